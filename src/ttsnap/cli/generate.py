"""`ttsnap generate`: from prompts and a budget to the best images, with a pruning board and a record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SEARCH, _MODEL, _OUTPUT = "Search", "Model", "Output"


def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to paint; several prompts give several images.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with prompts: .txt (one per line) or .json (a list of strings).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output directory (default: out/ and the prompt).", rich_help_panel=_OUTPUT)
    ] = None,
    model: Annotated[
        str, typer.Option(help="`shapes` (embedded), a hub id, or a diffusers directory.", rich_help_panel=_MODEL)
    ] = "shapes",
    reward: Annotated[
        str | None, typer.Option(help="Reward, or several separated by commas (rank sum).", rich_help_panel=_SEARCH)
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="best-of-n, halving, early-selection, or a policy FILE.json.", rich_help_panel=_SEARCH),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Candidates started per prompt.", rich_help_panel=_SEARCH)
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Or what a prompt may cost: 200NFE, 2000TFLOP, 50GFLOP or 30s.", rich_help_panel=_SEARCH),
    ] = None,
    rungs: Annotated[
        str | None, typer.Option(help="Steps at which to look, such as 3,7,12.", rich_help_panel=_SEARCH)
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Share that survives each look, such as .4,.4,.5.", rich_help_panel=_SEARCH)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoiser calls of a finished image.", rich_help_panel=_MODEL)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first candidate; the others count up.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Image size in pixels: 512 or 768x512 (width x height).", rich_help_panel=_MODEL)
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the model.", rich_help_panel=_MODEL)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", rich_help_panel=_MODEL)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.", rich_help_panel=_MODEL)] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(help="Most candidates in one batch (halved when memory runs out).", rich_help_panel=_MODEL),
    ] = None,
    top: Annotated[int, typer.Option(help="Save this many of the best finished images.", rich_help_panel=_OUTPUT)] = 1,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also run best-of-N at the same cost and show it.", rich_help_panel=_OUTPUT),
    ] = False,
    board: Annotated[bool, typer.Option(help="Draw the pruning board.", rich_help_panel=_OUTPUT)] = True,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Find the best image for a prompt under a compute budget.

    Try: ttsnap generate "a red circle left of a blue square"
    """
    from ttsnap.cli.generating import Request, execute

    execute(
        Request(
            prompts=_prompts(prompt or [], prompts),
            out=out,
            model=model,
            reward=reward,
            policy=_policy(policy, rungs, keep),
            candidates=candidates,
            budget=budget,
            seed=seed,
            top=top,
            compare=compare,
            board=board,
            options={
                "num_steps": steps,
                "guidance_scale": guidance,
                "max_batch": max_batch,
                **_size(size),
            },
            device=device,
            dtype=dtype,
        ),
        as_json=json,
    )


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts of the command line or of a file."""
    if file is None:
        prompts = given
    elif given:
        raise ValueError("give prompts on the command line or in a file, not both")
    else:
        prompts = _read_prompts(file)
    if not prompts:
        raise ValueError('give a prompt, such as: ttsnap generate "a red circle left of a blue square"')
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty; a prompt needs at least one word")
    return [" ".join(prompt.split()) for prompt in prompts]


def _read_prompts(file: Path) -> list[str]:
    """A text file with one prompt per line, or a JSON list of strings."""
    import json

    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read prompts from {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read prompts from {file}: it is not UTF-8 text") from error
    if file.suffix != ".json":
        return [line for line in text.splitlines() if line.strip()]
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        raise ValueError(f'{file} must hold a JSON list of strings, such as ["a red circle", "a blue square"]')
    return data


def _policy(name: str | None, rungs: str | None, keep: str | None) -> object:
    """The policy that the options describe: a name or file, or halving with these rungs and ratios."""
    if rungs is None and keep is None:
        return name
    if name not in (None, "halving"):
        raise ValueError(f"--rungs and --keep belong to the policy halving, not to {name}")
    if rungs is None:
        raise ValueError("--keep needs --rungs, such as --rungs 3,7,12 --keep .4,.4,.5")
    from ttsnap.policies import SuccessiveHalving

    steps = tuple(int(value) if value == int(value) else value for value in _numbers(rungs, "--rungs", "3,7,12"))
    ratios = _numbers(keep, "--keep", ".4,.4,.5") if keep is not None else None
    return SuccessiveHalving(steps, ratios)  # type: ignore[arg-type]  # it checks that rungs are whole


def _numbers(text: str, name: str, example: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} takes numbers separated by commas, such as {example}, got {text!r}") from None


def _size(text: str | None) -> dict[str, int]:
    """Height and width of `512` or `768x512`."""
    if text is None:
        return {}
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--size takes pixels such as 512 or 768x512 (width x height), got {text!r}")
    return {"width": int(parts[0]), "height": int(parts[-1])}

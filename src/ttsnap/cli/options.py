"""Options that several verbs share, from text to values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ttsnap.types import Policy

MAX_PROMPT = 10_000  # characters
MAX_FILE = 64 << 20  # bytes of a file with prompts
MAX_SEED = 2**62  # seeds of candidates count up from the first
MAX_STEPS = 1000
MAX_SIDE = 16_384  # pixels

RecordingPath = Annotated[Path, typer.Argument(help="A recording (see import-values and record).")]
Accounting = Annotated[
    str, typer.Option(help="calls: everything counts; published: as the TTSnap authors charge.", rich_help_panel="Cost")
]
CostModelName = Annotated[
    str | None,
    typer.Option(
        help="flux-512, flux-512-counted, flux-1024, sdxl-512, sdxl-1024 (default: as recorded).",
        rich_help_panel="Cost",
    ),
]
CallTflop = Annotated[float | None, typer.Option(help="Or: TFLOP of one call ...", rich_help_panel="Cost")]
LookTflop = Annotated[float | None, typer.Option(help="... and of one look, decode included.", rich_help_panel="Cost")]
Weights = Annotated[
    str | None,
    typer.Option(help="Weights of several rewards, such as 1,.5 (default: rank sum).", rich_help_panel="Policies"),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel="Output")
]
_MODEL = "Model"
Offload = Annotated[
    str | None,
    typer.Option(
        help="model: keep models that do not run in main memory; sequential: every layer; none.", rich_help_panel=_MODEL
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the denoiser (torch.compile).", rich_help_panel=_MODEL)
]
AttentionSlicing = Annotated[
    bool, typer.Option("--attention-slicing", help="Attention in slices (UNets).", rich_help_panel=_MODEL)
]
VaeSlicing = Annotated[
    bool, typer.Option("--vae-slicing", help="Decode image by image, for less memory.", rich_help_panel=_MODEL)
]
VaeTiling = Annotated[bool, typer.Option("--vae-tiling", help="Decode large images in tiles.", rich_help_panel=_MODEL)]
Config = Annotated[
    str | None,
    typer.Option(
        help="Directory or hub id of the pipeline a single .safetensors file belongs to.", rich_help_panel=_MODEL
    ),
]
CallArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--call",
        help="Any other argument of the pipeline's call, such as true_cfg_scale=4 or eta=.5 (may be repeated).",
        rich_help_panel=_MODEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Worker processes, one per GPU, with the same results as one (needs the extra `cluster`).",
        rich_help_panel="Many workers",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Of a Ray cluster, such as auto or ray://host:10001.", rich_help_panel="Many workers"),
]


def read_prompts(given: list[str], source: str | None, *, verb: str = "generate") -> list[str]:
    """Prompts of the command line, or of a file or built-in list."""
    if source is None:
        prompts = given
    elif given:
        raise ValueError("give prompts on the command line or in a file, not both")
    elif source.startswith("shapes:"):
        prompts = _shapes_prompts(source)
    else:
        prompts = _read_file(Path(source))
    if not prompts:
        raise ValueError(f'give a prompt, such as: ttsnap {verb} "a red circle left of a blue square"')
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty; a prompt needs at least one word")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"prompt {number} has {len(prompt)} characters; at most {MAX_PROMPT} are taken")
        if not prompt.isprintable() and any(ord(c) < 32 and not c.isspace() for c in prompt):
            raise ValueError(f"prompt {number} has a control character: {prompt[:40]!r}")
    return [" ".join(prompt.split()) for prompt in prompts]


def check_ranges(**options: tuple[int | None, int, int]) -> None:
    """Raise ValueError about the first option (value, least, most) that is given and out of range."""
    for name, (value, least, most) in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if value is not None and value > most:
            raise ValueError(f"--{name.replace('_', '-')} must be at most {most}, got {value}")


def _shapes_prompts(source: str) -> list[str]:
    """The lists of the embedded world: `shapes:train` and `shapes:held-out`."""
    from ttsnap.shapes.scenes import held_out_prompts, train_prompts

    lists = {"shapes:train": train_prompts, "shapes:held-out": held_out_prompts}
    if source not in lists:
        raise ValueError(f"unknown prompts {source!r}; known are {', '.join(lists)}, or a file")
    return lists[source]()


def _read_file(file: Path) -> list[str]:
    """A text file with one prompt per line, or a JSON list of strings."""
    import json

    try:
        if file.stat().st_size > MAX_FILE:
            raise ValueError(f"{file} is larger than {MAX_FILE >> 20} MiB; split the prompts")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read prompts from {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read prompts from {file}: it is not UTF-8 text") from error
    if file.suffix != ".json":
        return [line for line in text.splitlines() if line.strip()]
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        raise ValueError(f'{file} must hold a JSON list of strings, such as ["a red circle", "a blue square"]')
    return data


def read_numbers(text: str, name: str, example: str) -> tuple[float, ...]:
    """Numbers separated by commas; the option's name and an example serve the error message."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} takes numbers separated by commas, such as {example}, got {text!r}") from None


def read_weights(text: str | None) -> tuple[float, ...] | None:
    """Weights of several rewards, such as `1,.5`."""
    if text is None:
        return None
    weights = read_numbers(text, "--weights", "1,.5")
    if not any(weights) or not all(abs(weight) < float("inf") for weight in weights):
        raise ValueError(f"--weights takes finite numbers that are not all 0, got {text!r}")
    return weights


def read_size(text: str | None) -> dict[str, int]:
    """Height and width of `512` or `768x512`."""
    if text is None:
        return {}
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--size takes pixels such as 512 or 768x512 (width x height), got {text!r}")
    if max(map(int, parts)) > MAX_SIDE:
        raise ValueError(f"--size is at most {MAX_SIDE} pixels a side, got {text}")
    return {"width": int(parts[0]), "height": int(parts[-1])}


def given(**options: Any) -> dict[str, Any]:
    """Options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def read_call(arguments: list[str] | None) -> dict[str, Any]:
    """Arguments of the pipeline's call, such as `true_cfg_scale=4`; values are JSON, or else text."""
    import json

    found: dict[str, Any] = {}
    for argument in arguments or []:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--call takes an argument such as true_cfg_scale=4, got {argument!r}")
        number = f"0{value}" if value.startswith(".") else value
        try:
            found[name] = json.loads(number)
        except ValueError:
            found[name] = value
    return found


def read_range(text: str | None, count: int) -> range:
    """Part of `count` prompts: `0:400`, `:400` or `400:` (all if not given)."""
    if text is None:
        return range(count)
    first, colon, end = text.partition(":")
    if not colon or not all(part.isdigit() or not part for part in (first, end)):
        raise ValueError(f"--prompt-range takes first and end, such as 0:400, got {text!r}")
    chosen = range(int(first or 0), min(int(end or count), count))
    if not chosen:
        raise ValueError(f"--prompt-range {text} holds no prompt; there are {count}")
    return chosen


def read_calls(text: str | None) -> list[int] | None:
    """Denoiser calls such as `1,5,20`."""
    if text is None:
        return None
    numbers = read_numbers(text, "--calls", "1,5,20")
    if any(number != int(number) for number in numbers):
        raise ValueError(f"--calls takes whole numbers, such as 1,5,20, got {text!r}")
    return [int(number) for number in numbers]


def read_policy(name: str | None, rungs: str | None, keep: str | None) -> str | Policy | None:
    """The policy that the options describe: a name or file, or halving with these rungs and ratios."""
    if rungs is None and keep is None:
        return name
    if name not in (None, "halving"):
        raise ValueError(f"--rungs and --keep belong to the policy halving, not to {name}")
    if rungs is None:
        raise ValueError("--keep needs --rungs, such as --rungs 3,7,12 --keep .4,.4,.5")
    from ttsnap.policies import SuccessiveHalving

    steps = tuple(int(value) if value == int(value) else value for value in read_numbers(rungs, "--rungs", "3,7,12"))
    ratios = read_numbers(keep, "--keep", ".4,.4,.5") if keep is not None else None
    return SuccessiveHalving(steps, ratios)  # type: ignore[arg-type]  # it checks that rungs are whole

"""`ttsnap train`: from an image tree and its recording to a noise-aware reward."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_DATA, _HOW = "Data", "How it is trained"


def train(
    out: Annotated[Path, typer.Option(help="Directory of the run; the same command goes on with it.")],
    tree: Annotated[Path | None, typer.Argument(help="Image tree, as `ttsnap record` writes it.")] = None,
    labels: Annotated[
        Path | None,
        typer.Argument(metavar="RECORDING", help="Its recording, as `ttsnap label --final-only` writes it."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings; options given here win.")] = None,
    reward: Annotated[str | None, typer.Option(help="Clean reward to start from (shapes).")] = None,
    train_prompts: Annotated[
        int | None, typer.Option(help="Train on so many prompts at most.", rich_help_panel=_DATA)
    ] = None,
    per_prompt: Annotated[
        int | None, typer.Option(help="Train on so many candidates of each at most.", rich_help_panel=_DATA)
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(help="Prompts from the end of TREE to evaluate on (a tenth).", rich_help_panel=_DATA),
    ] = None,
    eval_tree: Annotated[
        Path | None, typer.Option(help="Evaluate on the images of this tree instead.", rich_help_panel=_DATA)
    ] = None,
    eval_labels: Annotated[Path | None, typer.Option(help="Its recording.", rich_help_panel=_DATA)] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            help="Denoiser calls whose x0 estimates to learn, such as 15:1 or 12,9,6 (three quarters of the way down "
            "to 1); always trained from clean to noisy.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    epochs_per_level: Annotated[
        int | None, typer.Option(help="How often each image is seen (1).", rich_help_panel=_HOW)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="lora, full, or auto: LoRA where the reward is large (auto).", rich_help_panel=_HOW),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images in one update, over all processes (64).", rich_help_panel=_HOW)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak (1e-4).", rich_help_panel=_HOW)] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, adapters and dropout (0).", rich_help_panel=_HOW)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting of the config, such as preference=1 or precision=bf16.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use an accelerator that is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Train a reward to foretell, from noisy x0 estimates, what the finished image will be worth (TTSnap).

    The run is then a reward: --reward OUT, or shapes+OUT. On several devices: accelerate launch -m ttsnap train ...

    Try: ttsnap train tree tree.zarr --reward shapes --out run
    """
    from ttsnap.cli.training import execute, read_levels

    given = {
        "tree": tree,
        "labels": labels,
        "reward": reward,
        "train_prompts": train_prompts,
        "per_prompt": per_prompt,
        "held_out": held_out,
        "eval_tree": eval_tree,
        "eval_labels": eval_labels,
        "levels": read_levels(levels),
        "epochs_per_level": epochs_per_level,
        "method": method,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    execute(given, set_ or [], config, out, cpu=cpu, as_json=json)

"""`ttsnap import-values`: published reward values into a recording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_values(
    folder: Annotated[
        Path, typer.Argument(help="Folder of value folders, such as flux_hps_val_base/p200_i200_s00.yaml.")
    ],
    out: Annotated[Path, typer.Argument(help="Recording to write (a zarr directory).")],
    model: Annotated[str | None, typer.Option(help="Which model, when there are several.")] = None,
    reward: Annotated[
        str | None, typer.Option(help="Which rewards, separated by commas, such as hps,imr (default: all).")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with the prompts, .txt or .json, in order.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recording if there is one.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Read published reward values ({model}_{reward}_val_{base|naft}) into one recording.

    Try: ttsnap import-values values/ flux.zarr --reward hps
    """
    import json as format_json

    from rich.console import Console
    from rich.progress import Progress

    from ttsnap.cli.options import read_prompts
    from ttsnap.recordings.published_values import import_values as read

    texts = None if prompts is None else read_prompts([], str(prompts))
    with Progress(console=Console(stderr=True), transient=True, disable=json) as bar:
        task = bar.add_task("reading", total=None)

        def show(path: Path, total: int) -> None:
            bar.update(task, total=total, advance=1, description=f"reading {path.parent.name}/{path.name}")

        recording = read(
            folder,
            out,
            model=model,
            rewards=reward.split(",") if reward else None,
            prompts=texts,
            overwrite=overwrite,
            on_file=show,
        )
    sizes = dict(zip(("prompts", "candidates", "steps", "rewards"), recording.shape, strict=True))
    if json:
        typer.echo(format_json.dumps({"recording": str(out)} | sizes | {"reward_names": list(recording.rewards)}))
    else:
        print(f"{out}: {sizes['prompts']} prompts x {sizes['candidates']} candidates x {sizes['steps']} steps", end="")
        print(f" ({', '.join(recording.rewards)}); next: ttsnap simulate {out}")

"""`ttsnap label`: from images and rewards, or from published labels, to a recording."""

from __future__ import annotations

from typing import Annotated

import typer

from ttsnap.cli.options import RayAddress, Workers

_TRUTH = "Published labels"


def label(
    source: Annotated[str, typer.Argument(metavar="TREE", help="Image tree, as `ttsnap record` writes it.")],
    out: Annotated[
        str, typer.Argument(help="Recording to write, local or s3://bucket/x; the same command goes on with it.")
    ],
    reward: Annotated[str | None, typer.Option(help="Reward, or several separated by commas.")] = None,
    final_only: Annotated[bool, typer.Option("--final-only", help="Judge finished images only.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an image that is missing or damaged.")] = False,
    prompts: Annotated[
        str | None, typer.Option(help="File with the prompts, for a tree without a manifest (.txt or .json).")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most images in one look.")] = 32,
    threads: Annotated[int | None, typer.Option(help="Threads that decode images (default: one per core).")] = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    ground_truth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Import labels of finished images (`p0000: {id000: value}`) instead of judging; "
            "TREE can then be a file with prompts.",
            rich_help_panel=_TRUTH,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Denoiser calls of a finished image, where no tree tells.", rich_help_panel=_TRUTH)
    ] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Judge the images of a tree into a recording, which simulate, tune and train read.

    A prompt with a missing or damaged image is reported and left out; record it again, and label takes it up.

    Try: ttsnap label tree tree.zarr --reward shapes
    """
    from ttsnap.cli.labelling import Request, import_labels, judge_tree
    from ttsnap.cli.scaling import Scale
    from ttsnap.storage import location

    if (reward is None) == (not ground_truth):
        raise ValueError("give --reward, such as --reward shapes, or --ground-truth FILE")
    if ground_truth:
        import_labels(location(source), location(out), ground_truth, prompts, steps, as_json=json)
    else:
        judge_tree(
            Request(
                location(source, absolute=True),
                location(out, absolute=True),
                reward or "",
                prompts,
                final_only,
                strict,
                max_batch,
                threads,
                device,
                Scale(workers, ray_address),
            ),
            as_json=json,
        )

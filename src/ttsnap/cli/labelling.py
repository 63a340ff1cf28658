"""What `ttsnap label` does once its options are understood."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from ttsnap import rewards
from ttsnap.cli.options import read_prompts
from ttsnap.cli.progress import ImageProgress

SHOWN = 10


def judge_tree(
    source: Path,
    out: Path,
    reward: str,
    *,
    prompts: str | None,
    final_only: bool,
    strict: bool,
    batch: int,
    workers: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Label what is not labelled yet, and report."""
    from ttsnap.recordings.image_tree import ImageTree

    for name, value in (("--max-batch", batch), ("--workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    names = rewards.names_of(reward)
    tree = ImageTree.open(source, read_prompts([], prompts) if prompts else None)
    from ttsnap.generation import find_device
    from ttsnap.recordings.labelling import label_tree

    where = find_device(device)
    with ImageProgress("labelling", quiet=as_json) as progress:
        try:
            labels = label_tree(
                tree,
                rewards.load(reward, where),
                out,
                final_only=final_only,
                strict=strict,
                batch=batch,
                workers=workers,
                device=where,
                on_start=progress.start,
                on_images=progress.advance,
            )
        except KeyboardInterrupt:
            print(f"stopped: the same command goes on from there ({out})", file=sys.stderr)
            raise typer.Exit(130) from None
    recorded = int(labels.recording.done.sum())
    for bad in labels.bad[:SHOWN]:
        print(f"warning: {bad}", file=sys.stderr)
    if labels.bad:
        more = f" ({len(labels.bad) - SHOWN} more like these)" if len(labels.bad) > SHOWN else ""
        print(
            f"warning: {len(labels.bad)} bad images{more}; {len(labels.left_out)} prompts are left out until these are "
            "recorded again",
            file=sys.stderr,
        )
    if not recorded:
        raise ValueError(f"no prompt of {source} has all its images, so that {out} is empty")
    if as_json:
        report = {
            "out": str(out),
            "rewards": names,
            "prompts": recorded,
            "candidates": tree.num_candidates,
            "bad_images": [{"path": str(bad.path), "fault": bad.fault} for bad in labels.bad],
            "prompts_left_out": labels.left_out,
            "prompts_not_recorded": labels.not_begun,
            **progress.report(),
        }
        typer.echo(json.dumps(report, indent=1))
        return
    rest = f"; nothing is recorded of {labels.not_begun} more prompts" if labels.not_begun else ""
    typer.echo(f"{out}: {recorded} prompts x {tree.num_candidates} candidates{rest}")
    typer.echo(progress.summary() if progress.images else "it was complete already; nothing was judged again.")


def import_labels(source: Path, out: Path, files: list[str], prompts: str | None, steps: int, *, as_json: bool) -> None:
    """Import published labels of finished images, and report."""
    from ttsnap.recordings.image_tree import ImageTree
    from ttsnap.recordings.labelling import ground_truth_name, import_ground_truth

    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    named: dict[str, str] = {}
    for file in files:
        name, equals, path = file.partition("=")
        name, path = (name, path) if equals else (ground_truth_name(file), file)
        if name in named:
            raise ValueError(f"--ground-truth gives {name!r} twice")
        named[name] = path
    if source.is_dir():
        tree = ImageTree.open(source, read_prompts([], prompts) if prompts else None)
        recording = import_ground_truth(named, tree.prompts, out, num_steps=tree.num_steps, seeds=tree.seeds)
    else:
        recording = import_ground_truth(named, read_prompts([], str(source)), out, num_steps=steps)
    prompt_count, candidates = int(recording.done.sum()), recording.shape[1]
    if as_json:
        report = {
            "out": str(out),
            "rewards": list(recording.rewards),
            "prompts": prompt_count,
            "candidates": candidates,
        }
        typer.echo(json.dumps(report, indent=1))
    else:
        typer.echo(f"{out}: {', '.join(recording.rewards)} of {prompt_count} prompts x {candidates} finished images")

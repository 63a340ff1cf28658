"""What `ttsnap label` does once its options are understood."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import typer

from ttsnap import rewards
from ttsnap.cli.options import read_prompts
from ttsnap.cli.scaling import PARTLY, SHOWN, Board, Scale, failures_file, report_failures, run
from ttsnap.storage import AnyPath


@dataclass(frozen=True)
class Request:
    """The options of judging a tree."""

    source: AnyPath
    out: AnyPath
    reward: str
    prompts: str | None
    final_only: bool
    strict: bool
    batch: int
    threads: int | None
    device: str | None
    scale: Scale

    def find_device(self) -> Any:
        """Where a worker's rewards run."""
        from ttsnap.loading import find_device

        return find_device(self.device)


def judge_tree(request: Request, *, as_json: bool) -> None:
    """Label what is not labelled yet, and report."""
    from ttsnap.cluster.label import Label
    from ttsnap.recordings.image_tree import ImageTree
    from ttsnap.recordings.recording import Recording

    for name, value in (("--max-batch", request.batch), ("--threads", request.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    names = rewards.names_of(request.reward)
    request.scale.check_device(request.device)
    tree = ImageTree.open(request.source, read_prompts([], request.prompts) if request.prompts else None)
    job = Label(
        tree,
        partial(rewards.load, request.reward),
        request.find_device,
        request.out,
        request.final_only,
        request.strict,
        request.batch,
        request.threads,
    )
    show = Board("labelling", "images", quiet=as_json, workers=not request.scale.alone)
    outcome = run(job, request.scale, request.out, show)
    bad = outcome.bad
    for path, fault in bad[:SHOWN]:
        print(f"warning: image {path} {fault}", file=sys.stderr)
    recorded = int(Recording(request.out).done.sum())
    if bad:
        more = f" ({len(bad) - SHOWN} more like these)" if len(bad) > SHOWN else ""
        print(
            f"warning: {len(bad)} bad images{more}; {len(outcome.failures)} prompts are left out until these are "
            "recorded again",
            file=sys.stderr,
        )
    if not recorded and bad:
        raise ValueError(f"no prompt of {request.source} has all its images, so that {request.out} is empty")
    failures = report_failures(outcome, failures_file(request.out, inside=False), lambda p: tree.prompts[p])
    if not recorded:
        raise ValueError(f"nothing is recorded in {request.source}, so that {request.out} is empty")
    if as_json:
        report = {
            "out": str(request.out),
            "rewards": names,
            "prompts": recorded,
            "candidates": tree.num_candidates,
            "bad_images": [{"path": path, "fault": fault} for path, fault in bad],
            "prompts_left_out": sorted(outcome.failures),
            "prompts_not_recorded": outcome.plan.report["prompts_not_recorded"],
            "failures": failures,
            **show.report(),
        }
        typer.echo(json.dumps(report, indent=1))
    else:
        missing = outcome.plan.report["prompts_not_recorded"]
        rest = f"; nothing is recorded of {missing} more prompts" if missing else ""
        typer.echo(f"{request.out}: {recorded} prompts x {tree.num_candidates} candidates{rest}")
        typer.echo(show.summary() if show.images else "it was complete already; nothing was judged again.")
    if failures:
        raise typer.Exit(PARTLY)


def import_labels(
    source: AnyPath, out: AnyPath, files: list[str], prompts: str | None, steps: int, *, as_json: bool
) -> None:
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

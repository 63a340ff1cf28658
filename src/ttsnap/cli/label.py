"""`ttsnap label`: from images and rewards, or from published labels, to a recording."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ttsnap.cli.options import LABELS, AsJson, DryRun, WorkerOptions, Workers, read_prompts, tell

if TYPE_CHECKING:
    from ttsnap.files.storage import AnyPath
    from ttsnap.live.forecast import Work

Published = Parameter(group=LABELS)


def label(
    tree: str,
    out: str,
    /,
    *,
    reward: str | None = None,
    final_only: bool = False,
    strict: bool = False,
    prompts: str | None = None,
    max_batch: int = 32,
    threads: int | None = None,
    device: str | None = None,
    reward_timeout: float | None = None,
    ground_truth: Annotated[tuple[str, ...], Published] = (),
    steps: Annotated[int, Published] = 20,
    workers: WorkerOptions = Workers(),
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Judge the images of a tree into a recording, which simulate, tune and train read.

    A prompt with a missing or damaged image is reported and left out; record it again, and label takes it up.

    Try: ttsnap label tree tree.zarr --reward shapes

    Args:
        tree: Image tree, as `ttsnap record` writes it.
        out: Recording to write, local or s3://bucket/x; the same command goes on with it.
        reward: Reward, or several separated by commas.
        final_only: Judge finished images only.
        strict: Stop at an image that is missing or damaged.
        prompts: File with the prompts, for a tree without a manifest (.txt or .json).
        max_batch: Most images in one look.
        threads: Threads that decode images (default: one per core).
        device: cpu, cuda, cuda:1, mps.
        reward_timeout: Seconds in which a reward has to answer about a batch (default: it may take for ever).
        ground_truth: [NAME=]FILE: import labels of finished images (`p0000: {id000: value}`) instead of judging; TREE
            can then be a file with prompts.
        steps: Denoiser calls of a finished image, where no tree tells.
    """
    import json as encoder

    from ttsnap.files.storage import location
    from ttsnap.pipelines.patience import check_timeout

    if (reward is None) == (not ground_truth):
        raise ValueError("give --reward, such as --reward shapes, or --ground-truth FILE")
    for name, value in (("--max-batch", max_batch), ("--threads", threads), ("--steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    texts = read_prompts([], prompts) if prompts else None
    if dry_run:
        if reward is None:
            raise ValueError("--dry-run is for --reward; importing labels computes nothing")
        tell(_planned(location(tree, absolute=True), reward, texts, final_only, max_batch, device), json)
        return
    if reward is None:
        report = _imported(location(tree), location(out), ground_truth, texts, steps)
        names = ", ".join(report["rewards"])
        lines = [f"{out}: {names} of {report['prompts']} prompts x {report['candidates']} finished images"]
    else:
        check_timeout(reward_timeout)
        choices = (final_only, strict, max_batch, threads)
        source, place = location(tree, absolute=True), location(out, absolute=True)
        report, lines = _judged(source, place, reward, texts, choices, device, reward_timeout, workers, json)
    print(encoder.dumps(report, indent=1) if json else "\n".join(lines))
    if report.get("failures"):
        from ttsnap.cli.workers import PARTLY

        raise SystemExit(PARTLY)


def _planned(
    source: AnyPath, reward: str, texts: list[str] | None, final_only: bool, max_batch: int, device: str | None
) -> Work:
    """What would be judged."""
    from ttsnap import rewards
    from ttsnap.live.forecast import judged
    from ttsnap.pipelines.loading import find_device
    from ttsnap.recordings.image_tree import ImageTree

    tree, place = ImageTree.open(source, texts), find_device(device)
    judges = rewards.load(reward, place)
    prompts = sum(tree.begun(p) for p in range(len(tree.prompts)))
    images = prompts * tree.num_candidates * (1 if final_only else len(tree.calls))
    what = f"{images} images of {prompts} prompts, judged by {', '.join(judges)}"
    return judged(what, judges, images, tree.size, place, images * 8 * len(judges), max_batch)


def _judged(
    source: AnyPath,
    out: AnyPath,
    reward: str,
    texts: list[str] | None,
    choices: tuple[bool, bool, int, int | None],
    device: str | None,
    timeout: float | None,
    workers: Workers,
    silent: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Label what is not labelled yet; the report, as an object and in lines."""
    from ttsnap import rewards
    from ttsnap.cli.progress import Board, say
    from ttsnap.cli.workers import SHOWN, failures_file, report_failures, run
    from ttsnap.cluster.label import Label
    from ttsnap.live.judging import try_own
    from ttsnap.live.settings import reward_contents
    from ttsnap.pipelines.loading import find_device
    from ttsnap.recordings.image_tree import ImageTree
    from ttsnap.recordings.recording import Recording

    names = rewards.names_of(reward)
    workers.check_device(device)
    tree = ImageTree.open(source, texts)
    try_own(reward, tree.prompts[0], tree.size[::-1], timeout)
    load = partial(rewards.load, reward, timeout=timeout)
    job = Label(tree, load, partial(find_device, device), out, *choices, reward_contents(reward))
    show = Board("labelling", "images", silent=silent, workers=not workers.alone)
    outcome = run(job, workers, out, show)
    bad = outcome.bad
    for path, fault in bad[:SHOWN]:
        say(f"warning: image {path} {fault}")
    recorded = int(Recording(out).done.sum())
    if bad:
        more = f" ({len(bad) - SHOWN} more like these)" if len(bad) > SHOWN else ""
        left = f"{len(outcome.failures)} prompts are left out until these are recorded again"
        say(f"warning: {len(bad)} bad images{more}; {left}")
    if not recorded and bad:
        raise ValueError(f"no prompt of {source} has all its images, so that {out} is empty")
    failures = report_failures(outcome, failures_file(out, inside=False), lambda p: tree.prompts[p])
    if not recorded:
        raise ValueError(f"nothing is recorded in {source}, so that {out} is empty")
    missing = outcome.plan.report["prompts_not_recorded"]
    report = {
        "out": str(out),
        "rewards": names,
        "prompts": recorded,
        "candidates": tree.num_candidates,
        "bad_images": [{"path": path, "fault": fault} for path, fault in bad],
        "prompts_left_out": sorted(outcome.failures),
        "prompts_not_recorded": missing,
        "failures": failures,
        **show.report(),
    }
    rest = f"; nothing is recorded of {missing} more prompts" if missing else ""
    done = show.summary() if show.images else "it was complete already; nothing was judged again."
    return report, [f"{out}: {recorded} prompts x {tree.num_candidates} candidates{rest}", done]


def _imported(
    source: AnyPath, out: AnyPath, files: tuple[str, ...], texts: list[str] | None, steps: int
) -> dict[str, Any]:
    """Import published labels of finished images."""
    from ttsnap.recordings.image_tree import ImageTree
    from ttsnap.recordings.labelling import ground_truth_name, import_ground_truth

    named: dict[str, str] = {}
    for file in files:
        name, equals, path = file.partition("=")
        name, path = (name, path) if equals else (ground_truth_name(file), file)
        if name in named:
            raise ValueError(f"--ground-truth gives {name!r} twice")
        named[name] = path
    if source.is_dir():
        tree = ImageTree.open(source, texts)
        recording = import_ground_truth(named, tree.prompts, out, num_steps=tree.num_steps, seeds=tree.seeds)
    else:
        recording = import_ground_truth(named, read_prompts([], str(source)), out, num_steps=steps)
    prompts, candidates = int(recording.done.sum()), recording.shape[1]
    return {"out": str(out), "rewards": list(recording.rewards), "prompts": prompts, "candidates": candidates}

"""What `ttsnap record` does once its options are understood."""

from __future__ import annotations

import errno
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ttsnap import rewards
from ttsnap.cli.progress import ImageProgress

if TYPE_CHECKING:
    from ttsnap.diversity.negtome import Negtome
    from ttsnap.samplers.base import PipelineSampler

SHOWN = 5  # notes of a kind


@dataclass(frozen=True)
class Request:
    """The options of one command; `part` are the indices of the prompts to record."""

    prompts: list[str]
    part: range
    per_prompt: int
    rewards: str | None
    calls: list[int] | None
    store_size: int | None
    image_format: str
    seed: int
    out: Path
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    max_batch: int | None = None
    device: str | None = None
    dtype: str | None = None
    diversity: Negtome | None = None
    preview: str | None = None

    def settings(self, sampler: PipelineSampler) -> dict[str, Any]:
        """Everything that decides the images."""
        found = {"num_steps": sampler.num_steps, **sampler.call_options()}
        del found["num_inference_steps"]
        dtype = str(sampler.pipe.dtype).removeprefix("torch.")
        if scheduler := self.options.get("scheduler"):
            found["scheduler"] = scheduler
        settings = {"model": self.model, "dtype": dtype, **found, "seed": self.seed}
        settings |= {"preview": self.preview} if sampler.preview else {}
        return settings | ({"diversity": self.diversity.to_dict()} if self.diversity else {})


def execute(request: Request, *, as_json: bool) -> None:
    """Record what is not there yet, and report."""
    from ttsnap.recordings.image_tree import FORMATS

    if request.per_prompt < 1:
        raise ValueError(f"--per-prompt must be at least 1, got {request.per_prompt}")
    if request.image_format not in FORMATS:
        raise ValueError(f"--format is {' or '.join(FORMATS)}, got {request.image_format!r}")
    if request.rewards is not None:
        rewards.names_of(request.rewards)
    with ImageProgress("recording", quiet=as_json) as progress:
        try:
            with notes_on_stderr():
                report = _record(request, progress)
        except KeyboardInterrupt:
            print(f"stopped: the same command goes on from there ({request.out})", file=sys.stderr)
            raise typer.Exit(130) from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno, "the disk is full; all that is stored is whole, and the same command goes on from it"
                ) from error
            raise
    report |= progress.report()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    elif not progress.images:
        typer.echo(f"{request.out} is complete already; nothing was run again.")
    else:
        typer.echo(
            f"{request.out}: {len(request.part)} prompts x {request.per_prompt} candidates; {progress.summary()}"
        )


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Warnings inside, each once and in the end, a line each; of many only the first few."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            notes = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
            for note in notes[:SHOWN]:
                print(f"warning: {note}", file=sys.stderr)
            if len(notes) > SHOWN:
                print(f"warning: {len(notes) - SHOWN} more like these", file=sys.stderr)


def _record(request: Request, progress: ImageProgress) -> dict[str, Any]:
    from ttsnap.cli.generating import quiet_libraries
    from ttsnap.generation import load_sampler
    from ttsnap.recordings.recorder import plan_tree, record_images, record_rewards, seeds_of
    from ttsnap.samplers import previews

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_libraries()
        sampler = load_sampler(
            request.model, request.device, request.dtype, max_batch=request.max_batch, **request.options
        )
    if request.diversity:
        from ttsnap.diversity.negtome import attach

        attach(sampler, request.diversity)
    previews.attach(sampler, request.preview)
    settings = request.settings(sampler)
    report = {
        "out": str(request.out),
        "prompts": len(request.part),
        "candidates": request.per_prompt,
        "steps": sampler.num_steps,
        "settings": settings,
    }
    if request.rewards is None:
        everybody = range(len(request.prompts))
        tree = plan_tree(
            sampler,
            request.out,
            request.prompts,
            seeds_of(everybody, request.per_prompt, request.seed),
            calls=request.calls,
            store_size=request.store_size,
            image_format=request.image_format,
            settings=settings,
        )
        progress.start(len(request.part) * request.per_prompt * len(tree.calls))
        record_images(sampler, tree, request.part, on_images=progress.advance, on_found=progress.skip)
        return report | {"calls": list(tree.calls), "image_size": list(tree.size)}
    if request.store_size is not None or request.image_format != "png":
        raise ValueError("with --reward no images are stored: leave out --store-size and --format")
    recording = record_rewards(
        sampler,
        rewards.load(request.rewards, sampler.device),
        [request.prompts[p] for p in request.part],
        seeds_of(request.part, request.per_prompt, request.seed),
        request.out,
        calls=request.calls,
        settings=settings | {"first prompt": request.part.start},
        on_start=progress.start,
        on_images=progress.advance,
    )
    return report | {"rewards": list(recording.rewards)}

"""What `ttsnap record` does once its options are understood."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ttsnap import rewards
from ttsnap.cli.progress import ImageProgress

if TYPE_CHECKING:
    from ttsnap.samplers.base import BaseSampler


@dataclass(frozen=True)
class Request:
    """The options of one command; `part` are the indices of the prompts to record."""

    prompts: list[str]
    part: range
    per_prompt: int
    rewards: str | None
    calls: list[int] | None
    seed: int
    out: Path
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    max_batch: int | None = None
    device: str | None = None
    dtype: str | None = None

    def settings(self, sampler: BaseSampler) -> dict[str, Any]:
        """Everything that decides the images."""
        options = ("num_steps", "height", "width", "guidance_scale", "negative_prompt", "true_cfg_scale")
        found = {name: getattr(sampler, name) for name in options if hasattr(sampler, name)}
        dtype = str(sampler.pipe.dtype).removeprefix("torch.")
        return {"model": self.model, "dtype": dtype, **found, "seed": self.seed}


def execute(request: Request, *, as_json: bool) -> None:
    """Record what is not there yet, and report."""
    from ttsnap.recordings.recorder import seeds_of

    if request.rewards is not None:
        rewards.names_of(request.rewards)
    seeds = seeds_of(request.part, request.per_prompt, request.seed)
    with ImageProgress(quiet=as_json) as progress:
        try:
            report = _record(request, seeds, progress)
        except KeyboardInterrupt:
            print(f"stopped: the same command goes on from there ({request.out})", file=sys.stderr)
            raise typer.Exit(130) from None
    report |= {"images": progress.images, "seconds": progress.seconds}
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    elif not progress.images:
        typer.echo(f"{request.out} is complete already; nothing was run again.")
    else:
        typer.echo(
            f"{request.out}: {len(request.part)} prompts x {request.per_prompt} candidates; "
            f"{progress.images} images in {progress.seconds:.1f} s, {progress.rate:.3g} per second"
        )


def _record(request: Request, seeds: Any, progress: ImageProgress) -> dict[str, Any]:
    from ttsnap.cli.generating import quiet_libraries
    from ttsnap.generation import load_sampler
    from ttsnap.recordings.recorder import record_rewards

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_libraries()
        sampler = load_sampler(
            request.model, request.device, request.dtype, max_batch=request.max_batch, **request.options
        )
    settings = request.settings(sampler)
    report = {"out": str(request.out), "prompts": len(request.part), "candidates": request.per_prompt}
    assert request.rewards is not None
    recording = record_rewards(
        sampler,
        rewards.load(request.rewards, sampler.device),
        [request.prompts[p] for p in request.part],
        seeds,
        request.out,
        calls=request.calls,
        settings=settings | {"first prompt": request.part.start},
        on_start=progress.start,
        on_images=progress.advance,
    )
    return report | {"rewards": list(recording.rewards), "steps": sampler.num_steps, "settings": settings}

"""What `ttsnap record` does once its options are understood."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from ttsnap import rewards
from ttsnap.cli.scaling import PARTLY, Board, Scale, failures_file, report_failures, run
from ttsnap.storage import AnyPath

if TYPE_CHECKING:
    from ttsnap.cluster.record import Record
    from ttsnap.diversity.negtome import Negtome
    from ttsnap.pipelines.sampler import Sampler


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
    out: AnyPath
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    max_batch: int | None = None
    device: str | None = None
    dtype: str | None = None
    diversity: Negtome | None = None
    preview: str | None = None
    scale: Scale = field(default_factory=Scale)
    loading: dict[str, Any] = field(default_factory=dict)

    def load_sampler(self) -> Sampler:
        """Load the model."""
        from ttsnap.cli.generating import quiet_libraries
        from ttsnap.live.session import load_sampler
        from ttsnap.pipelines import previews

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_libraries()
            options = self.options | ({"max_batch": self.max_batch} if self.max_batch else {})
            sampler = load_sampler(self.model, self.device, self.dtype, self.prompts[0], **self.loading, **options)
        if self.diversity:
            from ttsnap.diversity.negtome import attach

            attach(sampler, self.diversity)
        previews.attach(sampler, self.preview)
        return sampler

    def job(self) -> Record:
        """What the workers do."""
        from ttsnap.cluster.record import Record

        return Record(
            load_sampler=self.load_sampler,
            load_rewards=partial(rewards.load, self.rewards) if self.rewards else None,
            describe=self.settings,
            prompts=self.prompts,
            part=self.part,
            per_prompt=self.per_prompt,
            out=self.out,
            seed=self.seed,
            calls=self.calls,
            store_size=self.store_size,
            image_format=self.image_format,
        )

    def settings(self, sampler: Sampler) -> dict[str, Any]:
        """Everything that decides the images."""
        found = {"num_steps": sampler.num_steps, **sampler.call_options()}
        found.pop("num_inference_steps", None)
        dtype = str(sampler.pipe.dtype).removeprefix("torch.")
        if scheduler := self.options.get("scheduler"):
            found["scheduler"] = scheduler
        settings = {"model": self.model, "dtype": dtype, **found, "seed": self.seed}
        settings |= {"preview": self.preview} if sampler.preview else {}
        settings |= {"look_frames": list(sampler.look_frames)} if sampler.look_frames else {}
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
    request.scale.check_device(request.device)
    if request.rewards is not None and (request.store_size is not None or request.image_format != "png"):
        raise ValueError("with --reward no images are stored: leave out --store-size and --format")
    show = Board("recording", "images", quiet=as_json, workers=not request.scale.alone)
    outcome = run(request.job(), request.scale, request.out, show)
    place = failures_file(request.out, inside=request.rewards is None)
    part = request.part if request.rewards is not None else range(len(request.prompts))
    failures = report_failures(outcome, place, lambda p: request.prompts[part[p]])
    report = {
        "out": str(request.out),
        "prompts": len(request.part),
        "candidates": request.per_prompt,
        **outcome.plan.report,
        "failures": failures,
        **show.report(),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    elif not show.images and not failures:
        typer.echo(f"{request.out} is complete already; nothing was run again.")
    else:
        typer.echo(f"{request.out}: {len(request.part)} prompts x {request.per_prompt} candidates; {show.summary()}")
    if failures:
        raise typer.Exit(PARTLY)

"""`record` as a job: blocks are the groups of prompts that fill a batch, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttsnap.cluster.jobs import Block, Event, Plan, first_line
from ttsnap.files.storage import AnyPath

if TYPE_CHECKING:
    from ttsnap.pipelines.sampler import Sampler


@dataclass(frozen=True)
class Record:
    """Sample candidates and store images, or the rewards of what they show.

    Attributes:
        load_sampler: loads the model.
        load_rewards: loads rewards for a device; None: images are stored.
        describe: what decides the images, from the sampler; kept with the results.
        prompts: all prompts.
        part: indices of those to record.
        per_prompt: candidates of each.
        out: the tree or recording.
        seed: first seed.
        calls: after which calls to look (None: all).
        features: keep what the denoiser knows beside the rewards.
        store_size: shorter side of stored images, pixels (None: as they are).
        image_format: png or webp.
        threads: that write images (None: one per core).
    """

    load_sampler: Callable[[], Sampler]
    load_rewards: Callable[[Any], Mapping[str, Any]] | None
    describe: Callable[[Sampler], dict[str, Any]]
    prompts: Sequence[str]
    part: Sequence[int]
    per_prompt: int
    out: AnyPath
    seed: int = 0
    calls: Sequence[int] | None = None
    features: bool = False
    store_size: int | None = None
    image_format: str = "png"
    threads: int | None = None

    def load(self) -> _Images | _Rewards:
        """Load the model, and the rewards if there are any."""
        sampler = self.load_sampler()
        return _Rewards(self, sampler) if self.load_rewards else _Images(self, sampler)


class _Images:
    def __init__(self, job: Record, sampler: Sampler) -> None:
        self.job, self.sampler = job, sampler

    def plan(self) -> Plan:
        from ttsnap.recordings.recorder import groups, plan_tree, seeds_of

        job = self.job
        settings = job.describe(self.sampler)
        tree = plan_tree(
            self.sampler,
            job.out,
            job.prompts,
            seeds_of(range(len(job.prompts)), job.per_prompt, job.seed),
            calls=job.calls,
            store_size=job.store_size,
            image_format=job.image_format,
            settings=settings,
        )
        tree.save()
        batch = self.sampler.max_batch
        blocks = [tuple(job.part[row] for row in rows) for rows, _ in groups(len(job.part), job.per_prompt, batch)]
        report = {"steps": tree.num_steps, "settings": settings}
        report |= {"calls": list(tree.calls), "image_size": list(tree.size)}
        images = len(job.part) * job.per_prompt * len(tree.calls)
        return Plan(blocks, images, len(job.part), {"tree": tree, "batch": batch}, report)

    def run(self, block: Block, shared: Mapping[str, Any]) -> Iterator[Event]:
        from ttsnap.recordings.recorder import make_images

        self.sampler.max_batch = shared["batch"]  # halved, it would make other groups of the prompts to come
        for made, found in make_images(self.sampler, shared["tree"], block, self.job.threads):
            yield Event(made, found)
        yield Event(prompts=block)


class _Rewards:
    def __init__(self, job: Record, sampler: Sampler) -> None:
        from ttsnap.recordings.recorder import looks, seeds_of

        assert job.load_rewards
        self.job, self.sampler, self.rewards = job, sampler, job.load_rewards(sampler.device)
        self.seeds = seeds_of(job.part, job.per_prompt, job.seed)
        self.calls = looks(job.calls, job.features, sampler.num_steps)
        self.recording: Any = None

    def plan(self) -> Plan:
        from ttsnap.recordings.recorder import begin_rewards, groups

        job, batch = self.job, self.sampler.max_batch
        settings = job.describe(self.sampler)
        recording = begin_rewards(
            self.sampler,
            self.rewards,
            [job.prompts[p] for p in job.part],
            self.seeds,
            job.out,
            calls=job.calls,
            features=job.features,
            settings=settings | {"first prompt": job.part[0]},
        )
        done = recording.done
        blocks = [tuple(rows) for rows, _ in groups(len(job.part), job.per_prompt, batch) if not done[list(rows)].all()]
        count = sum(map(len, blocks))
        shared = {"batch": batch, "done": done}
        report = {"steps": self.sampler.num_steps, "settings": settings, "rewards": list(recording.rewards)}
        return Plan(blocks, count * job.per_prompt * len(self.calls), count, shared, report)

    def run(self, block: Block, shared: Mapping[str, Any]) -> Iterator[Event]:
        from ttsnap.recordings.recorder import judge_group
        from ttsnap.recordings.recording import Recording

        self.sampler.max_batch = shared["batch"]
        self.recording = self.recording or Recording(self.job.out)
        failures: dict[int, Exception] = {}
        for images, failures in judge_group(  # noqa: B007 - the last is what counts
            self.sampler, self.rewards, self.recording, block, self.seeds, self.calls, shared["done"]
        ):
            yield Event(images)
        stored = tuple(p for p in block if p not in failures)
        yield Event(prompts=stored, failures={p: first_line(error) for p, error in failures.items()})

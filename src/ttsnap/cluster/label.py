"""`label` as a job: blocks of several groups of prompts, so that images are read ahead within a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ttsnap.cluster.jobs import Block, Event, Plan, StopRunError, first_line
from ttsnap.files.storage import AnyPath
from ttsnap.recordings.image_tree import ImageTree

GROUPS = 8  # in a block


@dataclass(frozen=True)
class Label:
    """Judge the images of a tree.

    Attributes:
        tree: the images.
        load_rewards: loads the rewards for a device.
        find_device: the device that a worker uses.
        out: the recording.
        final_only: judge finished images only.
        strict: stop at the first bad image.
        batch: most images in one look.
        threads: that read images (None: one per core).
        contents: fingerprints of the rewards' weights and code.
    """

    tree: ImageTree
    load_rewards: Callable[[Any], Mapping[str, Any]]
    find_device: Callable[[], Any]
    out: AnyPath
    final_only: bool = False
    strict: bool = False
    batch: int = 32
    threads: int | None = None
    contents: Mapping[str, str] | None = None

    def load(self) -> _Labels:
        """Load the rewards."""
        device = self.find_device()
        return _Labels(self, self.load_rewards(device), device)


class _Labels:
    def __init__(self, job: Label, rewards: Mapping[str, Any], device: Any) -> None:
        self.job, self.rewards, self.device = job, rewards, device
        self.calls = (job.tree.num_steps,) if job.final_only else job.tree.calls
        self.recording: Any = None

    def _groups(self) -> list[Block]:
        from ttsnap.recordings.recorder import groups

        tree = self.job.tree
        return [tuple(rows) for rows, _ in groups(len(tree.prompts), tree.num_candidates, self.job.batch)]

    def plan(self) -> Plan:
        from ttsnap.recordings.labelling import begin_labels

        job, tree = self.job, self.job.tree
        options = {"final_only": job.final_only, "device": self.device, "contents": job.contents}
        recording = begin_labels(tree, self.rewards, job.out, **options)
        done = recording.done
        begun = [tree.begun(p) for p in range(len(tree.prompts))]
        groups = [tuple(p for p in rows if begun[p]) for rows in self._groups()]
        groups = [rows for rows in groups if not done[list(rows)].all()]
        blocks = [
            tuple(p for rows in groups[start : start + GROUPS] for p in rows) for start in range(0, len(groups), GROUPS)
        ]
        count = sum(map(len, blocks))
        return Plan(
            blocks,
            count * tree.num_candidates * len(self.calls),
            count,
            {"done": done},
            {"rewards": list(recording.rewards), "prompts_not_recorded": begun.count(False)},
        )

    def run(self, block: Block, shared: Mapping[str, Any]) -> Iterator[Event]:
        from ttsnap.recordings.labelling import judge_blocks
        from ttsnap.recordings.recording import Recording

        job = self.job
        self.recording = self.recording or Recording(job.out)
        mine = set(block)
        rows = [[p for p in group if p in mine] for group in self._groups()]
        for part in judge_blocks(
            job.tree,
            self.rewards,
            self.recording,
            [group for group in rows if group],
            self.calls,
            batch=job.batch,
            threads=job.threads,
            device=self.device,
            done=shared["done"],
        ):
            if part.bad and job.strict:
                raise StopRunError(str(part.bad[0]))
            failures = {p: first_line(error) for p, error in part.failures.items()}
            bad = tuple((str(error.path), error.fault) for error in part.bad)
            yield Event(part.images, prompts=tuple(part.stored), failures=failures, bad=bad)

"""`generate` for many prompts as a job: blocks of prompts that share batches, each prompt in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttsnap.cluster.jobs import Block, Event, Plan, first_line
from ttsnap.files.storage import AnyPath, Remote, write_json

if TYPE_CHECKING:
    from ttsnap.live.result import SearchResult
    from ttsnap.live.session import Session

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Generate:
    """Search for the best image of each prompt.

    Attributes:
        prepare: loads everything a search needs.
        prompts: the prompts.
        out: the folder in which each prompt gets its own, `p0000` and so on.
        settings: what decides the results; kept with them.
        candidates: per prompt, if a run that is gone on with has fixed them.
        seed: first seed.
        top: images kept per prompt.
        compare: also run best-of-N at the same cost, or with which numbers of steps.
        board: draw the pruning board.
        metadata: let the pictures say how they were made.
        place: of the first prompt among all that there were when a picture that is made again was made.
    """

    prepare: Callable[[], Session]
    prompts: Sequence[str]
    out: AnyPath
    settings: Mapping[str, Any]
    candidates: int | None = None
    seed: int = 0
    top: int = 1
    compare: bool | Sequence[int] = False
    board: bool = True
    metadata: bool = True
    place: int = 0

    def folder(self, prompt: int) -> AnyPath:
        """Where the results of a prompt lie."""
        return self.out / f"p{prompt:04d}"

    def load(self) -> _Search:
        """Load model and rewards."""
        return _Search(self, self.prepare())

    def settle(self, session: Session) -> None:
        """Fix the number of candidates: a budget in seconds is turned into it once, so that all do the same."""
        session.candidates = self.candidates or session.candidates
        if self.candidates is None:
            self._keep_settings(session)

    def save(self, result: SearchResult, folder: AnyPath, session: Session) -> None:
        """Store a result; where the output has vanished meanwhile, it is begun anew, with its settings."""
        if not isinstance(self.out, Remote) and not (self.out / SETTINGS).exists():
            self.out.mkdir(parents=True, exist_ok=True)
            self._keep_settings(session)
        result.save(folder, board=self.board, metadata=self.metadata)

    def _keep_settings(self, session: Session) -> None:
        write_json({"settings": dict(self.settings), "candidates": session.candidates}, self.out / SETTINGS)


class _Search:
    def __init__(self, job: Generate, searcher: Session) -> None:
        self.job, self.searcher = job, searcher

    def plan(self) -> Plan:
        job, searcher = self.job, self.searcher
        job.settle(searcher)
        size = searcher.block_size()
        everything = range(len(job.prompts))
        with ThreadPoolExecutor(16) as pool:
            done = list(pool.map(lambda p: read_record(job.folder(p)) is not None, everything))
        blocks = [tuple(everything[start : start + size]) for start in range(0, len(everything), size)]
        blocks = [block for block in blocks if not all(done[p] for p in block)]
        shared = {"candidates": searcher.candidates, "batch": searcher.sampler.max_batch}
        report = {"candidates": searcher.candidates, "rewards": list(searcher.judges)}
        return Plan(blocks, 0, done.count(False), shared, report)

    def run(self, block: Block, shared: Mapping[str, Any]) -> Iterator[Event]:
        """The whole block runs, even if some of it is stored: alone, the rest would have other company."""
        job, searcher = self.job, self.searcher
        searcher.candidates, searcher.sampler.max_batch = shared["candidates"], shared["batch"]
        done = {p for p in block if read_record(job.folder(p)) is not None}
        if len(done) == len(block):
            yield Event(prompts=block)
            return
        results = searcher.stream(
            [job.prompts[p] for p in block],
            seed=job.seed,
            top=job.top,
            compare=job.compare,
            previews=job.board,
            places=block,
        )
        for row, result in results:
            p = block[row]
            if isinstance(result, Exception):
                yield Event(failures={p: first_line(result)})
            elif p not in done:
                job.save(result, job.folder(p), searcher)
                yield Event(result.finished, prompts=(p,), notes=tuple(result.notes), rewards=(float(result.reward),))


def read_record(folder: AnyPath) -> dict[str, Any] | None:
    """The record of a prompt that is complete, else None."""
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) and "files" in record else None

"""Many prompts on one sampler: as their cohorts shrink, candidates of the next prompts fill the batches.

Each prompt has its own search, which asks and waits. What all of them ask for lies in groups by the step the candidates
stand at; a batch is drawn from one group, since most models take one noise level per call. A prompt ends as soon as its
own search does, and one that fails takes nobody with it.

Which candidates share a batch depends on the prompts and their rewards alone, never on time. So a queue of the same
prompts comes to the same result, to the last bit, wherever and whenever it runs.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.environments.faults import apart, judge_in_halves
from ttsnap.environments.live import LiveEnvironment
from ttsnap.observers import Observer
from ttsnap.search import Result, drive
from ttsnap.types import Combine, FloatArray, IntArray, Policy, Query, Rung

if TYPE_CHECKING:
    from ttsnap.samplers.base import PipelineSampler
    from ttsnap.samplers.views import View

MOST_PROMPTS = 64  # in one block
FULL = 0.95  # how full the batches of a block are meant to be


def prompts_per_block(plan: Sequence[Rung], batch: int) -> int:
    """Prompts that run together: the fewest whose cohorts fill their batches to FULL, at most MOST_PROMPTS.

    The last batch of each rung is not full; the more prompts share it, the less that matters. A block is also what
    runs again when it is interrupted, so it is not larger than it must be.

    Args:
        plan: the schedule of one prompt.
        batch: most candidates in one call.
    """
    before = (0, *(rung.step for rung in plan))
    segments = [(rung.step - start, rung.size) for start, rung in zip(before, plan, strict=False)]

    def fullness(prompts: int) -> float:
        room = sum(calls * -(-size * prompts // batch) * batch for calls, size in segments)
        return sum(calls * size * prompts for calls, size in segments) / room

    best = max(range(1, MOST_PROMPTS + 1), key=lambda prompts: (min(fullness(prompts), FULL), -prompts))
    return best


@dataclass
class Occupancy:
    """How full the batches of denoiser calls were: candidates in them, and places there were."""

    taken: int = 0
    places: int = 0

    @property
    def mean(self) -> float:
        """Share of the places that were taken."""
        return self.taken / max(1, self.places)


@dataclass
class Ended:
    """A search that came to its end, or failed.

    Attributes:
        prompt: index of the prompt.
        environment: its candidates, a grid of one row.
        result: what `run` returns; None where the search failed.
        error: why it failed.
        seconds: its share, by candidates, of the time of the batches it was in.
        notes: warnings it met.
    """

    prompt: int
    environment: LiveEnvironment
    result: Result | None = None
    error: Exception | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass
class _Open(Ended):
    """A search under way: what it waits for."""

    search: Generator[Query, FloatArray, Result] | None = None
    query: Query | None = None
    answer: FloatArray | None = None
    missing: int = 0


_Place = tuple[int, int]  # prompt, candidate


@dataclass
class Queue:
    """Searches of many prompts over one sampler.

    Attributes:
        sampler: drives the model.
        rewards: name -> reward.
        prompts: the prompts [P].
        seeds: seeds [P, candidates].
        policy: what each prompt's search asks.
        combine: several rewards -> one number.
        seed: of the policy's own randomness, the same for each prompt.
        previews: keep a small picture of every x0 estimate that was looked at.
        most_open: most prompts under way at a time, which bounds the memory for latents.
        observers: answers with who is told of the search of the prompt of that index: asked, looked and ended.
        occupancy: how full the batches were.
    """

    sampler: PipelineSampler
    rewards: Mapping[str, Any]
    prompts: Sequence[str]
    seeds: IntArray
    policy: Policy
    combine: Combine | None = None
    seed: int = 0
    previews: bool = False
    most_open: int = MOST_PROMPTS
    observers: Callable[[int], Observer] | None = None
    occupancy: Occupancy = field(default_factory=Occupancy)
    _open: dict[int, _Open] = field(default_factory=dict, repr=False)
    _groups: dict[int, list[_Place]] = field(default_factory=dict, repr=False)
    _ended: deque[Ended] = field(default_factory=deque, repr=False)

    def __iter__(self) -> Iterator[Ended]:
        """Every prompt once, as soon as its search ends or fails."""
        waiting = deque(range(len(self.prompts)))
        while waiting or self._open or self._ended:
            while self._ended:
                yield self._ended.popleft()
            step = self._fullest()
            room = waiting and len(self._open) < self.most_open
            if room and (step is None or len(self._groups[step]) < self.sampler.max_batch):
                self._begin(waiting.popleft())
            elif step is not None:
                self._batch(step)

    def _fullest(self) -> int | None:
        """The step whose candidates fill a batch best; of several, the latest, so that prompts end."""
        limit = self.sampler.max_batch
        return max(self._groups, key=lambda step: (min(len(self._groups[step]), limit), step), default=None)

    def _begin(self, p: int) -> None:
        environment = LiveEnvironment(
            self.sampler, self.rewards, [self.prompts[p]], np.asarray(self.seeds)[p : p + 1], self.previews
        )
        observer = self.observers(p) if self.observers else None
        search = drive(self.policy, environment, self.combine, np.random.default_rng(self.seed), observer=observer)
        one = self._open[p] = _Open(p, environment, search=search)
        with _noted([one]):
            try:
                self.sampler.text(self.prompts[p])
                self._ask(one, next(search))
            except StopIteration as end:  # stopped before it began
                self._end(one, result=end.value)
            except Exception as error:
                self._end(one, error=error)

    def _ask(self, one: _Open, query: Query) -> None:
        """Queue what a search asks for; an empty question is answered at once."""
        while not query.mask.any():
            assert one.search is not None
            try:
                query = one.search.send(np.full((*query.mask.shape, len(self.rewards)), np.nan))
            except StopIteration as end:
                self._end(one, result=end.value)
                return
        one.query, one.missing = query, int(query.mask.sum())
        one.answer = np.full((*query.mask.shape, len(self.rewards)), np.nan)
        for c in np.flatnonzero(query.mask[0]):
            self._put(one, int(c))

    def _put(self, one: _Open, c: int) -> None:
        self._groups.setdefault(one.environment.step_of(0, c), []).append((one.prompt, c))

    def _batch(self, step: int) -> None:
        """Bring as many candidates as fit from `step` to where the first of them is wanted; judge those who are."""
        from ttsnap.samplers.base import Trajectories
        from ttsnap.samplers.views import View

        group = sorted(self._groups.pop(step))
        limit = self.sampler.max_batch
        places, rest = group[:limit], group[limit:]
        if rest:
            self._groups[step] = rest
        concerned = [self._open[p] for p in dict.fromkeys(p for p, _ in places)]
        to = min(one.query.step for one in concerned if one.query)
        start = time.perf_counter()
        with _noted(concerned):
            if step == 0:
                for one in concerned:
                    self.sampler.group(one.environment.prompts, one.environment.seeds[:, 0].tolist())
                made = self.sampler.start(
                    [self.prompts[p] for p, _ in places],
                    [int(self._open[p].environment.seeds[0, c]) for p, c in places],
                )
            else:
                made = Trajectories.concat([self._open[p].environment.state(0, c) for p, c in places])
            extra = diversity.extra_calls if (diversity := self.sampler.diversity) else 0
            made = self.sampler.advance(made, to)
            if diversity and diversity.extra_calls > extra:
                warnings.warn("denoiser calls of references are not in the cost (negtome)", stacklevel=2)
            self.occupancy.taken += (to - step) * len(places)
            self.occupancy.places += (to - step) * limit
            for row, (p, c) in enumerate(places):
                self._open[p].environment.keep(0, c, made, row)
            arrived = [row for row, (p, _) in enumerate(places) if self._wants(p) == to]
            if arrived:
                self._judge([places[row] for row in arrived], View(self.sampler, made.select(arrived)), to)
        seconds = time.perf_counter() - start
        share = {p: sum(q == p for q, _ in places) / len(places) for p in dict.fromkeys(p for p, _ in places)}
        for one in concerned:
            one.seconds += seconds * share[one.prompt]
        for p, c in places:
            if p in self._open and self._wants(p) > to:
                self._put(self._open[p], c)
        for one in concerned:
            if one.prompt in self._open and not one.missing:
                self._answer(one)

    def _wants(self, p: int) -> int:
        query = self._open[p].query
        assert query is not None
        return query.step

    def _judge(self, places: list[_Place], view: View, step: int) -> None:
        """Decode and judge; a reward that fails on the batch is asked about each prompt alone, and fails only that."""
        last = step == self.sampler.num_steps
        rows = {p: [row for row, (q, _) in enumerate(places) if q == p] for p in dict.fromkeys(p for p, _ in places)}
        texts = [self.prompts[p] for p, _ in places]
        values = np.full((len(places), len(self.rewards)), np.nan)

        def look(chosen: Sequence[int]) -> None:
            seen, prompts = view[chosen], [texts[row] for row in chosen]
            for column, (name, reward) in enumerate(self.rewards.items()):
                values[list(chosen), column] = judge_in_halves(name, reward, seen, prompts, view.sigma)

        errors = apart(look, list(rows.values()))
        for (p, mine), error in zip(rows.items(), errors, strict=True):
            one = self._open[p]
            if error is not None:
                self._end(one, error=error)
                continue
            assert one.answer is not None
            cs = [places[row][1] for row in mine]
            one.answer[0, cs] = values[mine]
            one.missing -= len(cs)
            one.environment.keep_pictures([(0, c) for c in cs], step, view[mine], last)

    def _answer(self, one: _Open) -> None:
        """Tell a search what it asked for, and queue what it asks next."""
        assert one.search is not None
        assert one.answer is not None
        try:
            query = one.search.send(one.answer)
        except StopIteration as end:
            self._end(one, result=end.value)
        except Exception as error:
            self._end(one, error=error)
        else:
            self._ask(one, query)

    def _end(self, one: _Open, result: Result | None = None, error: Exception | None = None) -> None:
        del self._open[one.prompt]
        for step in list(self._groups):
            self._groups[step] = [place for place in self._groups[step] if place[0] != one.prompt]
            if not self._groups[step]:
                del self._groups[step]
        self._ended.append(Ended(one.prompt, one.environment, result, error, one.seconds, one.notes))


class _noted:
    """Warnings inside become notes of the searches concerned, each once."""

    def __init__(self, concerned: Sequence[Ended]) -> None:
        self._concerned, self._catch = concerned, warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")

    def __exit__(self, *error: Any) -> None:
        self._catch.__exit__(*error)
        notes = [str(w.message) for w in self._caught or () if issubclass(w.category, UserWarning)]
        for one, note in itertools.product(self._concerned, dict.fromkeys(notes)):
            if note not in one.notes:
                one.notes.append(note)

"""The one loop that answers policies by running the real pipeline: for one prompt or many.

Every search under way asks and waits. Its candidates are suspended calls; what these ask for runs in batches that all
searches share, and as cohorts shrink, candidates of the next prompts fill the places. A search ends as soon as its own
policy does, and a search that fails fails alone.

Which candidates share a batch depends on the prompts and their rewards alone, never on time. So the same prompts come
to the same result, to the last bit, wherever and whenever they run.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.driver import drive
from ttsnap.core.grid import BoolArray, Combine, FloatArray, Fork, IntArray, Policy, Problem, Query, Rung, calls_of
from ttsnap.core.observers import SILENT, Interrupted, Observer, Result, Stop
from ttsnap.core.ranking import RankSum
from ttsnap.live.judging import apart, judge_in_parts
from ttsnap.live.sets import Different, thumbnail

if TYPE_CHECKING:
    from ttsnap.pipelines.call import Call
    from ttsnap.pipelines.forks import Turn
    from ttsnap.pipelines.sampler import Sampler
    from ttsnap.pipelines.standing import Standing
    from ttsnap.pipelines.views import View

MOST_OPEN = 64  # prompts under way at a time, which bounds the memory for latents
FULL = 0.95  # how full the batches of a block are meant to be

Place = tuple[int, int]  # prompt, candidate


@dataclass
class Clock:
    """Seconds spent in denoiser calls, decodes, previews and looks; it waits for the GPU, for benchmarks."""

    calls: float = 0.0
    decodes: float = 0.0
    previews: float = 0.0
    looks: float = 0.0

    @contextmanager
    def measure(self, what: str, device: Any) -> Iterator[None]:
        """Add the time of a block to `what`."""
        wait(device)
        start = time.perf_counter()
        yield
        wait(device)
        setattr(self, what, getattr(self, what) + time.perf_counter() - start)


def wait(device: Any) -> None:
    """Until the accelerator has done all that it was given."""
    if getattr(device, "type", "cpu") == "cuda":
        import torch

        torch.cuda.synchronize(device)


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
class Engine:
    """A model and rewards at work.

    Attributes:
        sampler: drives the pipeline.
        rewards: name -> reward; policies see them combined.
        clock: measures where the time goes, for benchmarks; it makes the accelerator wait.
        park: keep candidates that a query leaves out in main memory (default: where the device has its own).
        occupancy: how full the batches were.
    """

    sampler: Sampler
    rewards: Mapping[str, Any]
    clock: Clock | None = None
    park: bool | None = None
    occupancy: Occupancy = field(default_factory=Occupancy)

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("a search needs at least one reward")
        self.listen()

    def listen(self) -> None:
        """Have the sampler keep the features that the rewards read; another search may have used it meanwhile."""
        from ttsnap.pipelines.features import attach

        attach(self.sampler, self.rewards)

    def grid(self, prompts: Sequence[str], seeds: IntArray, **options: Any) -> Grid:
        """Prompts and their candidates, not yet begun; options are those of `Grid`."""
        return Grid(self, prompts, seeds, **options)

    def stream(
        self,
        prompts: Sequence[str],
        seeds: IntArray,
        policy: Policy,
        combine: Combine | None = None,
        *,
        seed: int = 0,
        places: Sequence[int] | None = None,
        previews: bool = False,
        observers: Callable[[int], Observer] | None = None,
        different: bool = False,
    ) -> Iterator[Searching]:
        """Search for each prompt on its own, in batches that all share.

        Args:
            prompts: the prompts [P].
            seeds: seeds [P, candidates].
            policy: what each prompt's search asks.
            combine: several rewards -> one number.
            seed: of the policy's own randomness: each prompt has a generator of its own, `default_rng([seed, place])`,
            places: with the place of the prompt among all that there are [P] (default: among these), so that it is the
                same in any company.
            previews: keep a small picture of every x0 estimate that was looked at.
            observers: answers with who is told of the search of the prompt of that index.
            different: let the set that survives a rung differ, see `ttsnap.live.sets`.

        Yields:
            Every search once, as soon as it ends or fails.
        """

        def searches() -> Iterator[Searching]:
            for number, prompt in enumerate(prompts):
                observer = observers(number) if observers else SILENT
                row = np.asarray(seeds)[number : number + 1]
                grid = self.grid([prompt], row, previews=previews, observer=observer)
                rng = np.random.default_rng([seed, places[number] if places is not None else number])
                merged = grid.differing(combine or RankSum()) if different else combine
                yield Searching(number, grid, drive(policy, grid, merged, rng, observer=observer))

        yield from self.run(searches())

    def run(self, searches: Iterable[Searching]) -> Iterator[Searching]:
        """The loop: every search once, when it has ended."""
        return (search for search in self.turns(searches) if search is not None)

    def turns(self, searches: Iterable[Searching | None]) -> Generator[Searching | None, None, None]:
        """The loop, turn by turn, for a server, which does other things between two turns.

        Args:
            searches: to begin; None among them: there is nothing to begin at the moment.

        Yields:
            Every search once, when it has ended, and None after a turn in which none has.
        """
        import torch

        waiting, under_way = iter(searches), dict[int, Searching]()
        exhausted = False
        while True:
            calls = [call for search in under_way.values() for call in search.calls]
            cohort = max(Counter(call.step for call in calls).values(), default=0)
            new: Searching | None = None
            if not exhausted and len(under_way) < MOST_OPEN and cohort < self.sampler.max_batch:
                try:
                    new = next(waiting)
                except StopIteration:
                    exhausted = True
                    continue
            if new is not None:
                under_way[new.number] = new
                with _noted([new]):
                    self._ask(new, None)
            elif under_way:
                with torch.no_grad():
                    self._turn(list(under_way.values()), calls)
            elif exhausted:
                return
            del calls, new  # nothing that is over is kept while the loop rests
            ended = [number for number, search in under_way.items() if search.ended]
            for number in ended:
                yield under_way.pop(number)
            if not ended:
                yield None

    # One turn.

    def _turn(self, searches: Sequence[Searching], calls: Sequence[Call]) -> None:
        """Run one batch; look at those who have come to where they are wanted."""
        self.listen()
        before = {search.number: search.steps() for search in searches}
        start = time.perf_counter()
        with _noted(searches):
            try:
                with self._timed("calls"):
                    parts = self.sampler.turn(calls)
            except MemoryError as error:
                for search in searches:
                    search.end(error=error)
                return
            self._count(searches, [call for part in parts for call in part], before, start)
            for search in searches:
                self._fail(search)
            for part in (*parts, ()) if len(parts) > 1 else [()]:  # each is looked at as if it had run alone
                self._look([search for search in searches if not search.ended], part)
        for search in searches:
            if not search.ended and search.stopped:
                self._interrupt(search)
            elif not search.ended and not search.missing:
                self._ask(search, search.answer)

    def _count(self, searches: Sequence[Searching], group: Sequence[Any], before: dict[int, int], start: float) -> None:
        """Tell observers of the calls made, and share the seconds out by candidates."""
        seconds, mine = time.perf_counter() - start, {id(call) for call in group}
        made = 0
        for search in searches:
            share = sum(id(call) in mine for call in search.calls) / max(1, len(group))
            search.seconds += seconds * share
            search.made = search.steps() - before[search.number]
            made += search.made
        if made:
            self.occupancy.taken += made
            self.occupancy.places += self.sampler.max_batch * -(-made // self.sampler.max_batch)  # of all devices
        for search in searches:
            if search.made and not search.stopped:
                try:
                    search.grid.observer.called(search.made)
                except Stop:
                    search.stopped = True

    def _fail(self, search: Searching) -> None:
        """End a search of which a call has failed."""
        for call in search.calls:
            if call.error is not None:
                search.end(error=self.sampler.explained(call))
                return

    def _look(self, searches: Sequence[Searching], ran: Sequence[Any]) -> None:
        """Judge candidates that have arrived, together where they stand at the same step.

        Args:
            searches: those under way.
            ran: calls of a batch; none: all calls.
        """
        arrived: dict[tuple[int, bool], list[tuple[Searching, Place, Call]]] = {}
        mine = {id(call) for call in ran}
        for search in searches:
            for place, call in search.going.items():
                if call.arrived and not search.stopped and (not mine or id(call) in mine):
                    arrived.setdefault((call.step, search.drafts), []).append((search, place, call))
        for (step, drafts), group in sorted(arrived.items()):
            sampler = self.sampler.drafting(step) if drafts else self.sampler
            for first in range(0, len(group), sampler.max_batch):
                part = group[first : first + sampler.max_batch]
                start = time.perf_counter()
                self._judge(part, sampler, step)
                seconds = time.perf_counter() - start
                for search, _, _ in part:
                    search.seconds += seconds / len(part)

    def _judge(self, part: Sequence[tuple[Searching, Place, Call]], sampler: Sampler, step: int) -> None:
        """Decode and judge; a reward that fails on the batch is asked about each search alone, and fails only that."""
        from ttsnap.pipelines.views import View

        mine: dict[int, list[int]] = {}
        for row, (search, _, _) in enumerate(part):
            mine.setdefault(search.number, []).append(row)
        owners = [part[rows[0]][0] for rows in mine.values()]
        try:
            view = View(sampler, sampler.gather([call for _, _, call in part], step))
        except Exception as failure:
            for owner in owners:
                owner.end(error=failure)
            return
        values = np.full((len(part), len(self.rewards)), np.nan)

        def look(chosen: Sequence[int]) -> None:
            values[list(chosen)] = self.judged(view[chosen])

        errors = apart(look, list(mine.values()))
        blank = view.blank() if view.made is not None else np.zeros(len(part), dtype=bool)
        for owner, rows, error in zip(owners, mine.values(), errors, strict=True):
            if error is not None:
                owner.end(error=error)
                continue
            places = [part[row][1] for row in rows]
            assert owner.answer is not None
            for place, row in zip(places, rows, strict=True):
                owner.answer[place] = values[row]
                owner.grid.blank[place] = blank[row]
                call = owner.going.pop(place)
                if not owner.drafts:
                    owner.grid.keep(place, call)
            try:
                owner.grid.keep_pictures(places, step, view[rows])
                owner.grid.observer.judged(step, owner.answer)
            except Stop:
                owner.stopped = True
            except Exception as failure:
                owner.end(error=failure)

    def judged(self, view: View) -> FloatArray:
        """Rewards [n, rewards] of a view."""
        from ttsnap.pipelines.views import need_pictures

        if need_pictures(self.rewards, view.sigma):
            self.picture(view)
        with self._timed("looks"):
            columns = [
                judge_in_parts(self.sampler.limits, name, reward, view, view.group.prompts, view.sigma)
                for name, reward in self.rewards.items()
            ]
        return np.stack(columns, axis=1).astype(np.float64)

    def picture(self, view: View) -> Any:
        """The pictures of a view, made here if they are not yet, where the clock knows what for."""
        with self._timed("previews" if view.sampler.preview_at(view.group.step) else "decodes"):
            return view.images

    def _timed(self, what: str) -> AbstractContextManager[None]:
        """Lets the clock, if there is one, add the time of a block to `what`."""
        return self.clock.measure(what, self.sampler.device) if self.clock else nullcontext()

    # Questions and answers.

    def _ask(self, search: Searching, answer: FloatArray | None) -> None:
        """Tell a search what it asked for, and begin what it asks next; an empty question is answered at once."""
        try:
            while True:
                query = next(search.queries) if answer is None else search.queries.send(answer)
                if isinstance(query, Fork):
                    answer = search.grid.fork(query)
                    continue
                answer = np.full((*query.mask.shape, len(self.rewards)), np.nan)
                if query.mask.any():
                    break
        except StopIteration as end:
            search.end(result=end.value)
        except Exception as error:
            search.end(error=error)
        else:
            search.answer, search.query = answer, query
            try:
                search.going = search.grid.drafted(query) if query.draft else search.grid.resumed(query)
            except ValueError as error:
                search.end(error=error)
                return
            search.begun = {place: call.progress.paid for place, call in search.going.items()}

    def _interrupt(self, search: Searching) -> None:
        """End a search in the middle of its question."""
        assert search.answer is not None
        assert search.query is not None
        judged = search.query.mask.copy()
        lost = np.zeros(len(judged), dtype=np.int64)
        for place, call in search.going.items():
            judged[place] = False
            lost[place[0]] += call.progress.paid - search.begun[place]
            call.again = 0
            if not search.drafts:
                search.grid.keep(place, call)
        search.going = {}
        try:
            search.queries.throw(Interrupted(judged, search.answer, lost))
        except StopIteration as end:
            search.end(result=end.value)
        except Exception as error:
            search.end(error=error)


@dataclass(eq=False)
class Searching:
    """A search under way, and in the end what it came to.

    Attributes:
        number: names it among others.
        grid: its candidates.
        queries: yields what it asks; is sent answers.
        result: what it returned; None where it failed.
        error: why it failed.
        seconds: its share, by candidates, of the time of the batches it was in.
        notes: warnings it met.
        query: what it has asked,
        answer: and what is known of the answer so far.
        going: candidates that are wanted, on their way,
        begun: and the steps they had made when they were asked about.
        made: steps made for it in the last turn.
        stopped: its observer wants it to end.
        ended: it has.
    """

    number: int
    grid: Grid
    queries: Generator[Query | Fork, FloatArray, Any]
    result: Any = None
    error: Exception | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    query: Query | None = None
    answer: FloatArray | None = None
    going: dict[Place, Call] = field(default_factory=dict)
    begun: dict[Place, int] = field(default_factory=dict)
    made: int = 0
    stopped: bool = False
    ended: bool = False

    @property
    def calls(self) -> list[Call]:
        """Of the candidates on their way, in their order."""
        return list(self.going.values())

    @property
    def drafts(self) -> bool:
        """Whether it has asked for drafts."""
        return self.query is not None and self.query.draft

    @property
    def missing(self) -> bool:
        """Whether some of the answer is."""
        return bool(self.going)

    def steps(self) -> int:
        """Steps that its candidates on their way have made."""
        return sum(call.progress.paid for call in self.going.values())

    def end(self, result: Any = None, error: Exception | None = None) -> None:
        """It has ended, or failed."""
        self.result, self.error, self.ended = result, error, True
        self.going = {}


@dataclass
class Grid:
    """Prompts, each with its candidates, on one engine: what one search sees of it.

    All candidates of a question run together, whatever their prompt. Those that were dropped are kept until the grid
    is: any of them may be asked about again.

    Attributes:
        engine: runs them.
        prompts: one per row.
        seeds: seeds [prompts, candidates].
        previews: keep a small picture of every x0 estimate that was looked at.
        observer: is told of denoiser calls and judged batches, and may stop the work there.
        only_shown: pictures that were made for `previews` alone, as no reward asked for them; no cost model knows them.
        calls: where the candidates stand that were begun.
        lineage: forks that led to candidates, from their seed on; those that are not in it are seeds.
        parents: the parent of each candidate that a fork began, its last one.
        begun: how often a child began in a place after so many calls.
        pictures: small pictures by prompt, candidate and step.
        thumbnails: of sets that are to differ, of each candidate's last look (None: not kept).
        finished: finished images [h, w, 3] (videos [frames, h, w, 3]), uint8.
        blank: whose picture at their last look was of one colour or black [prompts, candidates]; they rank last.
        again: calls that finished images took again, whole, after drafts with a cache [prompts].
        saved: TFLOP that calls did without, by a cache [prompts].
    """

    engine: Engine
    prompts: Sequence[str]
    seeds: IntArray
    previews: bool = False
    observer: Observer = SILENT
    only_shown: int = 0
    calls: dict[Place, Call | Standing] = field(default_factory=dict, repr=False)
    lineage: dict[Place, tuple[Turn, ...]] = field(default_factory=dict, repr=False)
    parents: dict[Place, int] = field(default_factory=dict, repr=False)
    begun: Counter[tuple[Place, int]] = field(default_factory=Counter, repr=False)
    pictures: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, repr=False)
    finished: dict[Place, np.ndarray] = field(default_factory=dict, repr=False)
    thumbnails: dict[Place, np.ndarray] | None = field(default=None, repr=False)
    blank: BoolArray = field(init=False, repr=False)
    again: IntArray = field(init=False, repr=False)
    saved: FloatArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.seeds = np.asarray(self.seeds)
        if self.seeds.ndim != 2 or len(self.seeds) != len(self.prompts) or self.seeds.size == 0:
            raise ValueError(
                f"seeds must have shape [{len(self.prompts)} prompts, candidates], not empty, got {self.seeds.shape}"
            )
        self.blank = np.zeros(self.seeds.shape, dtype=bool)
        self.again, self.saved = np.zeros(len(self.seeds), dtype=np.int64), np.zeros(len(self.seeds))

    @property
    def problem(self) -> Problem:
        """The grid: prompts x seeds x the sampler's steps."""
        return Problem(self.seeds.shape[0], self.seeds.shape[1], self.engine.sampler.num_steps)

    def describe(self, prompt: int, candidate: int) -> str:
        """Name a candidate for an error message."""
        return f"prompt {self.prompts[prompt]!r}, seed {int(self.seeds[prompt, candidate])}"

    def observe(self, query: Query) -> FloatArray:
        """Advance, decode and judge; rewards [prompts, candidates, rewards], NaN where not asked.

        Raises:
            Interrupted: the observer stopped it; the answer so far is in the exception.
        """

        def once() -> Generator[Query, FloatArray, FloatArray]:
            return (yield query)

        search = next(iter(self.engine.run([Searching(0, self, once())])))
        for note in search.notes:
            warnings.warn(note, stacklevel=2)
        if search.error is not None:
            raise search.error
        answer: FloatArray = search.result
        return answer

    def fork(self, fork: Fork) -> FloatArray:
        """Put children in their places.

        Raises:
            ValueError: a parent that cannot be forked.
        """
        import torch

        from ttsnap.pipelines.forks import Turn, forked, natural, rows_of, turn_seed

        sampler = self.engine.sampler
        if sampler.diversity:
            raise ValueError("candidates that are pushed apart cannot be forked; leave out the diversity")
        made, step = dict[Place, Any](), fork.step
        level, to = (
            (float(at.alpha), float(at.sigma)) for at in map(sampler.probe.levels.__getitem__, (step, fork.begins))
        )
        rows = rows_of(torch.empty(sampler.probe.sample, device="meta"), sampler.probe.image) if fork.band else 0
        with torch.no_grad():
            for p, c in np.argwhere(fork.children).tolist():
                place, parent = (p, c), (p, int(fork.parents[p, c]))
                seed = turn_seed(int(self.seeds[place]), step, self.begun[place, step])
                self.begun[place, step] += 1
                angle = float(fork.angle[place])
                angle = natural(level, to) if math.isnan(angle) else angle
                turn = Turn(step, angle, seed, *level, fork.back, to if fork.back else None, fork.band, rows)
                child = forked(sampler, self.calls[parent], turn)
                made[place] = child, (*self.lineage.get(parent, ()), turn), self.blank[parent], parent[1]
        for place, (child, turns, blank, parent) in made.items():  # a child may take the place of another's parent
            self.calls[place], self.lineage[place], self.blank[place], self.parents[place] = child, turns, blank, parent
        if self.thumbnails is not None:
            self.thumbnails |= {place: self.thumbnails[place[0], entry[3]] for place, entry in made.items()}
        return np.full((*fork.parents.shape, len(self.engine.rewards)), np.nan)

    def differing(self, combine: Combine) -> Different:
        """Combined rewards for sets that differ; the thumbnails they need are kept from now on."""
        self.thumbnails = {} if self.thumbnails is None else self.thumbnails
        return Different(combine, self.thumbnails)

    def root(self, place: Place) -> int:
        """The seed that a candidate, or the first of its ancestors, began from."""
        call = self.calls.get(place)
        return int(self.seeds[place]) if call is None else call.seed

    def drafted(self, query: Query) -> dict[Place, Call]:
        """Calls of their own for the seeds asked about, with the steps of a draft.

        Raises:
            ValueError: the model makes no such drafts.
        """
        sampler, places = self.engine.sampler.drafting(query.step), np.argwhere(query.mask).tolist()
        going = {(p, c): sampler.begin(self.prompts[p], int(self.seeds[p, c])) for p, c in places}
        sampler.aim(list(going.values()), query.step)
        return going

    def resumed(self, query: Query) -> dict[Place, Call]:
        """Calls of the candidates asked about, on their way to the step; all others are put away."""
        from ttsnap.pipelines.call import Call
        from ttsnap.pipelines.forks import estimate

        sampler, park = self.engine.sampler, self.engine.park
        asked = [(int(p), int(c)) for p, c in np.argwhere(query.mask)]
        if park or (park is None and sampler.device.type != "cpu"):
            for place in self.calls.keys() - set(asked):
                call = self.calls[place]
                if isinstance(call, Call) and call.progress.last is not None:
                    clean = None if sampler.probe.copies else estimate(call)
                    self.calls[place] = replace(call.standing(), clean=clean).to("cpu")
        new = [place for place in asked if place not in self.calls]
        if new:
            sampler.group(self.prompts, self.seeds[:, 0].tolist())
        going: dict[Place, Call] = {}
        for place in asked:
            before = self.calls.pop(place, None)
            prompt, seed = self.prompts[place[0]], int(self.seeds[place])
            if sampler.cache and sampler.cache.drafts and query.step == sampler.num_steps:
                call = self._whole(place, before)
            elif before is None or (isinstance(before, Call) and not before.here and before.progress.last is None):
                call = sampler.begin(prompt, seed)  # new, or left in the middle of a step in another thread
            elif isinstance(before, Call):
                call = before if before.here else sampler.begin(prompt, before.seed, standing=before.standing())
            else:
                call = sampler.begin(prompt, before.seed, standing=before.to(sampler.device))
            call.progress.target = query.step
            going[place] = call
        return going

    def keep(self, place: Place, call: Call) -> None:
        """Put away a call that stands, and enter in the books what it took otherwise than its steps say."""
        self.calls[place] = call
        self.again[place[0]] += call.again
        self.saved[place[0]] += call.saved
        call.again, call.saved = 0, 0.0

    def _whole(self, place: Place, draft: Call | Standing | None) -> Call:
        """The call that finishes a candidate, begun again without the cache: from its seed, by way of its forks."""
        import torch

        from ttsnap.pipelines.forks import forked

        sampler, prompt, turns = self.engine.sampler, self.prompts[place[0]], self.lineage.get(place, ())
        call = sampler.begin(prompt, draft.seed if draft else int(self.seeds[place]))
        call.whole = True
        for turn in turns:
            sampler.aim([call], turn.step)
            with torch.no_grad():
                sampler.bring([call])
            call = sampler.begin(prompt, call.seed, standing=forked(sampler, call, turn))
            call.whole = True
        call.again = (draft.step if draft else 0) + sum(turn.back for turn in turns)
        return call

    def held(self) -> int:
        """Bytes that candidates take on the device, those that are parked in main memory left out."""
        from ttsnap.pipelines.call import Call, tensors

        lasts = [call.progress.last for call in self.calls.values() if isinstance(call, Call)]
        kept = [tensor for last in lasts if last for tensor in tensors((last.sample, last.model_output, last.result))]
        storages = [tensor.untyped_storage() for tensor in kept]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def keep_pictures(self, places: Sequence[Place], step: int, view: View) -> None:
        """Pictures of the looked at [n], if previews are kept, and of the finished in any case."""
        from ttsnap.pipelines.outputs import shrink, to_uint8

        last = step == self.problem.num_steps
        if not (self.previews or last or self.thumbnails is not None):
            return
        if view.made is None:
            self.only_shown += len(view)
        images = self.engine.picture(view)
        full = to_uint8(images) if last else None
        small = to_uint8(shrink(view.shown)) if self.previews or self.thumbnails is not None else None
        for row, place in enumerate(places):
            if full is not None:
                self.finished[place] = full[row]
            if small is not None and self.previews:
                self.pictures[(*place, step)] = small[row]
            if small is not None and self.thumbnails is not None:
                self.thumbnails[place] = thumbnail(small[row])

    def adopt(self, other: Grid) -> None:
        """Take over candidates and finished images of another search with the same prompts and first seeds."""
        for place, call in other.calls.items():
            if place in other.lineage:
                continue  # no longer what its seed makes
            if place[1] < self.seeds.shape[1] and int(self.seeds[place]) == int(other.seeds[place]):
                self.calls[place] = call
                self.blank[place] = other.blank[place]
        self.finished |= {place: image for place, image in other.finished.items() if place in self.calls}


class _noted:
    """Warnings inside become notes of the searches concerned, each once."""

    def __init__(self, concerned: Sequence[Searching]) -> None:
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


def prompts_per_block(plan: Sequence[Rung], batch: int) -> int:
    """Prompts that run together: the fewest whose cohorts fill their batches to FULL, at most MOST_OPEN.

    The last batch of each rung is not full; the more prompts share it, the less that matters. A block is also what
    runs again when it is interrupted, so it is not larger than it must be.

    Args:
        plan: the schedule of one prompt.
        batch: most candidates in one call.
    """
    segments = [(calls, rung.size) for rung, calls in calls_of(plan)]

    def fullness(prompts: int) -> float:
        room = sum(calls * -(-size * prompts // batch) * batch for calls, size in segments)
        return sum(calls * size * prompts for calls, size in segments) / room

    best = max(range(1, MOST_OPEN + 1), key=lambda prompts: (min(fullness(prompts), FULL), -prompts))
    return best


__all__ = ["Clock", "Engine", "Grid", "Occupancy", "Result", "Searching", "prompts_per_block", "wait"]

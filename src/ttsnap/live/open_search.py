"""A block of prompts under search. It stays open: more can be asked when its policy has ended."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ttsnap import policies, rewards
from ttsnap.core.cost import Budget, Cost, CostModel, affordable
from ttsnap.core.driver import check, run
from ttsnap.core.errors import explain
from ttsnap.core.grid import BoolArray, Combine, IntArray, Policy, Problem, Query, Rung, Search
from ttsnap.core.observers import SILENT, Observer, Result, Start, Stop
from ttsnap.core.ranking import Constrained, RankSum, WeightedSum, choose, order, said
from ttsnap.core.tree import Tree
from ttsnap.live import reporting
from ttsnap.live.rerun import origin_of
from ttsnap.live.result import Ancestor, BestOfNComparison, Finished, SearchResult, history_of
from ttsnap.policies import BestOfN

if TYPE_CHECKING:
    from ttsnap.live.engine import Engine, Grid

SHOWN_ONLY = (
    "pictures of looks that read the denoiser's features were decoded for display only; their cost is not counted"
)


@dataclass
class Setup:
    """A pipeline, rewards and settings, ready to be searched with.

    Attributes:
        sampler: drives the pipeline.
        judges: rewards by name.
        policy: what to look at and what to drop.
        candidates: started per prompt.
        cost_model: counted (and, for budgets in seconds, measured) costs.
        model: its name, for the record.
        budget: as the user gave it.
        combine: several rewards -> one number.
        different: how many images a set that is good and different has; 0: none is wanted.
        held_out: rewards by name that judge finished images and steer nothing; see `ttsnap.live.reporting`.
        held_out_tflop: of one look by each of them, and of what it reads of a prompt once.
        second: name of the held-out reward that is used by default; it is loaded when the first search has ended, and
            no search fails because of it.
        asked: options as they were asked for, where the rest does not tell: reward, preview, scheduler and so on.
        compare_steps: other numbers of steps that best-of-N is compared with, too.
    """

    sampler: Any
    judges: dict[str, Callable[..., Any]]
    policy: Policy
    candidates: int
    cost_model: CostModel
    model: str = "model"
    budget: str | None = None
    combine: Combine = field(default_factory=RankSum)
    different: int = 0
    held_out: dict[str, Callable[..., Any]] = field(default_factory=dict)
    held_out_tflop: dict[str, tuple[float, float]] = field(default_factory=dict)
    second: str | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    compare_steps: tuple[int, ...] = ()
    _compared: dict[int, Setup] = field(default_factory=dict, init=False, repr=False)

    @property
    def targets(self) -> list[str]:
        """Names of the rewards that judge finished images; `judges` are those that judge looks."""
        return rewards.targets_of(self.judges)

    def load_second(self) -> None:
        """Load the held-out reward that is used by default, without a download."""
        if self.held_out or self.second is None:
            return
        from ttsnap.pipelines.flops import count_look
        from ttsnap.rewards.sources import local_only

        size = self.sampler.device, self.sampler.height, self.sampler.width
        with local_only():
            judges = rewards.load(self.second, self.sampler.device)
        self.held_out_tflop = {name: count_look(judge, *size) for name, judge in judges.items()}
        self.held_out = judges

    def with_steps(self, steps: int) -> Self:
        """The same model, rewards and settings with another `num_inference_steps`; nothing is loaded again.

        Raises:
            ValueError: the pipeline takes no number of steps, or its candidates are pushed apart.
        """
        from ttsnap.pipelines import features
        from ttsnap.pipelines.flops import cost_model

        sampler = self.sampler.with_steps(steps)
        features.attach(sampler, self.judges)
        return replace(self, sampler=sampler, cost_model=cost_model(sampler, self.judges, sampler.some_prompt))

    def compared_with(self, steps: int) -> Setup:
        """The same with another number of steps, made once, for comparisons."""
        if steps not in self._compared:
            self._compared[steps] = self.with_steps(steps)
        other = self._compared[steps]
        other.sampler.max_batch = self.sampler.max_batch
        return other

    def engine(self) -> Engine:
        """Model and rewards at work."""
        from ttsnap.live.engine import Engine

        return Engine(self.sampler, self.judges)


@dataclass
class OpenSearch:
    """Prompts that are searched together, so that batches stay full.

    Attributes:
        session: model, rewards, policy, and how many candidates.
        grid: the prompts and where their candidates stand.
        result: what the search came to so far.
        seconds: spent searching.
        notes: warnings on the way.
        place: of its prompt among all that are searched for, which the policy's randomness depends on.
    """

    session: Setup
    grid: Grid
    result: Result | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    place: int = 0
    _best_of_n: list[BestOfNComparison] | None = None
    _best_of_n_at: list[list[BestOfNComparison]] = field(default_factory=list)
    _compared: Grid | None = None
    _said: str | None = None
    _taken: list[int] = field(default_factory=list)

    @property
    def prompts(self) -> Sequence[str]:
        """One per row of the grid."""
        return self.grid.prompts

    @property
    def seed(self) -> int:
        """The first seed of each prompt."""
        return int(self.grid.seeds[0, 0])

    def run(self, observer: Observer | None = None) -> None:
        """Search by the searcher's policy."""
        self._run(self.session.policy, observer)

    def finish(self, candidates: BoolArray, observer: Observer | None = None) -> None:
        """Finish some more candidates [prompts, candidates] after all: they go on from where they were dropped.

        They are charged as any others, and compete with the finished ones.

        Raises:
            ValueError: the search has not been run, or no candidate is left to finish.
        """
        if self.result is None:
            raise ValueError("candidates can be finished after all when the search has been run")
        if not (candidates & ~self.result.finished).any():
            raise ValueError("no candidate is left to finish: all of these are finished already")
        self._run(_Finish(candidates & ~self.result.finished), observer)

    def take(self, candidates: Sequence[int]) -> None:
        """Of a search for one prompt: these finished candidates come first, whatever the rewards say of the others.

        Raises:
            ValueError: one of them is not finished.
        """
        result = self._result()
        if not all(result.finished[0, c] for c in candidates):
            raise ValueError("only finished candidates can be taken")
        self._taken = list(candidates)
        final = _final(result, self.session.sampler.num_steps)
        among = np.zeros_like(result.finished[:1])
        among[0, self._taken] = True
        best = choose(self.session.combine(final[:1], among), among)
        self.result = replace(result, chosen=best, rewards=final[:1][np.arange(1), best])

    def _run(self, policy: Policy, observer: Observer | None) -> None:
        s, grid = self.session, self.grid
        problem = grid.problem
        plan = policy.plan(problem.num_candidates, problem.num_steps)
        grid.observer = observer or SILENT
        with self._noted():
            start = time.perf_counter()
            try:
                grid.observer.started(
                    Start(
                        self.prompts,
                        grid.seeds,
                        problem,
                        policy,
                        plan,
                        s.cost_model,
                        list(s.judges),
                        s.budget,
                        grid.pictures,
                    )
                )
            except Stop:
                policy, plan = _Nothing(), ()
            self.result = run(
                policy,
                grid,
                grid.differing(s.combine) if s.different else s.combine,
                np.random.default_rng([self.seed, self.place]),
                observer=observer,
                before=self.result,
            )
            self.seconds += time.perf_counter() - start
        self._best_of_n, self._compared, self._best_of_n_at = None, None, []
        s.sampler.forget_prompts()  # thousands of encoded prompts would fill the memory

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Warnings become notes, each once."""
        diversity = self.session.sampler.diversity
        before = diversity.extra_calls if diversity else 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        notes = [*self.session.sampler.notes, *(str(w.message) for w in caught if issubclass(w.category, UserWarning))]
        if diversity and diversity.extra_calls > before:
            notes.append(f"{diversity.extra_calls - before} denoiser calls of references are not in the cost (negtome)")
        for note in dict.fromkeys(notes):
            if note not in self.notes:
                self.notes.append(note)
                warnings.warn(note, stacklevel=4)

    def results(self, top: int = 1) -> list[SearchResult]:
        """What was found, one result per prompt.

        Args:
            top: how many of the best finished images to return.
        """
        result, s = self._result(), self.session
        check_top(top)
        diversity = s.sampler.diversity
        notes = list(dict.fromkeys([*s.sampler.notes, *self.notes]))
        if s.sampler.cache:
            notes.append(s.sampler.cache.said)
        if uncounted := [name for name, judge in s.judges.items() if getattr(judge, "tflop", None) == 0]:
            notes.append(f"what {', '.join(uncounted)} computes elsewhere is in the seconds, not in the TFLOP")
        found = [
            SearchResult(
                prompt=prompt,
                model=s.model,
                policy=policies.to_dict(s.policy),
                images=self._best(p, top),
                cost=self._cost(p),
                started=s.candidates,
                finished=int(result.finished[p].sum()),
                history=history_of(result, p, self.grid.seeds[p], s.sampler.num_steps, self.grid.pictures),
                best_of_n=self._best_of_n[p] if self._best_of_n else self._equal_cost(self.session, p),
                best_of_n_at=[each[p] for each in self._best_of_n_at],
                num_steps=s.sampler.num_steps,
                reproduce=self._reproduce(p),
                budget=s.budget,
                preview=s.sampler.preview.name if s.sampler.preview else "full",
                notes=[*notes, *[SHOWN_ONLY] * bool(self.grid.only_shown), *self._blank(p), *self._missed(p)],
                diversity=diversity.parameters.to_dict() if diversity else None,
                rewards=s.targets,
                guides={t: g for t, g in zip(s.targets, s.judges, strict=True) if t != g},
                stopped=result.stopped,
                combine=said(s.combine, s.targets),
                weights=list(s.combine.weights) if isinstance(s.combine, WeightedSum) else None,
                lineage=self._lineage(p),
                tree=self._tree(p),
                origin=origin_of(s, self.seed, self.place + p),
            )
            for p, prompt in enumerate(self.prompts)
        ]
        return self._report(found) if s.held_out or s.second else found

    def _report(self, found: list[SearchResult]) -> list[SearchResult]:
        """Let the held-out rewards judge the finished images, and warn where they part from the optimised ones."""
        s, reported = self.session, []
        for p, r in enumerate(found):
            finished = {  # a fork's child is not what its seed makes: best-of-N may have finished that one
                (int(grid.seeds[row, c]), (row, c) in grid.lineage): image[len(image) // 2]
                if image.ndim == 4
                else image
                for grid in (self.grid, self._compared)
                if grid
                for (row, c), image in grid.finished.items()
                if row == p
            }  # of a video, the middle frame
            if r.images:
                other = (r.best_of_n.best.seed, False) if r.best_of_n.best else None
                winner = r.seed, (p, int(self._result().chosen[p])) in self.grid.lineage
                try:
                    s.load_second()
                    work = (finished, winner, other, s.sampler.device, s.sampler.max_batch)
                    held_out = reporting.report(s.held_out, s.held_out_tflop, r.prompt, *work)
                except Exception as error:
                    if s.second is None:
                        raise
                    held_out, note = [], f"there is no held-out reward: {explain(error)}"
                else:
                    note = reporting.warning([held_out], list(s.judges)) or ""
                r = replace(r, held_out=held_out, notes=[*r.notes, note] if note else r.notes)
            reported.append(r)
        said = reporting.warning([r.held_out for r in reported if r.held_out], list(s.judges))
        if said and said != self._said:
            warnings.warn(said, stacklevel=3)
        self._said = said
        return reported

    def _result(self) -> Result:
        if self.result is None:
            raise ValueError("the search has not been run")
        return self.result

    def _cost(self, p: int) -> Cost:
        """What a prompt paid; of the time its share by calls."""
        ledger = self._result().ledger
        share = float(ledger.nfe[p] / max(1, ledger.nfe.sum()))
        return ledger.cost(self.session.cost_model, p, self.seconds * share)

    def _lineage(self, p: int) -> dict[int, Ancestor]:
        """Where candidates come from that a fork began, by seed."""
        grid = self.grid
        return {
            int(grid.seeds[place]): Ancestor(int(grid.seeds[p, grid.parents[place]]), turns[-1].step, turns[-1].angle)
            for place, turns in sorted(grid.lineage.items())
            if place[0] == p
        }

    def _tree(self, p: int) -> Tree | None:
        """What was looked at, if candidates were forked."""
        result, names = self._result(), list(self.session.judges)
        if not result.forks or not result.history:
            return None
        return Tree.of(
            result,
            p,
            self.session.sampler.num_steps,
            self.grid.seeds[p],
            prompt=self.prompts[p],
            rewards=names,
            policy=policies.to_dict(self.session.policy),
            random=[self.seed, self.place],
        )

    def _blank(self, p: int) -> list[str]:
        """What is to be said of candidates whose pictures show nothing."""
        seeds = self.grid.seeds[p][self.grid.blank[p]]
        if not len(seeds):
            return []
        named = ", ".join(map(str, seeds[:5])) + (", ..." if len(seeds) > 5 else "")
        return [f"{len(seeds)} candidates showed a picture of one colour, or black, and ranked last (seeds {named})"]

    def _missed(self, p: int) -> list[str]:
        """What is to be said where the winner does not keep the bounds; it is a warning, too."""
        rule, names, values = self.session.combine, self.session.targets, self._result().rewards[p]
        if not isinstance(rule, Constrained) or not (missed := rule.missed(values)):
            return []
        wanted = " and ".join(bound.said(names) for bound in rule.bounds)
        has = ", ".join(f"{names[bound.reward]} {values[bound.reward]:.4g}" for bound in missed)
        note = f"no finished image keeps {wanted}; the winner has {has}"
        warnings.warn(note, stacklevel=4)
        return [note]

    def _best(self, p: int, top: int) -> list[Finished]:
        """The best finished images of a prompt, by the rewards they got when they were finished."""
        result = self._result()
        finished = result.finished[p : p + 1]
        if not finished.any():
            return []
        final = _final(result, self.session.sampler.num_steps)[p : p + 1]
        combined = self.session.combine(final, finished)
        count = min(top, int(finished.sum()))
        chosen = order(combined, finished)[0, :count].tolist()
        if self.session.different and count > 1:
            chosen = self.grid.differing(self.session.combine).choose(p, finished[0], combined[0], count)
        if self._taken:
            chosen = sorted(np.flatnonzero(finished[0]), key=lambda c: (c not in self._taken, -combined[0, c], c))[:top]
        return [self._finished(self.grid, p, c, final[0, c], combined[0, c]) for c in chosen]

    def _finished(self, grid: Grid, p: int, c: int, values: Any, combined: float) -> Finished:
        from PIL import Image

        by_name = {name: float(value) for name, value in zip(self.session.targets, values, strict=True)}
        array, frames = grid.finished[p, c], None
        if array.ndim == 4:  # a video
            array, frames = array[len(array) // 2], array
        return Finished(int(grid.seeds[p, c]), float(combined), by_name, Image.fromarray(array), frames)

    def _equal_cost(self, s: Setup, p: int) -> BestOfNComparison:
        """How many finished images the same TFLOP buy."""
        try:
            n = affordable(BestOfN(), Budget(self._cost(p).tflop, "TFLOP"), s.cost_model, s.sampler.num_steps)
        except ValueError:
            n = 1  # the search cost less than one finished image and its look
        steps = None if s is self.session else s.sampler.num_steps
        cost = s.cost_model.of_plan(BestOfN().plan(n, s.sampler.num_steps))
        return BestOfNComparison(n, cost, num_steps=steps)

    def compare(self, observer: Observer | None = None, steps: Sequence[int] = ()) -> None:
        """Run best-of-N at the same cost, also with the other numbers of steps that the session names.

        Trajectories that the search began are finished, not begun again. If the observer stops it, there is no
        comparison.

        Args:
            observer: is told of the calls.
            steps: numbers of steps in place of those of the session.

        Raises:
            ValueError: the pipeline takes no number of steps.
        """
        s, told = self.session, observer or SILENT
        others = [n for n in steps or s.compare_steps if n != s.sampler.num_steps]
        try:
            mine, self._compared = self._best_at(s, told)
            self._best_of_n_at = [self._best_at(s.compared_with(n), told)[0] for n in others]
        except Stop:
            return
        self._best_of_n = mine

    def _best_at(self, s: Setup, observer: Observer) -> tuple[list[BestOfNComparison], Grid]:
        """Best-of-N at the cost of this search, by its own session or the same with another number of steps."""
        comparisons = [self._equal_cost(s, p) for p in range(len(self.prompts))]
        most = max(comparison.candidates for comparison in comparisons)
        seeds: IntArray = np.broadcast_to(self.seed + np.arange(most), (len(self.prompts), most))
        engine = self.grid.engine if s is self.session else s.engine()
        other = engine.grid(self.prompts, seeds, observer=observer)
        wanted = np.arange(most)[None] < np.array([[comparison.candidates] for comparison in comparisons])
        last = s.sampler.num_steps
        known = self._known(other, last) if s is self.session else np.full((*wanted.shape, len(s.judges)), np.nan)
        missing = wanted & np.isnan(known).any(axis=-1)
        try:
            values = other.observe(Query(missing, last))
        finally:
            s.sampler.forget_prompts()
        check(other, missing, values, last)
        values = np.where(missing[..., None], values, known)
        combined = s.combine(values, wanted)
        chosen = choose(combined, wanted)
        found = []
        for p, comparison in enumerate(comparisons):
            c, paid = int(chosen[p]), self._cost(p)
            # What the search had begun was not begun again, so these seconds are estimated by calls.
            cost = replace(comparison.cost, seconds=paid.seconds * comparison.cost.nfe / max(1, paid.nfe))
            best = self._finished(other, p, c, values[p, c], combined[p, c])
            found.append(replace(comparison, best=best, cost=cost))
        return found, other

    def _known(self, other: Grid, last: int) -> np.ndarray:
        """Rewards [prompts, candidates, rewards] of what the search finished of another grid's candidates, else NaN."""
        result = self._result()
        other.adopt(self.grid)
        most = other.seeds.shape[1]
        shared = min(most, self.session.candidates)
        known = np.full((len(self.prompts), most, result.rewards.shape[-1]), np.nan)
        known[:, :shared] = _final(result, last)[:, :shared]
        for p, c in self.grid.lineage:
            known[p, c : c + 1] = np.nan  # a child is not what its seed makes
        return known

    def _reproduce(self, p: int) -> str:
        s, chosen = self.session.sampler, int(self._result().chosen[p])
        if chosen < 0:
            return "there is nothing to reproduce: the search was stopped before an image was finished"
        seed = int(self.grid.seeds[p, chosen])
        if turns := self.grid.lineage.get((p, chosen)):
            return str(s.reproduce(self.prompts[p], self.grid.root((p, chosen)), turns))
        if s.diversity and seed != self.seed:
            return f"not by the pipeline alone: seed {seed} was pushed away from seed {self.seed}, see `diversity`"
        return str(s.reproduce(self.prompts[p], seed))


def check_top(top: int) -> None:
    """ValueError where `top` images cannot be asked for."""
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")


@dataclass(frozen=True, eq=False)
class _Finish:
    """Bring some candidates to the last step."""

    candidates: BoolArray

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        yield Query(self.candidates, problem.num_steps)

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        return (Rung(num_steps, int(self.candidates.sum(axis=1).max())),)


@dataclass(frozen=True)
class _Nothing:
    """Stopped before it began."""

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        yield from _stop()

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        return ()


def _stop() -> Search:
    raise Stop


def _final(result: Result, num_steps: int) -> np.ndarray:
    """Rewards [prompts, candidates, rewards] of the finished images, NaN elsewhere."""
    final = np.full((*result.finished.shape, result.rewards.shape[-1]), np.nan)
    for look in result.history:
        if look.step == num_steps:
            final = np.where(look.alive[..., None], look.rewards, final)
    return final


__all__ = ["OpenSearch", "check_top"]

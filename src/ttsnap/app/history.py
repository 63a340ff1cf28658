"""The history of one search as it unfolds: what a person wants to see of it at any moment."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ttsnap.core.cost import Cost, CostModel, Ledger
from ttsnap.core.grid import FloatArray, Fork, Query
from ttsnap.core.observers import Look, Observer, Result, Start

WAITING, RUNNING, ALIVE, CUT, FINISHED, WINNER = "waiting", "running", "alive", "cut", "finished", "winner"


@dataclass
class Tile:
    """One candidate as it stands.

    Attributes:
        seed: its seed.
        state: waiting, running, alive, cut, finished or winner.
        step: denoiser calls at its last look.
        reward: what it got there (combined, if there are several), once known.
        picture: the latest preview [h, w, 3] (uint8), if any look left one.
        proposed: the rewards propose to keep it (only while a person picks).
        parent: seed in whose place its parent was, if a fork began it.
    """

    seed: int
    state: str = WAITING
    step: int = 0
    reward: float | None = None
    picture: np.ndarray | None = None
    proposed: bool = False
    parent: int | None = None


class Rung(NamedTuple):
    """One look that is over: how many were looked at there, and the best reward."""

    step: int
    looked_at: int
    best: float
    draft: bool = False


@dataclass(eq=False)
class History(Observer):
    """Gathers what the search of one prompt tells.

    Attributes:
        tiles: one per candidate, by seed.
        rungs: the looks that are over.
        num_steps: denoiser calls of a finished image.
        planned: cost of the plan.
        spent: cost so far, up to the last look that is over.
        calls: denoiser calls made so far.
        goal: where those who are running are brought to.
        seconds: time spent searching, without the time a person took to pick.
        over: the policy has ended.
        missed: the winner does not show what was asked for.
    """

    tiles: list[Tile] = field(default_factory=list)
    rungs: list[Rung] = field(default_factory=list)
    num_steps: int = 0
    planned: Cost | None = None
    spent: Cost | None = None
    calls: int = 0
    goal: int = 0
    over: bool = False
    missed: bool = False
    _model: CostModel | None = None
    _start: Start | None = None
    _ticking: float | None = None
    _seconds: float = 0.0

    def started(self, start: Start) -> None:
        """Tiles for all candidates; a search that goes on keeps those it has."""
        self._start, self._model, self.num_steps, self.over = start, start.cost_model, start.problem.num_steps, False
        if not self.tiles:
            self.tiles = [Tile(int(seed)) for seed in start.seeds[0]]
            self.planned = start.cost_model.of_plan(start.plan)
        self.tick()

    def tick(self) -> None:
        """The search works."""
        if self._ticking is None:
            self._ticking = time.monotonic()

    def pause(self) -> None:
        """The search waits for a person."""
        if self._ticking is not None:
            self._seconds += time.monotonic() - self._ticking
            self._ticking = None

    @property
    def seconds(self) -> float:
        """Time spent searching."""
        return self._seconds + (0.0 if self._ticking is None else time.monotonic() - self._ticking)

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the calls so far; None where there is nothing to estimate from."""
        if not self.calls or self.planned is None:
            return None
        return self.seconds / self.calls * max(0, self.planned.nfe - self.calls)

    @property
    def tflop(self) -> float:
        """Spent so far, the calls since the last look among it."""
        if self._model is None:
            return 0.0
        nfe, tflop = (self.spent.nfe, self.spent.tflop) if self.spent else (0, 0.0)
        return tflop + max(0, self.calls - nfe) * self._model.call_tflop

    @property
    def running(self) -> int:
        """Candidates that are being brought further."""
        return sum(tile.state == RUNNING for tile in self.tiles)

    def asked(self, query: Query) -> None:
        """Those asked about run, the others of the last look are cut."""
        self.goal = query.step
        for tile, wanted in zip(self.tiles, query.mask[0], strict=True):
            tile.proposed = False
            if wanted:
                tile.state = RUNNING
            elif tile.state == ALIVE:
                tile.state = CUT

    def forked(self, fork: Fork) -> None:
        """Children look as their parents did, until they are looked at themselves."""
        before = [replace(tile) for tile in self.tiles]
        for c in np.flatnonzero(fork.children[0]):
            parent = before[int(fork.parents[0, c])]
            self.tiles[c] = replace(parent, seed=self.tiles[c].seed, parent=parent.seed, state=ALIVE)

    def called(self, calls: int) -> None:
        """Counts."""
        self.calls += calls

    def judged(self, step: int, rewards: FloatArray) -> None:
        """Pictures of a batch, and its rewards if there is only one kind: several are combined over all alive."""
        assert self._start is not None
        for c in np.flatnonzero(np.isfinite(rewards[0]).all(axis=-1)):
            tile = self.tiles[c]
            tile.step = step
            tile.picture = self._start.pictures.get((0, int(c), step), tile.picture)
            if rewards.shape[-1] == 1:
                tile.reward = float(rewards[0, c, 0])

    def looked(self, look: Look, ledger: Ledger) -> None:
        """A rung is over."""
        assert self._model is not None
        for c in np.flatnonzero(look.alive[0]):
            tile = self.tiles[c]
            tile.state = FINISHED if look.step == self.num_steps else ALIVE
            tile.step, tile.reward = look.step, float(look.combined[0, c])
        best = float(np.nanmax(look.combined[0]))
        self.rungs.append(Rung(look.step, int(look.alive[0].sum()), best, look.draft))
        self.spent = ledger.cost(self._model)
        self.calls = self.spent.nfe

    def ended(self, result: Result) -> None:
        """The winner; candidates on the way are cut."""
        self.pause()
        self.over = True
        assert self._model is not None
        self.spent = result.ledger.cost(self._model)
        self.calls = self.spent.nfe
        for c, tile in enumerate(self.tiles):
            if tile.state == WINNER:
                tile.state = FINISHED
            elif tile.state in (RUNNING, ALIVE):
                tile.state = CUT
            if c == result.chosen[0]:
                tile.state = WINNER

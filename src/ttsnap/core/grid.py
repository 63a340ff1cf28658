"""The grid of candidates x denoiser calls, and who asks and answers questions about it.

A *policy* asks: "bring these candidates to call s and tell me their rewards". An *environment* answers, live from a
pipeline or by lookup in recorded rewards. A candidate that is never asked about again is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


NO_DRAFTS = "this policy finishes drafts with fewer steps, which no recording holds; run it live (ttsnap generate)"


class Problem(NamedTuple):
    """The size of the grid a policy works on."""

    num_prompts: int
    num_candidates: int
    num_steps: int


class Query(NamedTuple):
    """Bring the candidates in `mask` [prompts, candidates] to `step` denoiser calls (1..num_steps) and judge them.

    Attributes:
        mask: who.
        step: denoiser calls made, by themselves or their ancestors.
        draft: instead, finish each seed by a call of its own that has only `step` steps (below num_steps), and judge
            that image. The candidates themselves stay where they are, and the image is no outcome of the search.
    """

    mask: BoolArray
    step: int
    draft: bool = False


class Fork(NamedTuple):
    """Begin children: each stands where its parent stands after `step` calls, with another noise.

    The parent's noise is rotated by `angle` towards fresh noise: eps' = cos(angle) eps + sin(angle) xi, and
    x' = alpha x0 + sigma eps'. With 0 degrees a child goes its parent's way (where the solver draws no noise of its
    own), with 90 degrees only the x0 estimate is left of the parent. A child takes the place of a candidate that was
    dropped, or not begun, and is worth what its parent was until it is looked at itself.

    Attributes:
        parents: candidate that the child at each place comes from [prompts, candidates]; -1: no child here.
        step: denoiser calls made by the parents, 1..num_steps - 1.
        angle: degrees [prompts, candidates]; NaN: as far as noise is added on the way from the noise level after
            `step` calls up to that after `step - back` (the forward process; none without `back`).
        band: rotate only frequencies of the noise from `band[0]` up to below `band[1]`, where 0 is the mean of a
            latent channel and 1 the highest frequency along a side; None: all.
        back: the children stand so many calls before their parents, at the noise level there, and make these calls
            again; less than `step`.
    """

    parents: IntArray
    step: int
    angle: FloatArray
    band: tuple[float, float] | None = None
    back: int = 0

    @property
    def begins(self) -> int:
        """Where the children stand."""
        return self.step - self.back

    @property
    def children(self) -> BoolArray:
        """Places of the children [prompts, candidates]."""
        return self.parents >= 0

    def from_parents(self, values: NDArray[Any]) -> NDArray[Any]:
        """What the parents have, at the places of their children; elsewhere the place's own."""
        own = np.arange(values.shape[1])[None]
        rows = np.arange(len(values))[:, None]
        return values[rows, np.where(self.children, self.parents, own)]


class Rung(NamedTuple):
    """One look of a fixed schedule: `size` candidates per prompt are alive at `step` and are looked at there.

    They come from the step of the rung before; size 0: none is looked at, the next rung's come from here.
    Drafts, which are finished images, take `step` calls from their seeds and lead nowhere.
    """

    step: int
    size: int
    draft: bool = False


Search = Generator[Query | Fork, FloatArray, None]
"""Yields queries and forks; is sent combined rewards [prompts, candidates], NaN where not asked (all after a fork)."""

Combine = Callable[[FloatArray, BoolArray], FloatArray]
"""Rewards [prompts, candidates, rewards] and who is alive [prompts, candidates] -> one number each."""


@runtime_checkable
class Policy(Protocol):
    """A frozen dataclass of hyperparameters with one method that reads like the algorithm."""

    def search(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Ask about candidates until those worth finishing have reached the last step."""
        ...

    def plan(self, num_candidates: int, num_steps: int) -> tuple[Rung, ...]:
        """Sizes per rung for one prompt, the finished images last; an upper bound where sizes depend on rewards."""
        ...


class Environment(Protocol):
    """The answering side: a live pipeline or recorded rewards."""

    @property
    def problem(self) -> Problem:
        """The grid that can be asked about."""
        ...

    def observe(self, query: Query) -> FloatArray:
        """Rewards [prompts, candidates, rewards] of the x0 estimates after `query.step` calls; NaN where not asked."""
        ...

    def fork(self, fork: Fork) -> FloatArray:
        """Begin children; what it answers does not matter."""
        ...

    def describe(self, prompt: int, candidate: int) -> str:
        """Name a candidate for an error message, such as `prompt "a cat", seed 7`."""
        ...


class Reward(Protocol):
    """An image-text judge (a "verifier")."""

    def __call__(self, images: Tensor, prompts: Sequence[str], *, sigma: float) -> Tensor:
        """Rewards [n] of images [n, 3, h, w] in 0..1, which are x0 estimates at noise level `sigma` (0: finished)."""
        ...


def calls_of(plan: Sequence[Rung]) -> list[tuple[Rung, int]]:
    """The rungs of a schedule at which candidates are looked at, and the calls that each of them makes on the way."""
    found, before = [], 0
    for rung in plan:
        if rung.size:
            found.append((rung, rung.step if rung.draft else rung.step - before))
        if not rung.draft:
            before = rung.step
    return found


def early_calls(num_steps: int) -> tuple[int, ...]:
    """Up to 8 calls, evenly over the first three fifths: where searches drop most candidates."""
    last = max(1, min(num_steps - 1, round(0.6 * num_steps)))
    return tuple(sorted({round(x) for x in np.linspace(1, last, min(last, 8))}))

"""The tree that a search with forks grew: every candidate that was looked at, and its rewards, for replay.

A candidate is known by its way: the place of the seed it began from, and each fork that led to it (after which step, by
which angle, into which place, and how many children had begun there before). A policy that is replayed and forks as
the recorded one did meets the same candidates; of another candidate nothing is known.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ttsnap.core.grid import NO_DRAFTS, FloatArray, Fork, Problem, Query
from ttsnap.core.observers import Result

Turn = tuple[Any, ...]  # step, back, angle (None: the forward process's), band, place, number
Way = tuple[Any, ...]  # place of the seed, then turns


class _Places:
    """Which candidate stands at each place [prompts, candidates] of a grid that is forked."""

    def __init__(self, problem: Problem) -> None:
        self.ways: dict[tuple[int, int], Way] = {
            (p, c): (c,) for p in range(problem.num_prompts) for c in range(problem.num_candidates)
        }
        self._begun: Counter[tuple[int, int, int]] = Counter()

    def fork(self, fork: Fork) -> None:
        made = {}
        for p, c in np.argwhere(fork.children).tolist():
            angle = float(fork.angle[p, c])
            number, self._begun[p, c, fork.step] = self._begun[p, c, fork.step], self._begun[p, c, fork.step] + 1
            turn = (fork.step, fork.back, None if math.isnan(angle) else round(angle, 6), fork.band, c, number)
            made[p, c] = (*self.ways[p, int(fork.parents[p, c])], turn)
        self.ways |= made


@dataclass(frozen=True)
class Tree:
    """What a search for one prompt looked at.

    Attributes:
        prompt: the prompt.
        seeds: of the places.
        num_steps: denoiser calls of a finished image.
        rewards: names of the rewards.
        policy: that grew it, as a JSON object.
        random: what seeded its generator.
        looks: rewards [rewards] by way and step.
    """

    prompt: str
    seeds: list[int]
    num_steps: int
    rewards: list[str]
    policy: dict[str, Any]
    random: list[int]
    looks: dict[Way, dict[int, list[float]]] = field(repr=False)

    @classmethod
    def of(cls, result: Result, p: int, num_steps: int, seeds: Sequence[int], **about: Any) -> Tree:
        """The tree of row `p` of a search whose history was kept; `about` are the other attributes."""
        places, forks = _Places(Problem(len(result.finished), len(seeds), num_steps)), list(result.forks)
        looks: dict[Way, dict[int, list[float]]] = {}
        for number, look in enumerate(result.history):
            while forks and forks[0][0] <= number:
                places.fork(forks.pop(0)[1])
            for c in np.flatnonzero(look.alive[p] & ~np.bool_(look.draft)):
                looks.setdefault(places.ways[p, int(c)], {})[look.step] = look.rewards[p, c].tolist()
        return cls(num_steps=num_steps, seeds=[int(seed) for seed in seeds], looks=looks, **about)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        looks = [
            {"way": [way[0], *map(list, way[1:])], "rewards": {str(step): values for step, values in seen.items()}}
            for way, seen in self.looks.items()
        ]
        return {"tree": 1} | {name: value for name, value in vars(self).items() if name != "looks"} | {"looks": looks}

    @classmethod
    def load(cls, path: str | Path) -> Tree:
        """Read `tree.json` of a result.

        Raises:
            ValueError: it is another file.
        """
        if not Path(path).is_file():
            raise ValueError(f"cannot read the tree {path}: it is not there, or no regular file")
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            looks = {
                (int(look["way"][0]), *(_turn(turn) for turn in look["way"][1:])): {
                    int(step): [float(value) for value in values] for step, values in look["rewards"].items()
                }
                for look in data["looks"]
            }
            about: dict[str, Any] = {
                "prompt": str(data["prompt"]),
                "seeds": list(map(int, data["seeds"])),
                "num_steps": int(data["num_steps"]),
                "rewards": list(data["rewards"]),
                "policy": dict(data["policy"]),
                "random": list(map(int, data["random"])),
            }
        except OSError as error:
            raise ValueError(f"cannot read the tree {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a tree.json that ttsnap generate wrote") from error
        return cls(**about, looks=looks)


def _turn(turn: Sequence[Any]) -> Turn:
    step, back, angle, band, place, number = turn
    return step, back, angle, None if band is None else tuple(band), place, number


class Trees:
    """Answers a policy from recorded trees, one per prompt; an environment for `ttsnap.core.driver.run`.

    Args:
        trees: of as many places, steps and rewards each.

    Raises:
        ValueError: they differ in these.
    """

    def __init__(self, trees: Sequence[Tree]) -> None:
        sizes = {(len(tree.seeds), tree.num_steps, tuple(tree.rewards)) for tree in trees}
        if len(sizes) != 1:
            raise ValueError("trees that are replayed together need the same candidates, steps and rewards")
        self._trees = list(trees)
        self.problem = Problem(len(trees), len(trees[0].seeds), trees[0].num_steps)
        self._places = _Places(self.problem)

    def observe(self, query: Query) -> FloatArray:
        """Rewards [prompts, candidates, rewards]; NaN where not asked.

        Raises:
            ValueError: a candidate that was not looked at there when the tree was recorded, or a draft.
        """
        if query.draft:
            raise ValueError(NO_DRAFTS)
        answer = np.full((*query.mask.shape, len(self._trees[0].rewards)), np.nan)
        for p, c in np.argwhere(query.mask).tolist():
            known = self._trees[p].looks.get(self._places.ways[p, c], {})
            if query.step not in known:
                raise ValueError(
                    f"the recorded tree holds no look at {self.describe(p, c)} after {query.step} calls; "
                    "replay the policy that was recorded, or run this one live"
                )
            answer[p, c] = known[query.step]
        return answer

    def fork(self, fork: Fork) -> FloatArray:
        """Let children take their places."""
        self._places.fork(fork)
        return np.full((*fork.parents.shape, len(self._trees[0].rewards)), np.nan)

    def describe(self, prompt: int, candidate: int) -> str:
        """Name a candidate for an error message."""
        way = self._places.ways[prompt, candidate]
        forks = "".join(f", forked after {turn[0]} calls" for turn in way[1:])
        return f"prompt {self._trees[prompt].prompt!r}, seed {self._trees[prompt].seeds[way[0]]}{forks}"

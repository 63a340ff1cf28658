"""Policies, rewards, previews and numbers of steps compared live at equal cost, on the same candidates.

Every denoiser call, decode, look and encoded prompt is charged. What a search found is told in best-of-N's terms, too:
the compute multiplier says how many times what the search paid best-of-N would have to pay for the same mean reward.
Intervals are 95 %, by bootstrap over prompts; a prompt's sets of seeds are averaged first.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap import policies
from ttsnap.core import MAX_CANDIDATES
from ttsnap.core.cost import Budget, affordable, parse_budgets
from ttsnap.core.grid import FloatArray, Policy, Query
from ttsnap.core.ranking import WeightedSum, worth
from ttsnap.live.settings import (
    MAX_SEED,
    MAX_STEPS,
    CallSettings,
    ModelSettings,
    SearchSettings,
    check_ranges,
    pictures_key,
    read_numbers,
    reward_contents,
)
from ttsnap.pipelines.conditions import Pictures
from ttsnap.pipelines.models import MODELS
from ttsnap.policies import BestOfN, default_policy
from ttsnap.rewards import parse

if TYPE_CHECKING:
    from ttsnap.live.session import Session

BLOCK = 10  # prompts that are measured in one go
SEEDS = 100_000  # apart, so that no two prompts share candidates
DRAWS = 1_000_000  # prompts apart are the sets of seeds
HELD_OUT = "held-out "  # begins the names of measurements by held-out rewards
DEFAULT = "default"  # the policy that a search takes unless told otherwise
ALL = (
    "default halving psp dog-trim early-selection draft-then-refine beam dsearch svdd trajectory-greedy fk-max "
    "fk-difference fk-sum smc zero-order epsilon-greedy search-over-paths restart best-first evosearch spectral rbf"
)


@dataclass(frozen=True)
class Contender:
    """Who searches.

    Attributes:
        policy: its name.
        reward: what it searches by; None: the model's own.
        preview: what early looks see; None: what the model's settings say.
        steps: denoiser calls of a finished image; None: what the policy file or the model's settings say.
        share: or of the model's own number of steps, where that is not known before it is loaded.
    """

    policy: str
    reward: str | None
    preview: str | None
    steps: int | None
    share: float | None = None

    def chosen(self, budget: Budget | None) -> tuple[Policy | None, int | None]:
        """The policy, if it is not the one that comes with model or steps, and the number of steps, if one is said."""
        policy, steps = (None, None) if self.policy == DEFAULT else policies.read(self.policy, budget)
        return policy, self.steps or steps


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """What is compared, and at what cost.

    Attributes:
        policies: Compare policies, such as default,svdd,rbf@8,my.json (default: as generate; @8: with 8 steps), or all.
        reward: Reward to search by (default: the model's own); of several (by repeating) each is compared.
        previews: Compare what early looks see, such as full,small=128,linear (default: --preview).
        try_steps: Numbers of steps to try best-of-N with, such as 8,12 or 40%: it is shown at its best one, too; none.
        report_reward: Held-out rewards: judge finished images, steer nothing (default: one that is here already).
        draws: Sets of seeds per prompt.
        pool: Candidates per prompt that best-of-N is measured with; more than any search is worth.
        seed: Seed of the first candidate of the first prompt.
    """

    policies: str | None = None
    reward: tuple[str, ...] = ()
    previews: str | None = None
    try_steps: str = "40%,60%"
    report_reward: str | None = None
    draws: int = 1
    pool: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(draws=(self.draws, 1, 1000), pool=(self.pool, 2, MAX_CANDIDATES), seed=(self.seed, 0, MAX_SEED))
        for who in self.contenders():
            who.chosen(None)
            check_ranges(steps=(who.steps, 1, MAX_STEPS))
            SearchSettings(reward=who.reward, report_reward=self.report_reward)
            CallSettings(preview=who.preview)
        self.plain()

    def contenders(self) -> list[Contender]:
        """All combinations of policies, rewards and previews."""
        named = [name for part in _parts(self.policies or "") for name in (ALL.split() if part == "all" else [part])]
        previews: list[str | None] = [*_parts(self.previews or "")] or [None]
        found = []
        for text, reward, preview in itertools.product(named, self.reward or (None,), previews):
            name, at, count = text.rpartition("@")
            name, count = (name, count) if at else (text, "")
            if at and not count.isdigit():
                raise ValueError(f"a policy with a number of steps is such as svdd@8, got {text!r}")
            found.append(Contender(name, reward, preview, int(count) if at else None))
        return found

    def plain(self, own: int | None = None) -> list[Contender]:
        """Best-of-N, with the model's own number of steps (where that is known) and the others that are to be tried."""
        plain = Contender("best-of-n", self.reward[0] if self.reward else None, None, None)
        found = [plain]
        for text in _parts(self.try_steps) if self.try_steps != "none" else []:
            (number,) = read_numbers(text.removesuffix("%"), "--try-steps", "8,12 or 40%,60%")
            if not text.endswith("%"):
                check_ranges(try_steps=(int(number), 1, MAX_STEPS))
                found.append(replace(plain, steps=int(number)))
            elif not 0 < number < 100:
                raise ValueError(f"--try-steps takes shares of the model's own steps between 0 and 100 %, got {text!r}")
            elif own is None:
                found.append(replace(plain, share=number / 100))
            elif (count := _part_of(own, number / 100)) != own:
                found.append(replace(plain, steps=count))
        return list(dict.fromkeys(found))


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _part_of(steps: int, share: float) -> int:
    return max(1, round(share * steps))


@dataclass(frozen=True)
class Part:
    """What is measured in one go.

    Attributes:
        contender: who searches; `best-of-n` without a budget: all candidates of the pool are finished.
        budget: what a prompt may cost.
        first: place of the block's first prompt.
        draw: number of the set of seeds.
    """

    contender: Contender
    budget: Budget | None
    first: int
    draw: int


@dataclass(frozen=True)
class Comparison:
    """A model, prompts, and what is compared; makes the parts, measures them, and keeps them in a folder.

    Attributes:
        model: the model.
        pictures: that the pipeline is given.
        settings: what is compared.
        budgets: per prompt, in NFE or TFLOP.
        prompts: what is painted.
        first: place of the first prompt in its list, so that parts of a list may be measured apart.
        folder: where measurements are kept.
    """

    model: ModelSettings
    pictures: Pictures
    settings: ComparisonSettings
    budgets: tuple[Budget, ...]
    prompts: tuple[str, ...]
    first: int
    folder: Path

    @classmethod
    def of(
        cls,
        model: ModelSettings,
        pictures: Pictures,
        settings: ComparisonSettings,
        budgets: Sequence[str],
        prompts: Sequence[str],
        first: int,
        folder: Path,
    ) -> Comparison:
        """Budgets are read; see the attributes.

        Raises:
            ValueError: no policy, no budget, or budgets in seconds or in several units.
        """
        read = sorted({b for text in budgets for b in parse_budgets(text)}, key=lambda b: b.amount)
        if not settings.contenders() or not read:
            raise ValueError(
                "a comparison needs --policies, such as halving,svdd, and --budget, such as 18GFLOP (may be repeated)"
            )
        if {b.unit for b in read} not in ({"NFE"}, {"TFLOP"}):
            raise ValueError("budgets are in NFE or in TFLOP, all alike; seconds depend on what else the machine does")
        return cls(model, pictures, settings, tuple(read), tuple(prompts), first, folder)

    @property
    def unit(self) -> str:
        """NFE or TFLOP."""
        return self.budgets[0].unit

    def plain(self) -> list[Contender]:
        """Best-of-N in the ways that it is measured."""
        own = MODELS.get(self.model.model)
        return self.settings.plain(self.model.steps or (own and own.arguments.get("num_inference_steps")))

    def parts(self) -> list[Part]:
        """All that is to be measured: best-of-N first, then budget by budget."""
        blocks = list(itertools.product(range(0, len(self.prompts), BLOCK), range(self.settings.draws)))
        who: list[tuple[Contender, Budget | None]] = [(contender, None) for contender in self.plain()]
        who += [(contender, budget) for budget in self.budgets for contender in self.settings.contenders()]
        return [Part(*found, self.first + first, draw) for found in who for first, draw in blocks]

    def texts(self, part: Part) -> tuple[str, ...]:
        """A part's prompts."""
        start = part.first - self.first
        return self.prompts[start : start + BLOCK]

    def file(self, part: Part) -> Path:
        """Where a part's measurements are kept; its name says what they depend on."""
        s = self.settings
        name, reward = part.contender.policy, part.contender.reward
        own = MODELS.get(self.model.model)
        if part.budget is None and own and reward in (own.reward, own.pushed_reward):
            reward = None  # a model's own rewards judge finished images alike
        policy, steps = part.contender.chosen(part.budget)
        key = {
            "model": self.model.key(),
            "pictures": pictures_key(self.pictures),
            "contender": asdict(replace(part.contender, reward=reward)),
            "policy": policies.to_dict(policy) if policy else policies.shipped() if name == DEFAULT else None,
            "rewards": reward_contents(reward, s.report_reward),
            "report": s.report_reward,
            "budget": str(part.budget) if part.budget else s.pool,
            "prompts": self.texts(part),
            "seeds": [s.seed, part.first, part.draw],
        }
        if steps != part.contender.steps:
            key["steps"] = steps  # of the policy file
        text = json.dumps(_given(key), sort_keys=True, default=str)
        return self.folder / "measured" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"

    def read(self, part: Part) -> dict[str, Any]:
        """A part's measurements, arrays by name."""
        with np.load(self.file(part), allow_pickle=False) as found:
            return dict(found)


def _given(key: Any) -> Any:
    """A JSON object without what says nothing, so that an option that is new does not make measurements others."""
    if not isinstance(key, dict):
        return key
    found = {name: _given(value) for name, value in key.items()}
    return {name: value for name, value in found.items() if value not in (None, {}, [], ())}


class Measuring:
    """A comparison with its model loaded: sessions are made when they are first needed."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self._sessions: dict[tuple[str | None, str | None, int | None], Session] = {}

    def session(self, reward: str | None, preview: str | None, steps: int | None) -> Session:
        """Model and rewards; the model is loaded once."""
        from ttsnap.live.session import prepare

        key = reward, preview, steps
        if key in self._sessions:
            return self._sessions[key]
        c = self.comparison
        if steps is not None and (reward, preview, None) in self._sessions:
            found = self._sessions[reward, preview, None].with_steps(steps)
        else:
            model = replace(c.model, preview=preview or c.model.preview)
            if self._sessions:
                pipe: Any = next(iter(self._sessions.values())).sampler.pipe
                given = {
                    k: v
                    for k, v in model.keywords(c.pictures).items()
                    if k in ("preview", "diversity", "cache", "draft_cache")
                }
                given |= {k: v for k, v in model.arguments().items() if k != "scheduler"}
                if c.pictures:  # the pipeline is the one that takes them already
                    given = c.pictures.arguments(pipe, given)
            else:
                pipe, given = model.model, model.keywords(c.pictures)
            found = prepare(
                pipe,
                reward=reward,
                prompt=c.prompts[0],
                report=c.settings.report_reward or "auto",
                reward_device=model.reward_device,
                **given,
            )
            found.load_second()
            if steps is not None:
                self._sessions[reward, preview, None] = found
                found = found.with_steps(steps)
        if len(found.judges) > 1 and not isinstance(found.combine, WeightedSum):
            raise ValueError("searches are compared by one reward")
        self._sessions[key] = found
        return found

    def measure(self, part: Part) -> None:
        """Measure a part and keep it, unless that was done."""
        from ttsnap.files.storage import atomically

        file = self.comparison.file(part)
        if file.is_file():
            return
        found = self._pool(part) if part.budget is None else self._searched(part, part.budget)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomically(file, partial(_save, found))

    def seeds(self, part: Part, count: int) -> Any:
        """Seeds [prompts, count] of a part."""
        s = self.comparison.settings
        places = part.first + np.arange(len(self.comparison.texts(part)))
        return s.seed + SEEDS * (places + DRAWS * part.draw)[:, None] + np.arange(count)

    def _searched(self, part: Part, budget: Budget) -> dict[str, Any]:
        """Reward, cost and held-out rewards [prompts] of the images that searches choose."""
        who, prompts = part.contender, self.comparison.texts(part)
        policy, asked = who.chosen(budget)
        session = self.session(who.reward, who.preview, asked)
        if policy is None and who.policy == DEFAULT and not self.comparison.pictures:  # as `prepare` chooses
            steps = asked or self.comparison.model.steps
            if tuned := policies.tuned_policy(session.model, list(session.judges), steps, budget):
                session = self.session(who.reward, who.preview, tuned[1])
                policy = tuned[0] if session.sampler.num_steps == tuned[1] else None
        steps = session.sampler.num_steps
        policy = policy or default_policy(steps)
        try:
            count = affordable(policy, budget, session.cost_model, steps)
        except ValueError as error:
            return {"impossible": np.array(str(error))}
        seeds = self.seeds(part, count)
        found: dict[str, Any] = {name: np.full(len(prompts), np.nan) for name in ("reward", "tflop", "nfe")}
        found |= {HELD_OUT + name: np.full(len(prompts), np.nan) for name in session.held_out}
        places = [part.first + p for p in range(len(prompts))]
        seed = self.comparison.settings.seed + part.draw
        ends = session.engine().stream(prompts, seeds, policy, session.combine, seed=seed, places=places)
        for ended in ends:
            if ended.result is None:
                assert ended.error is not None
                raise ended.error
            p, result = ended.number, ended.result
            found["reward"][p] = worth(session.combine, result.rewards[0])[0]
            found["tflop"][p] = result.ledger.tflop(session.cost_model)[0]
            found["nfe"][p] = result.ledger.nfe[0]
            image = ended.grid.finished[0, int(result.chosen[0])]
            for name, values in _held_out(session, prompts[p], image[None]).items():
                found[name][p] = values[0]
        session.sampler.forget_prompts()
        return found | {"started": np.array(count), "steps": np.array(steps)}

    def _pool(self, part: Part) -> dict[str, Any]:
        """Reward and held-out rewards [prompts, pool] of finished candidates, and what they cost."""
        who, prompts = part.contender, self.comparison.texts(part)
        spec = parse(who.reward) if who.reward else None
        if spec and spec.clean:  # with its weights, which names of results leave out
            judge = f"{spec.clean}={spec.path}" if spec.path else spec.clean
        else:
            judge = ",".join(self.session(who.reward, None, None).targets)
        session = self.session(judge, None, who.steps)
        if who.share is not None:
            try:
                session = self.session(judge, None, _part_of(session.sampler.num_steps, who.share))
            except ValueError as error:  # it takes no other number of steps
                return {"impossible": np.array(str(error))}
        seeds = self.seeds(part, self.comparison.settings.pool)
        grid = session.engine().grid(prompts, seeds)
        steps = session.sampler.num_steps
        reward = worth(session.combine, grid.observe(Query(np.ones(seeds.shape, dtype=bool), steps)))[..., 0]
        found: dict[str, Any] = {"reward": reward}
        found |= {HELD_OUT + name: np.full(seeds.shape, np.nan) for name in session.held_out}
        for p, prompt in enumerate(prompts):
            images = np.stack([grid.finished[p, c] for c in range(seeds.shape[1])])
            for name, values in _held_out(session, prompt, images).items():
                found[name][p] = values
        session.sampler.forget_prompts()
        one, model = BestOfN().plan(1, steps), session.cost_model
        costs = {"tflop": model.of_plan(one).tflop, "prompt": model.prompt_tflop, "steps": steps}
        return found | {name: np.array(value) for name, value in costs.items()}


def _save(found: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **found)


def _held_out(session: Session, prompt: str, images: np.ndarray) -> dict[str, FloatArray]:
    """Held-out rewards [n] of images [n, h, w, 3] as uint8, and whether a reward that knows calls them perfect."""
    import torch

    from ttsnap.live.judging import judge

    found: dict[str, FloatArray] = {}
    for name, reward in session.held_out.items():
        parts = []
        for start in range(0, len(images), 32):
            some = torch.from_numpy(images[start : start + 32]).to(session.sampler.device)
            some = some.permute(0, 3, 1, 2).float() / 255
            parts.append(judge(name, reward, some, [prompt] * len(some), 0.0))
        values = np.concatenate(parts)
        perfect = getattr(reward, "perfect", None)
        found[HELD_OUT + name] = values if perfect is None else (values >= perfect).astype(float)
    return found

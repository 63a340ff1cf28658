"""What a search costs: budgets, the cost of one call, decode and look, and the ledger that counts them.

Live and replayed searches are charged by the same `Ledger`. Every denoiser call, every decode and every look counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ttsnap.types import BoolArray, FloatArray, IntArray, Policy, Problem, Query, Rung

MAX_CANDIDATES = 1_000_000
_UNITS = {"nfe": ("NFE", 1.0), "mflop": ("TFLOP", 1e-6), "gflop": ("TFLOP", 1e-3), "tflop": ("TFLOP", 1.0)}
_UNITS |= {"pflop": ("TFLOP", 1e3), "ms": ("s", 1e-3), "s": ("s", 1.0), "min": ("s", 60.0), "h": ("s", 3600.0)}


@dataclass(frozen=True)
class Budget:
    """Allowed cost per prompt: `amount` in `unit`, one of NFE, TFLOP, s."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `200NFE`, `2000TFLOP` (also MFLOP, GFLOP, PFLOP) or `30s` (also ms, min, h)."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
        unit = match and match[2].lower().removesuffix("s" if match[2].lower().endswith("flops") else "\0")
        if not match or unit not in _UNITS:
            raise ValueError(f"budget {text!r} needs a number and a unit, such as 200NFE, 2000TFLOP, 50GFLOP or 30s")
        name, factor = _UNITS[unit]
        amount = float(match[1]) * factor
        if not (0 < amount < math.inf):
            raise ValueError(f"budget {text!r} must be above zero")
        return cls(amount, name)

    def __str__(self) -> str:
        return format_amount(self.amount, self.unit)


def parse_budgets(text: str) -> list[Budget]:
    """Read one budget (`2000TFLOP`), several (`500TFLOP,2000TFLOP`) or a range (`400:4000:200TFLOP`, ends included).

    Returns:
        The budgets, ascending, in one unit.

    Raises:
        ValueError: not a budget, mixed units, a step that leads nowhere, or more than 1000 budgets.
    """
    parts = text.split(":")
    if len(parts) == 1:
        budgets = [Budget.parse(part) for part in text.split(",")]
        if len({budget.unit for budget in budgets}) > 1:
            raise ValueError(f"budgets {text!r} must share one unit")
        return sorted(set(budgets), key=lambda budget: budget.amount)
    unit = parts[-1].lstrip(" 0123456789.")
    try:
        if len(parts) != 3:
            raise ValueError
        first, last, step = (Budget.parse(part if part.strip(" 0123456789.") else part + unit) for part in parts)
    except ValueError:
        raise ValueError(
            f"a range of budgets is first:last:step and a unit, like 400:4000:200TFLOP, got {text!r}"
        ) from None
    if not first.unit == last.unit == step.unit:
        raise ValueError(f"budgets {text!r} must share one unit")
    if last.amount < first.amount:
        raise ValueError(f"a range of budgets must ascend, got {text!r}")
    count = math.floor((last.amount - first.amount) / step.amount * (1 + 1e-12)) + 1
    if count > 1000:
        raise ValueError(f"{text!r} are {count} budgets; at most 1000 are taken")
    return [Budget(first.amount + index * step.amount, first.unit) for index in range(count)]


def format_amount(amount: float, unit: str) -> str:
    """Write an amount of NFE, TFLOP or seconds for people: `128 NFE`, `2.1 GFLOP`, `3.4 s`."""
    if unit == "TFLOP":
        for factor, name in ((1.0, "TFLOP"), (1e-3, "GFLOP"), (1e-6, "MFLOP")):
            if amount >= factor or name == "MFLOP":
                return f"{amount / factor:.4g} {name}"
    return f"{amount:.4g} {unit}"


@dataclass(frozen=True)
class Cost:
    """Cost of a search: counts, TFLOP by the cost model, and seconds (measured live, else estimated or NaN)."""

    nfe: int
    decodes: int
    looks: int
    tflop: float
    seconds: float = math.nan

    def amount(self, unit: str) -> float:
        """This cost in the unit of a budget: NFE, TFLOP or s."""
        return {"NFE": float(self.nfe), "TFLOP": self.tflop, "s": self.seconds}[unit]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; unknown seconds become null."""
        return asdict(self) | {"seconds": None if math.isnan(self.seconds) else self.seconds}


@dataclass(frozen=True)
class Seconds:
    """Measured time of one operation on a batch: `fixed` per batch plus `each` per image, in seconds."""

    fixed: float
    each: float

    def __call__(self, count: float, batch: int) -> float:
        """Seconds for `count` images in batches of at most `batch`."""
        return math.ceil(count / batch) * self.fixed + count * self.each


@dataclass(frozen=True)
class CostModel:
    """Cost of one denoiser call (all CFG passes), one decode, one look (all rewards), and encoding one prompt.

    TFLOP are counted once per model, resolution and text length (see `ttsnap.samplers.flops`). Seconds are None until
    measured on this machine by `ttsnap.environments.live.calibrate`.
    """

    name: str
    call_tflop: float
    decode_tflop: float
    look_tflop: float
    prompt_tflop: float = 0.0
    call_seconds: Seconds | None = None
    decode_seconds: Seconds | None = None
    look_seconds: Seconds | None = None
    max_batch: int = 32

    def tflop(self, calls: float, decodes: float, looks: float, prompts: float = 1) -> float:
        """TFLOP of that many calls, decodes, looks and encoded prompts."""
        return (
            calls * self.call_tflop
            + decodes * self.decode_tflop
            + looks * self.look_tflop
            + prompts * self.prompt_tflop
        )

    def tflops(self) -> dict[str, str | float]:
        """Its name and counts as a JSON object, from which it can be made again; the seconds are this machine's."""
        names = ("name", "call_tflop", "decode_tflop", "look_tflop", "prompt_tflop")
        return {name: getattr(self, name) for name in names}

    def of_plan(self, plan: Sequence[Rung], prompts: int = 1) -> Cost:
        """Cost of a fixed schedule, for `prompts` prompts run as one block."""
        calls = looks = before = 0
        seconds = 0.0
        for step, size in plan:
            calls += (step - before) * size * prompts
            looks += size * prompts
            if self.call_seconds and self.decode_seconds and self.look_seconds:
                batch = (size * prompts, self.max_batch)
                seconds += (step - before) * self.call_seconds(*batch)
                seconds += self.decode_seconds(*batch) + self.look_seconds(*batch)
            before = step
        tflop = self.tflop(calls, looks, looks, prompts)
        return Cost(calls, looks, looks, tflop, seconds if self.call_seconds else math.nan)


# TFLOP = 2 x multiply-adds, counted with torch's flop counter; a look is one ViT-H reward (PickScore, HPSv2: 0.335 for
# the image, 0.047 for the text). `flux-512` keeps the constants that TTSnap was published with: they are the
# multiply-adds of the linear layers alone, and of the VAE decode alone. Pass your own with --call-tflop, --look-tflop.
NAMED_COST_MODELS = {
    model.name: model
    for model in (
        CostModel("flux-512", call_tflop=9.9, decode_tflop=0.0, look_tflop=1.2),
        CostModel("flux-512-counted", call_tflop=21.50, decode_tflop=2.515, look_tflop=0.382),
        CostModel("flux-1024", call_tflop=74.38, decode_tflop=10.47, look_tflop=0.382),
        CostModel("sdxl-512", call_tflop=3.18, decode_tflop=2.515, look_tflop=0.382),
        CostModel("sdxl-1024", call_tflop=13.52, decode_tflop=10.47, look_tflop=0.382),
    )
}


def affordable(policy: Policy, budget: Budget, model: CostModel, num_steps: int) -> int:
    """The largest number of candidates per prompt whose plan costs at most `budget`.

    Raises:
        ValueError: not even one candidate fits; the message names the smallest budget that works.
    """
    if budget.unit == "s" and model.call_seconds is None:
        raise ValueError("a budget in seconds needs a cost model that was calibrated on this machine")

    def fits(n: int) -> bool:
        return model.of_plan(policy.plan(n, num_steps)).amount(budget.unit) <= budget.amount * (1 + 1e-12)

    if not fits(1):
        least = model.of_plan(policy.plan(1, num_steps)).amount(budget.unit)
        digits = 3 - math.floor(math.log10(least))
        least = math.ceil(least * 10**digits) / 10**digits  # rounded up: the budget that is named must work
        raise ValueError(
            f"budget {budget} is too small for one image; the smallest that works is {_exact(least, budget)}"
        )
    low, high = 1, 2
    while high <= MAX_CANDIDATES and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _exact(amount: float, budget: Budget) -> str:
    return f"{math.ceil(amount)}NFE" if budget.unit == "NFE" else f"{amount:.6g}{budget.unit}"


@dataclass
class Ledger:
    """Counts what each prompt was charged, and knows where every candidate stands.

    Attributes:
        moves: what was charged, in order: who was advanced to which step, and looked at there.
        lost: calls of batches that were stopped half-way and led nowhere [prompts].
    """

    problem: Problem
    moves: list[Query] = field(default_factory=list)
    lost: IntArray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    @property
    def position(self) -> IntArray:
        """Denoiser calls made [prompts, candidates]."""
        position = np.zeros(self.problem[:2], dtype=np.int64)
        for mask, step in self.moves:
            position[mask] = step
        return position

    @property
    def finished(self) -> BoolArray:
        """Who reached the last step [prompts, candidates]."""
        finished = np.zeros(self.problem[:2], dtype=bool)
        for mask, step in self.moves:
            if step == self.problem.num_steps:
                finished |= mask
        return finished

    @property
    def nfe(self) -> IntArray:
        """Denoiser calls [prompts]."""
        return np.asarray(self.position.sum(axis=1) + self.lost)

    @property
    def looks(self) -> IntArray:
        """Images judged [prompts]."""
        return sum((mask.sum(axis=1) for mask, _ in self.moves), np.zeros(self.problem.num_prompts, dtype=np.int64))

    @property
    def decodes(self) -> IntArray:
        """Images decoded [prompts]: every image that is judged."""
        return self.looks

    def charge(self, query: Query) -> BoolArray:
        """Charge a query; returns the candidates [prompts, candidates] that must be advanced and looked at.

        A candidate that already stands at the step was looked at there: asking again is free.

        Raises:
            ValueError: the query has another shape, a step outside 1..num_steps, or goes back in time.
        """
        mask, step = query
        if mask.shape != self.problem[:2]:
            raise ValueError(f"a query must have shape {self.problem[:2]} (prompts, candidates), got {mask.shape}")
        if not 1 <= step <= self.problem.num_steps:
            raise ValueError(f"a query's step must be in 1..{self.problem.num_steps}, got {step}")
        if not self.moves or self._follows(query):
            new = mask.copy()
        else:
            position = self.position
            if (position[mask] > step).any():
                raise ValueError(f"a query for step {step} asks about a candidate that was already brought further")
            new = mask & (position < step)
        self.moves.append(Query(new, step))
        return new

    def amend(self, answered: BoolArray, lost: IntArray) -> None:
        """Correct the last charge: the environment was stopped when only `answered` [prompts, candidates] was done.

        `lost` [prompts] calls had been made for others; they stay charged.
        """
        self.moves[-1] = self.moves[-1]._replace(mask=answered)
        self.lost = self.lost + lost

    def copy(self) -> Ledger:
        """The same books, to go on with."""
        return Ledger(self.problem, list(self.moves), self.lost)

    def _follows(self, query: Query) -> bool:
        """Whether everybody asked about made the last move, to an earlier step (as in any halving)."""
        last = self.moves[-1]
        return last.step < query.step and not (query.mask & ~last.mask).any()

    def cost(self, model: CostModel, prompt: int | None = None, seconds: float = math.nan) -> Cost:
        """The cost so far of one prompt, or of all."""
        pick = slice(None) if prompt is None else slice(prompt, prompt + 1)
        nfe, decodes, looks = (int(a[pick].sum()) for a in (self.nfe, self.decodes, self.looks))
        prompts = self.problem.num_prompts if prompt is None else 1
        return Cost(nfe, decodes, looks, model.tflop(nfe, decodes, looks, prompts), seconds)

    def tflop(self, model: CostModel) -> FloatArray:
        """TFLOP of each prompt [prompts]."""
        return np.asarray(
            self.nfe * model.call_tflop
            + self.decodes * model.decode_tflop
            + self.looks * model.look_tflop
            + model.prompt_tflop
        )

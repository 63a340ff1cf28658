"""What a search costs: budgets, the cost of one call, decode and look, and the ledger that counts them.

Live and replayed searches are charged by the same `Ledger`. Every denoiser call, every decode and every look counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ttsnap.core import MAX_CANDIDATES
from ttsnap.core.grid import BoolArray, FloatArray, Fork, IntArray, Policy, Problem, Query, Rung, calls_of

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
            raise ValueError(f"budget {text!r} must be above zero and finite")
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
    """Cost of a search: counts, TFLOP by the cost model, and seconds (measured live, else estimated or NaN).

    Every look judges an image of the full decoder (`decodes`), a picture of a cheaper one (`previews`), or none. Of the
    TFLOP, `text_tflop` went into reading prompts, by the model's text encoders and by the rewards.
    """

    nfe: int
    decodes: int
    looks: int
    tflop: float
    seconds: float = math.nan
    previews: int = 0
    text_tflop: float = 0.0

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
class LookCost:
    """Cost of one look: the picture that is judged, and the judgement by all rewards.

    Attributes:
        source: what the picture is made with: `full` (the model's own decoder), `tiny`, `small`, `linear`, ...
        until: last call whose looks it serves.
        picture_tflop: TFLOP of one picture; 0 where the judge needs none.
        judge_tflop: TFLOP of all rewards on one picture.
        picture_seconds: of a batch of pictures, None until measured.
        judge_seconds: of all rewards on a batch, None until measured.
    """

    source: str
    until: float
    picture_tflop: float
    judge_tflop: float
    picture_seconds: Seconds | None = None
    judge_seconds: Seconds | None = None

    @property
    def tflop(self) -> float:
        """TFLOP of picture and judgement."""
        return self.picture_tflop + self.judge_tflop

    def counts(self) -> dict[str, str | float]:
        """All but the seconds, which are this machine's, as a JSON object."""
        return {name: getattr(self, name) for name in ("source", "until", "picture_tflop", "judge_tflop")}

    def __str__(self) -> str:
        return f"{format_amount(self.tflop, 'TFLOP')} ({self.source}) until call {self.until:g}"


@dataclass(frozen=True)
class TextCost:
    """What some looks need of a prompt beside what all need: read once, at the first of them.

    Noise-aware weights of a text tower are such: every level reads the prompt by its own.

    Attributes:
        since: first call whose looks need it.
        until: the last.
        tflop: of reading one prompt.
    """

    since: int
    until: int
    tflop: float


@dataclass(frozen=True)
class CostModel:
    """Cost of one denoiser call (all CFG passes), one decode, one look (all rewards), and reading one prompt.

    `prompt_tflop` is what reading a prompt takes, by the model's text encoders and by the rewards that judge finished
    images: it is read once, however many looks there are. `texts` are what noise-aware weights read beside that.

    TFLOP are counted once per model, resolution and text length (see `ttsnap.pipelines.flops`). Seconds are None until
    measured on this machine by `ttsnap.live.calibration.calibrate`.

    With a cache, `shares` are what each call computes of a whole one [num_steps], as one candidate had it; with
    `drafts` only candidates on their way to a look use it, and finished ones are begun again with whole calls. What a
    search really did without is in its `Ledger`.

    `early` are the looks that do without the full decoder (or a safety checker, which sees finished images and counts
    to their decode), by ascending `until`: a look after s calls costs what the first of them with s <= until says, else
    a decode and a look. Finished images always use the full decoder.
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
    early: tuple[LookCost, ...] = ()
    texts: tuple[TextCost, ...] = ()
    shares: tuple[float, ...] = ()
    drafts: bool = False

    def look(self, step: int) -> LookCost:
        """The cost of a look after `step` calls."""
        for look in self.early:
            if step <= look.until:
                return look
        return self.last_look

    @property
    def last_look(self) -> LookCost:
        """The cost of a look at a finished image."""
        return LookCost("full", math.inf, self.decode_tflop, self.look_tflop, self.decode_seconds, self.look_seconds)

    def tflop(self, calls: Any, looks: Any) -> Any:
        """TFLOP of a prompt, or of many [...]: calls [...], looks by step [..., num_steps], and reading the prompt."""
        each = np.array([self.look(step).tflop for step in range(1, np.shape(looks)[-1] + 1)])
        return calls * self.call_tflop + np.asarray(looks) @ each + self.text_tflop(looks)

    def text_tflop(self, looks: Any) -> Any:
        """TFLOP of reading a prompt, or many [...], that were looked at so often after each step [..., num_steps]."""
        looks = np.asarray(looks)
        needed = [text.tflop * looks[..., text.since - 1 : text.until].any(axis=-1) for text in self.texts]
        return self.prompt_tflop + sum(needed)

    def tflops(self) -> dict[str, Any]:
        """Its name and counts as a JSON object, from which `read` makes it again; the seconds are this machine's."""
        names = ("name", "call_tflop", "decode_tflop", "look_tflop", "prompt_tflop")
        early = {"early": [look.counts() for look in self.early]} if self.early else {}
        texts = {"texts": [asdict(text) for text in self.texts]} if self.texts else {}
        return {name: getattr(self, name) for name in names} | early | texts

    @classmethod
    def read(cls, counts: Mapping[str, Any]) -> CostModel:
        """The cost model that `tflops` wrote down."""
        early = tuple(LookCost(**look) for look in counts.get("early", ()))
        texts = tuple(TextCost(**text) for text in counts.get("texts", ()))
        return cls(**{**counts, "early": early, "texts": texts})

    def under(self, guide: str) -> CostModel:
        """The cost model where looks see a guide, `aware` or `clean`: a clean reward needs pictures everywhere."""
        if guide == "aware":
            return self
        return replace(self, early=tuple(look for look in self.early if look.source != "features"), texts=())

    def slower(self, factor: float) -> CostModel:
        """The same with all seconds, if there are any, multiplied by `factor`."""

        def times(seconds: Seconds | None) -> Seconds | None:
            return seconds and Seconds(seconds.fixed * factor, seconds.each * factor)

        early = tuple(
            replace(look, picture_seconds=times(look.picture_seconds), judge_seconds=times(look.judge_seconds))
            for look in self.early
        )
        calls, decodes, looks = map(times, (self.call_seconds, self.decode_seconds, self.look_seconds))
        return replace(self, call_seconds=calls, decode_seconds=decodes, look_seconds=looks, early=early)

    def of_plan(self, plan: Sequence[Rung], prompts: int = 1) -> Cost:
        """Cost of a fixed schedule, for `prompts` prompts run as one block.

        A rung of no candidates costs nothing; it says where those of the next one come from, who may make calls again.
        """
        calls = decodes = previews = looks = 0
        rungs = calls_of(plan)
        steps = np.bincount([rung.step for rung, _ in rungs if not rung.draft], minlength=1)[1:]
        text = prompts * float(self.text_tflop(steps))
        seconds, tflop = 0.0, text
        for (step, size, draft), made in rungs:
            many, look = size * prompts, self.last_look if draft else self.look(step)
            again = self.drafts and step == len(self.shares)
            whole = step if again else sum(self.shares[step - made : step]) if self.shares else made
            made = step if again else made
            calls += made * many
            looks += many
            decodes += many if look.source == "full" else 0
            previews += many if look.source != "full" and look.picture_tflop else 0
            tflop += whole * many * self.call_tflop + many * look.tflop
            if self.call_seconds and look.picture_seconds and look.judge_seconds:
                seconds += made * self.call_seconds(many, self.max_batch)
                seconds += look.picture_seconds(many, self.max_batch) + look.judge_seconds(many, self.max_batch)
        return Cost(calls, decodes, looks, tflop, seconds if self.call_seconds else math.nan, previews, text)


# TFLOP = 2 x multiply-adds, counted with torch's flop counter; a look is one ViT-H reward (PickScore, HPSv2) at the
# image, 0.335; the prompt is read once, 0.047. `flux-512` keeps the constants that TTSnap was published with: they are
# the multiply-adds of the linear layers alone, and of the VAE decode alone. Pass your own with --call-tflop,
# --look-tflop.
NAMED_COST_MODELS = {
    model.name: model
    for model in (
        CostModel("flux-512", call_tflop=9.9, decode_tflop=0.0, look_tflop=1.2),
        CostModel("flux-512-counted", call_tflop=21.50, decode_tflop=2.515, look_tflop=0.335, prompt_tflop=0.047),
        CostModel("flux-1024", call_tflop=74.38, decode_tflop=10.47, look_tflop=0.335, prompt_tflop=0.047),
        CostModel("sdxl-512", call_tflop=3.18, decode_tflop=2.515, look_tflop=0.335, prompt_tflop=0.047),
        CostModel("sdxl-1024", call_tflop=13.52, decode_tflop=10.47, look_tflop=0.335, prompt_tflop=0.047),
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
        moves: what was charged, in order: who was advanced to which step, and looked at there; drafts; and forks,
            which are free.
        lost: calls of batches that were stopped half-way and led nowhere [prompts].
        again: calls that were made again, whole, for candidates that had come so far with a cache [prompts].
        saved: TFLOP that calls did without, by a cache [prompts].
    """

    problem: Problem
    moves: list[Query | Fork] = field(default_factory=list)
    lost: IntArray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    again: IntArray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    saved: FloatArray = field(default_factory=lambda: np.zeros(1))

    @property
    def position(self) -> IntArray:
        """Where each candidate stands: denoiser calls made, by itself or its ancestors [prompts, candidates]."""
        position = np.zeros(self.problem[:2], dtype=np.int64)
        for where, step, _ in self._walks():
            position[where] = step
        return position

    def _walks(self) -> Iterator[tuple[BoolArray, int, bool]]:
        """Who came to stand where, and whether by calls of the denoiser; drafts lead nowhere."""
        for move in self.moves:
            if isinstance(move, Fork):
                yield move.children, move.begins, False
            elif not move.draft:
                yield move.mask, move.step, True

    @property
    def drafts(self) -> IntArray:
        """Calls of drafts [prompts]."""
        calls = np.zeros(self.problem.num_prompts, dtype=np.int64)
        for move in self.moves:
            if isinstance(move, Query) and move.draft:
                calls += move.step * move.mask.sum(axis=1)
        return calls

    @property
    def finished(self) -> BoolArray:
        """Who reached the last step [prompts, candidates]."""
        finished = np.zeros(self.problem[:2], dtype=bool)
        for move in self.moves:
            if isinstance(move, Query) and move.step == self.problem.num_steps:
                finished |= move.mask
        return finished

    @property
    def nfe(self) -> IntArray:
        """Denoiser calls [prompts]; a child inherits its parent's position, not its bill."""
        calls = self.drafts + self.lost + self.again
        if not any(isinstance(move, Fork) for move in self.moves):  # nearly all replays
            return np.asarray(calls + self.position.sum(axis=1))
        position = np.zeros(self.problem[:2], dtype=np.int64)
        for where, step, made in self._walks():
            if made:
                calls = calls + np.where(where, step - position, 0).sum(axis=1)
            position[where] = step
        return calls

    @property
    def looks_by_step(self) -> IntArray:
        """Images judged after each call [prompts, num_steps]; drafts count as the finished images that they are."""
        looks = np.zeros((self.problem.num_prompts, self.problem.num_steps), dtype=np.int64)
        for move in self.moves:
            if isinstance(move, Query):
                looks[:, -1 if move.draft else move.step - 1] += move.mask.sum(axis=1)
        return looks

    @property
    def looks(self) -> IntArray:
        """Images judged [prompts]."""
        return np.asarray(self.looks_by_step.sum(axis=1))

    def charge(self, query: Query) -> BoolArray:
        """Charge a query; returns the candidates [prompts, candidates] that must be advanced and looked at.

        A candidate that already stands at the step was looked at there: asking again is free.

        Raises:
            ValueError: the query has another shape, a step outside 1..num_steps, or goes back in time.
        """
        mask, step, draft = query
        if mask.shape != self.problem[:2]:
            raise ValueError(f"a query must have shape {self.problem[:2]} (prompts, candidates), got {mask.shape}")
        if not 1 <= step <= self.problem.num_steps:
            raise ValueError(f"a query's step must be in 1..{self.problem.num_steps}, got {step}")
        if draft and step == self.problem.num_steps:
            raise ValueError(f"a draft has fewer steps than the {step} of a finished image")
        if draft or not self.moves or self._follows(query):
            new = mask.copy()
        else:
            position = self.position
            if (position[mask] > step).any():
                raise ValueError(f"a query for step {step} asks about a candidate that was already brought further")
            new = mask & (position < step)
        self.moves.append(query._replace(mask=new))
        return new

    def fork(self, fork: Fork) -> None:
        """Enter children in the books.

        Raises:
            ValueError: another shape, a step outside 1..num_steps - 1, a parent that does not stand there, or a child
                in the place of a finished image.
        """
        shape, steps = self.problem[:2], self.problem.num_steps
        if fork.parents.shape != shape or fork.angle.shape != shape or fork.parents.max() >= shape[1]:
            raise ValueError(f"a fork must have shape {shape} and parents among its candidates")
        if not 1 <= fork.step < steps:
            raise ValueError(f"a fork's step must be in 1..{steps - 1}, got {fork.step}")
        if not 0 <= fork.back < fork.step:
            raise ValueError(f"a fork after {fork.step} calls goes back by 0 to {fork.step - 1} calls, got {fork.back}")
        if fork.band is not None and not 0 <= fork.band[0] < fork.band[1]:
            raise ValueError(f"a band of frequencies takes two ascending numbers of at least 0, got {fork.band}")
        if (fork.from_parents(self.position)[fork.children] != fork.step).any():
            raise ValueError(f"a fork after {fork.step} calls has a parent that does not stand there")
        if (self.finished & fork.children).any():
            raise ValueError("a child cannot take the place of a finished image")
        self.moves.append(fork)

    def amend(self, answered: BoolArray, lost: IntArray) -> None:
        """Correct the last charge: the environment was stopped when only `answered` [prompts, candidates] was done.

        `lost` [prompts] calls had been made for others; they stay charged.
        """
        last = self.moves[-1]
        assert isinstance(last, Query)
        self.moves[-1] = last._replace(mask=answered)
        self.lost = self.lost + lost

    def copy(self) -> Ledger:
        """The same books, to go on with."""
        return Ledger(self.problem, list(self.moves), self.lost, self.again, self.saved)

    def _follows(self, query: Query) -> bool:
        """Whether all candidates asked about made the last move, to an earlier step (as in any halving)."""
        last = self.moves[-1]
        return (
            isinstance(last, Query)
            and not last.draft
            and last.step < query.step
            and not (query.mask & ~last.mask).any()
        )

    def cost(self, model: CostModel, prompt: int | None = None, seconds: float = math.nan) -> Cost:
        """The cost so far of one prompt, or of all."""
        pick = slice(None) if prompt is None else slice(prompt, prompt + 1)
        nfe, looks = self.nfe[pick], self.looks_by_step[pick]
        by_step = looks.sum(axis=0)
        kinds = [model.look(step) for step in range(1, self.problem.num_steps + 1)]
        full = np.array([look.source == "full" for look in kinds])
        pictures = np.array([look.picture_tflop > 0 for look in kinds])
        return Cost(
            int(nfe.sum()),
            int(by_step[full].sum()),
            int(by_step.sum()),
            float((model.tflop(nfe, looks) - np.broadcast_to(self.saved, self.nfe.shape)[pick]).sum()),
            seconds,
            int(by_step[pictures & ~full].sum()),
            float(np.broadcast_to(model.text_tflop(looks), nfe.shape).sum()),
        )

    def tflop(self, model: CostModel) -> FloatArray:
        """TFLOP of each prompt [prompts]."""
        return np.asarray(model.tflop(self.nfe, self.looks_by_step) - self.saved)

"""What a comparison found: a row for each contender and budget, as a table, a figure, and data; two side by side."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.cost import Budget, format_amount
from ttsnap.core.grid import FloatArray
from ttsnap.live.comparison import BLOCK, HELD_OUT, Comparison, Contender, Part
from ttsnap.live.protocols import BASE, Protocol, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "bench.json"


@dataclass(frozen=True)
class Row:
    """What one contender found at one budget.

    Attributes:
        policy: its name.
        reward: what it searched by.
        preview: what its early looks saw.
        steps: denoiser calls of a finished image.
        budget: as text.
        started: candidates per prompt.
        paid: mean cost per prompt, in the budget's unit.
        value: mean reward of the chosen images.
        value_interval: its 95 % interval.
        held_out: mean of the held-out rewards, or the share of perfect images where a reward knows that, by name.
        multiplier: times its cost that best-of-N needs for the same mean reward.
        interval: its 95 % interval.
        beyond: the pool's best-of-N does not get there, so that the multiplier is a lower bound.
    """

    policy: str
    reward: str | None
    preview: str | None
    steps: int
    budget: str
    started: int
    paid: float
    value: float
    value_interval: tuple[float, float]
    held_out: dict[str, float]
    multiplier: float
    interval: tuple[float, float]
    beyond: bool = False


class Pool:
    """What best-of-N finds with 1, 2, ... candidates: the mean over all choices of so many out of a pool.

    Args:
        reward: [prompts, draws, pool].
        tflop: of one candidate and its prompt.
        prompt: of reading the prompt, in TFLOP.
        steps: denoiser calls of a candidate.
        held_out: [prompts, draws, pool] by name.
    """

    def __init__(
        self, reward: FloatArray, tflop: float, prompt: float, steps: int, held_out: Mapping[str, FloatArray]
    ) -> None:
        order = reward.argsort(axis=-1, kind="stable")
        weights = _largest_of(reward.shape[-1])
        self.curves = (np.take_along_axis(reward, order, -1) @ weights.T).mean(axis=1)  # [prompts, pool]
        self.held_out = {
            name: (np.take_along_axis(values, order, -1) @ weights.T).mean(axis=1) for name, values in held_out.items()
        }
        self.tflop, self.prompt, self.steps = tflop, prompt, steps

    def cost(self, count: float, unit: str) -> float:
        """Of so many candidates."""
        if unit == "NFE":
            return count * self.steps
        return count * (self.tflop - self.prompt) + self.prompt

    def affordable(self, budget: Budget) -> int:
        """How many candidates a budget pays for; at least 1, and no more than there are."""
        one = self.cost(1, budget.unit)
        more = self.cost(2, budget.unit) - one
        return int(np.clip(1 + (budget.amount - one) / more * (1 + 1e-12), 1, self.curves.shape[1]))

    def needed(self, wanted: float, unit: str, who: Any) -> float:
        """What best-of-N pays for a mean reward over prompts `who`; all of the pool where it does not get there."""
        means = self.curves[who].mean(axis=0)
        return self.cost(float(np.interp(wanted, means, np.arange(1, len(means) + 1))), unit)


def _largest_of(count: int) -> FloatArray:
    """Chance [n - 1, k] that the k-th smallest of `count` is the largest of n drawn without replacement."""
    from math import comb

    return np.array([[comb(k, n - 1) / comb(count, n) for k in range(count)] for n in range(1, count + 1)])


def interval(function: Callable[[Any], float], count: int, times: int = 2000) -> tuple[float, float]:
    """95 % interval of a function of resampled prompts, by the same samples whatever the function."""
    rng = np.random.default_rng(0)
    low, high = np.percentile([function(rng.integers(count, size=count)) for _ in range(times)], [2.5, 97.5])
    return float(low), float(high)


def rows(comparison: Comparison) -> list[Row]:
    """Budget by budget: best-of-N, best-of-N with its best number of steps, and the contenders from the best down."""
    pools = [pool for who in comparison.plain() if (pool := _pool_of(comparison, who))]
    base, unit = pools[0], comparison.unit
    found = []
    for budget in comparison.budgets:
        best = max(pools, key=lambda pool: pool.curves[:, pool.affordable(budget) - 1].mean())
        found.append(_best_of_n(BASE, base, base, budget))
        if best is not base:
            found.append(_best_of_n(f"{BASE}, its best number of steps", best, base, budget))
        searched = []
        for who in comparison.settings.contenders():
            parts = list(_blocks(comparison, who, budget))
            one = parts[0][0]
            if "impossible" in one:
                continue
            reward, paid = (_by_prompt(parts, name) for name in ("reward", unit.lower()))
            held_out = {name: float(_by_prompt(parts, HELD_OUT + name).mean()) for name in _held_out_names(one)}
            asked = who.policy, who.reward, who.preview, int(one["steps"]), str(budget), int(one["started"])
            searched.append(_row(asked, held_out, reward, paid, base, unit))
        found += sorted(searched, key=lambda row: -row.multiplier)
    return found


def _best_of_n(name: str, pool: Pool, base: Pool, budget: Budget) -> Row:
    count = pool.affordable(budget)
    reward = pool.curves[:, count - 1]
    held_out = {key: float(values[:, count - 1].mean()) for key, values in pool.held_out.items()}
    paid = np.full(len(reward), pool.cost(count, budget.unit))
    return _row((name, None, None, pool.steps, str(budget), count), held_out, reward, paid, base, budget.unit)


def _row(
    asked: tuple[str, str | None, str | None, int, str, int],
    held_out: dict[str, float],
    reward: FloatArray,
    paid: FloatArray,
    base: Pool,
    unit: str,
) -> Row:
    """A row with its figures: of rewards and costs [prompts]."""
    everybody = np.arange(len(reward))

    def times(who: Any) -> float:
        return base.needed(reward[who].mean(), unit, who) / float(paid[who].mean())

    return Row(
        *asked,
        paid=float(paid.mean()),
        value=float(reward.mean()),
        value_interval=interval(lambda who: float(reward[who].mean()), len(reward)),
        held_out=held_out,
        multiplier=times(everybody),
        interval=interval(times, len(reward)),
        beyond=bool(reward.mean() >= base.curves.mean(axis=0)[-1]),
    )


def _blocks(comparison: Comparison, who: Contender, budget: Budget | None) -> Iterator[list[dict[str, Any]]]:
    """What was measured, block of prompts by block: one entry per set of seeds."""
    for first in range(0, len(comparison.prompts), BLOCK):
        draws = range(comparison.settings.draws)
        yield [comparison.read(Part(who, budget, comparison.first + first, draw)) for draw in draws]


def _held_out_names(one: Mapping[str, Any]) -> list[str]:
    return [name.removeprefix(HELD_OUT) for name in one if name.startswith(HELD_OUT)]


def _by_prompt(parts: Sequence[Sequence[Mapping[str, Any]]], name: str) -> FloatArray:
    """Means over sets of seeds [prompts]."""
    return np.concatenate([np.mean([found[name] for found in block], axis=0) for block in parts])


def _pool_of(comparison: Comparison, who: Contender) -> Pool | None:
    """What a way of best-of-N found; None where the model takes no such number of steps."""
    parts = list(_blocks(comparison, who, None))

    def joined(name: str) -> FloatArray:
        return np.concatenate([np.stack([found[name] for found in block], axis=1) for block in parts])

    one = parts[0][0]
    if "impossible" in one:
        return None
    held_out = {name: joined(HELD_OUT + name) for name in _held_out_names(one)}
    return Pool(joined("reward"), float(one["tflop"]), float(one["prompt"]), int(one["steps"]), held_out)


def save(comparison: Comparison, found: Sequence[Row], command: str, protocol: Protocol | None = None) -> Path:
    """Write `bench.json`, `bench.md` and `bench.png` into the comparison's folder; returns the first."""
    from ttsnap.files import figures
    from ttsnap.files.provenance import versions
    from ttsnap.files.storage import write, write_json

    s, model = comparison.settings, comparison.model
    data = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(model.device),
        "versions": versions(),
        "settings": asdict(s) | {"model": model.key(), "budgets": [str(b) for b in comparison.budgets]},
        "prompts": len(comparison.prompts),
        "first_prompt": comparison.first,
        "rows": [asdict(row) for row in found],
        "left_out": left_out(comparison),
    }
    if protocol is not None:
        data["protocol"] = asdict(protocol)
    write_json(data, comparison.folder / FILE)
    write(comparison.folder / "bench.md", report(data).encode())
    figures.save({"bench": figure(found)}, comparison.folder)
    return comparison.folder / FILE


def hardware(device: str | None) -> str:
    """What it was measured on, in words."""
    from ttsnap.pipelines.loading import find_device

    found = find_device(device)
    if found.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(found))
    return f"{platform.machine()} CPU"


def left_out(comparison: Comparison) -> list[str]:
    """Who has no row, and why."""
    found: dict[str, None] = {}
    for budget in comparison.budgets:
        for who in comparison.settings.contenders():
            one = comparison.read(Part(who, budget, comparison.first, 0))
            if "impossible" in one:
                found[f"{who.policy} at {budget}: {one['impossible']}"] = None
    return list(found)


def report(data: Mapping[str, Any]) -> str:
    """The table with what was measured, how, on what and when, as Markdown."""
    settings, versions = data["settings"], data["versions"]
    seeds = f"{settings['draws']} {'set' if settings['draws'] == 1 else 'sets'} of seeds"
    lines = [
        f"    {data['command']}",
        "",
        f"{data['prompts']} prompts x {seeds}, pool of {settings['pool']} candidates per prompt and set; "
        f"{data['hardware']}, torch {versions.get('torch')}, ttsnap {versions['ttsnap']}, {data['date']}.",
        "",
        *table([read_row(row) for row in data["rows"]]),
    ]
    lines += ["", *(f"- left out: {why}" for why in data["left_out"])] if data["left_out"] else []
    if "protocol" in data:
        lines += ["", *printed(data)]
    return "\n".join(lines) + "\n"


def printed(data: Mapping[str, Any]) -> list[str]:
    """What the paper of a bench's protocol printed, beside what was measured, in Markdown."""
    protocol = named(data["protocol"]["name"])
    beside = protocol.beside([read_row(row) for row in data["rows"]])
    return [f"{protocol.source}: {protocol.note}.", "", *beside]


def read_row(data: Mapping[str, Any]) -> Row:
    """A row from its JSON object."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return Row(**fields)


def table(found: Sequence[Row]) -> list[str]:
    """Lines of a table in Markdown; columns that say the same everywhere are left out."""
    searched = [row for row in found if row.reward or row.preview] or found
    held_out = list(dict.fromkeys(name for row in found for name in row.held_out))
    shown: dict[str, Callable[[Row], str]] = {"budget": lambda row: row.budget, "policy": lambda row: row.policy}
    if len({row.reward for row in searched}) > 1:
        shown["judge"] = lambda row: row.reward or ""
    if len({row.preview for row in searched}) > 1:
        shown["looks"] = lambda row: row.preview or ""
    if len({row.steps for row in found}) > 1:
        shown["steps"] = lambda row: str(row.steps)
    shown |= {
        "started": lambda row: str(row.started),
        "paid": lambda row: format_amount(row.paid, Budget.parse(row.budget).unit),
        "reward": lambda row: f"{row.value:.2f} ({row.value_interval[0]:.2f} to {row.value_interval[1]:.2f})",
    }
    for name in held_out:
        shown[name] = lambda row, name=name: f"{row.held_out[name]:.3f}" if name in row.held_out else ""  # type: ignore[misc]
    shown["compute (95 %)"] = times
    lines = [f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]
    return lines + [f"| {' | '.join(value(row) for value in shown.values())} |" for row in found]


def times(row: Row) -> str:
    """The compute multiplier with its interval; 1 by definition for best-of-N with the default number of steps."""
    if row.interval[0] == row.interval[1] == 1 or row.policy == BASE:
        return "x1"
    at_least = "at least " if row.beyond else ""
    return f"{at_least}x{row.multiplier:.2f} ({row.interval[0]:.2f} to {row.interval[1]:.2f})"


def figure(found: Sequence[Row]) -> Figure:
    """Compute multipliers with their intervals: one panel per budget, contenders from the best down."""
    from matplotlib.figure import Figure

    from ttsnap.files.figures import COLOURS, styled

    budgets = list(dict.fromkeys(row.budget for row in found))
    named = {id(row): name_of(row, found) for row in found if row.policy != BASE}
    mean: dict[str, list[float]] = {}
    for row in found:
        if id(row) in named:
            mean.setdefault(named[id(row)], []).append(np.log(row.multiplier))
    names = sorted(mean, key=lambda name: float(np.mean(mean[name])))

    @styled
    def draw() -> Figure:
        made = Figure(figsize=(2.2 + 2.6 * len(budgets), 0.8 + 0.24 * len(names)), layout="constrained")
        axes = made.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
        for axis, budget in zip(axes, budgets, strict=True):
            for row in found:
                if row.budget == budget and id(row) in named:
                    place = names.index(named[id(row)])
                    axis.plot(row.interval, (place, place), color=COLOURS[5], lw=4, solid_capstyle="round")
                    axis.plot(row.multiplier, place, ">" if row.beyond else "o", color=COLOURS[0], ms=5)
            axis.axvline(1, color="#888888", lw=1)
            axis.set_yticks(range(len(names)), names)
            started = next(row.started for row in found if row.budget == budget and row.policy == BASE)
            axis.set(title=f"{budget} (best-of-{started})", xlabel="compute multiplier")
        return made

    return draw()


def name_of(row: Row, found: Sequence[Row]) -> str:
    """What tells a row from the others of its budget."""
    parts = [row.policy]
    searched = [other for other in found if other.policy[:9] != BASE]
    for value in ("reward", "preview"):
        if len({getattr(other, value) for other in searched}) > 1 and row in searched:
            parts.append(str(getattr(row, value) or "the model's own"))
    if len({other.steps for other in searched}) > 1 and row in searched:
        parts.append(f"{row.steps} steps")
    return ", ".join(parts)


def compare(first: str | Path, second: str | Path) -> list[str]:
    """Two benches side by side, as lines of a table in Markdown: what both have, and whether their intervals meet.

    Args:
        first: folder or `bench.json` of one.
        second: of the other.

    Raises:
        ValueError: not a bench, or they have no row in common.
    """
    sides = [{_key(row): row for row in map(read_row, read(path)["rows"])} for path in (first, second)]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        raise ValueError(f"{first} and {second} have no policy and budget in common")
    lines = ["| budget | policy | reward: first | second | compute: first | second | intervals |", "|---" * 7 + "|"]
    for key in common:
        one, other = (side[key] for side in sides)
        apart = one.interval[0] > other.interval[1] or other.interval[0] > one.interval[1]
        values = f"{one.value:.3f} | {other.value:.3f} | {times(one)} | {times(other)}"
        parts = [key[1], *(str(part) for part in key[2:4] if part), f"{key[4]} steps"]
        lines.append(f"| {key[0]} | {', '.join(parts)} | {values} | {'apart' if apart else 'meet'} |")
    return lines


def _key(row: Row) -> tuple[str, str, str | None, str | None, int]:
    return row.budget, row.policy, row.reward, row.preview, row.steps


def read(path: str | Path) -> dict[str, Any]:
    """A bench from its folder or file.

    Raises:
        ValueError: there is none.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(data["rows"], list)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is no bench; give the --out folder of `ttsnap bench --policies ...`") from error
    return dict(data)

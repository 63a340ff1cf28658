"""Pictures of a simulation, as a paper would print them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.grid import FloatArray
from ttsnap.files.figures import COLOURS, MARKERS, styled
from ttsnap.recordings import Recording
from ttsnap.replay.results import Simulation
from ttsnap.replay.statistics import interval, rank_correlation, resample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNITS = {"TFLOP": ((1.0, "TFLOP"), (1e-3, "GFLOP"), (1e-6, "MFLOP")), "NFE": ((1.0, "denoiser calls"),)}


def plot(simulation: Simulation, recording: Recording | None = None) -> dict[str, Figure]:
    """All pictures by name.

    Args:
        simulation: what to show.
        recording: also show how well each guide ranks (adds `correlation`).

    Returns:
        `reward`: reward against budget; `multiplier`: compute multiplier against budget; `increase`: relative
        increase of each policy; `correlation`: rank correlation of each guide with the final reward at every step.
    """
    figures = {"reward": reward(simulation), "multiplier": multiplier(simulation)}
    if simulation.common.sum() > 1:
        figures["increase"] = increase(simulation)
    if recording is not None:
        figures["correlation"] = correlation(recording)
    return figures


@styled
def reward(simulation: Simulation, mark: float | None = None) -> Figure:
    """Mean reward of the chosen image against the budget, one panel per reward; `mark`: a budget to point out.

    Bands are the 95 % intervals of the difference from best-of-N on the same prompts: most of the spread of the reward
    itself is that between prompts, which all policies share.
    """
    rows, (unit, scale) = simulation.table, _unit(simulation)
    figure, panels = _panels(simulation)
    for panel, (name, rows_of_reward) in zip(panels, rows.groupby("reward_name", sort=False), strict=True):
        first = rows_of_reward[rows_of_reward.policy == simulation.names[0]].dropna(subset=["best_of_n_reward"])
        panel.plot(first.budget * scale, first.best_of_n_reward, color="black", marker="x", ms=4, lw=1.2)
        panel.plot([], [], color="black", marker="x", ms=4, lw=1.2, label="best-of-N (exact)")
        for policy, colour, marker in _policies(simulation):
            line = rows_of_reward[rows_of_reward.policy == policy].dropna(subset=["reward", "best_of_n_reward"])
            band = [
                (base + low, base + high)
                for base, (low, high) in zip(line.best_of_n_reward, line.gain_ci95, strict=True)
            ]
            _line(panel, line.budget * scale, line.reward, band, policy, colour, marker)
        if mark is not None:
            panel.axvline(mark * scale, color="#e8a200", lw=2, zorder=0)
        _label(panel, f"budget per prompt ({unit})", f"{name} of the chosen image")
        panel.legend(loc="lower right")
    _say_prompts(figure, simulation, "bands: 95 % of the difference from best-of-N")
    return figure


@styled
def multiplier(simulation: Simulation) -> Figure:
    """Compute multiplier against the budget, one panel per reward, with 95 % intervals."""
    rows, (unit, scale) = simulation.table, _unit(simulation)
    figure, panels = _panels(simulation)
    for panel, (name, rows_of_reward) in zip(panels, rows.groupby("reward_name", sort=False), strict=True):
        panel.axhline(1.0, color="black", lw=1.2)
        panel.plot([], [], color="black", lw=1.2, label="best-of-N")
        for policy, colour, marker in _policies(simulation):
            line = rows_of_reward[rows_of_reward.policy == policy].dropna(subset=["compute_multiplier"])
            _line(
                panel,
                line.budget * scale,
                line.compute_multiplier,
                line.compute_multiplier_ci95,
                policy,
                colour,
                marker,
            )
        _label(panel, f"budget per prompt ({unit})", f"compute multiplier ({name})")
        panel.yaxis.set_major_formatter("\N{MULTIPLICATION SIGN}{x:g}")
        panel.legend(loc="best")
    _say_prompts(figure, simulation)
    return figure


@styled
def increase(simulation: Simulation) -> Figure:
    """Relative increase over best-of-N of each policy and reward, with 95 % intervals."""
    _, policies = simulation.rows
    rows = [row for row in policies if row["relative_increase_percent"] is not None]
    figure, (panel,) = _figure(1, height=0.9 + 0.32 * len(rows))
    colours = {name: (colour, marker) for name, colour, marker in _policies(simulation)}
    labels = []
    for place, row in enumerate(rows):
        colour, marker = colours[row["policy"]]
        low, high = row["relative_increase_ci95"]
        value = row["relative_increase_percent"]
        panel.plot([low, high], [place, place], color=colour, lw=2)
        panel.plot(value, place, color=colour, marker=marker, ms=6)
        panel.annotate(f"{value:+.1f} %", (value, place), (0, 5), textcoords="offset points", ha="center", fontsize=8)
        labels.append(f"{row['policy']}, {row['reward_name']}" if len(simulation.dataset.reward) > 1 else row["policy"])
    panel.axvline(0.0, color="black", lw=1.2)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.6)
    _label(panel, "relative increase over best-of-N (%)", "")
    _say_prompts(figure, simulation)
    return figure


@styled
def correlation(recording: Recording) -> Figure:
    """Spearman correlation of each guide with the final reward after every call, with 95 % intervals over prompts."""
    from matplotlib.ticker import MaxNLocator

    table = correlations(recording)
    figure, panels = _figure(len(recording.rewards))
    for panel, name in zip(panels, recording.rewards, strict=True):
        for (kind, label), colour, marker in zip(
            (("aware", "noise-aware guide"), ("clean", "clean guide")), COLOURS, MARKERS, strict=False
        ):
            if (kind, name) not in table:
                continue
            by_prompt = table[kind, name]
            weights = resample(len(by_prompt), 1000, np.random.default_rng(0))
            steps = np.arange(1, by_prompt.shape[1] + 1)
            low_high = [*zip(*interval(weights @ by_prompt), strict=True)]
            _line(panel, steps, by_prompt.mean(axis=0), low_high, label, colour, marker)
        _label(panel, "denoiser calls made", f"rank correlation with final {name}")
        panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.03)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(loc="lower right")
    figure.text(
        1,
        -0.01,
        f"Spearman, mean over {len(recording.recorded())} prompts, 95 % intervals",
        ha="right",
        va="top",
        fontsize=7,
    )
    return figure


def correlations(recording: Recording) -> dict[tuple[str, str], FloatArray]:
    """Spearman correlation [prompts, steps] of each guide with the final reward, by (guide, reward name)."""
    table = {}
    final = recording.guide("clean")[:, :, -1]
    for kind in ("aware", "clean") if recording.has_aware else ("clean",):
        guide = recording.guide(kind)
        for index, name in enumerate(recording.rewards):
            table[kind, name] = rank_correlation(guide[..., index], final[..., index])
    return table


def _figure(columns: int, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot: nothing global, nothing to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _panels(simulation: Simulation) -> tuple[Figure, list[Axes]]:
    return _figure(simulation.dataset.sizes["reward"])


def _policies(simulation: Simulation) -> Iterator[tuple[str, str, str]]:
    for index, name in enumerate(simulation.names):
        yield name, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _line(panel: Axes, x: Any, y: Any, intervals: Any, label: str, colour: str, marker: str) -> None:
    """A line with its interval as a band."""
    low, high = ([float("nan") if value is None else value for value in side] for side in zip(*intervals, strict=True))
    panel.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    panel.plot(x, y, color=colour, marker=marker, ms=4, lw=1.5, label=label)


def _label(panel: Axes, x: str, y: str) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)


def _unit(simulation: Simulation) -> tuple[str, float]:
    """Unit of the budget axis, and the factor from the budgets to it."""
    unit, most = simulation.dataset.attrs["unit"], float(simulation.dataset.budget.values[-1])
    scales = _UNITS.get(unit, ((1.0, unit),))
    factor, name = next((pair for pair in scales if most >= 2 * pair[0]), scales[-1])
    return name, 1 / factor


def _say_prompts(figure: Figure, simulation: Simulation, bands: str = "95 % intervals over prompts") -> None:
    attrs = simulation.dataset.attrs
    text = (
        f"{simulation.dataset.sizes['prompt']} prompts, {attrs['trials']} paired trials; {bands}\n"
        f"accounting: {attrs['accounting']}, {attrs['cost_model']}"
    )
    figure.text(1, -0.01, text, ha="right", va="top", fontsize=7)

"""Pictures of a training run: how well it judges before and after, and the course of its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ttsnap.files.figures import COLOURS, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "kendall_tau": "Kendall's tau with the final reward",
    "mse": "mean squared error",
    "top_accuracy_25": "best candidate is among the best 25 %",
    "top_gap_25": "reward lost by keeping 25 %",
}
_WHEN = {"before": "clean reward", "during": "at the end of its level", "after": "noise-aware, as it serves"}


@styled
def evaluation(measured: Mapping[str, Mapping[str, Mapping[str, float | None]]], prompts: int) -> Figure:
    """Four metrics against the denoiser call, on held-out prompts.

    Args:
        measured: what `evaluation.json` holds: METRICS by call, `before`, `during` and `after`.
        prompts: held-out prompts, for the title.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    for panel, (metric, title) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        for (when, label), colour, marker in zip(_WHEN.items(), COLOURS, "osD", strict=False):
            calls = sorted(map(int, measured.get(when, {})))
            values = [measured[when][str(call)][metric] for call in calls]
            points = [(call, value) for call, value in zip(calls, values, strict=True) if value is not None]
            if points:
                line = {"ls": "none"} if when == "during" else {"lw": 1.4}
                panel.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=4, label=label, **line)
        panel.set_xlabel("denoiser calls")
        panel.set_title(title, fontsize=9)
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_WHEN))
    figure.suptitle(f"{prompts} held-out prompts", fontsize=9)
    return figure


@styled
def losses(log: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss of every update, one colour per level, with its mean over a twentieth of the level.

    Args:
        log: the lines of `log.jsonl`.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panel = figure.subplots()
    values = np.array([line["loss"] for line in log], dtype=float)
    stages = np.array([line["stage"] for line in log], dtype=int)
    for stage in np.unique(stages):
        where = np.flatnonzero(stages == stage)
        colour = COLOURS[stage % len(COLOURS)]
        panel.plot(where + 1, values[where], color=colour, lw=0.6, alpha=0.4)
        width = max(1, len(where) // 20)
        smooth = np.convolve(values[where], np.ones(width) / width, mode="valid")
        panel.plot(where[width - 1 :] + 1, smooth, color=colour, lw=1.6)
        label = f"call {log[where[0]]['call']}"
        middle = (float(where.mean()) + 1, 1.02)
        panel.annotate(label, middle, xycoords=("data", "axes fraction"), fontsize=7, rotation=90, ha="center")
    if (values > 0).all():
        panel.set_yscale("log")
    panel.set_xlabel("update")
    panel.set_ylabel("loss")
    return figure

"""How pictures of figures look and are stored: axes with units, colour-blind safe, PNG and SVG."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ttsnap.files.storage import atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttsnap.core.observers import Seen

P = ParamSpec("P")
R = TypeVar("R")

# Okabe and Ito (2008): told apart with any colour vision, and by their markers in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = "osD^vP*"
_STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ttsnap",
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in our style without touching anybody else's."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **options: P.kwargs) -> R:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*args, **options)

    return in_style


def save(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write each picture as `{name}.png` and `{name}.svg`; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")]
    for path in paths:
        atomically(path, functools.partial(_write, figures[path.stem], path.suffix[1:]))
    return paths


@styled
def _write(figure: Figure, suffix: str, path: Path) -> None:
    metadata = {"Date": None} if suffix == "svg" else {}
    figure.savefig(path, format=suffix, dpi=200, bbox_inches="tight", metadata=metadata)


@styled
def history(looks: Mapping[int, Sequence[Seen]], num_steps: int, reward: str = "reward") -> Figure:
    """Reward of each candidate against denoiser calls: the dropped end in a cross, the winner is gold.

    Args:
        looks: per seed, every look at it, as `SearchResult.history` has them.
        num_steps: denoiser calls of a finished image.
        reward: label of the axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for seed, seen in looks.items():
        steps, values = [look.step for look in seen], [look.reward for look in seen]
        finished = steps[-1] == num_steps
        wins = finished and seen[-1].kept
        colour = COLOURS[4] if wins else COLOURS[0] if finished else "#a8adb5"
        axes.plot(
            steps, values, color=colour, lw=2.4 if wins else 1.1, marker="o", ms=5 if wins else 3, zorder=3 * wins
        )
        if not finished:
            axes.plot(steps[-1], values[-1], color="#c7402d", marker="x", ms=6, zorder=2)
        if wins:
            axes.annotate(f"#{seed}", (steps[-1], values[-1]), (-6, 6), textcoords="offset points", ha="right")
    axes.set_xlim(0, num_steps + 0.5)
    axes.set_xlabel("denoiser calls")
    axes.set_ylabel(reward)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled
def svg(figure: Figure) -> str:
    """A picture as an SVG element to put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

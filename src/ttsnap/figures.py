"""How pictures of figures look and are stored: axes with units, colour-blind safe, PNG and SVG."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ttsnap.results import atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

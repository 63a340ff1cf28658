"""Test-time scaling for text-to-image diffusion: start many candidates, drop the poor ones early, finish the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ttsnap.core import __version__

if TYPE_CHECKING:
    from ttsnap.files.pictures import beside as beside
    from ttsnap.files.pictures import read_picture as read_picture
    from ttsnap.live.scoring import score as score
    from ttsnap.live.session import Session as Session
    from ttsnap.live.session import prepare as prepare
    from ttsnap.live.session import search as search
    from ttsnap.pipelines.forks import Lineage as Lineage

__all__ = ["Lineage", "Session", "__version__", "beside", "prepare", "read_picture", "score", "search"]


def __getattr__(name: str) -> Any:
    """Load what is asked for; `import ttsnap` alone imports nothing else."""
    if name == "Lineage":
        from ttsnap.pipelines.forks import Lineage

        return Lineage
    if name in ("beside", "read_picture"):
        from ttsnap.files import pictures

        return getattr(pictures, name)
    if name == "score":
        from ttsnap.live.scoring import score

        return score
    if name not in ("Session", "prepare", "search"):
        raise AttributeError(f"module 'ttsnap' has no attribute {name!r}")
    from ttsnap.live import session

    return getattr(session, name)

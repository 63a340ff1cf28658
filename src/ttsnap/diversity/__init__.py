"""Ways to make the candidates of one prompt differ more; see docs/diversity.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttsnap.diversity.negtome import Negtome

KNOWN = ("negtome", "repel")


def parse(name: str | None, options: str | None = None) -> Negtome | None:
    """The parameters that a name and `merging_alpha=1.2,t_end=800` describe; None without a name.

    Args:
        name: `negtome` or its variant `repel`.
        options: parameters that differ from the defaults.

    Raises:
        ValueError: an unknown name or parameter, or a value outside its range.
    """
    if name is None:
        if options is not None:
            raise ValueError("--diversity-options need --diversity, such as --diversity negtome")
        return None
    if name not in KNOWN:
        raise ValueError(f"unknown diversity {name!r}; known are {', '.join(KNOWN)}")
    from dataclasses import replace

    from ttsnap.diversity.negtome import REPEL, Negtome, convert

    return replace(REPEL if name == "repel" else Negtome(), **convert(options or ""))

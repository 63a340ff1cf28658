"""Things by name: ttsnap's own, and what installed packages offer as entry points."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from functools import cached_property
from typing import Any


class Registry(MutableMapping[str, Any]):
    """Things by name.

    A package offers more of a kind by entry points, in its `pyproject.toml`:

        [project.entry-points."ttsnap.rewards"]
        tidy = "my_package.rewards:load_tidy"

    Args:
        group: of the entry points, which are loaded when they are asked for.
        own: what needs no entry point; it comes last, and wins.
    """

    def __init__(self, group: str, **own: Any) -> None:
        self.group, self._own = group, own

    @cached_property
    def _known(self) -> dict[str, Any]:
        from importlib import metadata  # takes longer than all the rest of the command line's help

        return {entry.name: entry for entry in metadata.entry_points(group=self.group)} | self._own

    def __getitem__(self, name: str) -> Any:
        from importlib.metadata import EntryPoint

        found = self._known[name]
        return found.load() if isinstance(found, EntryPoint) else found

    def __setitem__(self, name: str, value: Any) -> None:
        self._known[name] = value

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


__all__ = ["Registry"]

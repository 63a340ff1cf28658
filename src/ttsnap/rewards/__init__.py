"""Rewards by name. Each loads when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def _shapes(device: Any) -> Any:
    from ttsnap.shapes.reward import load_reward

    return load_reward(device=device)


REWARDS: dict[str, Callable[[Any], Any]] = {"shapes": _shapes}

Rewards = str | Sequence[str] | Callable[..., Any] | Mapping[str, Callable[..., Any]]


def names_of(rewards: Rewards) -> list[str]:
    """The names of rewards; ValueError names the known ones when one is not known."""
    if callable(rewards):
        return [getattr(rewards, "__name__", type(rewards).__name__)]
    names = rewards.split(",") if isinstance(rewards, str) else list(rewards)
    names = [name.strip() for name in names]
    if not isinstance(rewards, Mapping):
        for name in names:
            if name not in REWARDS:
                raise ValueError(f"unknown reward {name!r}; known are {', '.join(REWARDS)}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"rewards must be named once each, got {', '.join(names) or 'none'}")
    return names


def load(rewards: Rewards, device: Any = "cpu") -> dict[str, Callable[..., Any]]:
    """Rewards by name, from a name, several (a list, or separated by commas), a callable, or a mapping of callables."""
    names = names_of(rewards)
    if callable(rewards):
        return {names[0]: rewards}
    if isinstance(rewards, Mapping):
        return dict(rewards)
    return {name: REWARDS[name](device) for name in names}

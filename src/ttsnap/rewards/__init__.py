"""Rewards by name. Each loads when it is asked for.

`RUN` or `shapes+RUN` names a noise-aware reward: the directory of a run of `ttsnap train`, and its clean reward.
`module:function` names a callable of one's own (see `ttsnap.types.Reward`), from the folder one works in or from an
installed package.
"""

from __future__ import annotations

import importlib
import sys
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
            if name not in REWARDS and ":" not in name and not run_of(name):
                known = ", ".join(REWARDS)
                raise ValueError(
                    f"unknown reward {name!r}; known are {known}, or a callable as module:function, "
                    "or the directory of a training run"
                )
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
    return {name: _load(name, device) for name in names}


def _load(name: str, device: Any) -> Callable[..., Any]:
    if name in REWARDS:
        return REWARDS[name](device)  # type: ignore[no-any-return]
    if run := run_of(name):
        from ttsnap.rewards.noise_aware import load_noise_aware

        return load_noise_aware(run[1], device, clean=run[0])
    return own(name)


def run_of(name: str) -> tuple[str | None, str] | None:
    """Clean reward (None: any) and directory of the training run that `shapes+RUN` or `RUN` names; None if neither."""
    from ttsnap.rewards.noise_aware import is_run

    clean, plus, folder = name.partition("+")
    if plus and clean in REWARDS:
        return clean, folder
    return (None, name) if is_run(name) else None


def own(name: str) -> Callable[..., Any]:
    """The callable that `module:function` names.

    Raises:
        ValueError: there is no such module, or no such callable in it.
    """
    module_name, _, function = name.partition(":")
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")  # an installed command does not look into the folder one works in
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise
        raise ValueError(f"reward {name!r}: there is no module {module_name!r} here or installed") from None
    judge = getattr(module, function, None)
    if not callable(judge):
        raise ValueError(f"reward {name!r}: module {module_name!r} has no callable {function!r}")
    return judge  # type: ignore[no-any-return]

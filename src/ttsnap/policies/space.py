"""The hyperparameters of a policy that can be varied, and in which range."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from ttsnap.core.grid import Policy

Range = tuple[float, float]


class Ask(Protocol):
    """Suggests numbers by name, as `optuna.Trial` does."""

    def suggest_float(self, name: str, low: float, high: float) -> float: ...  # noqa: D102
    def suggest_int(self, name: str, low: int, high: int) -> int: ...  # noqa: D102


def ranges(policy: Policy) -> dict[str, Range]:
    """Lowest and highest value by hyperparameter, from the policy's RANGES; of tuples, of each number.

    Raises:
        ValueError: it has none that can be varied.
    """
    found: dict[str, Range] = {
        name: limits for name, limits in getattr(policy, "RANGES", {}).items() if getattr(policy, name) is not None
    }
    if not found:
        raise ValueError(f"the policy {type(policy).__name__} has no hyperparameters to tune; name another")
    return found


def suggest(policy: Policy, ask: Ask) -> Policy:
    """The policy with other hyperparameters: as many rungs as it has, as shares of the steps, in ascending order.

    Raises:
        ValueError: the numbers do not make a policy.
    """
    chosen: dict[str, Any] = {}
    for name, (low, high) in ranges(policy).items():
        now = getattr(policy, name)
        if isinstance(now, tuple):
            values = [ask.suggest_float(f"{name} {place}", low, high) for place in range(len(now))]
            chosen[name] = tuple(round(v, 3) for v in (sorted(values) if name == "rungs" else values))
        elif isinstance(low, int) and isinstance(high, int):
            chosen[name] = ask.suggest_int(name, low, high)
        else:
            chosen[name] = round(ask.suggest_float(name, low, high), 3)
    if "grow" in chosen:  # at least what is kept, as a policy that forks needs it
        chosen["grow"] = tuple(map(max, chosen["grow"], chosen["keep"]))
    return dataclasses.replace(policy, **chosen)  # type: ignore[type-var]


def values(policy: Policy, num_steps: int) -> dict[str, float]:
    """What `suggest` must be told to make this policy again, as nearly as the ranges allow.

    Args:
        policy: of any hyperparameters.
        num_steps: that rungs in calls are shares of.
    """
    found: dict[str, float] = {}
    for name, (low, high) in ranges(policy).items():
        now = getattr(policy, name)
        for place, value in enumerate(now if isinstance(now, tuple) else (now,)):
            share = value / num_steps if name in ("rungs", "look", "step", "steps") and value >= 1 else value
            clipped = min(max(share, low), high)
            found[f"{name} {place}" if isinstance(now, tuple) else name] = clipped
    return found

"""Policies: which candidates to look at, when, and which to drop. Each is one file and one frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ttsnap.policies.best_of_n import BestOfN
from ttsnap.policies.early_selection import EarlySelection
from ttsnap.policies.successive_halving import SuccessiveHalving
from ttsnap.policies.tapered_halving import TaperedHalving
from ttsnap.types import Policy

POLICIES: dict[str, type] = {
    "best-of-n": BestOfN,
    "halving": SuccessiveHalving,
    "tapered-halving": TaperedHalving,
    "early-selection": EarlySelection,
}

PUBLISHED_RUNGS = (0.15, 0.35, 0.6)

__all__ = [
    "POLICIES",
    "BestOfN",
    "EarlySelection",
    "SuccessiveHalving",
    "TaperedHalving",
    "default_policy",
    "from_dict",
    "load",
    "to_dict",
]


def default_policy(num_steps: int) -> Policy:
    """Successive halving with the paper's three rungs, moved to the number of steps."""
    rungs = sorted({max(1, round(share * num_steps)) for share in PUBLISHED_RUNGS})
    rungs = [rung for rung in rungs if rung < num_steps]
    return SuccessiveHalving(tuple(rungs), tuple((0.4, 0.4, 0.5)[: len(rungs)]))


def to_dict(policy: Policy) -> dict[str, Any]:
    """A policy as a JSON object `{"policy": name, ...hyperparameters}`."""
    name = next(name for name, kind in POLICIES.items() if type(policy) is kind)
    fields = dataclasses.asdict(policy)  # type: ignore[call-overload]
    return {"policy": name} | {key: value for key, value in fields.items() if value is not None}


def from_dict(data: dict[str, Any]) -> Policy:
    """The policy of a JSON object as `to_dict` writes it; the keys `provenance` and `report` are ignored.

    Raises:
        ValueError: unknown policy or hyperparameter; the message names the known ones.
    """
    name = data.get("policy") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known are {', '.join(POLICIES)}")
    kind = POLICIES[name]
    known = {f.name for f in dataclasses.fields(kind)}
    given = {key: value for key, value in data.items() if key not in ("policy", "provenance", "report")}
    if wrong := set(given) - known:
        raise ValueError(
            f"policy {name} has no {', '.join(sorted(wrong))}; it has {', '.join(sorted(known)) or 'none'}"
        )
    policy: Policy = kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})
    return policy


def load(path: str | Path) -> Policy:
    """Read a policy file (JSON).

    Raises:
        ValueError: the file is missing, is not JSON, or holds no known policy.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read policy file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"policy file {path} is not valid JSON: {error}") from error
    try:
        return from_dict(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy file {path}: {error}") from error

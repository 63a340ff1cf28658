"""Policies: which candidates to look at, when, and which to drop. Each is one file and one frozen dataclass."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttsnap.core.cost import Budget
from ttsnap.core.grid import Policy
from ttsnap.core.registry import Registry
from ttsnap.files.text import read_text
from ttsnap.policies.best_first import BestFirst
from ttsnap.policies.best_of_n import BestOfN
from ttsnap.policies.branching import Branching
from ttsnap.policies.draft_then_refine import DraftThenRefine
from ttsnap.policies.early_selection import EarlySelection
from ttsnap.policies.evolution import Evolution
from ttsnap.policies.hand_picked import HandPicked
from ttsnap.policies.restart import Restart
from ttsnap.policies.rollover import Rollover
from ttsnap.policies.search_over_paths import SearchOverPaths
from ttsnap.policies.steering import Steering
from ttsnap.policies.successive_halving import SuccessiveHalving
from ttsnap.policies.until_good import UntilGood
from ttsnap.policies.zero_order import ZeroOrder

POLICIES = Registry(
    "ttsnap.policies",
    **{
        "best-of-n": BestOfN,
        "halving": SuccessiveHalving,
        "early-selection": EarlySelection,
        "draft-then-refine": DraftThenRefine,
        "branching": Branching,
        "steering": Steering,
        "zero-order": ZeroOrder,
        "search-over-paths": SearchOverPaths,
        "restart": Restart,
        "best-first": BestFirst,
        "evolution": Evolution,
        "rollover": Rollover,
        "until-good": UntilGood,
        "hand-picked": HandPicked,
    },
)

PRESETS: dict[str, dict[str, Any]] = {  # published settings by the name they are known by
    "psp": {"policy": "halving", "rungs": (0.25, 0.5), "keep": (0.5, 0.5)},  # arXiv 2607.21591
    "dog-trim": {"policy": "halving", "rungs": (0.2, 0.4, 0.6, 0.8), "keep": (0.6,) * 4},  # arXiv 2511.22242
    "beam": {"policy": "branching", "keep": (0.2,) * 3, "grow": (0.5, 0.5, 0.2)},
    "dsearch": {"policy": "branching"},  # arXiv 2503.02039: a beam that narrows
    "svdd": {"policy": "branching", "keep": (0.25,) * 3, "grow": (1.0, 1.0, 0.25), "families": True},  # 2408.08252
    "trajectory-greedy": {  # arXiv 2511.22242, a baseline
        "policy": "branching",
        "rungs": (0.2, 0.4, 0.6, 0.8),
        "keep": (0.01,) * 4,
        "grow": (1.0, 1.0, 1.0, 1.0),
        "angle": 90.0,
    },
    "fk-max": {"policy": "steering"},  # arXiv 2501.06848
    "fk-difference": {"policy": "steering", "potential": "difference"},
    "fk-sum": {"policy": "steering", "potential": "sum"},
    "smc": {"policy": "steering", "potential": "difference", "threshold": 0.5, "resampling": "multinomial"},
    "epsilon-greedy": {"policy": "zero-order", "explore": 0.4},  # arXiv 2501.09732
    "evosearch": {"policy": "evolution"},  # arXiv 2505.17618
    "spectral": {"policy": "evolution", "band": (0.0, 0.35), "angle": 60.0},  # SES
    "rbf": {"policy": "rollover"},  # arXiv 2503.19385
}

MOST = 16 << 20  # bytes of a policy file
TUNED = Path(__file__).parent / "tuned"  # what ships
NOTES = ("provenance", "held_out", "by_budget")  # what a policy file may say beside the policy
PUBLISHED_RUNGS = (0.15, 0.35, 0.6)
FEW_STEPS = 8  # up to which a model counts as one of few steps

__all__ = [
    "POLICIES",
    "PRESETS",
    "BestFirst",
    "BestOfN",
    "Branching",
    "DraftThenRefine",
    "EarlySelection",
    "Evolution",
    "HandPicked",
    "Restart",
    "Rollover",
    "SearchOverPaths",
    "Steering",
    "SuccessiveHalving",
    "UntilGood",
    "ZeroOrder",
    "baseline_steps",
    "default_policy",
    "for_budget",
    "from_dict",
    "load",
    "load_with_notes",
    "named",
    "parse",
    "read",
    "save",
    "shipped",
    "to_dict",
    "tuned_policy",
]


def read(text: str, budget: Budget | None = None) -> tuple[Policy | None, int | None]:
    """The policy that a text says: by its name, as the JSON object that `to_dict` writes, or what a file has.

    Args:
        text: what `--policy` is given.
        budget: what a prompt may cost, see `for_budget`.

    Returns:
        The policy, None for plain `halving`, whose rungs depend on the steps; and the number of steps that it was tuned
        with, where that was tuned.

    Raises:
        ValueError: no such policy, or one that is not searched with by name.
    """
    if text.startswith("{"):
        return parse(text), None
    if text.endswith(".json") or (text not in {*POLICIES, *PRESETS} and Path(text).exists()):
        return for_budget(text, budget)
    return named(text), None


def named(name: str) -> Policy | None:
    """A policy by its name; None for plain `halving`, whose rungs depend on the steps.

    Raises:
        ValueError: no such policy, or one that is not searched with by name.
    """
    if name == "halving":
        return None
    if name == "hand-picked":
        raise ValueError("the policy hand-picked needs a person at each look: open the page with ttsnap app")
    if name == "until-good":
        raise ValueError("until-good needs a reward to stop at: give --stop-at 3.5, or stop_at in a policy file")
    if name in PRESETS:
        return from_dict(PRESETS[name])
    if name in POLICIES:
        made: Policy = POLICIES[name]()
        return made
    raise ValueError(
        f"unknown policy {name!r}; known are {', '.join([*POLICIES, *PRESETS])}, or a file such as tuned.json"
    )


def default_policy(num_steps: int) -> Policy:
    """Successive halving with the paper's three rungs, moved to the number of steps; of few steps two late ones.

    With 8 steps or fewer the paper's shares look too early: see docs/searches.md.
    """
    shares, keep = ((0.5, 0.75), (0.5, 0.4)) if num_steps <= FEW_STEPS else (PUBLISHED_RUNGS, (0.4, 0.4, 0.5))
    rungs = sorted({max(1, round(share * num_steps)) for share in shares})
    rungs = [rung for rung in rungs if rung < num_steps]
    return SuccessiveHalving(tuple(rungs), tuple(keep[: len(rungs)]))


def tuned_policy(
    model: str, rewards: Sequence[str], num_steps: int | None = None, budget: Budget | None = None
) -> tuple[Policy, int] | None:
    """The policy that ships for a model with these rewards, and its number of steps; None if none does.

    Args:
        model: its name.
        rewards: names of what judges the looks.
        num_steps: denoiser calls of a finished image, if they are given: of what was tuned with as many.
        budget: what a prompt may cost, see `for_budget`; None: the file's own, else that of the largest budget.
    """
    if not model.replace("-", "").isidentifier():  # a path is no name
        return None
    for path in sorted(TUNED.glob(f"{model}*.json")):
        policy, notes = load_with_notes(path)
        made_for = notes["provenance"]
        if made_for.get("guides", made_for["rewards"]) != list(rewards):
            continue
        own = int(made_for["num_steps"])
        entries = [entry for entry in _by_budget(notes, own) if num_steps in (None, entry[2])]
        if not (chosen := _within(entries, budget)) and num_steps in (None, own):
            return policy, own
        chosen = chosen or max(entries, key=lambda entry: entry[0].amount, default=None)
        return chosen[1:] if chosen else None
    return None


def baseline_steps(model: str, targets: Sequence[str], policy: object = None) -> tuple[int, ...]:
    """Numbers of steps that best-of-N is compared with: a model's own, and the one at which best-of-N is best.

    Args:
        model: its name; of models without a schedule that ships nothing is known,
        targets: nor for other rewards of finished images,
        policy: but by a policy file, if its steps were tuned, too.
    """
    files = list(TUNED.glob(f"{model}*.json")) if model.replace("-", "").isidentifier() else []
    files += [Path(policy)] if isinstance(policy, str) and policy.endswith(".json") else []
    found: set[int] = set()
    for path in files:
        made = load_with_notes(path)[1].get("provenance", {})
        if made.get("rewards") == list(targets) and path.parent == TUNED:
            found.add(made["num_steps"])
        if made.get("rewards") == list(targets) and "best_of_n_steps" in made:
            found.add(made["best_of_n_steps"])
    return tuple(sorted(found))


def shipped() -> str:
    """A fingerprint of the schedules that ship, for records of searches with whatever is the default."""
    files = sorted(TUNED.glob("*.json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def to_dict(policy: Policy) -> dict[str, Any]:
    """A policy as a JSON object `{"policy": name, ...hyperparameters}`."""
    name = next(name for name, kind in POLICIES.items() if type(policy) is kind)
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy) if f.compare}  # type: ignore[arg-type]
    return {"policy": name} | {
        key: to_dict(value) if isinstance(value, Policy) else value
        for key, value in fields.items()
        if value is not None and not (name == "halving" and (key, value) == ("least", 1))
    }


def from_dict(data: dict[str, Any]) -> Policy:
    """The policy of a JSON object as `to_dict` writes it; what is under NOTES does not matter.

    Raises:
        ValueError: unknown policy or hyperparameter; the message names the known ones.
    """
    name = data.get("policy") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known are {', '.join(POLICIES)}")
    kind = POLICIES[name]
    known = {f.name for f in dataclasses.fields(kind) if f.compare}
    given = {key: value for key, value in data.items() if key != "policy" and key not in NOTES}
    if wrong := set(given) - known:
        raise ValueError(
            f"policy {name} has no {', '.join(sorted(wrong))}; it has {', '.join(sorted(known)) or 'none'}"
        )
    policy: Policy = kind(**{key: _value(value) for key, value in given.items()})
    return policy


def _value(value: Any) -> Any:
    """A hyperparameter as it was before JSON; some are policies themselves."""
    if isinstance(value, dict):
        return from_dict(value)
    return tuple(value) if isinstance(value, list) else value


def parse(text: str) -> Policy:
    """The policy of a text with a JSON object as `to_dict` writes it; no file is read.

    Raises:
        ValueError: it is not JSON, or no known policy.
    """
    try:
        return from_dict(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"policy {text[:60]}: {error}") from error


def load(path: str | Path) -> Policy:
    """Read a policy file (JSON).

    Raises:
        ValueError: the file is missing, is not JSON, or holds no known policy.
    """
    return load_with_notes(path)[0]


def load_with_notes(path: str | Path) -> tuple[Policy, dict[str, Any]]:
    """Read a policy file, and what it says about the policy: `provenance`, `held_out` and `by_budget`, where given.

    Raises:
        ValueError: as `load`.
    """
    text = read_text(Path(path), MOST, "policy file")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"policy file {path} is not valid JSON: {error}") from error
    try:
        return from_dict(data), {key: data[key] for key in NOTES if key in data}
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy file {path}: {error}") from error


def for_budget(path: str | Path, budget: Budget | None) -> tuple[Policy, int | None]:
    """The policy that a file has for a budget, and the number of steps that it was tuned with, where that was tuned.

    A file that was tuned for several budgets gives that of the largest one that is not above `budget`, else of the
    least; of a budget in another unit, or without one, its own policy.

    Raises:
        ValueError: as `load`.
    """
    policy, notes = load_with_notes(path)
    made = notes.get("provenance", {})
    steps = int(made["num_steps"]) if "steps" in made else None
    try:
        chosen = _within(_by_budget(notes, steps), budget)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"policy file {path}: by_budget is a list of a budget and its policy each, as `ttsnap tune` writes it"
        ) from error
    return chosen[1:] if chosen else (policy, steps)


def _by_budget(notes: dict[str, Any], steps: Any) -> list[tuple[Budget, Policy, Any]]:
    """Budgets of a policy file, what is best for each, and with how many steps."""
    entries = notes.get("by_budget", [])
    return [(Budget.parse(e["budget"]), from_dict(e["policy"]), e.get("num_steps", steps)) for e in entries]


def _within(entries: list[tuple[Budget, Policy, Any]], budget: Budget | None) -> tuple[Budget, Policy, Any] | None:
    """The entry of the largest budget that is not above this one, else of the least; None of none in its unit."""
    found = sorted((e for e in entries if budget and e[0].unit == budget.unit), key=lambda entry: entry[0].amount)
    if not found or budget is None:
        return None
    within = [entry for entry in found if entry[0].amount <= budget.amount * (1 + 1e-9)]
    return within[-1] if within else found[0]


def save(policy: Policy, path: str | Path, **notes: Any) -> None:
    """Write a policy file, atomically.

    Args:
        policy: what to write.
        path: the file; its folder is made if needed.
        **notes: `provenance`, `held_out`, JSON objects; `by_budget`, a list of `budget`, `policy`, `num_steps` and
            `held_out`.

    Raises:
        ValueError: other notes.
    """
    from ttsnap.files.storage import write_json

    if wrong := set(notes) - set(NOTES):
        raise ValueError(f"a policy file has notes on {', '.join(NOTES)}, not {', '.join(sorted(wrong))}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(to_dict(policy) | notes, path)

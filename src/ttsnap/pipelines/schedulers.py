"""Schedulers in place of a pipeline's own: by a short name, or any that diffusers has, with options of theirs.

A model that predicts a flow needs a scheduler that knows flows, and the other way round: what does not fit is refused.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttsnap.core.values import read_options

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "ddim": ("DDIMScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "dpm-karras": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
}
EULER, FLOW_EULER = "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
FLOWS = "euler, dpm, UniPCMultistep, DEISMultistep"  # that know flows, to be named where another was asked for


def read_scheduler(text: str) -> tuple[str, dict[str, Any]]:
    """Class and options of a scheduler such as `dpm` or `UniPCMultistep,solver_order=3`.

    Raises:
        ValueError: diffusers has no such scheduler, or it takes no such option.
    """
    name, _, rest = text.partition(",")
    name, given = name.strip(), read_options(rest, "--scheduler UniPCMultistep,solver_order=3")
    kind, options = SCHEDULERS[name] if name in SCHEDULERS else (_class_named(name), {})
    if given:
        known = _options_of(kind)
        for option in given:
            if option not in known:
                close = difflib.get_close_matches(option, known, 1)
                meant = f"; did you mean {close[0]}?" if close else f"; it takes {', '.join(known)}"
                raise ValueError(f"{kind} takes no option {option!r}{meant}")
    return kind, options | given


def check_scheduler(text: str) -> None:
    """ValueError where there is no such scheduler, or it takes no such option."""
    read_scheduler(text)


def check_fits(model: str, text: str) -> None:
    """ValueError where a scheduler does not fit the one of a diffusers directory; nothing is loaded."""
    file = Path(model) / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whatever is wrong there is told when the model is loaded
    if isinstance(config, dict):
        fitting(text, str(config.get("_class_name", "")), config)


def fitting(text: str, own: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class and options of a scheduler that is to take the place of another.

    Args:
        text: what is asked for.
        own: class of the pipeline's own scheduler.
        config: of that.

    Raises:
        ValueError: one of the two is for flows, the other is not.
    """
    kind, options = read_scheduler(text)
    flow = own.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    flow = flow or config.get("prediction_type") == "flow_prediction"
    if kind.startswith("FlowMatch") and not flow:
        raise ValueError(f"{kind} is for models that predict a flow; this one's scheduler is {own}: take {EULER[:-9]}")
    if not flow or kind.startswith("FlowMatch"):
        return kind, options
    if kind == EULER and text.partition(",")[0].strip() in SCHEDULERS:
        return FLOW_EULER, options
    known = _options_of(kind)
    if "use_flow_sigmas" not in known:
        raise ValueError(f"this model predicts a flow, for which {kind} is not made; such as {FLOWS} are")
    flows = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if "flow_shift" in known and config.get("shift") and not config.get("use_dynamic_shifting"):
        flows["flow_shift"] = config["shift"]
    return kind, {name: value for name, value in flows.items() if config.get(name) != value} | options


def with_scheduler(pipe: Any, text: str) -> tuple[Any, str]:
    """The pipeline with another scheduler of the same configuration, and the line of Python that gives it that.

    Raises:
        ValueError: no such scheduler, none that fits, or the pipeline has no scheduler.
    """
    import diffusers

    check_scheduler(text)
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler to replace")
    kind, options = fitting(text, type(pipe.scheduler).__name__, pipe.scheduler.config)
    twin = copy.copy(pipe)
    twin.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    extra = "".join(f", {key}={value!r}" for key, value in options.items())
    return twin, f"pipe.scheduler = diffusers.{kind}.from_config(pipe.scheduler.config{extra})"


def _class_named(name: str) -> str:
    """The scheduler of diffusers that is meant, with or without `Scheduler` at its end, in any case."""
    import diffusers

    known = {kind.lower(): kind for kind in dir(diffusers) if kind.endswith("Scheduler") and "Flax" not in kind}
    lower = name.lower()
    if found := known.get(lower) or known.get(f"{lower}scheduler") or known.get(f"{lower}discretescheduler"):
        return found
    close = difflib.get_close_matches(lower, known, 3)
    meant = f"did you mean {' or '.join(known[one] for one in close)}?" if close else "or any that diffusers has"
    raise ValueError(f"unknown scheduler {name!r}; known are {', '.join(SCHEDULERS)}; {meant}")


def _options_of(kind: str) -> list[str]:
    """What the scheduler of a class can be told."""
    import diffusers

    return [name for name in inspect.signature(getattr(diffusers, kind).__init__).parameters if name != "self"]


__all__ = ["SCHEDULERS", "check_fits", "check_scheduler", "with_scheduler"]

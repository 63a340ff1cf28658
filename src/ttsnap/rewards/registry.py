"""Names of rewards, and what they say: kinds, weights, runs, callables of one's own."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttsnap.core.registry import Registry
from ttsnap.rewards.own import adapt


class Published:
    """Loads a published reward: a function of a device and a path, found when it is called."""

    def __init__(self, module: str, function: str) -> None:
        self.module, self.function = module, function

    def __call__(self, device: Any = "cpu", path: str | None = None) -> Any:
        """The reward, with the hub's weights or those at `path`."""
        return getattr(importlib.import_module(f"ttsnap.rewards.{self.module}"), self.function)(device, path)


REWARDS = Registry(
    "ttsnap.rewards",  # functions of a device that return a reward
    **{
        "imagereward": Published("blip", "load_imagereward"),
        "pickscore": Published("clip", "load_pickscore"),
        "hpsv2": Published("clip", "load_hpsv2"),
        "hpsv2.1": Published("clip", "load_hpsv21"),
        "clipscore": Published("clip", "load_clipscore"),
        "aesthetic": Published("clip", "load_aesthetic"),
        "geneval": Published("geneval", "load_geneval"),
        "hpsv3": Published("hpsv3", "load_hpsv3"),
        "mps": Published("mps", "load_mps"),
        "unifiedreward": Published("unifiedreward", "load_unifiedreward"),
        "vqascore": Published("vqascore", "load_vqascore"),
        "vlm": Published("vlm", "load_vlm"),
    },
)

Rewards = str | Sequence[str] | Callable[..., Any] | Mapping[str, Callable[..., Any]]


RUN = "run.json"  # describes a run of `ttsnap train`
HEAD = "head.json"  # describes a head on the denoiser's features, see ttsnap.rewards.feature_head


def is_run(path: str | Path) -> bool:
    """Whether there is a training run at `path`."""
    return (Path(path) / RUN).is_file()


def is_head(path: str | Path) -> bool:
    """Whether there is a head on the denoiser's features at `path`."""
    return (Path(path) / HEAD).is_file()


class Spec(NamedTuple):
    """What `NAME=PATH+LEVELS` says: clean reward (None: that of the run), its weights, its noise-aware weights."""

    clean: str | None
    path: str | None = None
    levels: str | None = None

    @property
    def name(self) -> str:
        """How results call it: without the path of its weights."""
        return "+".join(part for part in (self.clean, self.levels) if part)


def parse(text: str) -> Spec | None:
    """What a name says; None for one that says neither a known reward nor a run."""
    found = re.fullmatch(r"([\w.-]+)(?:([=+])(.+))?", text, re.DOTALL)
    if not found or found[1] not in REWARDS:
        return Spec(None, None, text) if is_run(text) or is_head(text) else None
    name, sign, rest = found.groups()
    if sign is None:
        return Spec(name)
    if sign == "+":
        return Spec(name, None, rest)
    path, plus, levels = rest.rpartition("+")
    return Spec(name, path, levels) if plus and not Path(rest).exists() else Spec(name, rest)


def names_of(rewards: Rewards) -> list[str]:
    """The names of rewards; ValueError names the known ones when one is not known."""
    if callable(rewards):
        return [getattr(rewards, "__name__", type(rewards).__name__)]
    if isinstance(rewards, Mapping):
        names = [name.strip() for name in rewards]
    else:
        names = [_name(text) for text in split(rewards)]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"rewards must be named once each, got {', '.join(names) or 'none'}")
    return names


def files_of(rewards: str) -> dict[str, Path]:
    """Files and directories that decide what rewards by name say, by what they are: weights, runs, one's own code."""
    found: dict[str, Path] = {}
    for text in split(rewards):
        spec = parse(text)
        if spec is None:
            _look_here()
            with contextlib.suppress(ImportError, ValueError):  # which is told when the reward is loaded
                module = importlib.util.find_spec(text.partition(":")[0])
                found |= {f"reward {text}": Path(module.origin)} if module and module.origin else {}
            continue
        named = {f"reward {spec.clean}": spec.path, f"reward {spec.levels}": spec.levels}
        found |= {name: Path(path) for name, path in named.items() if path}
    return found


def split(rewards: str | Sequence[str]) -> list[str]:
    """Names of several rewards."""
    return [text.strip() for text in (rewards.split(",") if isinstance(rewards, str) else rewards)]


def _name(text: str) -> str:
    if spec := parse(text):
        if spec.path is not None and not isinstance(REWARDS[str(spec.clean)], Published):
            raise ValueError(f"reward {spec.clean} takes no weights of one's own, got {text!r}")
        return spec.name
    if ":" in text:
        return text
    raise ValueError(
        f"unknown reward {text!r}; known are {', '.join(REWARDS)}, or a callable as module:function, "
        "or the directory of a training run"
    )


def load_clean(spec: Spec, device: Any) -> Any:
    """The reward that a name (and a path) says, without noise-aware weights."""
    loader = REWARDS[str(spec.clean)]
    return loader(device) if spec.path is None else loader(device, spec.path)


def load_plain(text: str, device: Any) -> Any:
    """One reward by its name that has no noise-aware weights, or a callable of one's own.

    Raises:
        ValueError: no such reward, or several, or one with noise-aware weights.
    """
    if len(names_of(text)) != 1:
        raise ValueError(f"one reward is trained at a time, got {text}")
    spec = parse(text)
    if spec is None:
        return own(text)
    if spec.levels is not None:
        raise ValueError(f"reward {text} is noise-aware already; name the clean one")
    return load_clean(spec, device)


def own(name: str) -> Callable[..., Any]:
    """The callable that `module:function` names.

    Raises:
        ValueError: there is no such module, or no such callable in it.
    """
    module_name, _, function = name.partition(":")
    _look_here()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise
        raise ValueError(f"reward {name!r}: there is no module {module_name!r} here or installed") from None
    except Exception as error:
        raise ValueError(f"reward {name!r}: module {module_name!r} fails: {type(error).__name__}: {error}") from error
    judge = getattr(module, function, None)
    if not callable(judge):
        raise ValueError(f"reward {name!r}: module {module_name!r} has no callable {function!r}")
    return judge  # type: ignore[no-any-return]


def _look_here() -> None:
    """An installed command does not look for modules in the folder one works in."""
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")


def own_of(rewards: Rewards) -> dict[str, Callable[..., Any]]:
    """Those that are callables of one's own and can be tried at once: not those that sit on a device."""
    if callable(rewards):
        found = {names_of(rewards)[0]: rewards}
    elif isinstance(rewards, Mapping):
        found = dict(rewards)
    else:
        found = {text: own(text) for text in split(rewards) if parse(text) is None}
    return {name: adapt(judge) for name, judge in found.items() if not _placed(judge)}


def _placed(judge: Any) -> bool:
    """Whether a callable is ttsnap's own, a module, or knows of a device, so that pictures elsewhere would not do."""
    owner = getattr(judge, "__self__", getattr(judge, "func", judge))  # of a bound method, of a partial
    if owner is not judge and not inspect.isfunction(owner):
        return _placed(owner)
    ours = type(owner).__module__.startswith("ttsnap.")
    return ours or hasattr(owner, "parameters") or hasattr(owner, "device")


def targets_of(judges: Mapping[str, Any]) -> list[str]:
    """What judges finished images: of a noise-aware reward its clean one, unless that would name one twice."""
    names = [getattr(judge, "clean_name", "") or name for name, judge in judges.items()]
    return names if len(set(names)) == len(names) else list(judges)

"""Rewards by name. Each loads when it is asked for.

NAME                `shapes` or a published reward; its weights come from the Hugging Face cache or hub
NAME=PATH           the same with weights of one's own: a file, or a directory that holds one
NAME+RUN            noise-aware: the clean reward and the directory of a run of `ttsnap train`; or RUN alone
NAME=PATH+RUN       both
module:function     a callable of one's own (see `ttsnap.core.grid.Reward`), from the folder one works in or installed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ttsnap.pipelines.patience import Timed
from ttsnap.rewards.own import adapt
from ttsnap.rewards.registry import (
    REWARDS,
    Rewards,
    Spec,
    files_of,
    is_head,
    is_run,
    load_clean,
    names_of,
    own,
    own_of,
    parse,
    split,
    targets_of,
)


def load(rewards: Rewards, device: Any = "cpu", timeout: float | None = None) -> dict[str, Callable[..., Any]]:
    """Rewards by name, from a name, several (a list, or separated by commas), a callable, or a mapping of callables.

    Args:
        rewards: what is named.
        device: where they run.
        timeout: seconds in which each has to answer.
    """
    found = _load_all(rewards, device)
    return {name: Timed(name, judge, timeout) for name, judge in found.items()} if timeout else found


def _load_all(rewards: Rewards, device: Any) -> dict[str, Callable[..., Any]]:
    names = names_of(rewards)
    if callable(rewards):
        return {names[0]: adapt(rewards)}
    if isinstance(rewards, Mapping):
        return {name: adapt(judge) for name, judge in rewards.items()}
    return {name: _load(text, device) for name, text in zip(names, split(rewards), strict=True)}


def _load(text: str, device: Any) -> Callable[..., Any]:
    spec = parse(text)
    if spec is None:
        return adapt(own(text))
    if spec.levels is not None:
        from ttsnap.rewards.noise_aware import load_noise_aware
        from ttsnap.rewards.published import find_steps, folder_of, load_published

        if is_head(spec.levels):
            from ttsnap.rewards.feature_head import load_head

            return load_head(spec.levels, device, clean=spec.clean)
        clean = Spec(spec.clean, spec.path) if spec.clean else None
        if clean and not is_run(spec.levels):
            folder = folder_of(spec.levels, clean.name)
            if find_steps(folder, clean.name):
                return load_published(folder, clean, device)
        return load_noise_aware(spec.levels, device, clean=clean)
    made: Callable[..., Any] = load_clean(spec, device)
    return made


__all__ = [
    "REWARDS",
    "Rewards",
    "Spec",
    "adapt",
    "files_of",
    "load",
    "load_clean",
    "names_of",
    "own",
    "own_of",
    "parse",
    "split",
    "targets_of",
]

"""Samples candidates and keeps what every x0 estimate shows: its rewards, or the image itself.

Candidates run in fixed groups, so that one that was interrupted runs in the same company again: the results of a
resumed run are those of an uninterrupted one to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.recordings.recording import Recording
from ttsnap.types import IntArray

if TYPE_CHECKING:
    from torch import Tensor

    from ttsnap.samplers.base import BaseSampler


def seeds_of(prompts: Sequence[int], per_prompt: int, seed: int = 0) -> IntArray:
    """Seeds [prompts, candidates], different for every prompt (by its index) and candidate."""
    if per_prompt < 1:
        raise ValueError(f"candidates per prompt must be at least 1, got {per_prompt}")
    return seed + np.asarray(prompts, dtype=np.int64)[:, None] * per_prompt + np.arange(per_prompt)


def chosen_calls(calls: Sequence[int] | None, num_steps: int) -> tuple[int, ...]:
    """The calls to record, ascending; all by default, and always the last, which finishes the image."""
    chosen = sorted(set(calls or range(1, num_steps + 1)) | {num_steps})
    if not 1 <= chosen[0] <= chosen[-1] <= num_steps:
        wrong = next(call for call in chosen if not 1 <= call <= num_steps)
        raise ValueError(f"calls must be in 1..{num_steps}, got {wrong}")
    return tuple(chosen)


def walk(
    sampler: BaseSampler, prompts: Sequence[str], seeds: Sequence[int], calls: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Each of `calls` with the decoded x0 estimates [n, 3, h, w] (0..1, fp32) of n candidates after it."""
    state = sampler.start(prompts, seeds)
    for call in calls:
        state = sampler.advance(state, call)
        assert state.x0 is not None
        yield call, sampler.decode(state.x0)


def groups(num_prompts: int, per_prompt: int, batch: int) -> Iterator[tuple[range, list[slice]]]:
    """Prompts that run together, and slices of their candidates (in prompt order) of at most `batch` each."""
    together = max(1, batch // per_prompt)
    for first in range(0, num_prompts, together):
        prompts = range(first, min(first + together, num_prompts))
        count = len(prompts) * per_prompt
        yield prompts, [slice(start, min(start + batch, count)) for start in range(0, count, batch)]


def record_rewards(
    sampler: BaseSampler,
    rewards: Mapping[str, Any],
    prompts: Sequence[str],
    seeds: IntArray,
    out: str | Path,
    *,
    calls: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Recording:
    """Judge the x0 estimates of every candidate and store the rewards, prompt by prompt; no image is written.

    A recording of the same settings is gone on with.

    Args:
        sampler: drives the model.
        rewards: name -> reward.
        prompts: all prompts [P].
        seeds: seeds [P, candidates].
        out: the recording to write.
        calls: after which calls to look (default: all); the last always counts.
        settings: configuration to keep as provenance; a recording made with others is refused.
        on_start: called once with the number of images that are left to judge.
        on_images: called with the number of images just judged.

    Raises:
        ValueError: settings differ from those of the recording that is there, or a reward is not a finite number.
    """
    from ttsnap.environments.live import judge
    from ttsnap.provenance import versions

    steps, per_prompt = sampler.num_steps, seeds.shape[1]
    calls = chosen_calls(calls, steps)
    settings = dict(settings or {}) | {"calls": list(calls)}
    recording = Recording.create(
        out,
        prompts=prompts,
        num_candidates=per_prompt,
        num_steps=steps,
        rewards=list(rewards),
        sigmas=sampler.sigmas,
        provenance={"made by": "ttsnap record", "settings": settings, "versions": versions()},
        resume=True,
    )
    check_same(settings, recording.provenance.get("settings", {}), recording.path)
    done = recording.done
    if (recording.seeds[done] != seeds[done]).any():
        raise ValueError(f"{recording.path} was recorded with other seeds")
    todo = [group for group in groups(len(prompts), per_prompt, sampler.max_batch) if not done[list(group[0])].all()]
    if on_start:
        on_start(sum(len(rows) for rows, _ in todo) * per_prompt * len(calls))
    for rows, parts in todo:
        texts = [prompts[p] for p in rows for _ in range(per_prompt)]
        numbers = seeds[rows.start : rows.stop].ravel()
        values = np.full((len(texts), steps, len(rewards)), np.nan, dtype=np.float32)
        for part in parts:
            for call, images in walk(sampler, texts[part], numbers[part].tolist(), calls):
                sigma = 0.0 if call == steps else sampler.sigmas[call - 1]
                for column, (name, reward) in enumerate(rewards.items()):
                    values[part, call - 1, column] = judge(name, reward, images, texts[part], sigma)
                _check_finite(values[part, call - 1], list(rewards), texts[part], numbers[part], call)
                if on_images:
                    on_images(len(images))
        for p, clean in zip(rows, values.reshape(len(rows), per_prompt, steps, -1), strict=True):
            if not done[p]:
                recording.write_prompt(p, clean, seeds=seeds[p])
        sampler.forget_prompts()
    return recording


def check_same(settings: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless the settings are those that `path` was begun with."""
    different = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
    if different:
        raise ValueError(
            f"{path} was begun with other settings ({', '.join(different)} differ); give the same, or another output"
        )


def _check_finite(values: np.ndarray, names: list[str], prompts: list[str], seeds: IntArray, call: int) -> None:
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"reward {names[column]!r} returned {values[row, column]:g} for prompt {prompts[row]!r}, "
            f"seed {seeds[row]} at step {call}"
        )

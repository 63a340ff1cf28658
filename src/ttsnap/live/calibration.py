"""Seconds on this machine: of a denoiser call, a decode and a look."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.cost import CostModel, Seconds
from ttsnap.core.grid import FloatArray
from ttsnap.live.engine import wait
from ttsnap.live.judging import judge

if TYPE_CHECKING:
    from ttsnap.pipelines.sampler import Sampler


def calibrate(
    sampler: Sampler,
    rewards: Mapping[str, Any],
    model: CostModel,
    prompt: str,
    clock: Callable[[], float] = time.perf_counter,
    patience: float = 5.0,
) -> CostModel:
    """Measure this machine: seconds of a call, a decode and a look (and of those of early looks), for one and a batch.

    Two batch sizes give a fixed part per batch and a part per image. Of up to three repetitions the slowest counts,
    so that a budget in seconds is kept to. Where a full batch would take longer than `patience`, a smaller one is
    measured.

    Args:
        sampler: drives the pipeline; forgets its prompts.
        rewards: the rewards of the search.
        model: the counted cost model that receives the seconds.
        prompt: any prompt of the search.
        clock: returns seconds; tests pass their own.
        patience: seconds after which a measurement is not repeated.
    """
    from ttsnap.pipelines.features import attach
    from ttsnap.pipelines.views import View, need_pictures

    attach(sampler, rewards)

    def trial(size: int) -> FloatArray:
        start = sampler.start([prompt] * size, list(range(size)))
        device = start.latents.device
        marks = [_now(clock, device)]
        made = sampler.advance(start, 1)
        marks.append(_now(clock, device))
        for step in (sampler.num_steps, *(int(look.until) for look in model.early)):
            view = View(sampler, replace(made, step=step))  # a look there takes as long
            if need_pictures(rewards, view.sigma):
                view.images  # noqa: B018
            marks.append(_now(clock, device))
            for name, reward in rewards.items():
                judge(name, reward, view, [prompt] * size, view.sigma)
            marks.append(_now(clock, device))
        return np.diff(marks)

    def slowest(size: int) -> FloatArray:
        start = clock()
        trial(size)  # warm up
        trials = [trial(size)]
        while len(trials) < 3 and clock() - start < patience:
            trials.append(trial(size))
        return np.asarray(np.max(trials, axis=0))

    with warnings.catch_warnings():  # the search itself will say that a prompt is cut or a batch too large
        warnings.simplefilter("ignore")
        one = slowest(1)
        size = min(sampler.max_batch, max(2, int(patience / max(one.sum(), 1e-9))))
        many = slowest(size) if size > 1 else one
        size = min(size, sampler.max_batch)  # halved by now if memory ran out
    sampler.forget_prompts()
    each = np.maximum((many - one) / (size - 1), 0.0) if size > 1 else np.zeros(len(one))
    fixed = np.maximum(one - each, 0.0)
    call, decode, look, *rest = (Seconds(float(f), float(e)) for f, e in zip(fixed, each, strict=True))
    early = tuple(
        replace(cost, picture_seconds=picture, judge_seconds=judged)
        for cost, picture, judged in zip(model.early, rest[::2], rest[1::2], strict=True)
    )
    return replace(
        model, call_seconds=call, decode_seconds=decode, look_seconds=look, max_batch=sampler.max_batch, early=early
    )


def _now(clock: Callable[[], float], device: Any) -> float:
    wait(device)
    return clock()

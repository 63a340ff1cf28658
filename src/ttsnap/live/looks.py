"""Which look is worth its cost: how the ranking by each kind of early look agrees with that of the finished images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.grid import FloatArray, early_calls
from ttsnap.core.ranking import kendall_tau, mean_and_error
from ttsnap.live.engine import wait
from ttsnap.live.judging import judge_in_parts

if TYPE_CHECKING:
    from ttsnap.pipelines.sampler import Sampler

KINDS = ("full", "tiny", "small", "linear")
SERVED = "as served"  # by a noise-aware reward


@dataclass(frozen=True)
class Looked:
    """What one kind of look after one call is worth; Kendall tau within a prompt, mean over prompts; None: not known.

    Attributes:
        kind: of picture: a preview, or `as served` by a noise-aware reward.
        call: after which it was.
        sigma: noise level of the estimate.
        final: tau with the rewards of the finished images.
        error: standard error of `final` over prompts.
        full: tau with the rewards of full decodes of the same estimates.
        tflop: of one look, picture and judgement; calls: the same in denoiser calls.
        seconds: of one look, in a full batch on this machine.
    """

    kind: str
    call: int
    sigma: float
    final: float | None
    error: float | None
    full: float | None
    tflop: float
    calls: float | None
    seconds: float


def compare_looks(
    sampler: Sampler,
    name: str,
    reward: Any,
    prompts: Sequence[str],
    *,
    kinds: Sequence[str] | None = None,
    candidates: int = 16,
    calls: Sequence[int] | None = None,
    seed: int = 0,
    on_start: Callable[[int], None] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> list[Looked]:
    """Look at the same estimates in several ways.

    Args:
        sampler: drives the model; its preview is as before in the end.
        name: of the reward.
        reward: that judges; a noise-aware one also as it serves searches.
        prompts: to sample.
        kinds: as `preview` takes them (default: those that this model has).
        candidates: of each prompt.
        calls: after which to look (default: eight, evenly over the first three fifths).
        seed: first of the candidates'.
        on_start: called with the number of candidates.
        on_images: called with the number of candidates just finished.

    Raises:
        ValueError: a kind that was asked for cannot be had.
    """
    from ttsnap.pipelines import features, previews
    from ttsnap.pipelines.flops import cost_model
    from ttsnap.pipelines.views import View

    clean = getattr(reward, "clean", reward)
    features.attach(sampler, {name: reward})
    before = sampler.preview
    made, models = {}, {}
    for kind in dict.fromkeys(("full", *(kinds or KINDS))):
        try:
            previews.attach(sampler, kind)
        except ValueError:
            if kinds:
                raise
            continue
        made[kind], models[kind] = sampler.preview, cost_model(sampler, {name: clean}, prompts[0])
    sampler.preview = before
    if hasattr(reward, "level"):
        made[SERVED], models[SERVED] = None, cost_model(sampler, {name: reward}, prompts[0])
    chosen = sorted({*(calls or early_calls(sampler.num_steps))} - {sampler.num_steps})
    if on_start:
        on_start(len(prompts) * candidates)

    def unaware(call: int) -> float:
        """The noise level at which a reward judges a picture as it would a finished one."""
        return 0.0 if hasattr(clean, "level") else sampler.sigmas[call - 1]

    def judged_by(judge: Any, view: View, sigma: float) -> FloatArray:
        return judge_in_parts(sampler.limits, name, judge, view, view.group.prompts, sigma)

    values = {kind: np.empty((len(prompts), candidates, len(chosen))) for kind in made}
    seconds = {kind: np.zeros(len(chosen)) for kind in made}
    final = np.empty((len(prompts), candidates))
    try:
        for row, prompt in enumerate(prompts):
            for first in range(0, candidates, sampler.max_batch):
                columns = slice(first, min(candidates, first + sampler.max_batch))
                seeds = range(seed + row * candidates, seed + (row + 1) * candidates)[columns]
                state = sampler.start([prompt] * len(seeds), list(seeds))
                for look, call in enumerate(chosen):
                    state = sampler.advance(state, call)
                    for kind, preview in made.items():
                        sampler.preview = preview
                        judged, level = (reward, sampler.sigmas[call - 1]) if kind == SERVED else (clean, unaware(call))
                        wait(sampler.device)
                        begun = time.perf_counter()
                        view = View(sampler, state)
                        values[kind][row, columns, look] = judged_by(judged, view, level)
                        seconds[kind][look] += time.perf_counter() - begun
                sampler.preview = before
                view = View(sampler, sampler.advance(state, sampler.num_steps))
                final[row, columns] = judged_by(clean, view, 0.0)
                if on_images:
                    on_images(len(seeds))
            sampler.forget_prompts()
    finally:
        sampler.preview = before
    found = []
    for kind in made:
        for look, call in enumerate(chosen):
            ours = values[kind][..., look]
            cost = models[kind].look(call).tflop
            found.append(
                Looked(
                    kind,
                    call,
                    sampler.sigmas[call - 1],
                    *mean_and_error(kendall_tau(ours, final)),
                    mean_and_error(kendall_tau(ours, values["full"][..., look]))[0],
                    cost,
                    cost / models["full"].call_tflop if models["full"].call_tflop else None,
                    float(seconds[kind][look] / final.size),
                )
            )
    return found

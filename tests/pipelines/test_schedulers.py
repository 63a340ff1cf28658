"""Every scheduler and what its model predicts: in batches, at different steps, what the stock call makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pipelines import tiny_any
from ttsnap.pipelines.sampler import Sampler

PROMPT = "a red circle"
KINDS = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "TCDScheduler": {},
    "LCMScheduler": {},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "DPMSolverMultistepScheduler, SDE": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "SASolverScheduler": {},
    "EulerDiscreteScheduler": {"use_beta_sigmas": False},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "UniPCMultistepScheduler, flow": tiny_any.FLOW,
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
NO_SAMPLE = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)


@pytest.fixture(scope="module")
def pipe():
    return tiny_any.stable_diffusion()


def cases():
    """Schedulers, what their models predict, dtypes. The fast tests run each scheduler with one prediction in turn, and
    every sixth in half precision too; the others are slow."""
    for number, (name, options) in enumerate(KINDS.items()):
        predictions = [None] if "flow" in name else PREDICTIONS[: 2 if name in NO_SAMPLE else 3]
        for place, prediction in enumerate(predictions):
            predicts = {"prediction_type": prediction} if prediction else {}
            for dtype in (torch.float32, torch.bfloat16):
                fast = place == number % len(predictions) and (dtype == torch.float32 or number % 6 == 0)
                yield pytest.param(
                    name,
                    options | predicts,
                    dtype,
                    id=f"{name} {prediction or ''} {str(dtype).removeprefix('torch.')}",
                    marks=() if fast else pytest.mark.slow,
                )


@pytest.mark.parametrize(("name", "options", "dtype"), cases())
def test_in_batches_and_at_different_steps_it_is_the_stock_call(pipe, name, options, dtype):
    pipe.scheduler = tiny_any.scheduler(name.partition(",")[0], **options)
    pipe.to(dtype=dtype)
    try:
        sampler = Sampler(pipe, num_inference_steps=4)
        made = _stock(pipe, 1)
        last = sampler.num_steps
        ahead = sampler.advance(sampler.start([PROMPT], [7]), min(2, last - 1))
        with torch.no_grad():
            calls = [*ahead.calls, *(sampler.begin(PROMPT, seed) for seed in (1, 2))]
            sampler.aim(calls, last)
            sampler.bring(calls)
        images = sampler.look(sampler.gather(calls, last))
        loose = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.12, "rtol": 0.1}
        torch.testing.assert_close(images[1:2], made, **loose)
        torch.testing.assert_close(images[:1], _stock(pipe, 7), **loose)
        alone = sampler.look(sampler.advance(sampler.start([PROMPT], [1]), last))
        assert torch.equal(alone, made)
    finally:
        pipe.to(dtype=torch.float32)


def _stock(pipe, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipe(PROMPT, num_inference_steps=4, generator=generator, output_type="np").images
    return torch.from_numpy(np.asarray(made)).movedim(-1, 1)

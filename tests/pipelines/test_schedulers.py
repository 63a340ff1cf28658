"""Every scheduler and what its model predicts: in batches, at different steps, what the stock call makes."""

from __future__ import annotations

import inspect

import diffusers
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


@pytest.fixture(scope="module")
def pipe():
    return tiny_any.stable_diffusion()


def cases():
    for name, options in KINDS.items():
        kind = getattr(diffusers, name.partition(",")[0])
        for prediction in PREDICTIONS:
            if "flow" in name and prediction != "epsilon":
                continue
            if prediction == "sample" and "sample" not in inspect.getsource(kind.step) + inspect.getsource(kind):
                continue
            yield pytest.param(
                name,
                options if "flow" in name else {**options, "prediction_type": prediction},
                id=f"{name} {prediction}",
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "options"), cases())
def test_in_batches_and_at_different_steps_it_is_the_stock_call(pipe, name, options, dtype):
    pipe.scheduler = tiny_any.scheduler(name.partition(",")[0], **options)
    pipe.to(dtype=dtype)
    try:
        sampler = Sampler(pipe, num_inference_steps=4)
        made = _stock(pipe, 1)
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"the scheduler does not take this: {error}")
    finally:
        pipe.to(dtype=torch.float32)
    pipe.to(dtype=dtype)
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
    pipe.to(dtype=torch.float32)


def _stock(pipe, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipe(PROMPT, num_inference_steps=4, generator=generator, output_type="np").images
    return torch.from_numpy(np.asarray(made)).movedim(-1, 1)

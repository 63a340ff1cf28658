"""Steps against the stock schedulers, to the last bit; no model is needed."""

from __future__ import annotations

import math

import pytest
import torch

from tests.samplers.tiny_sd import scheduler
from ttsnap.samplers import Declined
from ttsnap.samplers.steps import choose, steps_of

EXACT = {"atol": 0, "rtol": 0, "equal_nan": True}  # pure noise divided by a signal of zero is not a number, there too
EULER, DDIM, DPM = "EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"
SCHEDULES = {
    "euler": (EULER, {}),
    "karras": (EULER, {"use_karras_sigmas": True}),
    "exponential": (EULER, {"use_exponential_sigmas": True}),
    "beta": (EULER, {"use_beta_sigmas": True}),
    "trailing, zero terminal SNR": (EULER, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    "sigma_min, linspace": (EULER, {"final_sigmas_type": "sigma_min", "timestep_spacing": "linspace"}),
    "log-linear": (EULER, {"interpolation_type": "log_linear"}),
    "continuous": (EULER, {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    "ddim": (DDIM, {"clip_sample": False}),
    "ddim, clipped": (DDIM, {"clip_sample": True, "clip_sample_range": 0.5}),
    "ddim, as shipped with SD 1.5": (DDIM, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddim, zero terminal SNR": (DDIM, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_is_the_stock_one(name, kind, dtype):
    which, options = SCHEDULES[name]
    stock = scheduler(which, **{"prediction_type": kind} | options)
    steps = steps_of(stock, 5, "cpu")
    stock.set_timesteps(5)
    if which == EULER:
        stock.set_begin_index(0)
    draw = torch.Generator().manual_seed(0)
    ours = theirs = (torch.randn(2, 4, 6, 6, generator=draw) * stock.init_noise_sigma).to(dtype)
    assert steps.noise_scale == stock.init_noise_sigma
    assert torch.equal(steps.timesteps, stock.timesteps)
    for index, timestep in enumerate(stock.timesteps):
        assert torch.equal(steps.scale(ours, index), stock.scale_model_input(theirs, timestep))
        prediction = torch.randn(ours.shape, generator=draw).to(dtype)
        made = stock.step(prediction, timestep, theirs)
        ours, x0 = steps(prediction, ours, index)
        theirs = made.prev_sample
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **EXACT)
        if index < 4:
            torch.testing.assert_close(x0, made.pred_original_sample.float(), **EXACT)
    torch.testing.assert_close(x0, ours.float(), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [4, 16])  # the last steps differ below 15
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_karras_sigmas": True},
        {"prediction_type": "v_prediction", "solver_type": "heun"},
        {"solver_order": 1},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ],
    ids=str,
)
def test_every_step_of_dpm_is_the_stock_one_though_it_starts_anew_at_each_call(options, count, dtype):
    stock = scheduler(DPM, **options)
    steps = steps_of(stock, count, "cpu")
    stock.set_timesteps(count)
    draw = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 4, 6, 6, generator=draw).to(dtype)
    x0 = None
    for index, timestep in enumerate(stock.timesteps):
        prediction = torch.randn(ours.shape, generator=draw).to(dtype)
        ours, x0 = steps(prediction, ours, index, x0)
        theirs = stock.step(prediction, timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, **EXACT)
        if index < count - 1:
            torch.testing.assert_close(x0, stock.model_outputs[-1].float(), **EXACT)
    torch.testing.assert_close(x0, ours.float(), **EXACT)


def test_a_multistep_solver_says_what_it_lacks_or_cannot():
    steps = steps_of(scheduler(DPM), 4, "cpu")
    latents = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="needs the x0 estimates of the call before"):
        steps(latents, latents, 2)
    for options in ({"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}):
        with pytest.raises(Declined, match=r"runs as dpmsolver\+\+ of order 1 or 2, not as"):
            steps_of(scheduler(DPM, **options), 4, "cpu")


@pytest.mark.parametrize("name", SCHEDULES)
def test_sigmas_fall_and_are_finite(name):
    which, options = SCHEDULES[name]
    steps = steps_of(scheduler(which, **options), 20, "cpu")
    assert len(steps.sigmas) == len(steps.timesteps) == 20
    assert all(math.isfinite(sigma) for sigma in steps.sigmas)
    assert all(a > b > 0 for a, b in zip(steps.sigmas, steps.sigmas[1:], strict=False))


def test_euler_and_ddim_mean_the_same_by_sigma():
    options = {"timestep_spacing": "leading"}
    euler, ddim = (steps_of(scheduler(kind, **options), 10, "cpu") for kind in (EULER, DDIM))
    torch.testing.assert_close(torch.tensor(euler.sigmas), torch.tensor(ddim.sigmas))


def test_the_scheduler_is_left_alone():
    stock = scheduler(EULER)
    before = stock.timesteps.clone()
    steps_of(stock, 7, "cpu")
    assert torch.equal(stock.timesteps, before)


def test_a_scheduler_by_name_takes_over_the_configuration():
    made, expression = choose("euler-karras", scheduler("PNDMScheduler", beta_end=0.013, skip_prk_steps=True))
    assert (type(made).__name__, made.config.beta_end, made.config.use_karras_sigmas) == (EULER, 0.013, True)
    assert expression == ("diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)")
    with pytest.raises(ValueError, match="unknown scheduler 'heun'; known are euler, euler-karras, ddim"):
        choose("heun", made)


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        (
            "PNDMScheduler",
            {"skip_prk_steps": True},
            "PNDMScheduler is not a pure function .* choose the scheduler euler",
        ),
        ("UniPCMultistepScheduler", {}, "UniPCMultistepScheduler is not a pure function"),
        ("EulerAncestralDiscreteScheduler", {}, "EulerAncestralDiscreteScheduler is not a pure function"),
        (DDIM, {"thresholding": True}, "thresholding is not supported"),
    ],
)
def test_schedulers_that_are_not_pure_functions_are_declined(which, options, message):
    with pytest.raises(Declined, match=message):
        steps_of(scheduler(which, **options), 5, "cpu")

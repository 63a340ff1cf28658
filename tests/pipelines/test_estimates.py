"""x0 and noise level of a scheduler's step, against what was mixed."""

from __future__ import annotations

import pytest
import torch

from ttsnap.pipelines.estimates import Step

# Scheduler, its options, and how much of the clean sample its noisy one holds (`vp`: variance kept, `ve`: added).
MIXED = {
    "DDIMScheduler": ({"clip_sample": False}, "vp"),
    "DDPMScheduler": ({"clip_sample": False}, "vp"),
    "PNDMScheduler": ({"skip_prk_steps": True}, "vp"),
    "TCDScheduler": ({}, "vp"),
    "DPMSolverMultistepScheduler": ({}, "vp"),
    "DPMSolverSinglestepScheduler": ({}, "vp"),
    "DEISMultistepScheduler": ({}, "vp"),
    "UniPCMultistepScheduler": ({"use_karras_sigmas": True}, "vp"),
    "SASolverScheduler": ({}, "vp"),
    "EulerDiscreteScheduler": ({}, "ve"),
    "EulerAncestralDiscreteScheduler": ({}, "ve"),
    "HeunDiscreteScheduler": ({}, "ve"),
    "KDPM2DiscreteScheduler": ({}, "ve"),
    "LMSDiscreteScheduler": ({}, "ve"),
    "FlowMatchEulerDiscreteScheduler": ({"shift": 3.0}, "flow"),
    "FlowMatchHeunDiscreteScheduler": ({}, "flow"),
    "FlowMatchLCMScheduler": ({}, "flow"),
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", MIXED)
def test_a_perfect_model_gives_back_what_was_mixed(name, kind):
    import diffusers

    options, mix = MIXED[name]
    options = options if mix == "flow" else options | {"prediction_type": kind}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(8)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = []
    for timestep in scheduler.timesteps:
        probe = Step(scheduler, clean, timestep, clean, None)
        sigma = _sigma(scheduler, timestep, mix)
        scale = {"ve": 1.0, "vp": 1 / (1 + sigma**2) ** 0.5, "flow": 1 - sigma}[mix]
        sample = scale * clean + sigma * (scale if mix == "vp" else 1.0) * noise
        size = (1 + sigma**2) ** 0.5
        output = (
            {"epsilon": noise, "v_prediction": (noise - sigma * clean) / size}[kind] if mix != "flow" else noise - clean
        )
        scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else None
        step = probe._replace(model_output=output, sample=sample, result=scheduler.step(output, timestep, sample))
        torch.testing.assert_close(step.clean, clean, atol=2e-3 * max(1.0, sigma), rtol=1e-3)
        assert step.level.noise == pytest.approx(sigma, rel=1e-4)
        levels.append(step.level.noise)
    assert levels == sorted(levels, reverse=True)


def _sigma(scheduler, timestep, mix):
    """Noise per signal (of a flow: sigma) of the next call, from the scheduler's tables alone."""
    name = type(scheduler).__name__
    if name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "TCDScheduler"):
        kept = float(scheduler.alphas_cumprod[int(timestep)])
        return ((1 - kept) / kept) ** 0.5
    index = scheduler.step_index or 0
    if name == "KDPM2DiscreteScheduler" and not scheduler.state_in_first_order:
        return float(scheduler.sigmas_interpol[index])
    return float(scheduler.sigmas[index])


def test_an_unknown_scheduler_is_named():
    class Odd:
        def __init__(self):
            self.config = {}

        def step(self):
            """Tells nothing."""

    with pytest.raises(ValueError, match="cannot tell the x0 estimate of a Odd; known are schedulers that"):
        _ = Step(Odd(), torch.zeros(1), 0, torch.zeros(1), (torch.zeros(1),)).clean

"""Schedulers by name: any that diffusers has, with options; what does not fit is refused before a model is loaded."""

from __future__ import annotations

import diffusers
import pytest
import torch

from tests.pipelines import tiny, tiny_sd
from ttsnap.live.session import load_sampler
from ttsnap.pipelines.schedulers import read_scheduler, with_scheduler


@pytest.mark.parametrize(
    ("text", "kind", "options"),
    [
        ("dpm-karras,solver_order=3", "DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", "UniPCMultistepScheduler", {}),
        ("unipcmultistep, solver_type=bh1", "UniPCMultistepScheduler", {"solver_type": "bh1"}),
        ("EulerAncestral", "EulerAncestralDiscreteScheduler", {}),
        ("tcd,steps_offset=1,clip_sample=true", "TCDScheduler", {"steps_offset": 1, "clip_sample": True}),
    ],
)
def test_names_and_options(text, kind, options):
    found, given = read_scheduler(text)
    assert found == kind
    assert options.items() <= given.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "UniPCMultistp",
            "unknown scheduler 'UniPCMultistp'; known are euler, .*; did you mean UniPCMultistepScheduler",
        ),
        ("euler,use_karas_sigmas=true", "takes no option 'use_karas_sigmas'; did you mean use_karras_sigmas?"),
        ("euler,use_karras_sigmas", "an option is written as --scheduler UniPCMultistep,solver_order=3"),
    ],
)
def test_what_is_wrong_is_one_sentence(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_scheduler(text)
    assert "\n" not in str(caught.value)


def test_a_model_of_flows_gets_schedulers_of_flows():
    pipe = tiny.flux(shift=3.0)
    assert type(with_scheduler(pipe, "euler")[0].scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    twin, line = with_scheduler(pipe, "UniPCMultistep,solver_order=3")
    config = twin.scheduler.config
    assert (config.prediction_type, config.use_flow_sigmas, config.flow_shift) == ("flow_prediction", True, 3.0)
    stock = tiny.flux(shift=3.0)
    exec(line, {"pipe": stock, "diffusers": diffusers})
    assert dict(stock.scheduler.config) == dict(config)
    for text, model, message in (
        ("ddim", pipe, "predicts a flow, for which DDIMScheduler is not made; such as .*UniPCMultistep"),
        ("FlowMatchEuler", tiny_sd.stable_diffusion(), "is for models that predict a flow; this one's"),
    ):
        with pytest.raises(ValueError, match=message):
            with_scheduler(model, text)


def test_a_flow_model_with_another_solver_is_the_stock_call():
    options = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": 12}
    stock = tiny.flux(shift=3.0)
    sampler = load_sampler(stock, scheduler="UniPCMultistep", **options)
    made = sampler.look(sampler.advance(sampler.start(["a"], [1]), sampler.num_steps))
    stock.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        stock.scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    images = stock("a", generator=torch.Generator("cpu").manual_seed(1), output_type="pt", **options).images
    assert torch.equal(made, images)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", None)
    with pytest.raises(ValueError, match="predicts a flow, for which DDIMScheduler is not made"):
        load_sampler("shapes", "cpu", scheduler="ddim")

"""Sizes: of a ratio, and those that a pipeline does not take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.pipelines import tiny, tiny_any
from ttsnap.live.session import load_sampler
from ttsnap.live.settings import ModelSettings, read_size
from ttsnap.pipelines.sizes import read_ratio, sized


def test_a_ratio_keeps_the_area_that_the_model_is_made_for():
    flux = SimpleNamespace(default_sample_size=128, vae_scale_factor=8)
    assert sized(flux, "3:2", {}) == {"width": 1280, "height": 832}
    assert sized(flux, "9:16", {}) == {"width": 768, "height": 1344}
    assert sized(tiny.flux(), "3:2", {}) == {"width": 320, "height": 208}  # its own are of 256
    assert sized(None, "1:1", {"height": 64, "width": 64}) == {"width": 64, "height": 64}
    sampler = load_sampler("shapes", "cpu", num_inference_steps=2, aspect_ratio="3:2")
    assert (sampler.width, sampler.height) == (80, 48)
    assert sampler.arguments["width"] == 80
    flux.default_sample_size = None
    with pytest.raises(ValueError, match="does not tell its own size; give --size in pixels"):
        sized(flux, "3:2", {})


@pytest.mark.parametrize("text", ["3:", "a:b", "3:0", "100:1", "-3:2", "nan:1"])
def test_what_is_no_ratio(text):
    with pytest.raises(ValueError, match=f"a ratio is width:height, such as 3:2, from 1:8 to 8:1, got '{text}'"):
        read_ratio(text)


def test_a_ratio_is_a_size_of_the_command_line():
    assert read_size("3:2") == {"aspect_ratio": "3:2"}
    assert ModelSettings(size="3:2").key()["aspect_ratio"] == "3:2"
    assert read_size("768x512") == {"width": 768, "height": 512}


def test_a_size_that_the_pipeline_refuses_is_rounded_with_a_note():
    sampler = load_sampler(tiny_any.stable_diffusion(), num_inference_steps=2, height=35, width=28)
    assert (sampler.width, sampler.height) == (32, 32)
    assert "makes no images of 28 x 35; these are of 32 x 32, the nearest that it makes" in sampler.notes[-1]
    exact = load_sampler(tiny_any.stable_diffusion(), num_inference_steps=2, height=32, width=32)
    assert exact.notes == []

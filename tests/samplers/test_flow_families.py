"""What the newer families have beyond what every sampler has (see test_conformance.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ttsnap
from tests.samplers import tiny_flow
from tests.samplers.tiny import Redness
from ttsnap import samplers
from ttsnap.policies import SuccessiveHalving


def test_another_scheduler_is_declined_in_one_sentence():
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = tiny_flow.z_image()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(samplers.Declined, match="needs a FlowMatchEulerDiscreteScheduler"):
        samplers.for_pipeline(pipe, sampler="adapter")


def test_a_whole_search_ends_in_an_image_that_the_stock_pipeline_makes():
    """With a multistep scheduler, whose candidates are dropped and go on in other batches."""
    pipe = tiny_flow.sana()
    options = {"num_steps": 4, "max_sequence_length": 48, "max_batch": 3, "height": 32, "width": 64}
    policy = SuccessiveHalving((1, 3), (0.5, 0.5))
    prompt = "a blue square left of a green circle"
    found = ttsnap.search(pipe, prompt, reward={"red": Redness()}, policy=policy, candidates=5, **options)
    assert "use_resolution_binning=False" in found.reproduce
    made = eval(found.reproduce, {"pipe": pipe, "torch": torch}).images[0]
    assert np.abs(np.asarray(made).astype(int) - np.asarray(found.image)).max() <= 1
    assert found.cost.nfe == 5 + 2 * 2 + 1

"""Families whose tests in diffusers need a hub: each ends where its stock call does, in full batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline

from tests.pipelines import tiny_newer
from ttsnap.pipelines.outputs import as_images
from ttsnap.pipelines.sampler import Sampler

SMALL = {"num_inference_steps": 3, "height": 32, "width": 32}
FAMILIES = {
    "sana_sprint": {**SMALL, "num_inference_steps": 2, "max_sequence_length": 48, "use_resolution_binning": False},
    "longcat": {**SMALL, "guidance_scale": 4.5, "enable_prompt_rewrite": False},
    "qwen_image_21": {**SMALL, "use_kv_cache": False, "true_cfg_scale": 3.0, "negative_prompt": "blurred"},
    "hidream": {"num_inference_steps": 3, "guidance_scale": 5.0, "max_sequence_length": 16},
    "kolors": {**SMALL, "guidance_scale": 5.0, "max_sequence_length": 32},
    "glm_image": {**SMALL, "guidance_scale": 1.5, "max_sequence_length": 32},
    "flux3_klein": {**SMALL, "max_sequence_length": 64},
}
ALONE = ("hidream",)  # its transformer takes the states of Llama with the rows in the second dimension
PROMPTS, SEEDS = ["a red circle", "a blue square", "a red circle"], [3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_ends_where_its_stock_call_does(family):
    pipe, arguments = getattr(tiny_newer, family)(), FAMILIES[family]
    expected = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        given = {"prompt": prompt, "generator": torch.Generator("cpu").manual_seed(seed), "output_type": "np"}
        if isinstance(pipe, ModularPipeline):
            picture = torch.from_numpy(np.stack(pipe(output="images", **given, **arguments)))
            expected.append(picture.permute(0, 3, 1, 2))
        else:
            expected.append(as_images(pipe(**given, **arguments), torch.device("cpu")))
    sampler = Sampler(pipe, example="a", **arguments)
    assert sampler.num_steps == arguments["num_inference_steps"]
    made = sampler.look(sampler.advance(sampler.start(PROMPTS, SEEDS), sampler.num_steps))
    assert (made - torch.cat(expected)).abs().max() < 2e-4
    assert made.std() > 0.01
    assert any("one candidate at a time" in note for note in sampler.notes) == (family in ALONE), sampler.notes

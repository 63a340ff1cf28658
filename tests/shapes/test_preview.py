"""The tiny decoder that ships for the embedded model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ttsnap import rewards
from ttsnap.live.session import load_sampler
from ttsnap.pipelines import previews
from ttsnap.pipelines.flops import cost_model


@pytest.fixture(scope="module")
def sampler():
    made = load_sampler("shapes", num_inference_steps=6)
    yield made
    made.preview = None


def test_its_pictures_are_those_of_the_full_decoder_at_half_the_size(sampler):
    state = sampler.advance(sampler.start(["a red circle left of a blue square"] * 4, [1, 2, 3, 4]), 5)
    full = F.interpolate(sampler.look(state), (32, 32), mode="area")
    previews.attach(sampler, "tiny")
    made = sampler.look(state)
    assert made.shape == full.shape
    assert (made - full).abs().mean() < 0.25 * (full - full.mean((2, 3), keepdim=True)).abs().mean()
    order = torch.stack([(one - full).abs().mean((1, 2, 3)) for one in made])
    assert order.argmin(1).tolist() == [0, 1, 2, 3]  # each is nearest to its own


def test_it_makes_a_look_cheaper(sampler):
    judges = rewards.load("shapes")
    costs = []
    for kind in ("full", "tiny"):
        previews.attach(sampler, kind)
        costs.append(cost_model(sampler, judges).look(1).tflop)
    assert costs[1] < costs[0] / 2


def test_training_that_was_killed_goes_on_where_it_was(tmp_path):
    from tools.shapes import common, preview

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 8, 8, 8, generator=generator)
    pictures = torch.randint(0, 256, (4, 3, 64, 64), generator=generator).byte()

    def trained(seed):
        torch.manual_seed(seed)
        vae = preview.build(4, (1, 0))
        preview.train(vae, latents, pictures, tmp_path / "checkpoint.pt", steps=252, batch=1, rate=1e-3)
        return vae.decoder.state_dict()

    first = trained(0)
    assert common.load(tmp_path / "checkpoint.pt")["step"] == 250
    again = trained(1)  # begins with other weights, and forgets them
    assert all(torch.equal(first[name], again[name]) for name in first)

"""The general head: what is gathered, and that training learns it."""

from __future__ import annotations

import numpy as np
import torch
from tools.shapes.foresight import gather

from tests.pipelines import tiny
from ttsnap.pipelines.features import Place
from ttsnap.pipelines.sampler import Sampler
from ttsnap.rewards.feature_head import HeadConfig
from ttsnap.training.heads import foretell, train_head

PROMPTS = ["a red circle", "a blue square left of a green circle", "a red circle", "a cyan triangle"]


def test_a_head_learns_trajectories_by_heart():
    sampler = Sampler(tiny.flux(), num_inference_steps=3, height=32, width=32, max_sequence_length=12, max_batch=8)
    seeds = np.arange(24).reshape(4, 6)
    places, seen = [Place("single_transformer_blocks.0", grid=2)], []
    trails = gather(
        sampler, lambda i, p: tiny.Redness()(i, p, sigma=0.0), places, PROMPTS, seeds, on_trajectories=seen.append
    )
    assert sum(seen) == 24
    assert sampler.tap is None
    assert trails.cells.shape == (4, 6, 2, 4, 32)
    assert (trails.prompts, trails.prompt.tolist()) == (tuple(dict.fromkeys(PROMPTS)), [0, 1, 0, 2])
    done = sampler.advance(sampler.start(PROMPTS[:1], [3]), 3)
    torch.testing.assert_close(trails.targets[0, 3, 0], tiny.Redness()(sampler.decode(done.x0), [""], sigma=0.0)[0])
    config = HeadConfig(channels=32, word_width=128, grid=2, words=12, width=32, depth=1)
    head = train_head([trails], config, updates=150, batch=24, learning_rate=1e-2, average=0.9)
    found, wanted = foretell(head, trails), trails.targets[..., 0].numpy()
    for call in range(2):
        assert np.corrcoef(found[..., call].ravel(), wanted.ravel())[0, 1] > 0.8

"""A denoiser that is spread over processes by diffusers' context parallelism is searched through the same call."""

from __future__ import annotations

import json
import sys

import pytest

from tests import commands

RANK = """
import json
import numpy as np
import torch
import ttsnap
from diffusers import ContextParallelConfig
from tests.pipelines import tiny

torch._C._get_accelerator = lambda *_: torch.device("cpu")  # diffusers asks for an accelerator and its number
torch.accelerator.device_count = lambda: 1
torch.distributed.init_process_group("gloo")
pipe = tiny.flux()
pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
options = {"num_inference_steps": 4, "height": 64, "width": 64, "max_sequence_length": 16}
asked = {"reward": {"red": tiny.Redness()}, "candidates": 4, "policy": "halving", "report": "none", "seed": 0}
found = ttsnap.search(pipe, "a red circle", **asked, **options)
stock = pipe("a red circle", generator=torch.Generator().manual_seed(found.seed), output_type="np", **options).images[0]
apart = float(np.abs(np.asarray(found.image) / 255 - stock).max())
print(json.dumps([found.seed, found.reward, found.cost.nfe, apart]))
"""


@pytest.mark.slow
def test_context_parallel_ranks_come_to_the_same_winner_which_is_that_of_the_stock_call():
    ranks = commands.in_ranks([sys.executable, "-W", "ignore", "-c", RANK])
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    one, other = (json.loads(rank.stdout.splitlines()[-1]) for rank in ranks)
    assert one == other
    assert one[-1] < 1.5 / 255

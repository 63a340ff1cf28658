"""A denoiser that diffusers spreads over processes, by context or tensor parallelism, is searched through its call."""

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
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from tests.pipelines import tiny

torch._C._get_accelerator = lambda *_: torch.device("cpu")  # diffusers asks for an accelerator and its number
torch.accelerator.device_count = lambda: 1
tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
torch.distributed.init_process_group("gloo")
pipe = tiny.flux()
pipe.transformer.enable_parallelism(config=CONFIG)
options = {"num_inference_steps": 4, "height": 64, "width": 64, "max_sequence_length": 16}
asked = {"reward": {"red": tiny.Redness()}, "candidates": 4, "policy": "halving", "report": "none", "seed": 0}
found = ttsnap.search(pipe, "a red circle", **asked, **options)
stock = pipe("a red circle", generator=torch.Generator().manual_seed(found.seed), output_type="np", **options).images[0]
apart = float(np.abs(np.asarray(found.image) / 255 - stock).max())
print(json.dumps([found.seed, found.cost.nfe, found.reward, apart]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ContextParallelConfig(ulysses_degree=2)", "TensorParallelConfig(tp_degree=2)"])
def test_all_ranks_come_to_the_same_winner_which_is_that_of_the_stock_call(config):
    ranks = commands.in_ranks([sys.executable, "-W", "ignore", "-c", RANK.replace("CONFIG", config)])
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    one, other = (json.loads(rank.stdout.splitlines()[-1]) for rank in ranks)
    same = (
        2 if "Tensor" in config else 4
    )  # tensor parallelism rounds otherwise in each process, in the stock call as well
    assert one[:same] == other[:same]
    assert max(one[-1], other[-1]) < 1.5 / 255

"""A reward that hangs is told of in time, in a sentence, and costs only what it was asked about."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from ttsnap import rewards
from ttsnap.live.judging import apart, judge, try_own
from ttsnap.pipelines.patience import Hung, Timed, check_timeout

PICTURES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Hangs:
    """Brightness; hangs for pictures of one prompt until the test is over."""

    clean_name = "bright"

    def __init__(self):
        self.over, self.asked = threading.Event(), 0

    def __call__(self, images, prompts, *, sigma):
        self.asked += 1
        assert not torch.is_grad_enabled()
        if "hang" in prompts:
            self.over.wait(30)
        return images.mean((1, 2, 3))


@pytest.fixture
def hangs():
    reward = Hangs()
    yield reward
    reward.over.set()


def test_a_timed_reward_is_the_reward_and_a_hung_one_is_one_sentence(hangs):
    (reward,) = rewards.load({"slow": hangs}, timeout=0.2).values()
    assert isinstance(reward, Timed)
    assert reward.clean_name == "bright"
    np.testing.assert_allclose(judge("slow", reward, PICTURES, ["a"] * 3, 0.0), PICTURES.mean((1, 2, 3)))
    begun = time.monotonic()
    with pytest.raises(Hung, match=r"reward 'slow' gave no answer about 3 pictures within 0.2 s \(--reward-timeout\)"):
        judge("slow", reward, PICTURES, ["a", "hang", "a"], 0.0)
    assert time.monotonic() - begun < 10
    with pytest.raises(Hung, match="about 2 pictures"):
        try_own({"slow": hangs}, "hang", (8, 8), timeout=0.2)


def test_of_many_prompts_those_before_the_one_that_hangs_are_kept_and_the_rest_is_not_waited_for(hangs):
    reward, prompts, values = Timed("slow", hangs, 0.2), ["a", "hang", "hang"], np.full(3, np.nan)

    def look(rows):
        values[list(rows)] = judge("slow", reward, PICTURES[list(rows)], [prompts[row] for row in rows], 0.0)

    errors = apart(look, [[0], [1], [2]])
    assert [type(error) for error in errors] == [type(None), Hung, Hung]
    assert np.isfinite(values).tolist() == [True, False, False]
    assert hangs.asked == 3  # all, the first, the second; the third is not asked


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_no_time_to_answer_in_is_one_sentence(timeout):
    with pytest.raises(ValueError, match="a number of seconds above 0"):
        check_timeout(timeout)


def test_a_failing_reward_fails_as_it_does_without_a_clock():
    def fails(images, prompts, *, sigma):
        raise KeyError("what")

    with pytest.raises(KeyError, match="what"):
        judge("fails", Timed("fails", fails, 5.0), PICTURES, ["a"] * 3, 0.0)

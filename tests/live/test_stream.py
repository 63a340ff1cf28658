"""Many prompts: the same choices as one search after another, full batches, and failures that stay where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pipelines.toy import ToyReward, toy_sampler
from ttsnap.core.driver import run
from ttsnap.core.grid import Query
from ttsnap.core.observers import Observer
from ttsnap.live import engine as engines
from ttsnap.live.engine import Engine, prompts_per_block
from ttsnap.live.judging import judge_in_parts
from ttsnap.pipelines.limits import Limits
from ttsnap.policies import BestOfN, EarlySelection, SuccessiveHalving

PAPER = SuccessiveHalving((3, 7, 12), keep=(0.4, 0.4, 0.5))
PROMPTS = [f"prompt {number}" for number in range(7)]


class Ragged:
    """Candidates of one prompt stand at different steps: the better half of each look runs ahead, then all meet."""

    def search(self, problem, rng):
        everybody = np.ones(problem[:2], dtype=bool)
        rewards = yield Query(everybody, 1)
        ahead = rewards >= np.median(rewards, axis=1, keepdims=True)
        yield Query(ahead, 3)
        yield Query(everybody, 3)  # some of them are there already
        yield Query(ahead, 3)  # asks nothing new
        yield Query(rng.random(problem[:2]) < 2, problem.num_steps)

    def plan(self, num_candidates, num_steps):
        return ()


def seeds(prompts, candidates):
    return np.arange(candidates)[None] + 100 * np.arange(len(prompts))[:, None]


def engine_of(sampler=None, reward=None):
    return Engine(sampler or toy_sampler(num_steps=16), {"bright": reward or ToyReward()})


def stream(policy, prompts=PROMPTS, candidates=6, reward=None, sampler=None, engine=None, **options):
    engine = engine or engine_of(sampler, reward)
    return engine.stream(prompts, seeds(prompts, candidates), policy, seed=3, **options)


@pytest.mark.parametrize("policy", [PAPER, BestOfN(), EarlySelection(4), Ragged()], ids=lambda p: type(p).__name__)
def test_choices_and_ledger_are_those_of_each_prompt_alone(policy):
    looks = []

    class Steps(Observer):
        def __init__(self, p):
            self.p = p

        def looked(self, look, ledger):
            looks.append((self.p, look.step))

    ended = {one.number: one for one in stream(policy, observers=Steps)}
    assert sorted(ended) == list(range(7))
    for p, one in ended.items():
        sampler = toy_sampler(num_steps=16)
        alone = run(
            policy,
            Engine(sampler, {"bright": ToyReward()}).grid([PROMPTS[p]], seeds(PROMPTS, 6)[p : p + 1]),
            rng=np.random.default_rng(3),
        )
        assert one.result.chosen == alone.chosen
        np.testing.assert_array_equal(one.result.ledger.position, alone.ledger.position)
        np.testing.assert_array_equal(one.result.ledger.looks, alone.ledger.looks)
        np.testing.assert_allclose(one.result.rewards, alone.rewards, atol=1e-6)
        assert [step for q, step in looks if q == p] == [look.step for look in alone.history]
        assert set(one.grid.finished) == {(0, int(c)) for c in np.flatnonzero(alone.finished[0])}


def test_a_long_queue_of_prompts_keeps_the_batches_full():
    """32 candidates, the published schedule, batches of 32: as the command line cuts it into blocks."""
    prompts = [f"prompt {number}" for number in range(20)]
    block = prompts_per_block(PAPER.plan(32, 20), 32)
    taken, places = 0, 0
    sampler = toy_sampler(num_steps=20, max_batch=32)
    for start in range(0, len(prompts), block):
        engine = engine_of(sampler)
        ended = stream(PAPER, prompts[start : start + block], 32, engine=engine)
        assert all(one.error is None for one in ended)
        taken, places = taken + engine.occupancy.taken, places + engine.occupancy.places
    batches = sampler.pipe.transformer.batches
    assert taken == sum(batches) == len(prompts) * (32 * 3 + 13 * 4 + 5 * 5 + 2 * 8)
    assert places == 32 * len(batches)
    assert taken / places >= 0.9


def test_few_prompts_are_under_way_at_a_time(monkeypatch):
    monkeypatch.setattr(engines, "MOST_OPEN", 3)
    most, engine = 0, engine_of()
    turn = engine._turn

    def counted(searches, calls):
        nonlocal most
        most = max(most, len(searches))
        turn(searches, calls)

    engine._turn = counted
    assert len(list(stream(PAPER, [f"p{n}" for n in range(12)], 1, engine=engine))) == 12
    assert most == 3


def test_the_same_again_to_the_last_bit():
    first, second = ({one.number: one.result.rewards for one in stream(PAPER)} for _ in range(2))
    assert all((first[p] == second[p]).all() for p in range(7))


def test_blocks():
    assert prompts_per_block(BestOfN().plan(32, 20), 32) == 1
    assert prompts_per_block(BestOfN().plan(8, 20), 32) == 4
    assert 1 < prompts_per_block(PAPER.plan(32, 20), 32) <= 32
    assert prompts_per_block(BestOfN().plan(1, 20), 1000) == 64  # bounded


class Fails(ToyReward):
    """Raises, returns NaN, or runs out of memory, where some prompt is concerned."""

    def __init__(self, how, prompt=PROMPTS[2]):
        super().__init__()
        self.how, self.prompt = how, prompt

    def __call__(self, images, prompts, *, sigma):
        values = super().__call__(images, prompts, sigma=sigma)
        mine = torch.tensor([prompt == self.prompt for prompt in prompts])
        if self.how == "nan":
            return torch.where(mine, torch.nan, values)
        if mine.any() and sigma < 0.8:
            raise RuntimeError("I do not like this one")
        return values


@pytest.mark.parametrize(
    ("how", "message"), [("raises", "do not like"), ("nan", "nan for prompt 'prompt 2', seed 200")]
)
def test_a_reward_that_fails_for_one_prompt_costs_that_one_only(how, message):
    ended = {one.number: one for one in stream(PAPER, reward=Fails(how))}
    plain = {one.number: one for one in stream(PAPER)}
    assert message in str(ended[2].error)
    assert ended[2].result is None
    for p in set(range(7)) - {2}:
        assert ended[p].result.chosen == plain[p].result.chosen
        np.testing.assert_allclose(ended[p].result.rewards, plain[p].result.rewards, atol=1e-6)


def test_a_prompt_that_cannot_be_encoded_costs_that_one_only():
    sampler = toy_sampler(num_steps=16)
    encode = sampler.pipe.encode_prompt
    sampler.pipe.encode_prompt = lambda prompt: encode(prompt) / (1 / (prompt != PROMPTS[4]))
    ended = {one.number: one for one in stream(PAPER, sampler=sampler)}
    assert "prompt 'prompt 4', seed 400: division by zero" in str(ended[4].error)
    assert sum(one.error is None for one in ended.values()) == 6


def test_a_reward_that_runs_out_of_memory_is_given_less():
    asked = []

    def reward(images, prompts, *, sigma):
        asked.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("full")
        return images.mean((1, 2, 3))

    limits = Limits(8)
    with pytest.warns(UserWarning, match="out of memory: going on with at most 1 in a batch"):
        values = judge_in_parts(limits, "r", reward, torch.rand(7, 3, 4, 4), ["a"] * 7, 0.0)
    assert np.isfinite(values).all()
    assert asked == [7, 3, *[1] * 7]
    assert limits.most == 8  # all else keeps its batches

    def never(images, prompts, *, sigma):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(MemoryError, match="one image of reward 'r' does not fit"):
        judge_in_parts(Limits(8), "r", never, torch.rand(1, 3, 4, 4), ["a"], 0.0)


def test_warnings_become_notes_of_the_prompts_concerned():
    sampler = toy_sampler(num_steps=16, fits=2)
    ended = list(stream(PAPER, PROMPTS[:2], sampler=sampler))
    assert any("out of memory" in note for one in ended for note in one.notes)

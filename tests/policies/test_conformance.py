"""One conformance test that every policy passes, live and replayed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttsnap import policies
from ttsnap.core.cost import CostModel
from ttsnap.core.driver import run
from ttsnap.policies import (
    BestFirst,
    BestOfN,
    Branching,
    DraftThenRefine,
    EarlySelection,
    Evolution,
    HandPicked,
    Restart,
    Rollover,
    SearchOverPaths,
    Steering,
    SuccessiveHalving,
    UntilGood,
    ZeroOrder,
)
from ttsnap.replay.environment import ReplayEnvironment

MODEL = CostModel("test", call_tflop=1.0, decode_tflop=0.25, look_tflop=0.125)
POLICIES = [
    BestOfN(),
    EarlySelection(step=2),
    DraftThenRefine(steps=2, keep=0.4),
    DraftThenRefine(steps=0.4),
    SuccessiveHalving((1, 3), keep=(0.5, 0.5)),
    SuccessiveHalving((2, 4), sizes=(5, 2)),
    SuccessiveHalving((1, 2, 3, 4), keep=(1.0, 0.7, 0.3, 1.0)),
    Branching((1, 2, 3), keep=(0.3, 0.3, 0.2), grow=(1.0, 0.6, 0.2)),
    Branching((1, 3), keep=(0.4, 0.4), grow=(0.8, 0.4), angle=(30.0, 60.0), families=True),
    Steering((1, 3)),
    ZeroOrder(rounds=3),
    ZeroOrder(rounds=2, look=3, angle=60.0, explore=0.5),
    Steering((1, 2, 4), potential="difference"),
    Steering((2, 3), potential="sum", strength=0.5),
    Steering((0.2, 0.6), resampling="multinomial", threshold=0.5),
    Steering((0.2, 0.6), resampling="residual"),
    SuccessiveHalving((0.25, 0.5), keep=(0.5, 0.5)),
    SearchOverPaths(children=3, ahead=0.5, back=0.2),
    SearchOverPaths(children=2, ahead=0.6, back=0.4),
    Restart(step=3, back=0.4, rounds=2),
    Evolution((1, 2), look=4),
    Evolution((0.2, 0.4), look=0.6, elite=0.6, band=(0.0, 0.5)),
    Rollover((0.2, 0.4, 0.6), first=0.5),
    BestFirst((1, 2, 4), share=0.5),
    UntilGood(stop_at=9.0, group=3),
    UntilGood(stop_at=9.0, group=4, inner=Branching((1, 3), keep=(0.4, 0.4), grow=(0.8, 0.4))),
    HandPicked(SuccessiveHalving((1, 3), keep=(0.5, 0.5))),
    HandPicked(SuccessiveHalving((1, 2, 3, 4), keep=(1.0, 0.7, 0.3, 1.0))),
]
FORKING = (Branching, Steering, ZeroOrder, SearchOverPaths, Restart, Evolution, Rollover)
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


def forks(policy):
    return isinstance(policy, FORKING) or (isinstance(policy, UntilGood) and forks(policy.inner))


def recorded(prompts=3, candidates=7, steps=5, rewards=1, seed=0):
    return np.random.default_rng(seed).normal(size=(prompts, candidates, steps, rewards))


class Tree(ReplayEnvironment):
    """A recording that can be forked: a child is what its parent was, and from then on a little different.

    Drafts are worth what looks after as many calls are.
    """

    def __post_init__(self):
        object.__setattr__(self, "guide", self.guide.copy())

    def observe(self, query):
        return super().observe(query._replace(draft=False))

    def fork(self, fork):
        other = np.random.default_rng(7).normal(size=self.guide.shape[1:])
        for step in range(fork.begins, self.guide.shape[2]):
            moved = fork.from_parents(self.guide[:, :, step, 0]) + other[None, :, step, 0]
            self.guide[:, :, step, 0] = np.where(fork.children, moved, self.guide[:, :, step, 0])
        return np.full(self.guide.shape[:2], np.nan)


@each_policy
def test_a_block_of_prompts_equals_a_loop_over_them(policy):
    guide = recorded(rewards=2)
    block = run(policy, Tree(guide))
    for p in range(len(guide)):
        alone = run(policy, Tree(guide[p : p + 1]))
        assert alone.chosen[0] == block.chosen[p]
        assert alone.ledger.cost(MODEL) == pytest.approx(block.ledger.cost(MODEL, p), nan_ok=True)


@each_policy
def test_the_plan_is_what_is_paid(policy):
    guide = recorded()
    result = run(policy, Tree(guide))
    planned = MODEL.of_plan(policy.plan(7, 5))
    for p in range(len(guide)):
        paid = result.ledger.cost(MODEL, p)
        if isinstance(policy, Rollover | BestFirst):  # at most
            assert 0.6 * planned.nfe <= paid.nfe <= planned.nfe
            continue
        assert (paid.nfe, paid.decodes, paid.looks) == (planned.nfe, planned.decodes, planned.looks)
        assert paid.tflop == pytest.approx(planned.tflop)


@each_policy
def test_the_best_of_the_finished_is_chosen(policy):
    world = Tree(recorded(prompts=20))
    result = run(policy, world)
    final = np.where(result.finished, world.guide[:, :, -1, 0], -np.inf)
    assert result.chosen.tolist() == final.argmax(axis=1).tolist()
    assert result.rewards[:, 0].tolist() == final.max(axis=1).tolist()


@each_policy
def test_one_candidate(policy):
    result = run(policy, Tree(recorded(candidates=1)))
    assert (result.chosen == 0).all()
    assert (result.ledger.nfe == 5).all()


@each_policy
def test_ties_go_to_the_lower_index(policy):
    if forks(policy):
        pytest.skip("children differ")
    result = run(policy, Tree(np.zeros((2, 6, 5, 1))))
    assert (result.chosen == 0).all()


@each_policy
def test_nan_is_an_error_that_names_prompt_seed_and_step(policy):
    guide = recorded()
    # Some begin with the first alone.
    bad = 0 if isinstance(policy, ZeroOrder | SearchOverPaths | Evolution | Rollover | UntilGood) else 4
    guide[1, bad] = np.nan
    environment = Tree(guide, prompts=["x", "a cat", "z"], seeds=np.arange(21).reshape(3, 7))
    step = policy.plan(7, 5)[0].step
    with pytest.raises(ValueError, match=f"nan for prompt 'a cat', seed {7 + bad} at step {step} of 5"):
        run(policy, environment)


@each_policy
def test_the_policy_survives_json(policy):
    assert policies.from_dict(policies.to_dict(policy)) == policy


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(2, 6), st.integers(0, 99), st.data())
def test_keep_all_equals_best_of_n_and_costs_its_looks_more(candidates, steps, seed, data):
    rungs = tuple(sorted(data.draw(st.sets(st.integers(1, steps - 1), max_size=3))))
    guide = recorded(2, candidates, steps, seed=seed)
    keep_all = run(SuccessiveHalving(rungs, keep=(1.0,) * len(rungs)), ReplayEnvironment(guide))
    best_of_n = run(BestOfN(), ReplayEnvironment(guide))
    assert (keep_all.chosen == best_of_n.chosen).all()
    assert (keep_all.ledger.nfe == best_of_n.ledger.nfe).all()
    extra = len(rungs) * candidates if candidates > 1 else 0
    assert (keep_all.ledger.looks == best_of_n.ledger.looks + extra).all()
    difference = keep_all.ledger.cost(MODEL).tflop - best_of_n.ledger.cost(MODEL).tflop
    assert difference == pytest.approx(2 * extra * (0.25 + 0.125))


def test_bad_hyperparameters_are_refused():
    for keep in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="keep ratio must be above 0 and at most 1"):
            SuccessiveHalving((3,), keep=(keep,))
    with pytest.raises(ValueError, match="2 rungs need 2 keep ratios, got 1"):
        SuccessiveHalving((3, 5), keep=(0.5,))
    with pytest.raises(ValueError, match="must ascend"):
        SuccessiveHalving((5, 3), keep=(0.5, 0.5))
    with pytest.raises(ValueError, match="must lie below the 5 steps"):
        SuccessiveHalving((3, 5), keep=(0.5, 0.5)).plan(4, 5)
    with pytest.raises(ValueError, match="unknown policy 'magic'; known are best-of-n"):
        policies.from_dict({"policy": "magic"})


@each_policy
def test_live_equals_replay_on_the_same_numbers(policy, live_world):
    """Record every look live, then run the policy live and replayed: the same choice at the same cost."""
    if forks(policy) or isinstance(policy, DraftThenRefine):
        pytest.skip("no recording holds what this policy forks or drafts")
    environment, guide = live_world
    live = run(policy, environment())
    replay = run(policy, ReplayEnvironment(guide))
    assert (live.chosen == replay.chosen).all()
    assert live.ledger.cost(MODEL) == pytest.approx(replay.ledger.cost(MODEL), nan_ok=True)
    np.testing.assert_allclose(live.rewards, replay.rewards, atol=1e-5)


@pytest.fixture(scope="module")
def live_world():
    from tests.pipelines import tiny
    from ttsnap.live.engine import Engine
    from ttsnap.pipelines.sampler import Sampler

    sampler = Sampler(tiny.flux(), num_inference_steps=5, max_sequence_length=12, height=32, width=32, max_batch=4)
    prompts = ["a red circle", "a blue square"]

    def environment():
        return Engine(sampler, {"red": tiny.Redness()}).grid(prompts, np.arange(7)[None].repeat(2, 0))

    everything = SuccessiveHalving((1, 2, 3, 4), keep=(1.0,) * 4)
    looks = run(everything, environment()).history
    return environment, np.stack([look.rewards for look in looks], axis=2)

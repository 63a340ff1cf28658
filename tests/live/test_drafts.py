"""Drafts: each is what the stock call makes with fewer steps, costs that, and leaves its candidate where it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.live.test_forks import FAMILIES, made_by
from tests.pipelines import tiny
from tests.pipelines.toy import ToyReward, toy_sampler
from ttsnap import policies
from ttsnap.core.cost import Ledger
from ttsnap.core.driver import run
from ttsnap.core.grid import NO_DRAFTS, Problem, Query
from ttsnap.core.observers import Observer, Stop
from ttsnap.live.engine import Engine
from ttsnap.live.session import prepare
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import BestOfN, DraftThenRefine, UntilGood
from ttsnap.replay.environment import ReplayEnvironment

DRAFTS = DraftThenRefine(steps=2, keep=0.4)
PROMPT = "a red circle"


def stock(pipe, options, seed, steps):
    given = options | {"num_inference_steps": steps}
    image = pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(seed), **given).images[0]
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("family", ["FLUX", "SDXL, ancestral", "SD, DPM++ 2M", "ControlNet"])
def test_drafts_and_winner_are_what_the_stock_call_makes(family):
    build, options = FAMILIES[family]
    pipe = build()
    session = prepare(
        pipe, reward=tiny.Redness(), policy=DRAFTS, candidates=5, report="none", preview="full", **options
    )
    result = session.search(PROMPT, seed=3)
    drafts = {seed: looks[0] for seed, looks in result.history.items()}
    assert sorted(drafts) == [3, 4, 5, 6, 7]
    for seed, draft in drafts.items():
        assert (draft.step, draft.draft) == (2, True)
        picture = torch.from_numpy(stock(pipe, options, seed, 2)).permute(2, 0, 1)[None] / 255
        assert draft.reward == pytest.approx(float(tiny.Redness()(picture, [PROMPT], sigma=0.0)), abs=0.005)
    refined = {seed for seed, draft in drafts.items() if draft.kept}
    assert refined == set(sorted(drafts, key=lambda seed: -drafts[seed].reward)[:2])
    assert (
        np.abs(
            made_by(result.reproduce.replace("image=...", "image=image"), pipe, image=options.get("image"))
            - np.asarray(result.image, dtype=int)
        ).max()
        <= 1
    )
    assert result.seed in refined
    assert (result.cost.nfe, result.cost.decodes, result.cost.looks) == (5 * 2 + 2 * 6, 7, 7)
    assert result.cost.tflop == pytest.approx(session.cost_model.of_plan(DRAFTS.plan(5, 6)).tflop)


def grid_of(sampler=None, seeds=5, observer=None):
    engine = Engine(sampler or toy_sampler(num_steps=6), {"bright": ToyReward()})
    options = {"observer": observer} if observer else {}
    return engine.grid(["a", "b"], np.arange(2 * seeds).reshape(2, seeds), **options)


def test_prompts_share_batches_and_choose_what_they_choose_alone():
    sampler = toy_sampler(num_steps=6)
    together = run(DRAFTS, grid_of(sampler))
    engine = Engine(sampler, {"bright": ToyReward()})
    seeds = np.arange(10).reshape(2, 5)
    streamed = {ended.number: ended.result for ended in engine.stream(["a", "b"], seeds, DRAFTS)}
    assert [int(streamed[p].chosen[0]) for p in (0, 1)] == together.chosen.tolist()
    assert [int(streamed[p].ledger.nfe[0]) for p in (0, 1)] == together.ledger.nfe.tolist() == [22, 22]
    assert engine.occupancy.taken == 44


def test_a_candidate_goes_on_from_where_it_stood_before_its_draft():
    class Mixed:
        def search(self, problem, rng):
            everybody = np.ones(problem[:2], dtype=bool)
            yield Query(everybody, 3)
            yield Query(everybody, 2, draft=True)
            yield Query(everybody, problem.num_steps)

        def plan(self, num_candidates, num_steps):
            return ()

    grid = grid_of()
    mixed, plain = run(Mixed(), grid), run(BestOfN(), grid_of())
    assert mixed.chosen.tolist() == plain.chosen.tolist()
    np.testing.assert_array_equal(mixed.rewards, plain.rewards)
    assert mixed.ledger.nfe.tolist() == [5 * (6 + 2)] * 2
    assert grid.engine.occupancy.taken == mixed.ledger.nfe.sum()  # nothing is made again
    assert mixed.ledger.looks_by_step.tolist() == [[0, 0, 5, 0, 0, 10]] * 2


def test_a_search_that_is_stopped_among_its_drafts_pays_for_them():
    class After(Observer):
        calls = 0

        def called(self, calls):
            self.calls += calls
            if self.calls >= 10:
                raise Stop

    grid = grid_of(observer=After())
    result = run(DRAFTS, grid, observer=grid.observer)
    assert result.stopped
    assert result.chosen.tolist() == [-1, -1]
    assert result.ledger.nfe.sum() == grid.observer.calls


def test_it_goes_on_after_an_end_with_its_books():
    grid = grid_of()
    first = run(DRAFTS, grid)
    again = run(BestOfN(), grid, before=first)
    plain = run(BestOfN(), grid_of())
    np.testing.assert_array_equal(again.rewards, plain.rewards)
    assert again.ledger.nfe.tolist() == [5 * 2 + 5 * 6] * 2


def test_recordings_refuse_them_by_name():
    with pytest.raises(ValueError, match="no recording holds") as refused:
        run(DRAFTS, ReplayEnvironment(np.zeros((1, 5, 6, 1))))
    assert str(refused.value) == NO_DRAFTS


def test_drafts_need_fewer_steps():
    ledger = Ledger(Problem(1, 2, 6))
    with pytest.raises(ValueError, match="fewer steps than the 6"):
        ledger.charge(Query(np.ones((1, 2), dtype=bool), 6, draft=True))
    assert DraftThenRefine().plan(4, 1)[-1] == (1, 4, False)
    with pytest.raises(ValueError, match="share above 0"):
        DraftThenRefine(keep=0)


def test_a_pipeline_without_a_number_of_steps_says_so():
    sampler = Sampler(tiny.flux(), height=32, width=32, max_sequence_length=12, sigmas=[1.0, 0.7, 0.4])
    engine = Engine(sampler, {"red": tiny.Redness()})
    with pytest.raises(ValueError, match=r"steps|sigmas"):
        run(DraftThenRefine(steps=1), engine.grid([PROMPT], np.arange(3)[None]))


def test_groups_until_one_is_good_draft_too():
    policy = UntilGood(stop_at=9.0, group=3, inner=DraftThenRefine(steps=2, keep=0.34))
    result = run(policy, grid_of(seeds=6))
    assert result.ledger.nfe.tolist() == [2 * (3 * 2 + 6)] * 2
    assert policies.from_dict(policies.to_dict(policy)) == policy

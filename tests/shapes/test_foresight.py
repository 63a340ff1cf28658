"""The noise-aware reward of the embedded world: what ships, and that its training learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttsnap import rewards
from ttsnap.core.cost import Budget
from ttsnap.core.grid import Query
from ttsnap.core.ranking import kendall_tau
from ttsnap.live.engine import Engine
from ttsnap.live.session import load_sampler, prepare
from ttsnap.pipelines.features import attach
from ttsnap.policies import Branching, SuccessiveHalving, tuned_policy
from ttsnap.shapes import foresight
from ttsnap.shapes.reward import FORESIGHT, load_reward
from ttsnap.shapes.scenes import held_out_prompts


@pytest.fixture(scope="module")
def sampler():
    return load_sampler("shapes", max_batch=64)


def test_weights_are_small():
    assert sum(path.stat().st_size for path in FORESIGHT.iterdir()) < 8_000_000


def test_it_ranks_held_out_candidates_better_than_the_clean_reward(sampler):
    """At the calls of the shipped schedule it serves, on a fixed small sample."""
    judges = rewards.load("shapes-aware,shapes")
    prompts, seeds = held_out_prompts()[:4], 5000 + np.arange(32).reshape(4, 8)
    environment = Engine(sampler, judges).grid(prompts, seeds)
    everybody = np.ones(seeds.shape, dtype=bool)
    looks = {step: environment.observe(Query(everybody, step)) for step in (3, 5, 20)}
    np.testing.assert_allclose(looks[20][..., 0], looks[20][..., 1])
    for step in (3, 5):
        aware, clean = (kendall_tau(looks[step][..., i], looks[20][..., 1]).mean() for i in range(2))
        assert aware > clean + 0.05
        assert aware > 0.35


def test_a_candidates_reward_does_not_depend_on_its_batch(sampler):
    (reward,) = rewards.load("shapes-aware").values()
    attach(sampler, {"it": reward})
    prompts = held_out_prompts()[:8]
    state = sampler.advance(sampler.start(prompts, list(range(8))), 4)
    together = reward.early(sampler.features(state), prompts, sigma=0.85)
    alone = [reward.early(sampler.features(state.select([i])), [prompts[i]], sigma=0.85) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert (reward.early(sampler.features(state), prompts, sigma=0.6) - together).abs().max() > 1e-3


def test_it_is_the_default_with_its_own_schedule_and_the_clean_reward_judges_what_is_finished():
    searcher = prepare("shapes", candidates=4)
    assert list(searcher.judges) == ["shapes-aware"]
    assert (searcher.policy, 20) == tuned_policy("shapes", ["shapes-aware"])
    clean = prepare("shapes", reward="shapes", candidates=4)
    assert (clean.policy, 20) == tuned_policy("shapes", ["shapes"], 20)
    assert clean.policy != searcher.policy
    (early,) = searcher.cost_model.early
    assert early.source == "features"
    assert early.tflop < 0.4 * searcher.cost_model.call_tflop
    (result,) = searcher.block(["a red circle left of a blue square"], seed=3)
    record = result.to_dict()
    assert (record["rewards"], record["guides"]) == (["shapes"], {"shapes": "shapes-aware"})
    image = torch.from_numpy(np.array(result.image)).permute(2, 0, 1)[None] / 255
    assert float(load_reward()(image, [result.prompt])[0]) == pytest.approx(record["reward"], abs=0.05)
    assert record["cost"]["decodes"] == result.finished
    assert any("decoded for display only" in note for note in record["notes"])


@pytest.mark.parametrize(
    ("budget", "steps", "policy", "made"),
    [
        ("2.3GFLOP", None, Branching, 4),
        ("20NFE", None, Branching, 4),
        ("9GFLOP", None, SuccessiveHalving, 4),
        ("9GFLOP", 20, SuccessiveHalving, 20),
        ("30s", None, SuccessiveHalving, 20),
    ],
)
def test_a_budget_chooses_policy_and_steps_unless_steps_are_given(budget, steps, policy, made):
    session = prepare("shapes", budget=budget, report="none", **({"num_inference_steps": steps} if steps else {}))
    assert (type(session.policy), session.sampler.num_steps) == (policy, made)
    parsed = Budget.parse(budget)
    spent = session.cost_model.of_plan(session.policy.plan(session.candidates, made))
    if parsed.unit != "s":
        assert spent.amount(parsed.unit) <= parsed.amount
        more = session.cost_model.of_plan(session.policy.plan(session.candidates + 1, made))
        assert more.amount(parsed.unit) > parsed.amount


def test_features_and_diversity_do_not_go_together(sampler):
    from ttsnap.pipelines.negtome import Negtome

    assert list(prepare("shapes", candidates=2, diversity=Negtome()).judges) == ["shapes"]
    with pytest.raises(ValueError, match="features cannot be read; take the clean reward"):
        prepare("shapes", reward="shapes-aware", candidates=2, diversity=Negtome())


@pytest.mark.slow
def test_untrained_the_convolutions_learn_to_see_and_the_whole_to_foretell(tmp_path):
    from tools.shapes.foresight import distil, train, trajectories

    trails = trajectories(32, steps=3, seed=1)
    assert trails.cells.shape == (4, 8, 2, 16, 160)
    assert trails.latents.shape == (4, 8, 2, 16, 32)
    assert torch.isfinite(trails.targets).all()
    model, told = foresight.begin(), []
    distil(model, trails, updates=24, images=32, batch=16, tell=told.append)
    losses = [float(line.split()[-1]) for line in told]
    assert losses[-1] < 0.9 * losses[0]
    told.clear()
    trained = train(model, trails, updates=20, batch=32, average=0.5, lowest=0.0, tell=told.append)
    errors = [float(line.split("error ")[1].split(",")[0]) for line in told]
    assert min(errors[-3:]) < errors[0]
    foresight.save(trained, tmp_path / "it", sigma=0.5)
    loaded = foresight.load_foresight(folder=tmp_path / "it")
    cells, latents = trails.cells[0, :, 0].float(), trails.latents[0, :, 0].float()
    sigma = torch.ones(8)
    texts = [trails.prompts[0]] * 8
    answers = [m.logits(cells, latents, texts, sigma) for m in (loaded.head, trained)]
    torch.testing.assert_close(*answers, atol=0.05, rtol=0.05)
    assert loaded.level(0.5) == 0.5
    assert loaded.level(0.45) is None

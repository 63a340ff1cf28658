"""Live: batches, what rewards are told, pictures, calibration. Time is that of a clock the test moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pipelines.toy import Time, ToyReward, toy_sampler
from ttsnap.core.cost import Budget, CostModel, Seconds, affordable
from ttsnap.core.driver import run
from ttsnap.core.grid import Query
from ttsnap.core.observers import Interrupted, Observer, Stop
from ttsnap.live.calibration import calibrate
from ttsnap.live.engine import Engine
from ttsnap.live.judging import judge_in_parts
from ttsnap.pipelines.limits import Limits
from ttsnap.pipelines.outputs import PREVIEW_SIDE, shrink
from ttsnap.policies import BestOfN, SuccessiveHalving

MODEL = CostModel("toy", 1.0, 1.0, 1.0)


def live(sampler, reward=None, prompts=("a", "b"), candidates=5, park=None, **options):
    seeds = np.arange(candidates)[None].repeat(len(prompts), 0)
    return Engine(sampler, {"bright": reward or ToyReward()}, park=park).grid(list(prompts), seeds, **options)


def test_candidates_of_all_prompts_share_batches_and_prompts_are_encoded_once():
    sampler = toy_sampler(max_batch=8)
    run(SuccessiveHalving((2,), keep=(0.4,)), live(sampler))
    batches = sampler.pipe.transformer.batches
    assert batches == [8, 8, 4, 4, 4]  # 10 candidates for two calls, at different steps in the second batch, then 4
    assert sampler.pipe.encoded == ["a", "b"]


def test_rewards_are_told_the_noise_level_and_zero_at_the_end():
    reward, sampler = ToyReward(), toy_sampler(num_steps=4)
    run(SuccessiveHalving((1, 3), keep=(1.0, 1.0)), live(sampler, reward, prompts=("a",)))
    assert reward.asked == [(5, sampler.sigmas[0]), (5, sampler.sigmas[2]), (5, 0.0)]


def test_images_stay_tensors_from_the_decoder_to_the_reward():
    seen = []

    def reward(images, prompts, *, sigma):
        seen.append(images)
        return images.mean((1, 2, 3))

    sampler = toy_sampler()
    run(BestOfN(), live(sampler, reward, prompts=("a",)))
    decoded = sampler.decode(sampler.advance(sampler.start(["a"] * 5, [0, 1, 2, 3, 4]), 4).x0)
    assert torch.equal(seen[0], decoded)
    assert not torch.equal((decoded * 255).round() / 255, decoded)  # as bytes, or as a PIL image, it would be another


def test_candidates_at_different_steps_keep_their_places():
    sampler = toy_sampler(num_steps=4)
    environment, straight = live(sampler), live(sampler)
    first = np.zeros((2, 5), dtype=bool)
    first[0, 3] = first[1, 1] = True
    environment.observe(Query(first, 2))
    everybody = np.ones((2, 5), dtype=bool)
    mixed = environment.observe(Query(everybody, 4))
    np.testing.assert_allclose(mixed, straight.observe(Query(everybody, 4)), atol=1e-6)


def test_pictures_of_every_look_and_full_images_of_the_finished():
    environment = live(toy_sampler(), previews=True, prompts=("a",))
    run(SuccessiveHalving((2,), sizes=(2,)), environment)
    assert {step for *_, step in environment.pictures} == {2, 4}
    assert len(environment.pictures) == 5 + 2
    assert len(environment.finished) == 2
    assert all(image.shape == (4, 4, 3) and image.dtype == np.uint8 for image in environment.finished.values())
    quiet = live(toy_sampler(), prompts=("a",))
    run(BestOfN(), quiet)
    assert not quiet.pictures
    assert shrink(torch.zeros(1, 3, 512, 1024)).shape == (1, 3, PREVIEW_SIDE // 2, PREVIEW_SIDE)


def test_a_decoder_that_runs_out_of_memory_leaves_the_calls_their_batch():
    sampler = toy_sampler(max_batch=8, fits=2)
    with pytest.warns(UserWarning, match="at most 4 in a batch"), pytest.warns(UserWarning, match="at most 2 in a"):
        run(BestOfN(), live(sampler, prompts=("a",), candidates=8))
    assert sampler.max_batch == 8
    assert sampler.pipe.vae.decoded == [2, 2, 2, 2]


def test_a_reward_that_runs_out_of_memory_is_given_less_also_of_one_prompt():
    asked, sampler = [], toy_sampler(max_batch=8)

    def reward(images, prompts, *, sigma):
        asked.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("full")
        return images.mean((1, 2, 3))

    with pytest.warns(UserWarning, match="out of memory: going on with at most 4 in a batch"):
        result = run(SuccessiveHalving((2,), keep=(1.0,)), live(sampler, reward, prompts=("a",), candidates=8))
    assert asked == [8, 4, 4, 4, 4]  # the second look knows
    assert np.isfinite(result.rewards).all()
    assert sampler.pipe.transformer.batches == [8, 8, 8, 8]


@pytest.mark.parametrize(
    ("reward", "shape"),
    [
        (lambda images, prompts, *, sigma: images.mean(), r"\[\]"),
        (lambda images, prompts, *, sigma: images.mean((2, 3)), r"\[5, 3\]"),
    ],
)
def test_a_reward_must_return_one_number_per_image(reward, shape):
    with pytest.raises(ValueError, match=rf"'bright' must return one number per image, shape \[5\], got {shape}"):
        run(BestOfN(), live(toy_sampler(), reward, prompts=("a",)))


def test_lists_and_columns_are_numbers_too():
    plain = run(BestOfN(), live(toy_sampler()))
    for kind in (lambda values: values.tolist(), lambda values: values[:, None], lambda values: values.numpy()):
        same = run(BestOfN(), live(toy_sampler(), lambda i, p, *, sigma, kind=kind: kind(i.mean((1, 2, 3)))))
        np.testing.assert_allclose(same.rewards, plain.rewards)


def test_nan_names_prompt_seed_and_step():
    def broken(images, prompts, *, sigma):
        values = images.mean((1, 2, 3))
        values[3] = float("nan")
        return values

    with pytest.raises(ValueError, match="nan for prompt 'a', seed 3 at step 2 of 4"):
        run(SuccessiveHalving((2,), keep=(0.5,)), live(toy_sampler(max_batch=16), broken))


def test_calibration_finds_the_fixed_part_and_the_part_per_image():
    clock = Time()
    sampler, reward = toy_sampler(clock=clock), ToyReward(clock)
    model = calibrate(sampler, {"bright": reward}, MODEL, "a", clock, patience=1e9)
    assert (model.call_seconds, model.decode_seconds) == (Seconds(0.5, 0.25), Seconds(0.25, 0.125))
    assert model.look_seconds == Seconds(0.0625, 0.03125)
    assert model.max_batch == 8
    assert not any(memo._known for memo in sampler.texts.values())


def test_calibration_of_a_slow_machine_is_short():
    """Per image 40 s; a full batch of 8 would take 300 s each time."""
    clock = Time()
    sampler = toy_sampler(clock=clock, call=(4.0, 32.0), decode=(0.0, 4.0))
    model = calibrate(sampler, {"bright": ToyReward(clock, (0.0, 0.0))}, MODEL, "a", clock, patience=5.0)
    assert clock.now == 2 * 40 + 2 * 76
    assert model.call_seconds == Seconds(4.0, 32.0)


@pytest.mark.parametrize("policy", [BestOfN(), SuccessiveHalving((1, 3), keep=(0.5, 0.5))], ids=str)
@pytest.mark.parametrize("seconds", [9, 33.3, 200])
def test_a_budget_in_seconds_is_kept_to_and_used(policy, seconds):
    """By the test's clock the search takes what was planned: at most the budget, and hardly less."""
    clock = Time()
    sampler, reward = toy_sampler(clock=clock), {"bright": ToyReward(clock)}
    model = calibrate(sampler, reward, MODEL, "a", clock)
    n = affordable(policy, Budget(seconds, "s"), model, sampler.num_steps)

    def takes(candidates):
        start = clock()
        run(policy, Engine(sampler, reward).grid(["a"], np.arange(candidates)[None]))
        return clock() - start

    assert takes(n) <= seconds < 1.05 * takes(n + 1)  # batches of several steps are fuller than planned


def test_dropped_candidates_are_parked_and_come_back_when_they_are_asked_about():
    policy = SuccessiveHalving((1, 2), keep=(0.2, 1.0))
    kept, parked = (live(toy_sampler(), prompts=("a",), candidates=10, park=park) for park in (False, True))
    first, second = (run(policy, environment) for environment in (kept, parked))
    np.testing.assert_array_equal(first.chosen, second.chosen)
    np.testing.assert_array_equal(first.rewards, second.rewards)
    one = 3 * 4 * 4 * 4 * 2  # bytes of the latents of a candidate before and after its step
    assert kept.held() >= 8 * one
    assert parked.held() == 0  # the finished hold nothing any more
    dropped = Query(~first.finished, 4)
    np.testing.assert_array_equal(kept.observe(dropped), parked.observe(dropped))
    assert parked.held() == 0


def test_calls_that_another_question_paid_are_not_lost_when_a_parked_candidate_is_stopped():
    """It comes back in a new call, which begins where the old one stood."""

    class Impatient(Observer):
        stopping = False

        def called(self, calls):
            if self.stopping:
                raise Stop

    observer = Impatient()
    grid = live(toy_sampler(num_steps=6), prompts=("a",), candidates=2, park=True, observer=observer)
    everybody, one = np.ones((1, 2), dtype=bool), np.array([[True, False]])
    grid.observe(Query(everybody, 3))
    grid.observe(Query(one, 4))  # the other is put away
    observer.stopping = True
    with pytest.raises(Interrupted) as stopped:
        grid.observe(Query(~one, 6))
    assert stopped.value.lost.tolist() == [1]


def test_every_part_of_a_look_is_judged_by_its_own_prompts():
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]

    def length(images, prompts, *, sigma):
        return [len(prompt) + float(image.mean()) for prompt, image in zip(prompts, images, strict=True)]

    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 2) / 10
    found = judge_in_parts(Limits(2), "length", length, images, texts, 0.0)
    np.testing.assert_allclose(found, [1.0, 2.1, 3.2, 4.3, 5.4], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("policy", [BestOfN(), SuccessiveHalving((2,), keep=(0.5,))], ids=repr)
def test_pictures_that_show_nothing_rank_last_whatever_the_reward_says(policy, value):
    sampler = toy_sampler()
    decode = sampler.pipe.vae.decode

    def spoilt(latents):
        images = decode(latents).clone()
        images[latents.mean((1, 2, 3)) < 0.5] = value  # of one colour, or black
        return images

    sampler.pipe.vae.decode = spoilt

    def flat(images, prompts, *, sigma):
        return -images.flatten(1).std(1)

    grid = Engine(sampler, {"flat": flat}).grid(["a"], np.arange(12)[None])
    result = run(policy, grid)
    blank = grid.blank[0]
    assert 0 < blank.sum() < 12
    assert not blank[result.chosen[0]]
    finished = result.finished[0]
    best = max(-(grid.finished[0, c] / 255).std(ddof=1) for c in np.flatnonzero(finished & ~blank))
    assert result.rewards[0, 0] == pytest.approx(best, abs=2e-3)


def test_where_all_pictures_show_nothing_one_of_them_wins():
    sampler = toy_sampler()
    sampler.pipe.vae.decode = lambda latents: torch.zeros_like(latents)
    grid = Engine(sampler, {"bright": ToyReward()}).grid(["a"], np.arange(3)[None])
    assert run(BestOfN(), grid).chosen[0] == 0
    assert grid.blank.all()

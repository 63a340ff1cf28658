"""A forked winner is what the stock pipeline makes with the two lines that the result gives, for any solver."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import ttsnap
from tests.pipelines import tiny, tiny_any, tiny_flow, tiny_sd
from ttsnap.core.cost import CostModel
from ttsnap.core.driver import run
from ttsnap.core.grid import Fork, Query
from ttsnap.core.tree import Tree, Trees
from ttsnap.live.engine import Engine
from ttsnap.live.result import history_of
from ttsnap.pipelines.forks import Turn, natural, rotated, within
from ttsnap.pipelines.negtome import Negtome
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import Branching, EarlySelection, Steering, ZeroOrder

SMALL = {"height": 32, "width": 32, "num_inference_steps": 6}
BEAM = Branching((1, 3, 4), keep=(0.5, 0.5, 0.25), grow=(1.0, 1.0, 0.5), angle=50.0)
FAMILIES = {
    "FLUX": (tiny.flux, SMALL | {"max_sequence_length": 12}),
    "SD 3": (tiny_sd.sd3, SMALL),
    "SDXL, Euler": (tiny_sd.sdxl, SMALL),
    "SDXL, ancestral": (
        lambda: tiny_sd.sdxl(tiny_sd.scheduler("EulerAncestralDiscreteScheduler")),
        SMALL,
    ),
    "SD, DPM++ 2M": (tiny_any.stable_diffusion, SMALL),
    "SD, UniPC": (lambda: tiny_any.stable_diffusion("UniPCMultistepScheduler"), SMALL),
    "SD, DDIM": (lambda: tiny_any.stable_diffusion("DDIMScheduler"), SMALL | {"eta": 0.7}),
    "SD, SDE": (
        lambda: tiny_any.stable_diffusion("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
        SMALL,
    ),
    "ControlNet": (
        lambda: tiny_any.stable_diffusion(pipeline="StableDiffusionControlNetPipeline"),
        SMALL | {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
    ),
    "Qwen-Image": (tiny_flow.qwen_image, SMALL),
    "FLUX.2 Klein": (tiny_flow.flux2_klein, SMALL),
}


def test_a_denoiser_that_keeps_keys_for_later_steps_is_pruned_and_forked_as_any_other():
    """Each candidate has a cache of its own, which a child begins by making again, and that call is counted."""
    pipe = tiny_flow.flux2_klein_kv()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    options = {"image": picture, "height": 32, "width": 32, "num_inference_steps": 3}
    sampler = Sampler(pipe, example="a red circle", **options)

    class Forks:
        def search(self, problem, rng):
            yield Query(np.ones((1, 3), dtype=bool), 1)
            yield Fork(np.array([[-1, -1, 0]]), 1, np.zeros((1, 3)))
            yield Query(np.array([[True, False, True]]), problem.num_steps)

        def plan(self, num_candidates, num_steps):
            return ()

    grid = Engine(sampler, {"red": tiny.Redness()}).grid(["a red circle"], np.array([[0, 1, 2]]))
    result = run(Forks(), grid)
    stock = pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), output_type="np", **options).images[
        0
    ]
    for place in (0, 2):
        assert np.abs(grid.finished[0, place] / 255 - stock).max() < 1.5 / 255
    assert result.ledger.cost(CostModel("any", 1.0, 1.0, 1.0), 0).nfe == 3 + 2 + 2 + 1


def made_by(line, pipe, **names):
    """The picture that lines of Python make."""
    known = {"pipe": pipe, "torch": torch, "ttsnap": ttsnap, **names}
    *before, last = line.split("\n")
    for one in before:
        exec(one, known)
    *statements, call = last.split("; ")
    for one in statements:
        exec(one, known)
    return np.asarray(eval(call, known).images[0], dtype=int)


def forked_search(pipe, options, policy=BEAM, seeds=range(40)):
    """The first search whose winner was forked."""
    for seed in seeds:
        result = ttsnap.search(
            pipe, "a red circle", reward=tiny.Redness(), policy=policy, candidates=6, seed=7 * seed, **options
        )
        if "Lineage" in result.reproduce:
            return result
    pytest.fail("no winner was forked")


SLOWLY = ("SD 3", "SD, DDIM", "Qwen-Image", "FLUX.2 Klein")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in SLOWLY else name for name in FAMILIES]
)
def test_the_stock_pipeline_makes_the_forked_winner(family):
    build, options = FAMILIES[family]
    pipe = build()
    result = forked_search(pipe, options)
    line = result.reproduce
    if "image" in options:
        line = line.replace("image=...", "image=image")
    made = made_by(line, pipe, image=options.get("image"))
    assert np.abs(made - np.asarray(result.image, dtype=int)).max() <= 1
    assert "step" not in vars(pipe.scheduler)  # it is as it was
    assert result.lineage[result.seed].step in BEAM.rungs


def grid_of(pipe, options, seeds=(1, 2, 3), **more):
    sampler = Sampler(pipe, **options)
    engine = Engine(sampler, {"red": tiny.Redness()}, **more)
    return engine.grid(["a red circle"], np.array([seeds]))


class Once:
    """Two steps, a fork, the end of everybody."""

    def __init__(self, parents, angle, step=2):
        self.fork = Fork(np.array([parents]), step, np.full((1, len(parents)), float(angle)))

    def search(self, problem, rng):
        yield Query(np.ones(problem[:2], dtype=bool), self.fork.step)
        yield self.fork
        yield Query(np.ones(problem[:2], dtype=bool), problem.num_steps)

    def plan(self, num_candidates, num_steps):
        return ()


@pytest.mark.parametrize("park", [False, True])
def test_a_child_of_no_angle_goes_its_parents_way_and_others_do_not(park):
    for family in ("FLUX", "SD, DPM++ 2M", "SD, UniPC"):
        build, options = FAMILIES[family]
        pipe = build()
        grid = grid_of(pipe, options, park=park)
        result = run(Once([-1, 0, -1], 0.0), grid)
        np.testing.assert_array_equal(grid.finished[0, 0], grid.finished[0, 1])
        assert result.ledger.nfe.tolist() == [3 * 6]
        moved = grid_of(pipe, options, park=park)
        run(Once([-1, 0, -1], 40.0), moved)
        np.testing.assert_array_equal(moved.finished[0, 0], grid.finished[0, 0])
        np.testing.assert_array_equal(moved.finished[0, 2], grid.finished[0, 2])
        assert (moved.finished[0, 1] != grid.finished[0, 1]).any()


def test_parents_may_exchange_their_places():
    build, options = FAMILIES["FLUX"]
    pipe = build()
    plain, grid = grid_of(pipe, options), grid_of(pipe, options)
    run(Once([-1, -1, -1], 0.0), plain)
    run(Once([1, 2, 0], 0.0), grid)
    for child, parent in enumerate([1, 2, 0]):
        np.testing.assert_array_equal(grid.finished[0, child], plain.finished[0, parent])
    assert grid.parents == {(0, 0): 1, (0, 1): 2, (0, 2): 0}
    assert grid.root((0, 0)) == 2


def test_noise_is_rotated():
    generator = torch.Generator()
    x0, noise = torch.randn(2, 4096), torch.randn(2, 4096)
    alpha, sigma = 0.4, 0.6
    x = alpha * x0 + sigma * noise
    for angle in (0.0, 30.0, 90.0):
        moved = rotated(x, x0, Turn(3, angle, 11, alpha, sigma), generator)
        found = (moved - alpha * x0) / sigma
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), noise.flatten(), dim=0)
        assert abs(cosine - math.cos(math.radians(angle))) < 0.05
        assert abs(found.std() - 1) < 0.05
    fresh = torch.randn(2, 4096, generator=torch.Generator().manual_seed(11))
    torch.testing.assert_close(found, fresh, atol=1e-4, rtol=1e-4)  # 90 degrees: nothing of the parent's


def test_noise_is_added_as_the_forward_process_does_it():
    """alpha' x0 + sigma' eps' where eps' holds the share of eps that (alpha'/alpha) x brings along."""
    generator, before, after = torch.Generator(), (0.8, 0.6), (0.6, 0.8)
    x0, noise = torch.randn(2, 4096), torch.randn(2, 4096)
    angle = natural(before, after)
    turn = Turn(7, angle, 11, *before, back=3, to=after)
    moved = rotated(before[0] * x0 + before[1] * noise, x0, turn, generator)
    fresh = torch.randn(2, 4096, generator=torch.Generator().manual_seed(11))
    kept = after[0] / before[0]
    added = (after[1] ** 2 - (kept * before[1]) ** 2) ** 0.5
    torch.testing.assert_close(moved, kept * (before[0] * x0 + before[1] * noise) + added * fresh, atol=1e-5, rtol=1e-5)
    assert natural((1.0, 2.0), (1.0, 4.0)) == pytest.approx(60.0)
    assert natural(before, before) == 0.0


def test_a_band_of_frequencies_is_rotated():
    generator, latents = torch.Generator(), torch.randn(1, 4, 16, 24)
    turn = Turn(3, 60.0, 11, 0.5, 0.5, band=(0.0, 0.4))
    change = rotated(latents, torch.zeros_like(latents), turn, generator) - latents
    assert change.abs().mean() > 0.05
    torch.testing.assert_close(within(change, (0.0, 0.4)), change, atol=1e-5, rtol=1e-5)
    assert within(change, (0.4, 9.0)).abs().max() < 1e-5
    noise = torch.randn(1, 4, 16, 24)
    torch.testing.assert_close(within(noise, (0.0, 0.5)) + within(noise, (0.5, 9.0)), noise, atol=1e-5, rtol=1e-5)
    listed = noise.flatten(2).transpose(1, 2)  # [1, 16 * 24, 4]
    laid = within(noise, (0.0, 0.4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(within(listed, (0.0, 0.4), rows=16), laid, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["FLUX", pytest.param("SD, DPM++ 2M", marks=pytest.mark.slow), "SDXL, ancestral"])
def test_a_child_may_make_calls_again(family):
    build, options = FAMILIES[family]
    pipe = build()

    class Back(Once):
        def search(self, problem, rng):
            yield Query(np.array([[True, True, True]]), 4)
            yield Fork(np.array([[-1, 0, -1]]), 4, np.full((1, 3), np.nan), back=3)
            yield Query(np.array([[False, True, False]]), 3)
            yield Query(np.array([[True, True, True]]), 6)

    grid = grid_of(pipe, options)
    result = run(Back([], 0.0), grid)
    assert result.ledger.nfe.tolist() == [3 * 4 + 2 + 2 + 3 + 2]
    turn = grid.lineage[0, 1][0]
    assert (turn.step, turn.back) == (4, 3)
    assert "made some of its calls again" in grid.engine.sampler.reproduce("a red circle", 1, (turn,))
    # By hand: a call whose first step is skipped, and that then goes on from the parent's x0 estimate with noise.
    moved = grid.finished[0, 1].astype(int)
    again = grid_of(pipe, options, park=True)
    run(Back([], 0.0), again)
    np.testing.assert_array_equal(again.finished[0, 1], grid.finished[0, 1])
    assert (moved != grid.finished[0, 0]).any()
    np.testing.assert_array_equal(again.finished[0, 0], grid.finished[0, 0])


def test_a_solver_that_goes_back_remembers_nothing():
    """The child of a multistep solver goes on as a call of the stock pipeline that begins at its noise level."""
    pipe = tiny_any.stable_diffusion()
    grid = grid_of(pipe, SMALL, seeds=(1, 2))
    problem = grid.problem
    grid.observe(Query(np.array([[True, False]]), 4))
    grid.fork(Fork(np.array([[-1, 0]]), 4, np.full((1, 2), 90.0), back=2))
    standing = grid.calls[0, 1]
    grid.observe(Query(np.array([[False, True]]), problem.num_steps))
    scheduler, x = pipe.scheduler, standing.result[0]
    scheduler.set_timesteps(SMALL["num_inference_steps"])
    with torch.no_grad():
        text, negative = pipe.encode_prompt("a red circle", "cpu", 1, True)
        for index, t in enumerate(scheduler.timesteps):
            if index < 2:
                scheduler.step(torch.zeros_like(x), t, x)  # only the counter matters
                if index == 1:
                    scheduler.model_outputs, scheduler.lower_order_nums = [None, None], 0
                continue
            both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, text])).sample
            guided = both[:1] + 7.5 * (both[1:] - both[:1])
            x = scheduler.step(guided, t, x).prev_sample
        image = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    stock = np.asarray(pipe.image_processor.postprocess(image)[0], dtype=int)
    assert np.abs(stock - grid.finished[0, 1].astype(int)).max() <= 1


def test_a_place_has_another_child_every_time():
    build, options = FAMILIES["FLUX"]
    grid = grid_of(build(), options)
    grid.observe(Query(np.array([[True, False, False]]), 2))
    made = []
    for _ in range(3):
        grid.fork(Fork(np.array([[-1, 0, -1]]), 2, np.full((1, 3), 30.0)))
        made.append(grid.lineage[0, 1][0].seed)
    assert len(set(made)) == 3


NAMES = ["search-over-paths", "restart", "best-first", "evosearch", "spectral", "rbf", "smc", "svdd", "zero-order"]
QUICK = {("FLUX", "spectral"), ("FLUX", "rbf"), ("SDXL, ancestral", "search-over-paths"), ("ControlNet", "evosearch")}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, name) in QUICK else pytest.mark.slow)
        for family in ("FLUX", "SDXL, ancestral", "SD, DPM++ 2M", "ControlNet")
        for name in NAMES
    ],
)
def test_each_policy_searches_live_by_the_book(name, family):
    build, options = FAMILIES[family]
    pipe = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ttsnap.search(
            pipe, "a red circle", reward=tiny.Redness(), policy=name, candidates=9, seed=3, **options
        )
    plan = ttsnap.policies.named(name).plan(9, 6)
    planned = CostModel("calls", 1.0, 0.0, 0.0).of_plan(plan).nfe
    assert 0 < result.cost.nfe <= planned
    if name not in ("best-first", "rbf"):
        assert result.cost.nfe == planned
    if "pipe(" in result.reproduce:
        line = result.reproduce.replace("image=...", "image=image")
        made = made_by(line, pipe, image=options.get("image"))
        assert np.abs(made - np.asarray(result.image, dtype=int)).max() <= 1
    else:
        assert "made some of its calls again" in result.reproduce


def test_a_search_is_the_same_in_any_company_and_its_comparison_knows_no_children():
    build, options = FAMILIES["FLUX"]
    pipe = build()
    policy = Steering((1, 3), strength=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = ttsnap.search(
            pipe, ["a red circle", "a cat"], reward=tiny.Redness(), policy=policy, candidates=5, compare=True, **options
        )
        best = ttsnap.search(pipe, "a red circle", reward=tiny.Redness(), policy="best-of-n", candidates=5, **options)
    one = ttsnap.search(pipe, "a red circle", reward=tiny.Redness(), policy=policy, candidates=5, **options)
    assert (one.seed, one.lineage, one.cost.nfe) == (both[0].seed, both[0].lineage, both[0].cost.nfe)
    np.testing.assert_allclose(one.reward, both[0].reward, atol=1e-6)
    assert one.cost.nfe == 5 * 6
    if both[0].best_of_n.candidates == 5:
        assert both[0].best_of_n.best.reward == pytest.approx(best.reward, abs=1e-6)
    record = one.to_dict()
    assert [set(entry) for entry in record["lineage"]] == [{"seed", "parent", "step", "angle"}] * len(one.lineage)


def test_the_history_tells_the_looks_of_a_place_in_their_order():
    build, options = FAMILIES["FLUX"]
    policy, rewards = ZeroOrder(rounds=3, look=3), []
    result = ttsnap.search(
        build(), "a red circle", reward=tiny.Redness(), policy=policy, candidates=6, seed=0, **options
    )
    assert [seen.step for seen in result.history[0]] == [1]
    assert [seen.step for seen in result.history[3]] == [3, 3, 3]  # a twin in every round
    assert [seen.step for seen in result.history[5]] == [6]
    pipe = build()
    for rounds in (1, 2, 3):
        grid = grid_of(pipe, options, seeds=range(6))
        found = run(ZeroOrder(rounds=rounds, look=3), grid)
        seen = history_of(found, 0, range(6), 6)
        rewards.append([one.reward for one in seen[3]])
    assert rewards[2][:1] == rewards[0]
    assert rewards[2][:2] == rewards[1]


@pytest.mark.parametrize(
    "name",
    ["smc", "rbf", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in ("smc", "rbf", "best-first"))],
)
def test_a_recorded_tree_replays_the_live_choice_and_cost(name, tmp_path):
    build, options = FAMILIES["FLUX"]
    results = ttsnap.search(
        build(), ["a red circle", "a cat"], reward=tiny.Redness(), policy=name, candidates=9, seed=5, **options
    )
    trees = []
    for number, result in enumerate(results):
        result.save(tmp_path / f"p{number:04d}", board=False)
        trees.append(Tree.load(tmp_path / f"p{number:04d}" / "tree.json"))
        assert trees[-1].looks == result.tree.looks
    policy = ttsnap.policies.from_dict(trees[0].policy)
    for chosen, some in ([results, trees], [results[:1], trees[:1]], [results[1:], trees[1:]]):
        replayed = run(policy, Trees(some), rng=np.random.default_rng(trees[0].random))
        assert (5 + replayed.chosen).tolist() == [result.seed for result in chosen]
        assert replayed.ledger.nfe.tolist() == [result.cost.nfe for result in chosen]
        assert replayed.ledger.looks.tolist() == [result.cost.looks for result in chosen]
        np.testing.assert_allclose(replayed.rewards[:, 0], [result.reward for result in chosen], rtol=1e-6)
    with pytest.raises(ValueError, match=r"holds no look at prompt 'a red circle', seed .* after 3 calls; replay"):
        run(EarlySelection(step=3), Trees(trees[:1]))


def test_a_file_that_is_no_tree_is_refused(tmp_path):
    (tmp_path / "tree.json").write_text('{"looks": [{"way": []}]}')
    for file, told in (
        (tmp_path / "tree.json", "is not a tree.json"),
        (tmp_path / "none.json", "cannot read the tree"),
    ):
        with pytest.raises(ValueError, match=told):
            Tree.load(file)


def test_what_cannot_be_forked_is_one_sentence():
    pipe = tiny.flux()
    with pytest.raises(ValueError, match="pushed apart cannot be forked"):
        ttsnap.search(
            pipe, "a", reward=tiny.Redness(), policy=BEAM, candidates=4, diversity=Negtome(), **FAMILIES["FLUX"][1]
        )

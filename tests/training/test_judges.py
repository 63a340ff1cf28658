"""A judge of features from a recording, for pipelines that nobody prepared: record, train, search with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import ttsnap
from tests.pipelines import tiny, tiny_any, tiny_flow, tiny_sd
from ttsnap import rewards
from ttsnap.core.grid import early_calls
from ttsnap.pipelines.features import X0, Place, Tap, find_places, tap
from ttsnap.pipelines.sampler import Sampler
from ttsnap.recordings import Recording
from ttsnap.recordings.features import Kept, Reader, create
from ttsnap.recordings.recorder import record_rewards, seeds_of
from ttsnap.training.judges import JudgeSettings, _served, shares_of_noise, train_judge

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "cyan") for shape in ("circle", "square")]
SMALL = {"height": 32, "width": 32, "num_inference_steps": 4}
QUICK = JudgeSettings(updates=24, batch=32, width=16, depth=1, held_out=2)
FAMILIES = {
    "FLUX": (tiny.flux, SMALL | {"max_sequence_length": 12}),
    "FLUX guided": (tiny.flux, SMALL | {"max_sequence_length": 12, "negative_prompt": "a", "true_cfg_scale": 3.0}),
    "SD": (tiny_sd.stable_diffusion, SMALL),
    "SDXL": (tiny_sd.sdxl, SMALL),
    "SD 3": (tiny_sd.sd3, SMALL),
    "ControlNet": (
        lambda: tiny_any.stable_diffusion(pipeline="StableDiffusionControlNetPipeline"),
        SMALL | {"image": torch.rand(1, 3, 32, 32)},
    ),
    "PixArt": (tiny_flow.pixart, SMALL | {"use_resolution_binning": False}),
    "Sana": (tiny_flow.sana, SMALL | {"use_resolution_binning": False}),
    "Qwen-Image": (tiny_flow.qwen_image, SMALL),
    "Z-Image": (tiny_flow.z_image, SMALL),
    "FLUX.2 Klein": (tiny_flow.flux2_klein, SMALL),
}


@pytest.fixture
def red(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "red", lambda device: tiny.Redness())
    return {"red": tiny.Redness()}


def recorded(sampler, red, out, prompts=PROMPTS, **options):
    return record_rewards(sampler, red, prompts, seeds_of(range(len(prompts)), 4, 0), out, features=True, **options)


QUICKLY = ("FLUX guided",)


@pytest.mark.parametrize(
    "family", [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_from_any_pipeline_to_a_judge_in_use(family, red, tmp_path):
    build, options = FAMILIES[family]
    sampler = Sampler(build(), **options)
    recording = recorded(sampler, red, tmp_path / "rec.zarr")
    kept = Reader(recording).kept
    assert len(kept.places) >= 2, kept.places
    assert kept.calls == early_calls(4) == (1, 2)
    report = train_judge(tmp_path / "rec.zarr", tmp_path / "head", QUICK)
    assert set(report.places) <= {place.module for place in kept.places}
    assert [level.call for level in report.levels] == [1, 2]
    result = ttsnap.search(
        sampler.pipe, PROMPTS[0], reward=f"red+{tmp_path / 'head'}", candidates=4, policy="halving", **options
    )
    assert result.cost.looks > result.cost.decodes  # looks at features decode nothing
    assert result.guides == {"red": f"red+{tmp_path / 'head'}"} or "red" in result.guides


def test_what_is_kept_is_what_the_denoiser_said(red, tmp_path):
    sampler = Sampler(tiny.flux(), **SMALL, max_sequence_length=12)
    recording = recorded(sampler, red, tmp_path / "rec.zarr")
    reader = Reader(Recording.open(tmp_path / "rec.zarr"))
    places = reader.kept.places
    assert places[-1] == Place(X0, grid=2, width=256)
    cells = reader.cells(places, np.array([3]))
    assert cells.shape == (1, 4, 2, 4, sum(reader.kept.widths))
    sampler.tap = tap(sampler, places)
    state = sampler.advance(sampler.start([PROMPTS[3]], [int(recording.seeds[3, 1])]), 2)
    features = sampler.features(state)
    np.testing.assert_allclose(cells[0, 1, 1], features.cells[0].numpy(), atol=2e-3, rtol=2e-3)
    one = reader.cells(places[1:2], np.array([3]))
    np.testing.assert_array_equal(one, cells[..., reader.kept.channels(places[1:2])])
    words, counts = reader.words(np.array([3]))
    np.testing.assert_allclose(words[0, : counts[0]], features.words[0].numpy(), atol=2e-3, rtol=2e-3)


def test_the_estimate_is_stacked_onto_the_grid():
    latents = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    cells = Tap(torch.nn.Identity(), [Place(X0, grid=2)]).with_x0(None, latents, 1)
    assert cells.shape == (1, 4, 8)
    assert cells[0, 1].tolist() == [2.0, 3.0, 6.0, 7.0, 18.0, 19.0, 22.0, 23.0]


def test_wide_features_are_projected_in_the_same_way_everywhere_and_keep_distances():
    place, cells = Place("block", width=256), torch.randn(6, 4, 2048, generator=torch.Generator().manual_seed(0))
    narrow = place.narrow(cells)
    assert narrow.shape == (6, 4, 256)
    torch.testing.assert_close(place.narrow(cells[2:3]), narrow[2:3])
    wide = torch.nn.functional.layer_norm(cells, (2048,))
    before, after = ((x[0] - x[1]).norm() for x in (wide, narrow))
    assert abs(after / before - 1) < 0.15
    assert not torch.equal(Place("other", width=256).narrow(cells), narrow)


def made_up(folder, prompts=60, candidates=8):
    """A recording in which the block in the middle knows the reward, and the clean reward sees it from call 3 on."""
    rng = np.random.default_rng(0)
    places = tuple(Place(module, grid=2) for module in ("blocks.0", "blocks.1", X0))
    kept = Kept(calls=(1, 2, 3), places=places, widths=(4, 4, 4), cells=4, words=(0, 0))
    recording = Recording.create(
        folder,
        prompts=[f"prompt {number}" for number in range(prompts)],
        num_candidates=candidates,
        num_steps=5,
        rewards=["red"],
        sigmas=[1.0, 0.8, 0.6, 0.4, 0.2],
    )
    create(recording, kept)
    for prompt in range(prompts):
        cells = rng.normal(size=(candidates, 3, 4, 12))
        final = rng.normal(size=candidates)
        for look, noise in enumerate((2.0, 1.0, 0.5)):
            cells[:, look, :, 5] += 1.5 * (final + noise * rng.normal(size=candidates))[:, None]
        clean = np.full((candidates, 5, 1), np.nan)
        for call, noise in ((1, 9.0), (2, 9.0), (3, 0.01), (5, 0.0)):
            clean[:, call - 1, 0] = final + noise * rng.normal(size=candidates)
        recording.write_array("features", prompt, cells.astype(np.float16))
        recording.write_prompt(prompt, clean)


def test_the_place_that_knows_is_found_and_serves_as_long_as_it_knows_more(tmp_path):
    made_up(tmp_path / "rec.zarr")
    settings = JudgeSettings(updates=120, batch=128, width=32, depth=1, learning_rate=5e-3)
    seen = []
    report = train_judge(
        tmp_path / "rec.zarr", tmp_path / "head", settings, on_start=seen.append, on_updates=seen.append
    )
    assert seen[0] == sum(seen[1:])
    assert set(report.trials) == {"blocks.0 + x0", "blocks.1 + x0", "blocks.0", "blocks.1", "x0"}
    assert "blocks.1" in report.places
    assert report.prompts == (40, 8, 12)
    assert [level.served for level in report.levels] == [True, True, False]
    assert [level.judge > 0.2 for level in report.levels] == [True] * 3
    assert report.levels[0].judge < report.levels[1].judge < report.levels[2].judge < report.levels[2].clean
    told = json.loads((tmp_path / "head" / "evaluation.json").read_text())
    assert told["levels"][0]["judge"] == report.levels[0].judge
    head = json.loads((tmp_path / "head" / "head.json").read_text())
    assert (head["reward"], head["sigma"]) == ("red", 0.8)


def test_a_recording_is_gone_on_with(red, tmp_path):
    sampler = Sampler(tiny.flux(), **SMALL, max_sequence_length=12, max_batch=4)
    whole = recorded(sampler, red, tmp_path / "whole.zarr")

    class Stop(Exception):
        pass

    seen = []

    def stop(images):
        seen.append(images)
        if sum(seen) > 9:
            raise Stop

    with pytest.raises(Stop):
        recorded(sampler, red, tmp_path / "rec.zarr", on_images=stop)
    assert 0 < Recording(tmp_path / "rec.zarr").done.sum() < len(PROMPTS)
    again = recorded(sampler, red, tmp_path / "rec.zarr")
    everybody = np.arange(len(PROMPTS))
    np.testing.assert_array_equal(again.clean, whole.clean)
    cells = [Reader(r).cells(Reader(r).kept.places, everybody) for r in (again, whole)]
    np.testing.assert_array_equal(*cells)


def test_calls_are_kept_in_their_order_and_bad_settings_refused(red, tmp_path):
    sampler = Sampler(tiny.flux(), **SMALL, max_sequence_length=12)
    recording = recorded(sampler, red, tmp_path / "rec.zarr", PROMPTS[:2], calls=(4, 3, 1))
    assert Reader(recording).kept.calls == (1, 3)
    for options, told in (
        ({"updates": 0}, "updates must be at least 1"),
        ({"width": 30}, "width must be a multiple of 4"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ):
        with pytest.raises(ValueError, match=told):
            JudgeSettings(**options)


def test_what_cannot_be_trained_is_one_sentence(red, tmp_path):
    sampler = Sampler(tiny.flux(), **SMALL, max_sequence_length=12)
    record_rewards(sampler, red, PROMPTS[:2], seeds_of(range(2), 2, 0), tmp_path / "plain.zarr")
    with pytest.raises(ValueError, match="keeps no features; record it with --features"):
        train_judge(tmp_path / "plain.zarr", tmp_path / "head")
    recorded(sampler, red, tmp_path / "few.zarr", PROMPTS[:4])
    with pytest.raises(ValueError, match="4 are recorded, 2 held out; record at least 8"):
        train_judge(tmp_path / "few.zarr", tmp_path / "head")
    recorded(sampler, red, tmp_path / "rec.zarr")
    with pytest.raises(ValueError, match="has no reward 'blue'; it has red"):
        train_judge(tmp_path / "rec.zarr", tmp_path / "head", JudgeSettings(reward="blue"))
    with pytest.raises(ValueError, match="'nowhere' was not recorded; there are transformer_blocks"):
        train_judge(tmp_path / "rec.zarr", tmp_path / "head", JudgeSettings(place="nowhere"))
    train_judge(tmp_path / "rec.zarr", tmp_path / "head", JudgeSettings(place="x0", updates=8, held_out=2))
    with pytest.raises(ValueError, match="holds a head already"):
        train_judge(tmp_path / "rec.zarr", tmp_path / "head")


def test_where_to_listen_is_found_in_transformers_and_unets():
    flux = tuple(find_places(Sampler(tiny.flux(), **SMALL, max_sequence_length=12)))
    assert [place.module for place in flux][-1] == X0
    assert all("blocks" in place.module for place in flux[:-1])
    unet = find_places(Sampler(tiny_sd.sdxl(), **SMALL))
    assert {place.module for place in unet} <= {"mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2", X0}


@pytest.mark.parametrize(
    ("judge", "last"),
    [
        ((0.21, 0.31, 0.30, 0.30), 1),  # the easy level by the two commands
        ((-0.10, 0.11, 0.21, 0.26), 0),  # the hard one: too weak everywhere
        ((0.31, 0.48, 0.54, 0.70), 3),
    ],
)
def test_where_the_clean_reward_was_not_asked_a_judge_serves_no_longer_than_that_usually_allows(judge, last):
    nobody = np.full((3, 4), np.nan)
    noise = shares_of_noise(np.array([1.0, 0.9, 0.8, 0.7]))
    assert _served(np.tile(judge, (3, 1)), nobody, noise) == last
    ratios = 1 / (1 / noise[1:] - 1)  # as Stable Diffusion has them
    np.testing.assert_allclose(shares_of_noise(ratios), noise[1:])
    asked = np.zeros((3, 4))
    assert _served(np.tile(np.abs(judge), (3, 1)), asked, noise) == 3

"""One prompt of a recording, look by look."""

from __future__ import annotations

import numpy as np
import pytest

from ttsnap.policies import SuccessiveHalving
from ttsnap.recordings import Recording
from ttsnap.replay import replay_prompt

HALVING = SuccessiveHalving((2,), sizes=(3,))


def recorded(path, seeds, scales=None):
    clean = np.random.default_rng(0).normal(size=(2, 6, 4, 1))
    options = {"num_candidates": 6, "num_steps": 4, "rewards": ["r"], "scales": scales}
    recording = Recording.create(path, prompts=["a", "b"], **options)
    recording.write_prompt(1, clean[1], seeds=seeds)
    return recording, clean[1].astype(np.float32)


def test_every_candidate_has_its_looks_in_the_scale_of_the_recording(tmp_path):
    recording, clean = recorded(tmp_path / "r.zarr", np.arange(40, 46), {"r": (1.0, 2.0)})
    replayed = replay_prompt(recording, 1, HALVING, 5)
    assert list(replayed.history) == [40, 41, 42, 43, 44]
    kept = [seed for seed, seen in replayed.history.items() if seen[0].kept]
    assert sorted(kept) == sorted(40 + np.argsort(clean[:5, 1, 0])[-3:])
    for seed, seen in replayed.history.items():
        assert [look.reward for look in seen] == pytest.approx(
            [(clean[seed - 40, look.step - 1, 0] - 1) / 2 for look in seen], abs=1e-6
        )
    assert replayed.result.ledger.nfe[0] == 5 * 2 + 3 * 2


def test_candidates_without_seeds_go_by_their_numbers(tmp_path):
    recording, _ = recorded(tmp_path / "r.zarr", None)
    assert list(replay_prompt(recording, 1, HALVING, 6).history) == list(range(6))


def test_what_is_not_recorded_is_refused(tmp_path):
    recording, _ = recorded(tmp_path / "r.zarr", None)
    with pytest.raises(ValueError, match="prompt 0 is not recorded"):
        replay_prompt(recording, 0, HALVING, 2)
    with pytest.raises(ValueError, match="7 candidates cannot be drawn from the 6 recorded"):
        replay_prompt(recording, 1, HALVING, 7)

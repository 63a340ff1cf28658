"""What early looks are worth, measured on the embedded model."""

from __future__ import annotations

import json

import pytest

from tests.pipelines import tiny
from ttsnap.live.looks import compare_looks
from ttsnap.pipelines.sampler import Sampler

SOME = ("--prompts", "shapes:held-out", "--prompt-range", "0:2", "--candidates", "5", "--steps", "8", "--calls", "2,6")


def test_kinds_of_looks_are_compared_on_the_same_estimates(ttsnap):
    code, out, err = ttsnap("bench", *SOME, "--looks", "tiny,linear", "--json")
    assert code == 0, err
    told = json.loads(out)
    looks = {(look["kind"], look["call"]): look for look in told["looks"]}
    assert set(looks) == {(kind, call) for kind in ("full", "tiny", "linear", "as served") for call in (2, 6)}
    assert told["reward"] == "shapes-aware"
    assert looks["full", 2]["full"] == looks["full", 6]["full"] == 1
    assert looks["full", 6]["final"] > 0.5  # late looks agree with the finished images
    assert looks["as served", 6] | {"seconds": 0, "kind": ""} == looks["full", 6] | {"seconds": 0, "kind": ""}
    assert looks["as served", 2]["calls"] == pytest.approx(0.22, abs=0.02)  # features
    assert looks["full", 2]["calls"] == pytest.approx(0.94, abs=0.02)
    assert looks["linear", 2]["tflop"] < looks["tiny", 2]["tflop"] < looks["full", 2]["tflop"]


def test_a_noise_aware_reward_of_pictures_is_asked_as_the_clean_one_too():
    class Aware(tiny.Redness):
        """Says the opposite of early pictures."""

        def level(self, sigma):
            return sigma if sigma > 0.5 else None

        def reads(self, sigma):
            return self.level(sigma)

        def __call__(self, images, prompts, *, sigma):
            return super().__call__(images, prompts, sigma=sigma) * (-1 if sigma > 0.5 else 1)

    sampler = Sampler(tiny.flux(), num_inference_steps=4, height=32, width=32, max_sequence_length=12)
    found = compare_looks(sampler, "red", Aware(), ["a", "b"], kinds=["full"], candidates=6, calls=[1])
    clean, served = found
    assert (clean.kind, served.kind) == ("full", "as served")
    assert clean.final == pytest.approx(-served.final)
    assert served.full == pytest.approx(-1)


def test_the_table_and_what_is_wrong(ttsnap):
    code, out, err = ttsnap(
        "bench",
        "a red circle",
        "a blue square",
        "--candidates",
        "3",
        "--steps",
        "3",
        "--calls",
        "1",
        "--looks",
        "linear",
    )
    assert code == 0, err
    for text in ("as served", "tau with full", "MFLOP", "within 2 prompts x 3 candidates"):
        assert text in out
    for options, told in (
        (("--reward", "shapes,clipscore"), "one reward are compared at a time"),
        (("--looks", "magic"), "a preview is auto, full, tiny"),
        (("--candidates", "1"), "candidates"),
    ):
        code, _, err = ttsnap("bench", "a red circle", *options)
        assert code == 2
        assert told in err


def test_policies_are_compared_and_two_benches_set_side_by_side(ttsnap, tmp_path):
    asked = ("bench", "a red circle", "--policies", "best-of-n", "--budget", "9NFE", "--steps", "3", "--pool", "3")
    asked += ("--try-steps", "none")
    out = tmp_path / "bench"
    code, told, err = ttsnap(*asked, "--out", out, "--json")
    assert code == 0, err
    data = json.loads(told)
    assert data == json.loads((out / "bench.json").read_text())
    first, second = data["rows"]
    assert (first["policy"], second["policy"], first["started"], second["started"]) == ("best-of-N", "best-of-n", 3, 3)
    assert first["value"] == pytest.approx(second["value"], rel=1e-5)
    measured = {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
    code, told, err = ttsnap(*asked, "--out", out)
    assert code == 0, err
    assert "| 9 NFE | best-of-n | 3 | 9 NFE |" in told
    assert f"written: {out / 'bench.md'}" in told
    assert {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()} == measured
    code, told, _ = ttsnap("bench", "--compare", out, out)
    assert code == 0
    assert "| 9 NFE | best-of-n, 3 steps |" in told
    for options, said in (
        (("--policies", "svdd"), "--budget, such as 18GFLOP"),
        (("--policies", "svdd", "--budget", "9NFE", "--looks", "full"), "give one of them"),
        (("--budget", "9NFE"), "say which with --policies"),
        (("--compare", out, tmp_path), "is no bench"),
    ):
        code, _, err = ttsnap("bench", "a red circle", *options)
        assert code == 2
        assert said in err

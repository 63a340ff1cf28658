"""Where the time goes: what is compared, and against what."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.pipelines import tiny
from ttsnap.live import speed
from ttsnap.live.session import prepare
from ttsnap.policies import SuccessiveHalving


@pytest.fixture(scope="module")
def session():
    arguments = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": 12}
    return prepare(tiny.flux(), reward={"red": tiny.Redness()}, report="none", max_batch=4, **arguments)


def test_the_stock_pipelines_images_are_those_of_the_sampler(session):
    images = speed.stock_images(session.sampler, "a red circle", range(5))
    state = session.sampler.advance(session.sampler.start(["a red circle"] * 5, range(5)), 4)
    np.testing.assert_allclose(images.numpy(), session.sampler.look(state).float().cpu().numpy(), atol=2e-3)
    reds = tiny.Redness()(images, ["a red circle"] * 5, sigma=0.0)
    assert speed.stock_best_of_n(session, "a red circle", 5) == int(reds.argmax())


def test_calls_places_shares_and_memory_of_a_search(session):
    halving = SuccessiveHalving((1,), keep=(0.5,))
    stock, ours, search = speed.measure(session, {"halving": halving}, "a red circle", 6, repeats=1)
    assert (stock.name, ours.name, search.name) == ("stock best-of-N", "best-of-N", "halving")
    assert search.calls == 6 + 3 * 3
    assert stock.candidates == ours.candidates == round(15 / 4)
    assert stock.calls == 4 * stock.candidates
    assert stock.per_call == 1
    assert ours.occupancy == 1  # four in batches of four
    assert search.occupancy == pytest.approx((6 + 9) / (4 * (2 + 3)))  # 4 and 2; then three times 3
    for one in (ours, search):
        assert sum(one.shares.values()) == pytest.approx(1)
        assert one.overhead == pytest.approx(1 / one.shares["calls"])
        assert one.per_call_range[0] <= one.per_call <= one.per_call_range[1]
    lines = speed.table([stock, ours, search])
    assert lines[2].startswith(f"| stock best-of-N | {stock.candidates} | {stock.calls} |")
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_the_command(ttsnap):
    code, out, err = ttsnap("bench", "a red circle", "--speed", "--candidates", 4, "--draws", 2, "--steps", 4, "--json")
    assert code == 0, err
    assert [one["name"] for one in json.loads(out)["speed"]] == ["stock best-of-N", "best-of-N", "default"]
    for option in (("--budget", "9NFE"), ("--policies", "svdd@3"), ("--candidates", 0)):
        code, _, err = ttsnap("bench", "a red circle", "--speed", *option)
        assert code == 2

"""What people who work in notebooks do, on the embedded model."""

from __future__ import annotations

import asyncio
import io
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import ttsnap
from ttsnap.core.observers import Observer
from ttsnap.live.session import first_seed

PROMPT = 'a red circle left of a "blue" <b>hut</b>'


@pytest.fixture(scope="module")
def session():
    with ttsnap.prepare("shapes", candidates=4, num_inference_steps=6, policy="steering") as session:
        yield session
    with pytest.raises(ValueError, match="the session is closed"):
        session.search(PROMPT)
    assert session.sampler is None


@pytest.fixture(scope="module")
def result(session):
    return session.search(PROMPT, seed=2)


def test_a_result_shows_picture_cost_and_board(result):
    html = result._repr_html_()
    assert "<b>hut" not in html
    assert "a red circle left of a &quot;blue&quot; &lt;b&gt;hut&lt;/b&gt;" in html
    assert f"seed {result.seed}" in html
    assert f"{result.cost.nfe} NFE" in html
    import base64

    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    best, board = (Image.open(io.BytesIO(data)) for data in pictures)
    assert np.array_equal(np.asarray(best), np.asarray(result.image))
    assert board.width > 600
    assert result.images[0]._repr_png_() == pictures[0]


def test_the_history_is_a_data_frame(result):
    frame = result.frame()
    assert len(frame) == result.cost.looks
    assert list(frame.columns) == ["seed", "parent", "step", "reward", "kept", "wins", "draft"]
    last = frame[frame.step == 6]
    assert last.loc[last.reward.idxmax(), "seed"] == result.seed
    assert frame[frame.wins].groupby("step").size().max() == 1
    children = {int(seed) for seed in frame[frame.parent.notna()].seed}
    assert children
    assert children <= set(result.lineage)


def test_a_picture_is_saved_by_its_name(result, tmp_path):
    for name, kind in (("a.png", "PNG"), ("a.webp", "WEBP"), ("a.jpg", "JPEG")):
        result.images[0].save(tmp_path / name)
        assert Image.open(tmp_path / name).format == kind


def test_a_generator_says_the_first_seed():
    generator = torch.Generator("cpu").manual_seed(7)
    torch.randn(3, generator=generator)
    assert first_seed(None, generator) == 7
    assert (first_seed(None, None), first_seed(5, None)) == (0, 5)
    with pytest.raises(ValueError, match="not both"):
        first_seed(0, generator)
    with pytest.raises(ValueError, match=r"one torch\.Generator.*got list"):
        ttsnap.search("shapes", "a", generator=[generator])


def test_a_bar_counts_calls_and_tells_the_best_reward(session, capsys):
    told = []

    class Told(Observer):
        def looked(self, look, ledger):
            told.append(look.step)

    result = session.search(PROMPT, seed=1, progress=True, observer=Told())
    said = capsys.readouterr().err
    assert f"/{result.cost.nfe} " in said
    assert "alive=" in said
    assert told
    session.search(PROMPT, seed=1)
    assert not capsys.readouterr().err  # no bar outside notebooks, unless one is asked for


def test_results_can_be_waited_for_while_the_event_loop_goes_on(session):
    ticks = []

    async def main():
        async def tick():
            while True:
                ticks.append(len(ticks))
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        stream = session.stream(["a red circle", "a blue square"], generator=torch.Generator().manual_seed(4))
        found = {number: result async for number, result in stream}
        ticking.cancel()
        return found

    with ThreadPoolExecutor(1) as thread:  # in this one a browser's test may have left a loop
        found = thread.submit(asyncio.run, main()).result()
    assert sorted(found) == [0, 1]
    assert len(ticks) > 3
    plain = dict(session.stream(["a red circle", "a blue square"], seed=4))
    assert {n: result.seed for n, result in found.items()} == {n: result.seed for n, result in plain.items()}
    assert np.array_equal(np.asarray(found[0].image), np.asarray(plain[0].image))


def test_steps_are_given_as_to_a_pipeline():
    with ttsnap.prepare("shapes", candidates=2, num_inference_steps=3, policy="best-of-n") as session:
        assert session.search("a red circle", num_inference_steps=4).num_steps == 4
        assert session.search("a red circle", num_inference_steps=3).num_steps == 3

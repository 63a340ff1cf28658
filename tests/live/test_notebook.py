"""What people who work in notebooks do, on the embedded model."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import ttsnap
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
    assert list(frame.columns) == ["seed", "parent", "step", "reward", "kept", "wins"]
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

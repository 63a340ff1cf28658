import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("zarr")
pytest.importorskip("matplotlib")

from PIL import Image

from tests.replay.synthetic import recording, rewards
from tests.replay.test_simulator import FIELD, simulation
from ttsnap.core.cost import parse_budgets
from ttsnap.files.figures import save
from ttsnap.replay import plots


def test_pictures_name_their_axes_and_show_every_policy(tmp_path):
    clean = rewards(kinds=2)
    made = recording(tmp_path / "r.zarr", clean, clean + 1)
    figures = plots.plot(simulation(made), made)
    assert set(figures) == {"reward", "multiplier", "increase", "correlation"}
    assert [panel.get_xlabel() for panel in figures["reward"].axes] == ["budget per prompt (TFLOP)"] * 2
    legend = [text.get_text() for text in figures["reward"].axes[0].get_legend().get_texts()]
    assert legend == ["best-of-N (exact)", "best", "halving", "early"]
    paths = save(figures, tmp_path / "plots")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {path.name for path in paths}
    for path in paths:
        if path.suffix == ".png":
            assert min(Image.open(path).size) > 200
        else:
            text = " ".join(ET.parse(path).getroot().itertext())
            assert "95 %" in text
            assert "prompts" in text


def test_small_budgets_are_shown_in_their_own_unit(tmp_path):
    made = recording(tmp_path / "r.zarr")
    made.provenance["cost_model"] = {"name": "small"} | dict.fromkeys(
        ("call_tflop", "decode_tflop", "look_tflop", "prompt_tflop"), 1e-4
    )
    figure = plots.reward(simulation(made, FIELD[:2], parse_budgets("4:20:4GFLOP")))
    assert figure.axes[0].get_xlabel() == "budget per prompt (GFLOP)"
    x = figure.axes[0].get_lines()[0].get_xdata()
    assert list(x) == pytest.approx([4, 8, 12, 16, 20])

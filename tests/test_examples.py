"""The examples run; the whole story at a fiftieth of its size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_the_whole_story_ends_with_a_picture_and_the_curve(tmp_path):
    script = EXAMPLES / "whole_story.py"
    done = subprocess.run([sys.executable, script, ".02"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "out" / "whole_story"
    assert (out / "picture0" / "board.png").is_file()
    assert (out / "aware.json").is_file()
    assert (out / "head" / "model.safetensors").is_file()
    assert list(out.glob("*.png"))


@pytest.mark.slow
def test_the_notebook_runs_in_a_real_kernel_and_shows_pictures_a_bar_and_a_table(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel ipywidgets")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(EXAMPLES / "search.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    client.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    shown, table, rewards, picture = ([output.get("data", {}) for output in outputs] for outputs in cells)
    assert "ttsnap-result" in shown[-1]["text/html"]
    assert "data:image/png" in shown[-1]["text/html"]
    assert "<table" in table[-1]["text/html"]
    assert "'a purple circle'" in rewards[-1]["text/plain"]
    assert picture[-1]["image/png"]
    bars = [data for data in shown if "application/vnd.jupyter.widget-view+json" in data]
    assert bars, "no progress bar was shown"

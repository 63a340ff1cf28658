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

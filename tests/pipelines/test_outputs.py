"""Arguments in the line that makes a winner again."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ttsnap.pipelines.outputs import written


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.5, "a 'fox'", [1, [2, None]], (1,), (), {"scale": [0.1, 0.2]}, [("a", 1)]]
)
def test_values_are_written_so_that_python_reads_them_again(value):
    assert eval(written("x", value)) == value


@pytest.mark.parametrize("value", [torch.ones(2), [torch.ones(2)], [Image.new("RGB", (2, 2))], {"a": object()}])
def test_objects_go_by_the_name_of_their_argument(value):
    assert written("image", value) == "image"


def test_pictures_from_files_are_opened_again(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    picture = Image.open(tmp_path / "a.png")
    import PIL

    again = eval(written("image", [picture, picture]), {"PIL": PIL})
    assert [one.size for one in again] == [(3, 2)] * 2

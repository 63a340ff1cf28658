"""Pictures that are there already: odd ones, full batches, prompts, and what is left after a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import ttsnap
from tests.files import odd_pictures
from tests.files.lethal import Lethal
from ttsnap import rewards
from ttsnap.files import readers
from ttsnap.live.scoring import JOURNAL, save

PROMPT = "a red circle left of a blue square"


def corner(images, prompts):
    """The colour of a pixel in the upper left quarter, as one number."""
    levels = (images * 255).round().long()
    h, w = images.shape[-2:]
    red, green, blue = levels[:, :, h // 4, w // 4].unbind(1)
    return (red * 65536 + green * 256 + blue).double()


def make(folder, count, sizes=((32, 32),), start=0):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(start)
    for number in range(start, start + count):
        width, height = sizes[number % len(sizes)]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module `mine` with a reward that counts what it is shown."""
    (tmp_path / "mine.py").write_text(
        "import time\nshown = []\nwait = 0\n"
        "def bright(images, prompts):\n"
        "    shown.extend(images.shape[:1])\n    time.sleep(wait)\n    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    import mine

    yield mine
    sys.modules.pop("mine", None)


def test_of_sixty_odd_files_each_is_shown_as_a_viewer_shows_it_or_named(tmp_path):
    wanted = odd_pictures.make(tmp_path)
    assert len(wanted) > 60
    found = ttsnap.score(tmp_path, reward=corner, prompt="a")
    assert found.left_out == [str(tmp_path / "notes.txt")]
    by_name = {picture.name.removeprefix(f"{tmp_path}/"): picture for picture in found.pictures}
    assert by_name.keys() == wanted.keys()
    for name, expected in wanted.items():
        picture = by_name[name]
        if isinstance(expected, str):
            assert any(part in picture.fault for part in expected.split("|")), (name, picture.fault)
            assert "\n" not in picture.fault
            assert len(picture.fault) < 120
            continue
        assert not picture.fault, (name, picture.fault)
        code = int(picture.rewards["corner"])
        colour = (code >> 16, code >> 8 & 255, code & 255)
        assert np.abs(np.subtract(colour, expected)).max() <= 6, (name, colour)
        assert bool(picture.note) == name.startswith(("moving", "pages")), name


def test_batches_are_full_whatever_the_sizes_and_each_gets_what_it_gets_alone(tmp_path, monkeypatch):
    sizes = [(64, 64), (40, 30), (64, 64), (100, 50), (31, 77), (64, 64)]
    make(tmp_path / "a", 42, sizes)
    (reward,) = rewards.load("shapes").values()
    asked = []
    see = type(reward).judge

    def counted(self, grid, prompts):
        asked.append(len(grid))
        return see(self, grid, prompts)

    monkeypatch.setattr(type(reward), "judge", counted)
    found = ttsnap.score(tmp_path / "a", reward="shapes", prompt=PROMPT, max_batch=8)
    assert sorted(asked) == [2, *[8] * 5]
    for picture in found.ranked[:12]:
        alone = torch.from_numpy(np.array(Image.open(picture.path))).permute(2, 0, 1)[None].float() / 255
        assert picture.rewards["shapes"] == pytest.approx(reward(alone, [PROMPT]).item(), abs=1e-4)
    values = [picture.rewards["shapes"] for picture in found.ranked]
    assert values == sorted(values, reverse=True)
    assert len(values) == 42


def test_processes_read_the_same_as_threads_and_one_that_dies_of_a_file_names_it(tmp_path, monkeypatch):
    make(tmp_path / "a", 20)
    (tmp_path / "a" / "text.png").write_text("a text")
    few = ttsnap.score(tmp_path / "a", reward=corner, prompt="a")
    monkeypatch.setattr(readers, "FEW", 0)
    monkeypatch.setattr(readers, "PART", 4)
    many = ttsnap.score(tmp_path / "a", reward=corner, prompt="a")
    assert [(p.name, p.rewards, p.fault) for p in many.pictures] == [(p.name, p.rewards, p.fault) for p in few.pictures]
    lethal = readers.Reading({"r": "r"}, Lethal())
    items = [readers.Item(p.name, p.path, "a") for p in few.pictures[:3]]
    with lethal.begin(items, 1) as read:
        assert [one.fault for one in read] == ["is damaged: its decoder crashes"] * 3
    monkeypatch.setattr(sys, "executable", "/bin/false")  # no process can begin
    here = ttsnap.score(tmp_path / "a", reward=corner, prompt="a")
    assert [p.name for p in here.pictures] == [p.name for p in few.pictures]


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path, mine):
    make(tmp_path / "a", 24)
    options = {"reward": "mine:bright", "prompt": "a", "max_batch": 4, "out": tmp_path / "out"}
    child = os.fork()
    if not child:
        mine.wait = 0.2
        ttsnap.score(tmp_path / "a", **options)
        os._exit(0)
    journal = tmp_path / "out" / JOURNAL
    for _ in range(600):
        if journal.exists() and journal.read_bytes().count(b"\n") >= 8:
            break
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    kept = journal.read_bytes().count(b"\n")
    assert 8 <= kept < 24
    with journal.open("ab") as file:
        file.write(b'{"key": "cut off in the mid')
    mine.shown.clear()
    found = ttsnap.score(tmp_path / "a", **options)
    assert found.found == kept
    assert sum(mine.shown[1:]) == 24 - kept  # the first were the two pictures that it is tried on
    assert found.pictures == ttsnap.score(tmp_path / "a", **options | {"out": None}).pictures
    assert len([json.loads(line) for line in journal.read_text().splitlines()]) == 24


def test_what_has_changed_is_judged_again_and_nothing_else(tmp_path, mine):
    folder = make(tmp_path / "a", 6)

    def judged(**changes):
        mine.shown.clear()
        options = {"reward": "mine:bright", "prompt": "a", "out": tmp_path / "out"} | changes
        found = ttsnap.score(folder, **options)
        assert len(found.ranked) == len(list(folder.iterdir()))
        return sum(mine.shown[1:]), found.found

    assert judged() == (6, 0)
    assert judged() == (0, 6)
    (folder / "000.png").rename(folder / "other.png")  # the same content
    assert judged() == (0, 6)
    make(folder, 1, start=3)  # another content under the same name
    assert judged() == (1, 5)
    assert judged(prompt="b") == (6, 0)
    assert judged(reward="mine:bright,shapes", prompt=PROMPT) == (6, 0)
    assert judged(reward="shapes,mine:bright", prompt=PROMPT) == (0, 6)
    code = tmp_path / "mine.py"
    code.write_text(code.read_text() + "\n# other code\n")
    assert judged() == (6, 0)


def test_a_reward_that_fails_on_a_picture_names_it_and_one_that_fails_on_all_ends_it(tmp_path):
    make(tmp_path / "a", 5)
    Image.new("RGB", (32, 32), "white").save(tmp_path / "a" / "white.png")
    Image.new("RGB", (32, 32), "black").save(tmp_path / "a" / "black.png")

    def picky(images, prompts):
        if (images.mean((1, 2, 3)) == 1).any():
            raise ArithmeticError("too bright")
        means = images.mean((1, 2, 3))
        return torch.where(means == 0, torch.nan, means)

    found = ttsnap.score(tmp_path / "a", reward=picky, prompt="a")
    assert len(found.ranked) == 5
    faults = {picture.path.name: picture.fault for picture in found.faulty}
    assert faults["black.png"] == "is not judged by picky: it returned nan"
    assert faults["white.png"].startswith("is not judged by picky: ")
    assert "too bright" in faults["white.png"]
    make(tmp_path / "c", 6)

    def broken(images, prompts):
        if images.shape[-1] == 32:
            raise ArithmeticError("no weights")
        return images.mean((1, 2, 3))

    with pytest.raises(ValueError, match=r"reward broken fails: .*no weights"):
        ttsnap.score(tmp_path / "c", reward=broken, prompt="a", max_batch=3)


def test_prompts_are_found_where_they_are_given(tmp_path):
    folder = make(tmp_path / "a", 3)
    names = [folder / f"00{number}.png" for number in range(3)]
    chunk = {"ttsnap": json.dumps({"prompt": "of the  file"})}
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in chunk.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(names[0], pnginfo=info)

    def prompts(source, **options):
        found = ttsnap.score(source, reward=corner, **options)
        by_name = {picture.path.name: picture for picture in found.pictures}
        return [by_name[path.name].prompt or by_name[path.name].fault.split(";")[0] for path in names]

    lacks = "has no prompt in its metadata"
    assert prompts(folder) == ["of the file", lacks, lacks]
    assert prompts(folder, prompt=["a", "b", "c"]) == ["a", "b", "c"]
    assert prompts(folder, prompt={str(names[1]): "b", "002.png": "c"}) == ["of the file", "b", "c"]
    (folder / "table.csv").write_text('﻿File,Prompt\n001.png,"a, b"\n000.png,\n002.png,c\n')
    assert prompts(folder / "table.csv") == ["of the file", "a, b", "c"]
    with pytest.raises(ValueError, match="3 pictures need as many prompts, got 2"):
        prompts(folder, prompt=["a", "b"])
    unread = rewards.load({"corner": corner})["corner"]
    unread.reads_prompt = False
    assert not ttsnap.score(folder, reward={"corner": unread}).faulty


def test_pictures_in_memory_are_scored(tmp_path):
    pictures = [Image.new("RGBA", (8, 8), (255, 0, 0, 0)), Image.new("L", (9, 5), 3)]
    found = ttsnap.score(pictures, reward={"bright": lambda images, prompts: images.mean((1, 2, 3))}, prompt="a")
    assert [picture.name for picture in found.pictures] == ["picture 0", "picture 1"]
    assert found.best.rewards["bright"] == 1
    save(found, tmp_path, sheet=True)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "there is no picture nowhere"),
        ("", {"reward": "magic"}, "unknown reward 'magic'"),
        ("", {"reward": None}, "name a reward"),
        ("", {"max_batch": 0}, "--max-batch must be at least 1"),
        ("", {"sigma": -1}, "noise level of at least 0"),
    ],
)
def test_what_is_asked_wrong_is_one_sentence(tmp_path, source, options, message):
    make(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        ttsnap.score(source or tmp_path, **{"reward": "shapes", "prompt": "a"} | options)

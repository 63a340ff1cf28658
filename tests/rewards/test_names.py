import sys

import pytest

from ttsnap import rewards


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("limit = 3\ndef judge(images, prompts, *, sigma):\n    return images\n")
    (tmp_path / "broken.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    yield
    sys.modules.pop("mine", None)


def test_a_function_of_ones_own(here):
    judges = rewards.load("mine:judge, shapes")
    assert list(judges) == ["mine:judge", "shapes"]
    assert judges["mine:judge"](1, ["a"], sigma=0.0) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", "unknown reward 'magic'; known are shapes, or a callable as module:function"),
        ("nowhere:judge", "there is no module 'nowhere' here or installed"),
        ("mine:missing", "module 'mine' has no callable 'missing'"),
        ("mine:limit", "module 'mine' has no callable 'limit'"),
        ("shapes,shapes", "named once each"),
    ],
)
def test_what_is_not_there_is_said(here, name, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(name)


def test_a_module_that_lacks_a_package_says_which(here):
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        rewards.load("broken:judge")

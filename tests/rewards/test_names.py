import ast
import sys
from pathlib import Path

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
        ("magic", "unknown reward 'magic'; known are shapes, .*, or a callable as module:function"),
        ("shapes=weights.pt", "reward shapes takes no weights of one's own"),
        ("pickscore=a,pickscore=b", "named once each, got pickscore, pickscore"),
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


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("pickscore", ("pickscore", None, None)),
        ("hpsv2.1=/a/b.pt", ("hpsv2.1", "/a/b.pt", None)),
        ("hpsv2+run", ("hpsv2", None, "run")),
        ("hpsv2=/a/b=c.pt+run", ("hpsv2", "/a/b=c.pt", "run")),
        ("magic=1", None),
        ("module:hpsv2", None),
    ],
)
def test_what_a_name_says(text, spec):
    assert rewards.parse(text) == spec


def test_results_are_named_without_paths(tmp_path):
    (tmp_path / "a+b.pt").touch()
    assert rewards.parse(f"hpsv2={tmp_path}/a+b.pt") == ("hpsv2", f"{tmp_path}/a+b.pt", None)
    assert rewards.names_of("pickscore=x, hpsv2=y+run,shapes") == ["pickscore", "hpsv2+run", "shapes"]


def test_no_reward_needs_torchvision_or_the_original_packages():
    unwanted = {"torchvision", "open_clip", "clip", "timm", "hpsv2", "ImageReward"}
    files = sorted(Path(rewards.__file__).parents[1].rglob("*.py"))
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not unwanted & {name.split(".")[0] for name in names}, file

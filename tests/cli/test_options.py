"""What all verbs share: the settings file, how much is said, errors, completion."""

from __future__ import annotations

import importlib
import inspect
import json
import re

import pytest

from tests.commands import ttsnap
from ttsnap.cli import VERBS
from ttsnap.live.settings import changes

SEARCH = ("generate", "a red circle", "--policy", "best-of-n")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TTSNAP_DEBUG", raising=False)
    return tmp_path


@pytest.mark.parametrize("named", [True, False])
def test_options_stand_in_a_settings_file_and_those_that_are_typed_win(here, named):
    file = here / ("mine.toml" if named else "ttsnap.toml")
    file.write_text("[generate]\nsteps = 3\ncandidates = 3\nboard = false\n")
    first = ("--settings", file) if named else ()
    done = ttsnap(*first, *SEARCH, "--candidates", 2, "--out", "o", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["num_steps"], record["candidates"]["started"]) == (3, 2)
    assert not (here / "o" / "board.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[generate]\nstepz = 3\n", "stepz"),
        ("[generate\n", "ttsnap.toml is not valid TOML"),
        ("[generate]\nsteps = 0\n", "--steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_settings_file_is_one_sentence(here, content, message):
    (here / "ttsnap.toml").write_text(content)
    done = ttsnap(*SEARCH)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("generate", "a", "--stesp", 3), "Unknown option: --stesp. Did you mean --steps?"),
        (("genrate", "a"), 'Did you mean "generate"?'),
        (("generate", "a", "--steps", "x"), 'unable to convert "x" into int'),
        (("record", "a"), "--out"),
        (("--settings", "nowhere.toml", "generate", "a"), "there is no settings file nowhere.toml"),
        (("generate", "a", "--policy", "hand-picked"), "needs a person at each look: open the page"),
    ],
)
def test_what_is_typed_wrong_is_one_sentence(typed, message):
    done = ttsnap(*typed)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError(), "memory ran out"), (RuntimeError("the driver\nis too old"), "error: the driver is too old")],
)
def test_what_fails_inside_is_one_sentence_and_debug_shows_where(monkeypatch, error, message):
    from ttsnap.live import session

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(session, "prepare", fails)
    done = ttsnap(*SEARCH, "--out", "o")
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(type(error)):
        ttsnap("--debug", *SEARCH, "--out", "o")


def test_quiet_says_nothing_but_the_result():
    loud, quiet = (
        ttsnap(*more, *SEARCH, "--candidates", 2, "--steps", 2, "--out", f"o{more}") for more in ((), ("-q",))
    )
    assert "2 candidates" in loud.stderr
    assert quiet.stderr == ""
    assert "a red circle" in quiet.stdout


def test_completion_knows_the_verbs():
    from ttsnap.cli import commands

    script = commands.generate_completion(shell="bash")
    assert all(verb in script for verb in ("generate", "import-values", "--candidates"))


def test_a_file_that_came_or_went_is_a_change_too():
    before, now = {"seed": 0, "contents": {"model m": "a", "config c": "b"}}, {"seed": 0, "contents": {"model m": "a"}}
    assert changes(before, now) == changes(now, before) == ["the content of config c"]
    assert changes(before, before) == []


@pytest.mark.parametrize("verb", VERBS)
def test_the_line_in_the_list_of_verbs_is_the_first_of_the_verb_itself(verb):
    path, _, summary = VERBS[verb]
    module, _, function = path.partition(":")
    told = inspect.getdoc(getattr(importlib.import_module(f"ttsnap.cli.{module}"), function))
    assert " ".join(told.split("\n\n")[0].split()) == summary


@pytest.mark.parametrize("verb", VERBS)
def test_a_usage_line_names_the_arguments_that_there_are(verb, ttsnap):
    shown = ttsnap(verb, "--help")[1]
    usage, _, rest = shown.partition("\n")
    panel = rest.partition("─ Arguments ─")[2].partition("╰")[0]
    there = re.findall(r"^│ \*? *([A-Z]+)  ", panel, re.MULTILINE)
    assert re.findall(r"\b[A-Z]+\b", usage.partition(" --")[0].replace("[OPTIONS]", "")) == there

"""`ttsnap app`: what is refused before a page is opened."""

from __future__ import annotations

import sys

import pytest

from ttsnap import cli

BAD = {
    "auth": (["--auth", "ann"], "--auth takes user:password, got 'ann'"),
    "open": (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: give --auth user:password, or --insecure"),
    "port": (["--port", "0"], "--port must be 1 to 65535, got 0"),
    "model": (["--model", "nope"], "unknown model 'nope'"),
    "reward": (["--reward", "magic"], "unknown reward 'magic'"),
    "limits": (["--max-candidates", "0"], "--max-candidates must be at least 1"),
    "file": (["--out", "file"], "cannot write to file"),
}


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ttsnap", "app", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error")]
    return line


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    arguments, message = BAD[case]
    assert message in run(monkeypatch, capsys, *arguments)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'ttsnap[app]'" in run(monkeypatch, capsys)

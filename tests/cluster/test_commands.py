"""The commands themselves with two workers, on the embedded model: the same bytes as one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.cluster import toys
from ttsnap.recordings import Recording

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_cores")]
PROMPTS = ["--prompts", "shapes:held-out", "--prompt-range", "0:12", "--per-prompt", 4, "--max-batch", 8]


def test_record_and_label(ttsnap, tmp_path):
    for name, workers in (("one", []), ("two", ["--workers", 2])):
        code, out, err = ttsnap("record", *PROMPTS, "--calls", "10", "--out", tmp_path / name, *workers, "--json")
        assert (code, json.loads(out)["images"]) == (0, 12 * 4 * 2), err
        options = ["--reward", "shapes", *workers, "--json"]
        code, out, err = ttsnap("label", tmp_path / name, tmp_path / f"{name}.zarr", *options)
        assert (code, json.loads(out)["prompts"]) == (0, 12), err
        ttsnap("record", *PROMPTS, "--reward", "shapes", "--out", tmp_path / f"{name}.values", *workers)
    assert toys.files(tmp_path / "one") == toys.files(tmp_path / "two")
    for kind in ("zarr", "values"):
        one, two = (Recording(tmp_path / f"{name}.{kind}").clean for name in ("one", "two"))
        assert one.tobytes() == two.tobytes()


def test_generate_while_a_worker_is_killed(ttsnap, tmp_path):
    prompts = tmp_path / "prompts.txt"
    colours = ("red", "blue", "green", "cyan", "yellow", "purple")
    prompts.write_text("\n".join(f"a {colour} circle" for colour in colours))
    options = ["generate", "--prompts", prompts, "--candidates", 4, "--max-batch", 4, "--no-board", "--json"]
    code, out, err = ttsnap(*options, "--out", tmp_path / "one")
    assert code == 0, err

    def kill():
        """A worker process, once there is something to lose."""
        while not list((tmp_path / "two").glob("p*/result.json")):
            time.sleep(0.05)
        for folder in os.listdir("/proc"):
            if folder.isdigit() and b"ray::_Actor" in _title(folder):
                os.kill(int(folder), signal.SIGKILL)
                return

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    code, out, err = ttsnap(*options, "--out", tmp_path / "two", "--workers", 2)
    killer.join(1)
    assert code == 0, err
    assert len(json.loads(out)["results"]) == 6
    assert toys.files(tmp_path / "two") == toys.files(tmp_path / "one")


def test_a_ray_that_runs_on_the_machine_already_is_left_alone_without_an_address():
    """`ray start` leaves its address in a file, which Ray itself would follow."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # short, as the names of sockets must be
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:1")
        code = (
            "from ttsnap.cluster import ray_pool; assert ray_pool.connect(None, 1); import ray; print(len(ray.nodes()))"
        )
        environment = {**os.environ, "RAY_TMPDIR": folder}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.stdout == "1\n", done.stderr


def test_a_prompt_that_fails_is_told_by_file_and_exit_code(tmp_path):
    (tmp_path / "picky.py").write_text(
        "def judge(images, prompts, *, sigma):\n"
        "    assert 'a blue circle' not in prompts, 'cannot'\n"
        "    return images.mean((1, 2, 3))\n"
    )
    (tmp_path / "prompts.txt").write_text("a red circle\na blue circle\na green circle\na cyan circle")
    options = ["--reward", "picky:judge", "--candidates", "2", "--steps", "2", "--no-board", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "ttsnap", "generate", "--prompts", "prompts.txt", *options, "--out", "out", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    failures = json.loads((tmp_path / "out" / "failures.json").read_text())["failures"]
    assert failures == json.loads(done.stdout)["failures"]
    assert failures == [{"prompt": 1, "text": "a blue circle", "error": "AssertionError: cannot"}]
    assert len(json.loads(done.stdout)["results"]) == 3


def _title(pid: str) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""

"""Bad input and hostile files: what is given, and what must come of it. Each case is a test and a row of the table."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest


class Case(NamedTuple):
    verb: str
    given: str
    outcome: str
    test: Callable


CASES: dict[str, Case] = {}


@dataclass
class Here:
    """Where a case runs: the command line in this process, and an empty folder to work in."""

    command: Callable
    folder: Path

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def refused(self, *arguments, message: str, code: int = 2) -> None:
        """One sentence, exit code 2, no traceback."""
        found, _, err = self.command(*arguments)
        lines = [line for line in err.strip().splitlines() if line.startswith("error")]
        assert (found, len(lines)) == (code, 1), err
        assert message in lines[0], err
        assert "Traceback" not in err


def case(verb: str, given: str, outcome: str = "one sentence, exit code 2"):
    def register(test):
        CASES[test.__name__] = Case(verb, given, outcome, test)
        return test

    return register


class Owned:
    """A pickle that says so when somebody loads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


# generate


@case("generate", "a file without prompts")
def no_prompts(here):
    here.refused("generate", "--prompts", here.file("p.txt", "\n \n\n"), message="give a prompt")


@case("generate", "prompts that are not UTF-8")
def prompts_not_text(here):
    here.refused("generate", "--prompts", here.file("p.txt", b"a \xff cat"), message="it is not UTF-8 text")


@case("generate", "a list of prompts that holds lists")
def prompts_nested(here):
    here.refused("generate", "--prompts", here.file("p.json", '["a", ["b"]]'), message="must hold a JSON list of str")


@case("generate", 'prompts by ids that climb out of the folder: `{"../../etc/x": "a cat"}`')
def prompts_with_ids(here):
    file = here.file("p.json", '{"../../etc/x": "a cat"}')
    here.refused("generate", "--prompts", file, message="has no column `prompt`; name one with --prompt-column")


@case("generate", "JSON that is nested 100,000 deep")
def prompts_deep(here):
    here.refused("generate", "--prompts", here.file("p.json", "[" * 100_000), message="is not valid JSON")


@case("generate", "a folder where a file with prompts is due")
def prompts_folder(here):
    here.refused("generate", "--prompts", here.folder, message="cannot read prompts from")


@case("generate", "a file with prompts of 80 MB")
def prompts_huge_file(here):
    file = here.file("p.txt", "")
    os.truncate(file, 80 << 20)
    here.refused("generate", "--prompts", file, message="is larger than 64 MiB")


@case("generate", "a prompt of a million characters")
def prompt_huge(here):
    here.refused("generate", "--prompts", here.file("p.txt", "a" * 1_000_000), message="at most 10000 are taken")


@case("generate", "a prompt with NUL and escape characters")
def prompt_control(here):
    here.refused("generate", "--prompts", here.file("p.txt", "a cat\x00\x1b[2J"), message="has a control character")


@case("generate", "emoji, Arabic, Hebrew and a prompt of 9,000 characters", "painted, and recorded as they are")
def prompt_scripts(here):
    prompts = ["a red circle 🔴👩‍🚀", "دائرة حمراء على مربع אדום", "very " * 1799 + "red"]
    file = here.file("p.json", json.dumps(prompts))
    out = here.folder / "out"
    code, text, err = here.command(
        "generate", "--prompts", file, "--candidates", 1, "--steps", 2, "--out", out, "--json"
    )
    assert code == 0, err
    assert [result["prompt"] for result in json.loads(text)["results"]] == prompts
    assert (out / "p0001" / "board.png").is_file()


@case("generate", "seeds below zero and beyond 2^62")
def seeds_out_of_range(here):
    here.refused("generate", "a", "--seed", -1, message="--seed must be at least 0, got -1")
    here.refused("generate", "a", "--seed", 2**63, message="--seed must be at most")


@case("generate", "a billion candidates, steps or pixels")
def far_too_many(here):
    here.refused("generate", "a", "--candidates", 10**9, message="--candidates must be at most 1000000")
    here.refused("generate", "a", "--steps", 10**9, message="--steps must be at most 1000")
    here.refused("generate", "a", "--size", 10**9, message="--size is at most 16384 pixels")
    here.refused("generate", "a", "--max-batch", 0, message="--max-batch must be at least 1")


@case("generate", "budgets that are not a number or infinite")
def budgets_not_finite(here):
    here.refused("generate", "a", "--budget", "nanNFE", message="needs a number and a unit")
    here.refused("generate", "a", "--budget", "1e999TFLOP", message="must be above zero and finite")


@case("generate", "a policy file with NaN and infinity for keep ratios")
def policy_not_finite(here):
    file = here.file("p.json", '{"policy": "halving", "rungs": [3], "keep": [NaN]}')
    here.refused("generate", "a", "--policy", file, message="above 0 and at most 1, got nan")
    file = here.file("p.json", '{"policy": "halving", "rungs": [3], "keep": [Infinity]}')
    here.refused("generate", "a", "--policy", file, message="above 0 and at most 1, got inf")


@case("generate", "a policy file that is nested 100,000 deep")
def policy_deep(here):
    here.refused("generate", "a", "--policy", here.file("p.json", "[" * 100_000), message="is not valid JSON")


@case("generate", "a policy file that is a pickle", "one sentence, exit code 2; nothing in it is run")
def policy_pickle(here):
    mark = here.folder / "owned"
    file = here.file("p.json", pickle.dumps(Owned(mark)))
    here.refused("generate", "a", "--policy", file, message="it is not UTF-8 text")
    assert not mark.exists()


@case("generate", "a reward whose module does not even compile")
def reward_broken(here):
    here.file("broken_reward.py", "def judge(:\n")
    here.refused(
        "generate", "a", "--reward", "broken_reward:judge", message="module 'broken_reward' fails: SyntaxError"
    )


@case(
    "generate", "a reward that fails for one prompt of many", "told in `failures.json`, exit code 3; the rest completes"
)
def reward_fails_for_one(here):
    module = (
        "import os\n"
        "def judge(images, prompts, *, sigma):\n"
        "    assert os.path.exists('able') or 'a blue circle' not in prompts, 'cannot'\n"
        "    return images.mean((1, 2, 3))\n"
    )
    here.file("picky_reward.py", module)
    file = here.file("p.txt", "a red circle\na blue circle\na green circle")
    out = here.folder / "out"
    options = ("--prompts", file, "--reward", "picky_reward:judge", "--candidates", 1, "--steps", 2, "--no-board")
    options += ("--out", out, "--json")
    code, text, err = here.command("generate", *options)
    assert code == 3, err
    failures = json.loads((out / "failures.json").read_text())["failures"]
    assert failures == json.loads(text)["failures"]
    assert failures == [{"prompt": 1, "text": "a blue circle", "error": "AssertionError: cannot"}]
    assert len(json.loads(text)["results"]) == 2
    here.file("able", "")
    code, text, err = here.command("generate", *options)
    assert code == 0, err
    assert len(json.loads(text)["results"]) == 3
    assert not (out / "failures.json").exists()


@case("generate", "a run whose reward's code or model's files have changed since", "the change is named, exit code 2")
def inputs_changed(here):
    module = "def judge(images, prompts, *, sigma):\n    return images.{}((1, 2, 3))\n"
    here.file("own_reward.py", module.format("mean"))
    out = here.folder / "out"
    options = (
        "generate",
        "a red circle",
        "--reward",
        "own_reward:judge",
        "--candidates",
        1,
        "--steps",
        2,
        "--out",
        out,
    )
    assert here.command(*options)[0] == 0
    assert "complete already" in here.command(*options)[1]
    here.file("own_reward.py", module.format("amax"))
    here.refused(*options, message="the content of reward own_reward:judge differ); give another --out")


@case("generate", "a model folder whose weights are a pickle", "one sentence, exit code 2; nothing in it is run")
def model_pickle(here):
    import torch

    from ttsnap.shapes import pipeline

    mark = here.folder / "owned"
    source = Path(pipeline.__file__).parent / "weights" / "pipeline"
    for path in source.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            here.file(f"model/{path.relative_to(source)}", path.read_bytes())
    for part in ("transformer", "vae"):
        torch.save(Owned(mark), here.folder / "model" / part / "diffusion_pytorch_model.bin")
    for part in ("text_encoder", "text_encoder_2"):
        torch.save(Owned(mark), here.folder / "model" / part / "pytorch_model.bin")
    here.refused("generate", "a", "--model", here.folder / "model", "--reward", "shapes", message="as a pickle only")
    assert not mark.exists()


@case("generate", "an output folder below a file")
def out_below_a_file(here):
    here.file("file", "")
    here.refused("generate", "a", "--out", here.folder / "file" / "x", message="cannot write to")


@case("generate", "an output folder that nobody can write to (`/proc/x`; root ignores modes)")
def out_read_only(here):
    here.refused("generate", "a", "--out", "/proc/ttsnap", message="cannot write to /proc/ttsnap")


@case("generate", "an object store without a bucket, and one that nobody knows")
def out_no_bucket(here):
    here.refused("generate", "a", "--out", "s3://", message="names no folder")
    here.refused("generate", "a", "--out", "magic://x/y", message="known are s3://")


def _other_process(out: Path) -> subprocess.Popen:
    code = (
        "import sys, time; from ttsnap.files.locks import locked; from ttsnap.files.storage import location\n"
        f"with locked(location({str(out)!r})): print('in', flush=True); time.sleep(100)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    return other


@case("generate, record, label", "an output that another process is writing to", "one sentence that names the process")
def out_in_use(here):
    out = here.folder / "out"
    other = _other_process(out)
    try:
        message = f"is being written by process {other.pid} on"
        here.refused("generate", "a", "--out", out, message=message)
        here.refused("record", "a", "--per-prompt", 1, "--out", out, message=message)
        _tree(here).save()
        here.refused("label", here.folder / "tree", out, "--reward", "shapes", message=message)
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()


@case("generate, record, label", "the lock of a process that was killed -9", "it is free; the run goes on")
def lock_of_the_dead(here):
    from ttsnap.files.locks import locked

    out = here.folder / "out"
    other = _other_process(out)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (here.folder / ".out.lock").exists()
    with locked(out):
        assert json.loads((here.folder / ".out.lock").read_text())["pid"] == os.getpid()
    assert not (here.folder / ".out.lock").exists()


@case("generate", "`settings.json` or `result.json` of a run that are cut off", "that part is done again")
def records_cut_off(here):
    from ttsnap.cli.generate import open_directory
    from ttsnap.cluster.generate import read_record

    here.file("settings.json", '{"settings": {"a"')
    here.file("result.json", '{"prompt": "a", "fi')
    assert open_directory(here.folder, {}) == (here.folder, None)
    assert read_record(here.folder) is None


@case("generate", "`--workers` of zero, of one prompt, and with a device of one's own")
def workers_wrong(here):
    here.refused("generate", "a", "--workers", 0, message="--workers must be at least 1")
    here.refused("generate", "a", "--workers", 2, message="are for many prompts")
    here.refused("generate", "a", "b", "--workers", 2, "--device", "cuda:1", message="has a GPU of its own")


# record


@case("record", "seeds beyond 2^62, no candidates, images of no size")
def record_ranges(here):
    here.refused("record", "a", "--out", "o", "--seed", 2**63, message="--seed must be at most")
    here.refused("record", "a", "--out", "o", "--per-prompt", 10**9, message="--per-prompt must be at most 1000000")
    here.refused("record", "a", "--out", "o", "--store-size", 0, message="--store-size must be at least 1")


@case("record", "a clock that is set back an hour, and a day ahead, in the middle", "the same files")
def clock_jumps(here):
    from tests.cluster import toys
    from ttsnap.cluster.scheduling import ThisProcess, execute

    execute(toys.images(here.folder / "whole"), ThisProcess())
    real, jumps = time.time, iter([0, -3600, 86400] * 10_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + next(jumps))
        execute(toys.images(here.folder / "tree"), ThisProcess())
        execute(toys.images(here.folder / "tree"), ThisProcess())
    assert toys.files(here.folder / "tree") == toys.files(here.folder / "whole")


@case("record", "a manifest that is nested 100,000 deep")
def manifest_deep(here):
    here.file("tree/manifest.json", "[" * 100_000)
    here.refused("label", here.folder / "tree", "o", "--reward", "shapes", message="manifest.json cannot be read")


# label


def _tree(here, **changes):
    from ttsnap.recordings.image_tree import ImageTree

    seeds = np.arange(2).reshape(1, 2)
    tree = ImageTree(here.folder / "tree", ("a red circle",), seeds, 2, (1, 2), (1.0, 0.5), (64, 64))
    return replace(tree, **changes)


def _whole_tree(here):
    tree = _tree(here)
    tree.save()
    for c in range(2):
        for call in (1, 2):
            tree.write(tree.path(0, c, call), np.zeros((64, 64, 3), dtype=np.uint8))
    return tree


def _png(width: int, height: int) -> bytes:
    """A file of a few hundred bytes that unfolds to width x height pixels."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes((width // 8 + 1) * min(height, 4000)), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _bad_image(here, content: bytes | None, fault: str) -> None:
    tree = _whole_tree(here)
    path = tree.path(0, 1, 1)
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    message = "no prompt of"
    here.refused("label", tree.root, here.folder / "o", "--reward", "shapes", message=message)
    found = tree.fault(0, 1, 1)
    if found is None:
        with pytest.raises(ValueError, match=r"s00\.png") as caught:
            tree.read(0, 1, 1)
        found = str(caught.value)
    assert fault in found


@case(
    "label", "a decompression bomb: 60,000 x 60,000 pixels in a file of a few KB", "a bad image: its prompt is left out"
)
def image_bomb(here):
    _bad_image(here, _png(60_000, 60_000), "decompression bomb")


@case("label", "a picture of 8,000 x 8,000 pixels where 64 x 64 are due", "a bad image: its prompt is left out")
def image_large(here):
    _bad_image(here, _png(8_000, 8_000), "is 8000 x 8000 instead of 64 x 64")


@case("label", "a pickle named .png", "a bad image; nothing in it is run")
def image_pickle(here):
    mark = here.folder / "owned"
    _bad_image(here, pickle.dumps(Owned(mark)), "is not a png image")
    assert not mark.exists()


@case("label", "a script named .png that begins and ends as an image does", "a bad image: its prompt is left out")
def image_script(here):
    _bad_image(here, b"\x89PNG\r\n\x1a\n<script>alert(1)</script>IEND\xaeB`\x82", "is damaged")


@case("label", "a folder where an image is due", "a bad image: its prompt is left out")
def image_folder(here):
    _bad_image(here, None, "cannot be read: Is a directory")


@case("label", "a symbolic link that points to itself", "a bad image: its prompt is left out")
def image_loop(here):
    tree = _whole_tree(here)
    path = tree.path(0, 0, 2)
    path.unlink()
    path.symlink_to(path)
    assert "cannot be read" in tree.fault(0, 0, 2)
    here.refused("label", tree.root, here.folder / "o", "--reward", "shapes", message="no prompt of")


@case("label", "a tree without a manifest whose first image is a bomb")
def first_image_bomb(here):
    here.file("tree/p0000/id000/s00.png", _png(60_000, 60_000))
    file = here.file("p.txt", "a")
    here.refused("label", here.folder / "tree", "o", "--reward", "shapes", "--prompts", file, message="is damaged")


@case("label", "folders in the tree whose names climb: `..p0000`, `p0000x`", "not taken for prompts")
def folder_names(here):
    for name in ("..p0000", "p0000x", "p00"):
        here.file(f"tree/{name}/id000/s00.png", b"")
    file = here.file("p.txt", "a")
    here.refused(
        "label", here.folder / "tree", "o", "--reward", "shapes", "--prompts", file, message="not an image tree"
    )


@case("label", "published labels with ids that climb out of the tree: `../../p0000: ...`")
def label_ids(here):
    here.file("hps.yaml", "../../p0000:\n  id000: 0.2\n")
    _whole_tree(here)
    here.refused(
        "label", here.folder / "tree", "o", "--ground-truth", "hps=hps.yaml", message="expected a key such as p000"
    )


@case("label", "published labels that multiply by aliases (a billion laughs)")
def label_laughs(here):
    lines = ["a: &a0 {id000: 1}"] + [f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    here.file("hps.yaml", "\n".join(lines))
    _whole_tree(here)
    start = time.perf_counter()
    here.refused("label", here.folder / "tree", "o", "--ground-truth", "hps=hps.yaml", message="hps.yaml, line 1")
    assert time.perf_counter() - start < 60


@case("label", "published labels with NaN and infinity")
def label_not_finite(here):
    _whole_tree(here)
    for value in (".nan", ".inf", "-.inf", "1e999"):
        here.file("hps.yaml", f"p0000: {{id000: {value}, id001: 1}}\n")
        here.refused("label", here.folder / "tree", "o", "--ground-truth", "hps=hps.yaml", message="a finite number")


# train


@case("train", "a config with object tags: `!!python/object/apply:os.system`", "one sentence; nothing in it is run")
def config_object(here):
    here.file("c.yaml", "learning_rate: !!python/object/apply:os.system ['touch owned']\n")
    here.refused(
        "train", "tree", "labels", "--config", "c.yaml", "--out", "run", message="c.yaml, line 1: not valid YAML"
    )
    assert not (here.folder / "owned").exists()


@case("train", "a config with NaN and infinity")
def config_not_finite(here):
    for value in (".nan", ".inf"):
        here.file("c.yaml", f"learning_rate: {value}\n")
        here.refused("train", "tree", "labels", "--config", "c.yaml", "--out", "run", message="must be above 0")


@case("train", "a config that is a list, and one that is not text")
def config_not_settings(here):
    here.file("c.yaml", "- 1\n")
    here.refused("train", "tree", "labels", "--config", "c.yaml", "--out", "run", message="must hold settings")
    here.file("c.yaml", b"\xff\xfe\x00")
    here.refused("train", "tree", "labels", "--config", "c.yaml", "--out", "run", message="cannot read the config")


# simulate, tune


def _recording(here) -> Path:
    from ttsnap.recordings import Recording

    path = here.folder / "r.zarr"
    recording = Recording.create(path, prompts=["a", "b"], num_candidates=4, num_steps=4, rewards=["r"])
    for p in range(2):
        recording.write_prompt(p, np.random.default_rng(p).random((4, 4, 1)))
    return path


@case("simulate, tune", "a file where a recording is due")
def recording_file(here):
    here.refused("simulate", here.file("r.zarr", "x"), message="is not a ttsnap recording")
    here.refused(
        "tune", here.file("r.zarr", "x"), "--budget", "9NFE", "--out", "o.json", message="not a ttsnap recording"
    )


@case("simulate", "a recording whose codec is `pickle`")
def recording_codec(here):
    path = _recording(here)
    file = path / "clean" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"codecs": [{"name": "pickle"}]}))
    here.refused("simulate", path, "--budgets", "9NFE", message="recording")


@case("simulate", "a recording with infinite rewards")
def recording_infinite(here):
    import zarr

    path = _recording(here)
    zarr.open_group(path, mode="r+")["clean"][1, 2, -1, 0] = np.inf
    here.refused("simulate", path, "--budgets", "9NFE", message="must be finite")


@case("simulate", "budgets of a million steps, NaN or infinity")
def simulate_budgets(here):
    path = _recording(here)
    for text, message in (("1:900000:1NFE", "at most 1000"), ("nan:9:1NFE", "first:last:step"), ("1e999NFE", "finite")):
        here.refused("simulate", path, "--budgets", text, message=message)


@case("tune", "an output below a file")
def tune_out(here):
    here.file("file", "")
    arguments = ("tune", _recording(here), "--budget", "40NFE", "--out", here.folder / "file" / "x.json")
    code, _, err = here.command(*arguments)
    assert code == 2
    assert "Traceback" not in err

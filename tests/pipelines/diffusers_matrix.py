"""Every tiny pipeline of diffusers' own test-suite, searched by ttsnap and compared with its stock call.

    git -C DIFFUSERS archive HEAD tests | tar x -C CHECKOUT
    pip install parameterized requests requests-mock opencv-python-headless beautifulsoup4
    python -m tests.pipelines.diffusers_matrix CHECKOUT --out rows.jsonl --table docs/pipelines.md

Three candidates of a best-of-N search, against three stock calls with the same seeds and against the line that the
result gives to make the winner again. Nothing comes from a hub: tokenizers and T5 encoders which the suite would load
from there are small ones made here. A test class is one row, a JSON object a line:

    outcome     ok, else why the stock pipeline does not run here
    spread      how far apart the pictures of two seeds are, of 1
    apart       how far the pictures of the search are from those of the stock calls at most (8 bits round by .002)
    winner      the same for the reproduced winner
    batches     denoiser calls made, per call that the stock pipeline makes: 1/3 is full batches, 1 one by one
    notes       what the search said
    error       why ttsnap does not search it
    fork        how far a child of no angle ends from its parent, and `moved` one of 60 degrees; else `fork_error`
    judge       what a judge of features, recorded, trained and used in a search, reads; else `judge_error`
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import inspect
import json
import re
import signal
import sys
import tempfile
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import constants

import ttsnap

NEEDED = ("parameterized", "requests", "requests_mock", "cv2", "bs4")
SEEDS = range(3)
ROUNDED = 0.0025  # pictures are rounded to 1 / 255, and so may a batch be
TWICE = 1.5 / 255  # apart are two pictures of 8 bits that were rounded
FULL = 0.8  # of the stock calls: less is batches
DENOISERS = ("unet", "transformer", "transformer_2", "controlnet", "prior", "decoder")
T5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
BEGIN, END = "<!-- matrix -->", "<!-- end -->"


# What the suite takes from a hub.


def byte_tokenizer(name: str) -> Any:
    """A tokenizer that knows bytes, with the special tokens of the family that a hub id names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    name = name.lower()
    clip = "clip" in name or "stable-diffusion" in name
    if not clip and not any(family in name for family in ("t5", "gemma", "qwen", "llama", "glm", "mistral")):
        raise OSError(f"not to be had without a hub: {name}")
    special = ["<pad>", "<bos>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A </s>" if clip else "$A </s>", special_tokens=[("<bos>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **names)
    fast.chat_template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    return fast


def t5_config(kind: Any, name: str) -> Any:
    if "t5" not in name.lower():
        raise OSError(f"not to be had without a hub: {name}")
    return (transformers.UMT5Config if "umt5" in name else transformers.T5Config)(**T5)


def t5_encoder(kind: Any, name: str) -> Any:
    torch.manual_seed(0)
    return kind((transformers.UMT5Config if "UMT5" in kind.__name__ else transformers.T5Config)(**T5)).eval()


@contextlib.contextmanager
def without_hub() -> Iterator[None]:
    """What is asked for by a hub's name is made here."""
    makers = {
        transformers.PreTrainedTokenizerBase: lambda kind, name: byte_tokenizer(name),
        transformers.AutoTokenizer: lambda kind, name: byte_tokenizer(name),
        transformers.AutoConfig: t5_config,
        transformers.T5EncoderModel: t5_encoder,
        transformers.UMT5EncoderModel: t5_encoder,
    }
    before = {kind: vars(kind).get("from_pretrained") for kind in makers}

    def replaced(kind: Any, make: Any) -> Any:
        load = kind.from_pretrained.__func__

        def from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
            return load(cls, name, *args, **options) if Path(str(name)).is_dir() else make(cls, str(name))

        return classmethod(from_pretrained)

    for kind, make in makers.items():
        kind.from_pretrained = replaced(kind, make)
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        for kind, method in before.items():
            if method is None:
                del kind.from_pretrained
            else:
                kind.from_pretrained = method


# One class.


class Late(Exception):
    """It took too long."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Late(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Passes:
    """Counts the forward passes of a pipeline's denoisers while it is entered."""

    def __init__(self, pipe: Any) -> None:
        self.count = 0
        parts = [getattr(pipe, name, None) for name in DENOISERS]
        self.parts = [part for part in parts if isinstance(part, torch.nn.Module)]

    def __enter__(self) -> Passes:
        self.hooks = [part.register_forward_hook(self.one) for part in self.parts]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def one(self, *_: Any) -> None:
        self.count += 1


def picture(output: Any) -> np.ndarray:
    """The picture [h, w, 3] or video [frames, h, w, 3] in 0..1 that a pipeline returned."""
    first = next(getattr(output, name) for name in ("images", "frames", 0) if name == 0 or hasattr(output, name))[0]
    if isinstance(first, list):
        first = np.stack([np.asarray(frame) for frame in first])
    array = (first.float().numpy() if isinstance(first, torch.Tensor) else np.asarray(first)).astype(float)
    return np.clip(array / 255 if array.max() > 1.5 else array, 0, 1)


def farthest(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")


def redness(images: Any, prompts: Any, *, sigma: float) -> Any:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def example(test: type) -> tuple[Any, str, dict[str, Any]]:
    """The pipeline of a test class, the prompt and the other arguments of its call, with three or four steps."""
    case: Any = test.__new__(test)
    with contextlib.suppress(Exception):
        unittest.TestCase.__init__(case, "get_dummy_components")
    pipe = case.pipeline_class(**case.get_dummy_components())
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    on_device = "device" in inspect.signature(case.get_dummy_inputs).parameters
    given = case.get_dummy_inputs("cpu") if on_device else case.get_dummy_inputs()
    for name in ("generator", "output_type", "return_dict"):
        given.pop(name, None)
    if "num_inference_steps" in given:
        given["num_inference_steps"] = max(3, min(4, given["num_inference_steps"]))
    prompt = given.pop("prompt", None)
    prompt = prompt[0] if isinstance(prompt, list) else prompt
    return pipe, prompt or "a squirrel", given


def compared(test: type, seconds: int) -> dict[str, Any]:
    """The row of a test class."""
    kind: Any = test
    row: dict[str, Any] = {"test": test.__module__.split("pipelines.")[-1], "class": test.__name__}
    row["pipeline"] = kind.pipeline_class.__name__
    taken = inspect.signature(kind.pipeline_class.__call__).parameters
    if not {"prompt", "generator"} <= set(taken):
        return row | {"outcome": "takes no prompt or no generator"}
    try:
        with at_most(seconds):
            pipe, prompt, given = example(test)
            if not hasattr(pipe, "scheduler"):
                return row | {"outcome": "has no scheduler"}
            as_numbers = {"output_type": "np"} if "output_type" in taken else {}

            def stock(seed: int) -> np.ndarray:
                generator = torch.Generator("cpu").manual_seed(seed)
                with torch.no_grad():
                    return picture(pipe(prompt=prompt, **copy.deepcopy(given), **as_numbers, generator=generator))

            with Passes(pipe) as theirs:
                pictures = [stock(seed) for seed in SEEDS]
            if pictures[0].ndim not in (3, 4) or pictures[0].shape[-1] not in (1, 3):
                return row | {"outcome": "makes no pictures"}
    except (Exception, Late) as error:
        return row | {"outcome": f"does not run here: {type(error).__name__} {str(error)[:90]}"}
    row |= {"outcome": "ok", "spread": round(farthest(pictures[0], pictures[1]), 3)}
    try:
        with at_most(seconds):
            ask: dict[str, Any] = {
                "reward": {"red": redness},
                "candidates": len(SEEDS),
                "policy": "best-of-n",
                "seed": 0,
            }
            with Passes(pipe) as mine:
                found = ttsnap.search(pipe, prompt, top=len(SEEDS), **ask, **given)
            own = {one.seed: one.image if one.frames is None else one.frames for one in found.images}
            row["apart"] = max(farthest(np.asarray(own[s]) / 255, pictures[s]) for s in SEEDS)
            row["batches"] = round(mine.count / max(1, theirs.count), 2)
            row["notes"] = found.notes
            with torch.no_grad():
                again = eval(found.reproduce.split("; ")[-1], {"pipe": pipe, "torch": torch, **copy.deepcopy(given)})
            row["winner"] = farthest(picture(again), pictures[found.best.seed])
    except (Exception, Late) as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    else:
        row |= forked(pipe, prompt, given, seconds) | judged(pipe, prompt, given, seconds)
    return row


def forked(pipe: Any, prompt: str, given: dict[str, Any], seconds: int) -> dict[str, Any]:
    """How far a child of no angle ends from its parent, `fork`, and one of 60 degrees, `moved`; or why none is made."""
    from ttsnap.core.driver import run
    from ttsnap.core.grid import Fork, Query
    from ttsnap.live.engine import Engine
    from ttsnap.pipelines.sampler import Sampler

    class Forks:
        def search(self, problem: Any, rng: Any) -> Any:
            yield Query(np.array([[True, False, False]]), problem.num_steps - 1)
            parents, angles = np.array([[-1, 0, 0]]), np.array([[0.0, 0.0, 60.0]])
            yield Fork(parents, problem.num_steps - 1, angles)
            yield Query(np.ones((1, 3), dtype=bool), problem.num_steps)

        def plan(self, num_candidates: int, num_steps: int) -> Any:
            return ()

    try:
        with at_most(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = Sampler(pipe, example=prompt, **copy.deepcopy(given))
            if sampler.num_steps < 2:
                return {"fork_error": "makes one step"}
            grid = Engine(sampler, {"red": redness}).grid([prompt], np.array([[0, 1, 2]]))
            run(Forks(), grid)
            parent, twin, other = (np.asarray(grid.finished[0, c]) / 255 for c in range(3))
            return {"fork": farthest(parent, twin), "moved": farthest(parent, other)}
    except (Exception, Late) as error:
        return {"fork_error": f"{type(error).__name__}: {error}"[:200]}


def judged(pipe: Any, prompt: str, given: dict[str, Any], seconds: int) -> dict[str, Any]:
    """What a judge of features reads, `judge`, that is recorded, trained for a moment and takes part in a search."""
    from ttsnap.pipelines.sampler import Sampler
    from ttsnap.policies import SuccessiveHalving
    from ttsnap.recordings.recorder import record_rewards, seeds_of
    from ttsnap.rewards import REWARDS
    from ttsnap.training.judges import JudgeSettings, train_judge

    REWARDS["red"] = lambda device="cpu", path=None: redness
    prompts = [prompt] * 5  # some take JSON, or texts of one length alone
    try:
        with at_most(seconds), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            sampler = Sampler(pipe, example=prompt, **copy.deepcopy(given))
            if sampler.num_steps < 2:
                return {"judge_error": "makes one step"}
            recording, head = Path(folder) / "rec.zarr", Path(folder) / "head"
            record_rewards(sampler, {"red": redness}, prompts, seeds_of(range(5), 2, 0), recording, features=True)
            report = train_judge(recording, head, JudgeSettings(updates=5, batch=4, width=16, depth=1, held_out=1))
            options = {"candidates": 3, "policy": SuccessiveHalving((1,), keep=(0.5,)), "report": "none"}
            found = ttsnap.search(pipe, prompt, reward=f"red+{head}", **options, **copy.deepcopy(given))
            if found.cost.looks <= found.cost.decodes:
                return {"judge_error": "its looks were decoded"}
            return {"judge": " ".join(report.places)}
    except (Exception, Late) as error:
        return {"judge_error": f"{type(error).__name__}: {error}"[:200]}


# All of them.


def tests_of(root: Path, only: str) -> Iterator[type | dict[str, Any]]:
    """Test classes of pipelines in a checkout; rows of the files that cannot be imported."""
    for file in sorted((root / "tests" / "pipelines").rglob("test_*.py")):
        if only not in str(file):
            continue
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        try:
            module = importlib.import_module(name)
        except Exception as error:
            yield {"test": name.split("pipelines.")[-1], "outcome": f"is not imported: {str(error)[:90]}"}
            continue
        yield from classes(module)


def classes(module: ModuleType) -> Iterator[type]:
    for name, kind in sorted(vars(module).items()):
        if not inspect.isclass(kind) or kind.__module__ != module.__name__ or name.endswith(("Memory", "TesterConfig")):
            continue
        if hasattr(kind, "get_dummy_components") and inspect.isclass(getattr(kind, "pipeline_class", None)):
            yield kind


def matrix(root: Path, only: str = "", seconds: int = 120, *, once: bool = False) -> Iterator[dict[str, Any]]:
    """All rows, or with `once` one test class of each pipeline.

    The checkout's package `tests` takes the place of the project's meanwhile.
    """
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tests"}
    sys.path.insert(0, str(root))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with without_hub():
            seen = set()
            for test in tests_of(root, only):
                if not isinstance(test, type):
                    yield test
                elif not once or test.pipeline_class not in seen:  # type: ignore[attr-defined]
                    row = compared(test, seconds)
                    seen |= {test.pipeline_class} if row["outcome"] == "ok" else set()  # type: ignore[attr-defined]
                    yield row
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]
        sys.modules.update(ours)


def is_exact(row: dict[str, Any]) -> bool:
    return row.get("apart", 9.0) < ROUNDED


def by_pipeline(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each pipeline class whose stock call runs here."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["outcome"] == "ok":
            found.setdefault(row["pipeline"], []).append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """What the matrix says, in Markdown: figures, what is not as it should be, and all classes that are."""
    found = by_pipeline(rows)
    exact = {name for name, own in found.items() if all(map(is_exact, own))}
    full = {name for name in exact if all(row["batches"] < FULL for row in found[name])}
    winners = sum(row.get("winner", 9.0) < ROUNDED for own in found.values() for row in own)
    rows_of = [(name, row) for name, own in found.items() for row in own]
    twins = {name for name, row in rows_of if row.get("fork", 9.0) < TWICE}
    moved = {name for name, row in rows_of if row.get("moved", 0.0) > TWICE}
    drawing = {name for name, row in rows_of if "fork" in row} - twins
    why = {name: row["fork_error"].split(": ")[-1] for name, row in rows_of if "fork_error" in row}
    judges = {name for name, row in rows_of if "judge" in row}
    unread = {name: row["judge_error"].split(": ")[-1] for name, row in rows_of if "judge_error" in row}

    def without(names: dict[str, str]) -> str:
        return "; ".join(f"`{name}`: {reason}" for name, reason in names.items()) or "none"

    of_each = "" if len(rows_of) > len(found) else ", one test class of each"
    draws = ", ".join(f"`{name}`" for name in sorted(drawing)) or "none"
    count = len(rows_of)
    lines = [
        f"Of {len(found)} pipeline classes whose stock calls run without a hub{of_each}, {len(exact)} give the "
        f"pictures of the stock calls (rounding apart), {len(full)} of them in batches; the line that makes the "
        f"winner again does so in {winners} of {count} tests.",
        "",
        f"- **Forks.** A fork of no angle ends as its parent in {len(twins)} classes, and one of 60 degrees elsewhere "
        f"in {len(moved)}. Noise of their own after a fork draw {draws}. Without forks: {without(why)}.",
        f"- **Judges of features** are recorded, trained and used in a search of {len(judges)}. Without: "
        f"{without(unread)}.",
        "",
        "Not exact, or not in batches:",
        "",
        "| pipeline | what | why |",
        "|---|---|---|",
    ]
    for name in sorted(found.keys() - full):
        for row in found[name]:
            if not is_exact(row) or row["batches"] >= FULL:
                what = "one by one" if is_exact(row) else (row.get("error") and "not searched") or "not exact"
                told = [note for note in row.get("notes", ()) if "one candidate at a time" in note]
                why = row.get("error") or (" ".join(told) if is_exact(row) else f"{row['apart']:.4f} apart")
                lines.append(f"| `{name}` | {what} | {' '.join(why.split())} |")
    lines += ["", f"In batches: {', '.join(f'`{name}`' for name in sorted(full))}."]
    return "\n".join(lines)


OWN = {  # classes that run on tiny models of the project's own, and the test; HiDream one by one
    "tests/pipelines/test_newer.py": ("HiDreamImage", "Kolors", "LongCatImage", "QwenImage21", "SanaSprint"),
    "tests/pipelines/test_option_matrix.py": (
        "Sana",
        "SanaControlNet",
        "StableDiffusionXLControlNetUnion",
        "ZImageControlNet",
    ),
    "tests/pipelines/test_loading.py": ("Flux2",),
}


def classes_table(docs: Path) -> str:
    """Markdown: the pipeline classes of the installed diffusers that a search could drive, and what became of each.

    Args:
        docs: the file whose table says which of them were run (`--table`).
    """
    import ast

    import diffusers

    bases: dict[str, tuple[list[str], set[str], set[str]]] = {}
    for file in (Path(diffusers.__file__).parent / "pipelines").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                of = {
                    m.name: {a.arg for a in (*m.args.args, *m.args.kwonlyargs)}
                    for m in node.body
                    if isinstance(m, ast.FunctionDef)
                }
                names = [ast.unparse(base).split(".")[-1] for base in node.bases]
                bases[node.name] = names, of.get("__call__", set()), of.get("__init__", set())

    def taken(name: str, which: int) -> set[str]:
        names, *own = bases.get(name, ([], set(), set()))
        return own[which] or set().union(*(taken(base, which) for base in names))

    known = {name for name in dir(diffusers) if name.endswith("Pipeline")} & bases.keys()
    fitting = {
        n for n in known if {"prompt", "generator"} <= taken(n, 0) and any("scheduler" in a for a in taken(n, 1))
    }
    text = docs.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    batched = set(re.findall(r"`(\w+Pipeline)`", text.split("In batches:")[1]))
    others = set(re.findall(r"^\| `(\w+Pipeline)` \| (?:one by one|not exact)", text, re.M))
    own = {f"{name}Pipeline" for names in OWN.values() for name in names} - batched - others
    rows = {
        "searched, in batches": fitting & batched,
        "searched, one by one or apart by rounding": fitting & others - batched,
        f"searched, on tiny models made here ({', '.join(f'`{test}`' for test in OWN)})": fitting & own,
        "not run: diffusers' tests have no tiny model of it that runs without a hub": fitting - batched - others - own,
    }
    lines = [
        f"{len(fitting)} classes take a prompt, a generator and a scheduler (diffusers {diffusers.__version__}).",
        "",
        "| what | classes | |",
        "|---|---|---|",
    ]
    return "\n".join(
        [
            *lines,
            *(
                f"| {what} | {len(names)} | {', '.join(f'`{n[:-8]}`' for n in sorted(names))} |"
                for what, names in rows.items()
            ),
        ]
    )


def write(path: Path, begin: str, table: str) -> None:
    """Put a table between its marks."""
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", help="folder that holds `tests/` of diffusers' repository")
    parser.add_argument("--only", default="", help="part of a test's path")
    parser.add_argument("--seconds", type=int, default=120, help="at most, for each side of a comparison")
    parser.add_argument("--once", action="store_true", help="one test class of each pipeline")
    parser.add_argument("--out", type=Path, help="rows, one JSON object a line")
    parser.add_argument("--table", type=Path, help="a Markdown file with the marks between which the table goes")
    parser.add_argument("--classes", type=Path, help="a Markdown file for the table of classes; runs nothing")
    asked = parser.parse_args()
    if asked.classes:
        write(asked.classes, "<!-- classes -->", classes_table(asked.classes.with_name("pipelines.md")))
        return
    if asked.checkout is None:
        parser.error("name a folder that holds `tests/` of diffusers' repository")
    rows = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(asked.out.open("w")) if asked.out else sys.stdout
        for row in matrix(asked.checkout, asked.only, asked.seconds, once=asked.once):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
    if asked.table:
        write(asked.table, BEGIN, table(rows))
    print(table(rows), file=sys.stderr)


if __name__ == "__main__":
    main()

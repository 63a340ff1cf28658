"""Where the weights and tokenizers of published rewards are: a path that the user gives, or the Hugging Face cache.

What is in the cache is used without asking the network. What is not is downloaded, and where that cannot be done one
sentence says how to get it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_local_only = ContextVar("local_only", default=False)


@contextmanager
def local_only() -> Iterator[None]:
    """Nothing is downloaded in here: what is not on this machine is an error."""
    before = _local_only.set(True)
    try:
        yield
    finally:
        _local_only.reset(before)


@dataclass(frozen=True)
class Source:
    """Where a published reward comes from.

    Attributes:
        reward: its name, for messages.
        repo: hub repository of the weights; empty if they are on no hub that is asked.
        files: the weight files there, the preferred one first; `CONFIG` where it is a whole directory of a model.
        tokenizer: hub repository of the tokenizer.
        got_by: where they are on no hub, the command that gets them.
    """

    reward: str
    repo: str
    files: tuple[str, ...]
    tokenizer: str
    got_by: str = ""

    def weights(self, path: str | Path | None = None) -> Path:
        """The weights file: at `path` (a file, or a directory that holds one), or from the hub.

        Raises:
            ValueError: it is not there; the message says what to do.
        """
        return self._in(Path(path).expanduser()) if path is not None else self._from_hub()

    def _in(self, path: Path) -> Path:
        if path.is_file():
            return path
        if not path.is_dir():
            raise ValueError(f"reward {self.reward}: there is no file or directory {path}")
        for name in self.files:
            if (path / name).is_file():
                return path / name
        found = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".pth", ".bin"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "no weights"
            raise ValueError(f"reward {self.reward}: {path} should hold {self.files[0]}, it holds {names}")
        return found[0]

    def cached(self) -> Path | None:
        """The weights file, or the model's directory, in the hub's cache on this machine; None if it is not there."""
        found = _cached(self.repo, self.files) if self.repo else None
        if found is None or found.name != CONFIG:
            return found
        return found.parent if _weights_in(found.parent) else None

    def at_hand(self) -> bool:
        """Whether weights and tokenizer are in the cache, so that nothing has to be downloaded."""
        return bool(self.cached() and _cached(self.tokenizer, ("tokenizer.json", "vocab.json", "vocab.txt")))

    def _from_hub(self) -> Path:
        if cached := self.cached():
            return cached
        from huggingface_hub import hf_hub_download

        if not self.repo:
            raise ValueError(
                f"the weights of reward {self.reward} are not on the Hugging Face hub; get them with `{self.got_by}`, "
                f"and give their file as {self.reward}=PATH"
            )
        problem: Exception | None = None
        for name in self.files:
            try:
                if _local_only.get():
                    raise FileNotFoundError("not in the cache")
                return Path(hf_hub_download(self.repo, name))
            except Exception as error:  # the hub's, the network's and the file system's errors share no base class
                problem = problem or error
        raise ValueError(
            f"the weights of reward {self.reward} are not on this machine and could not be downloaded "
            f"({_brief(problem)}); get them with `hf download {self.repo} {self.files[0]}`, or give their file as "
            f"{self.reward}=PATH"
        )

    def load_tokenizer(self, kind: type[Any], weights: Path) -> Any:
        """The tokenizer beside the weights if there is one, else the hub's.

        Args:
            kind: its transformers class.
            weights: the weights file.

        Raises:
            ValueError: it is nowhere; the message says what to do.
        """
        folder = weights.parent
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
            return kind.from_pretrained(folder)
        for offline in (True,) if _local_only.get() else (True, False):
            try:
                return kind.from_pretrained(self.tokenizer, local_files_only=offline)
            except Exception as error:
                problem = error
        raise ValueError(
            f"the tokenizer of reward {self.reward} is not on this machine and could not be downloaded "
            f"({_brief(problem)}); get it with `hf download {self.tokenizer}`, or put its files beside {weights}"
        )


def _weights_in(folder: Path) -> bool:
    """Whether a model's directory holds weights."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _cached(repo: str, files: tuple[str, ...]) -> Path | None:
    """The first of these files of a repository that is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repo, name) for name in files)
    return next((Path(path) for path in found if isinstance(path, str)), None)


CONFIG = "config.json"
OPENAI = "openai/clip-vit-large-patch14"
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
BERT = "google-bert/bert-base-uncased"
QWEN = "Qwen/Qwen2-VL-7B-Instruct"
IMAGEREWARD = Source("imagereward", "THUDM/ImageReward", ("ImageReward.pt",), BERT)
PICKSCORE = Source("pickscore", "yuvalkirstain/PickScore_v1", ("model.safetensors", "pytorch_model.bin"), LAION)
HPSV2 = Source("hpsv2", "xswu/HPSv2", ("HPS_v2_compressed.pt",), LAION)
HPSV21 = Source("hpsv2.1", "xswu/HPSv2", ("HPS_v2.1_compressed.pt",), LAION)
CLIPSCORE = Source("clipscore", OPENAI, ("model.safetensors", "pytorch_model.bin"), OPENAI)
AESTHETIC = Source("aesthetic", "trl-lib/ddpo-aesthetic-predictor", ("aesthetic-model.pth",), OPENAI)
HPSV3 = Source("hpsv3", "MizzenAI/HPSv3", ("HPSv3.safetensors",), QWEN)
UNIFIEDREWARD = Source("unifiedreward", "CodeGoat24/UnifiedReward-2.0-qwen-7b", (CONFIG,), "")
VQASCORE = Source("vqascore", "zhiqiulin/clip-flant5-xxl", (CONFIG,), "google/flan-t5-xxl")  # that of the paper
GENEVAL = Source("geneval", "google/owlv2-large-patch14-ensemble", (CONFIG,), "")
# The authors publish a pickled module, which can run code and is not opened; DiffSynth-Studio its tensors.
_MPS = "MPS_overall_checkpoint_diffsynth.safetensors"
MPS = Source(
    "mps",
    "",
    (_MPS, f"MPS_overall_checkpoint/{_MPS}"),
    LAION,
    "modelscope download --model DiffSynth-Studio/QualityMetric_reward_pretrained --include 'MPS_overall_checkpoint/*'",
)
_ALL = (IMAGEREWARD, CLIPSCORE, PICKSCORE, HPSV21, HPSV2, AESTHETIC, HPSV3, UNIFIEDREWARD, VQASCORE, GENEVAL, MPS)
SOURCES = {one.reward: one for one in _ALL}


MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.txt", "*.model")


def model_folder(reward: str, named: str) -> Path:
    """The directory of a transformers model: one that is named, or that of a hub repository.

    Args:
        reward: its name, for messages.
        named: a directory, or a repository such as `Qwen/Qwen2.5-VL-7B-Instruct`.

    Raises:
        ValueError: it is nowhere; the message says what to do.
    """
    folder = Path(named).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        raise ValueError(
            f"reward {reward}: {named} is no directory with a config.json, nor a hub repository such as "
            "Qwen/Qwen2.5-VL-7B-Instruct"
        )
    from huggingface_hub import snapshot_download

    for offline in (True, False):
        try:
            found = Path(snapshot_download(named, allow_patterns=list(MODEL_FILES), local_files_only=offline))
            if _weights_in(found):
                return found
            problem: Exception = ValueError("it holds no weights")
        except Exception as error:  # the hub's, the network's and the file system's errors share no base class
            problem = error
    raise ValueError(
        f"the model of reward {reward} is not on this machine and could not be downloaded ({_brief(problem)}); get it "
        f"with `hf download {named}`, or give its directory as {reward}=PATH"
    )


def checkpoints_folder(reward: str, named: str, patterns: Sequence[str]) -> Path:
    """The directory of noise-aware checkpoints: one that is named, or that of a hub repository such as TerryYu/DOGTrim.

    Args:
        reward: its name, for messages.
        named: a directory, or a repository.
        patterns: the files in it that are wanted.

    Raises:
        ValueError: it is a repository that is not on this machine and cannot be downloaded.
    """
    if Path(named).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        return Path(named)
    from huggingface_hub import snapshot_download

    for offline in (True,) if _local_only.get() else (True, False):
        try:
            found = Path(snapshot_download(named, allow_patterns=list(patterns), local_files_only=offline))
            if any(found.rglob("*.pt")) or any(found.rglob("*.safetensors")):
                return found
            problem: Exception = ValueError(f"it holds none for {reward}")
        except Exception as error:  # the hub's, the network's and the file system's errors share no base class
            problem = error
    raise ValueError(
        f"the noise-aware checkpoints of reward {reward} in {named} are not on this machine and could not be "
        f"downloaded ({_brief(problem)}); get them with `hf download {named}`, or name their directory: {reward}+DIR"
    )


def _brief(error: Exception | None) -> str:
    """The kind of an error and the first line it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__

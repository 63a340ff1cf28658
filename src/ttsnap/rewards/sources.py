"""Where the weights and tokenizers of published rewards are: a path that the user gives, or the Hugging Face cache.

What is in the cache is used without asking the network. What is not is downloaded, and where that cannot be done one
sentence says how to get it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """Where a published reward comes from.

    Attributes:
        reward: its name, for messages.
        repo: hub repository of the weights.
        files: the weight files there, the preferred one first.
        tokenizer: hub repository of the tokenizer.
    """

    reward: str
    repo: str
    files: tuple[str, ...]
    tokenizer: str

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

    def _from_hub(self) -> Path:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        for name in self.files:
            cached = try_to_load_from_cache(self.repo, name)
            if isinstance(cached, str):
                return Path(cached)
        problem: Exception | None = None
        for name in self.files:
            try:
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
        for offline in (True, False):
            try:
                return kind.from_pretrained(self.tokenizer, local_files_only=offline)
            except Exception as error:
                problem = error
        raise ValueError(
            f"the tokenizer of reward {self.reward} is not on this machine and could not be downloaded "
            f"({_brief(problem)}); get it with `hf download {self.tokenizer}`, or put its files beside {weights}"
        )


def _brief(error: Exception | None) -> str:
    """The kind of an error and the first line it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__

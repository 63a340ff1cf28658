"""What a recording keeps of the denoiser: hidden features of early calls, from which a judge of features is trained.

They lie in the zarr group of the recording, half precision, one chunk per prompt: `features` [prompt, candidate, look,
cell, channel] and the states of the prompt's `words` [prompt, word, word_channel]. A prompt's features are written
before its rewards, so that a prompt that is recorded has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.grid import FloatArray, IntArray, early_calls
from ttsnap.pipelines.features import Features, Place, find_places

if TYPE_CHECKING:
    from ttsnap.pipelines.sampler import Sampler
    from ttsnap.recordings.recording import Recording

KEY = "features"
MOST_WORDS = 64


@dataclass(frozen=True)
class Kept:
    """What is kept of each candidate and prompt.

    Attributes:
        calls: denoiser calls after which features are kept.
        places: where they come from, in the order of their channels.
        widths: channels of each place.
        cells: of the grid.
        words: most words of a prompt, and the width of their states; widths of 0: the denoiser is given none.
    """

    calls: tuple[int, ...]
    places: tuple[Place, ...]
    widths: tuple[int, ...]
    cells: int
    words: tuple[int, int]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Kept:
        """From the attributes of a recording."""
        places = tuple(Place(**place) for place in found["places"])
        calls, widths, words = (tuple(found[name]) for name in ("calls", "widths", "words"))
        return cls(calls, places, widths, int(found["cells"]), words)

    def channels(self, places: Sequence[Place]) -> IntArray:
        """Indices of the channels of some places."""
        ends = np.cumsum(self.widths)
        return np.concatenate([np.arange(*ends[i] - [self.widths[i], 0]) for i in map(self.places.index, places)])


def plan(sampler: Sampler, prompt: str, calls: Sequence[int] | None) -> Kept:
    """What to keep of a model's candidates; one candidate is tried.

    Args:
        sampler: drives the model.
        prompt: to try.
        calls: after which to look; None: `early_calls`.
    """
    sampler.some_prompt = prompt
    chosen = tuple(sorted({*(calls or early_calls(sampler.num_steps))} - {sampler.num_steps}))
    if not chosen:
        raise ValueError("features are kept after calls before the last; name some with --calls")
    heard = find_places(sampler, calls=(chosen[0], chosen[-1]))
    widths = tuple(found.cells.shape[2] for found in heard.values())
    first = next(iter(heard.values()))
    width = first.words[0].shape[-1]
    return Kept(chosen, tuple(heard), widths, first.cells.shape[1], (MOST_WORDS if width else 0, width))


def create(recording: Recording, kept: Kept) -> None:
    """Make the arrays in a recording that has none yet."""
    prompts, candidates = recording.shape[:2]
    sizes = {
        "features": ((prompts, candidates, len(kept.calls), kept.cells, sum(kept.widths)), "float16"),
        "words": ((prompts, *kept.words), "float16"),
        "word_count": ((prompts,), "int32"),
    }
    dims = {
        "features": ("prompt", "candidate", "look", "cell", "channel"),
        "words": ("prompt", "word", "word_channel"),
        "word_count": ("prompt",),
    }
    for name, (shape, dtype) in sizes.items():
        if 0 not in shape:
            recording.add_array(name, shape, dtype, dims[name])
    recording.note(KEY, asdict(kept))


def kept_in(recording: Recording) -> Kept | None:
    """What a recording keeps; None: nothing of the denoiser."""
    found = recording.notes.get(KEY)
    return Kept.of(found) if found else None


class Heard:
    """Features of a group of candidates, filled look by look."""

    def __init__(self, kept: Kept, candidates: int) -> None:
        self.kept = kept
        self.cells = np.zeros((candidates, len(kept.calls), kept.cells, sum(kept.widths)), dtype=np.float16)
        self.words: dict[str, np.ndarray] = {}

    def put(self, first: int, call: int, found: Features, prompts: Sequence[str]) -> None:
        """Features of consecutive candidates after a call."""
        rows = slice(first, first + len(found.cells))
        self.cells[rows, self.kept.calls.index(call)] = found.cells.float().clamp(-6e4, 6e4).cpu().numpy()
        if self.kept.words[0]:
            for prompt, words in zip(prompts, found.words, strict=True):
                self.words.setdefault(prompt, words[: self.kept.words[0]].float().clamp(-6e4, 6e4).cpu().numpy())

    def store(self, recording: Recording, prompt: int, rows: slice) -> None:
        """Write what was heard of a prompt's candidates."""
        recording.write_array("features", prompt, self.cells[rows])
        if self.kept.words[0]:
            words = self.words[recording.prompts[prompt]]
            padded = np.zeros(self.kept.words, dtype=np.float16)
            padded[: len(words)] = words
            recording.write_array("words", prompt, padded)
            recording.write_array("word_count", prompt, np.int32(len(words)))


class Reader:
    """The features of a recording's recorded prompts, read as they are asked for."""

    def __init__(self, recording: Recording) -> None:
        kept = kept_in(recording)
        if kept is None:
            raise ValueError(f"{recording.path} keeps no features; record it with --features")
        self.recording, self.kept = recording, kept

    @cached_property
    def prompts(self) -> IntArray:
        """Indices of the recorded prompts."""
        return self.recording.recorded()

    def cells(self, places: Sequence[Place], which: IntArray) -> FloatArray:
        """Features of some places [n, candidates, looks, cells, channels], half precision, of some of `prompts`."""
        channels = self.kept.channels(places)
        return np.stack([self.recording.read_array("features", int(p))[..., channels] for p in self.prompts[which]])

    def words(self, which: IntArray) -> tuple[FloatArray, IntArray]:
        """States of words [n, most of them, width], and how many there are [n], of some of `prompts`."""
        if not self.kept.words[0]:
            return np.zeros((len(which), 0, 0), dtype=np.float16), np.zeros(len(which), dtype=int)
        states = np.stack([self.recording.read_array("words", int(p)) for p in self.prompts[which]])
        counts = np.array([int(self.recording.read_array("word_count", int(p))) for p in self.prompts[which]])
        return states[:, : counts.max()], counts

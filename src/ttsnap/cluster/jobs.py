"""What a worker can do, and what is told between workers and the loop that hands out work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Block = tuple[int, ...]
"""Indices of the prompts that run together. What is in a block never depends on the number of workers."""


class Event(NamedTuple):
    """What became of a part of a block.

    Attributes:
        images: images made or judged.
        found: images that were there already.
        prompts: prompts whose results are stored.
        failures: prompt -> why it has no result; it will not be tried again.
        notes: warnings.
        bad: images that were expected and cannot be used: path and fault.
        rewards: of the chosen images of `prompts`, where some were chosen.
    """

    images: int = 0
    found: int = 0
    prompts: Block = ()
    failures: Mapping[int, str] = {}
    notes: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()
    rewards: tuple[float, ...] = ()


class StopRunError(ValueError):
    """The user wants the whole run to end at this."""


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        blocks: what is left to do, as blocks of prompts.
        images: images to be made or judged in all blocks; 0 where that is not known.
        prompts: prompts of all blocks.
        shared: what all workers must know beyond the job itself, such as the number of candidates.
        report: facts for the report.
    """

    blocks: Sequence[Block]
    images: int = 0
    prompts: int = 0
    shared: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


class Work(Protocol):
    """A job with its model and rewards loaded."""

    def plan(self) -> Plan:
        """Prepare the output and say what is left to do; one worker is asked, once."""
        ...

    def run(self, block: Block, shared: Mapping[str, Any]) -> Iterator[Event]:
        """Work on a block and store its results prompt by prompt; what is stored already is left as it is."""
        ...


class Job(Protocol):
    """What to do: small, so that it can be sent to workers, who load what it needs."""

    def load(self) -> Work:
        """Load model and rewards."""
        ...


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return text if isinstance(error, ValueError) and text else f"{kind}: {text}" if text else kind

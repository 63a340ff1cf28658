"""What a visitor may ask for, and the queue of those who wait for the device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ttsnap.core.observers import Stop

POLICIES = {
    "tuned for the model": None,
    "successive halving": "halving",
    "beam search with forks": "branching",
    "best-of-N": "best-of-n",
    "early selection": "early-selection",
}
USUAL = 16  # candidates with which the form begins


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for at most."""

    prompt: int = 600  # characters
    candidates: int = 128
    side: int = 2048  # pixels
    steps: int = 100
    waiting: int = 20  # searches in the queue
    file: int = 200  # prompts of a file
    pictures: int = 8  # that options may name


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    `size` is as `ttsnap generate --size` takes it; `image`: a file to start from, or to be edited; `options`: more of
    them, as on the command line; `pictures`: files that these may name; `by_hand`: he picks at each look.
    """

    prompt: str
    model: str
    rewards: tuple[str, ...]
    policy: str = "tuned for the model"
    budget: str | None = None
    candidates: int | None = None
    seed: int = 0
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    loras: tuple[str, ...] = ()
    image: str | None = None
    strength: float | None = None
    options: str = ""
    pictures: tuple[str, ...] = ()
    by_hand: bool = False


class Queue:
    """Those who want the device, in order of arrival; the first has it."""

    def __init__(self) -> None:
        self._order: list[Any] = []
        self._changed = threading.Condition()

    def join(self, who: Any) -> None:
        """Go to the end of the queue."""
        with self._changed:
            self._order.append(who)

    def wait(self, who: Any, wanted: Callable[[], bool]) -> None:
        """Until it is one's turn; `Stop` when it is not wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] is who or not wanted())
            if not wanted():
                self._order.remove(who)
                self._changed.notify_all()
                raise Stop

    def leave(self, who: Any) -> None:
        """Let the next one have it."""
        with self._changed:
            if who in self._order:
                self._order.remove(who)
            self._changed.notify_all()

    def nudge(self) -> None:
        """Wake those who may not want to wait any more."""
        with self._changed:
            self._changed.notify_all()

    def before(self, who: Any) -> int:
        """How many are ahead in the queue."""
        with self._changed:
            return self._order.index(who) if who in self._order else 0

    def __len__(self) -> int:
        return len(self._order)

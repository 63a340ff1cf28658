"""Rewards that have to answer in time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class Hung(RuntimeError):
    """A reward did not answer in time."""


class Around:
    """Something around a `reward`; in all that it does not say itself it is the reward."""

    reward: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "reward":  # while it is copied, it has no reward yet
            raise AttributeError(name)
        return getattr(self.reward, name)


@dataclass(eq=False)
class Timed(Around):
    """A reward, and how long it may take.

    Attributes:
        name: of the reward.
        reward: the reward.
        timeout: seconds that one answer may take.
    """

    name: str
    reward: Any
    timeout: float

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the reward."""
        return self.reward(*args, **kwargs)


def check_timeout(timeout: float | None) -> None:
    """ValueError where that is no time to answer in."""
    if timeout is not None and not 0 < timeout < threading.TIMEOUT_MAX:
        raise ValueError(f"--reward-timeout is a number of seconds above 0, got {timeout:g}")


def in_time(reward: Any, count: int, ask: Callable[[], T]) -> T:
    """The answer of a reward about `count` pictures.

    One that is `Timed` is asked in a thread of its own. Where it hangs, that is left behind: it cannot be ended.

    Raises:
        Hung: it did not answer in time.
    """
    if not isinstance(reward, Timed):
        return ask()
    import torch

    found: list[Any] = []
    grad = torch.is_grad_enabled()

    def work() -> None:
        try:
            with torch.set_grad_enabled(grad):
                found.append((ask(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=work, name=f"reward {reward.name}", daemon=True)
    thread.start()
    thread.join(reward.timeout)
    if not found:
        raise Hung(
            f"reward {reward.name!r} gave no answer about {count} picture{'s' * (count > 1)} within "
            f"{reward.timeout:g} s (--reward-timeout)"
        )
    answer, error = found[0]
    if error is not None:
        raise error
    return answer  # type: ignore[no-any-return]

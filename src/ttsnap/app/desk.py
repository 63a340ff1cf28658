"""Where searches are ordered: one at a time on the device, the others in line, each visitor's own."""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ttsnap.app.job import Job
from ttsnap.app.orders import POLICIES, Limits, Line, Order

logger = logging.getLogger(__name__)


@dataclass
class Models:
    """Pipelines and rewards, each loaded once, when it is first used; only in one's turn."""

    device: str | None = None
    dtype: str | None = None
    _pipes: dict[str, Any] = field(default_factory=dict)
    _judges: dict[str, Any] = field(default_factory=dict)

    def searcher(self, order: Order) -> Any:
        """A prepared searcher for what was ordered."""
        from ttsnap import rewards
        from ttsnap.live.session import prepare
        from ttsnap.loading import Loading, find_device, load_model, quiet_libraries

        quiet_libraries()
        if order.model not in self._pipes:
            self._pipes[order.model] = load_model(order.model, Loading(device=self.device, dtype=self.dtype))
        pipe = self._pipes[order.model]
        for name in order.rewards:
            if name not in self._judges:
                self._judges |= rewards.load([name], find_device(self.device))
        sizes: dict[str, Any] = {}
        if order.steps:
            sizes["num_inference_steps"] = order.steps
        if order.size:
            sizes |= {"height": order.size, "width": order.size}
        return prepare(
            pipe,
            reward={name: self._judges[name] for name in order.rewards},
            budget=order.budget,
            candidates=order.candidates,
            policy=POLICIES[order.policy],
            prompt=order.prompt,
            **sizes,
        )


class Desk:
    """What is offered, and who has ordered what.

    Args:
        out: everything is written below this folder.
        models: names of models on offer; nothing else is ever loaded.
        rewards: names of rewards on offer (default: those of the models).
        device: where the models run.
        dtype: their dtype.
        limits: of what a visitor may ask for.
    """

    def __init__(
        self,
        out: Path,
        models: Sequence[str] = ("shapes",),
        rewards: Sequence[str] = (),
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        from ttsnap.live.session import DEFAULT_REWARDS
        from ttsnap.loading import check_model
        from ttsnap.rewards import names_of

        for name in models:
            check_model(name)
        own = [DEFAULT_REWARDS[name] for name in models if name in DEFAULT_REWARDS]
        self.rewards = list(dict.fromkeys([*rewards, *own]))
        if not self.rewards:
            raise ValueError("name a reward with --reward; these models have none of their own")
        names_of(self.rewards)
        self.out, self.offered = Path(out).resolve(), list(models)
        self.out.mkdir(parents=True, exist_ok=True)
        self.models, self.limits, self.line = Models(device, dtype), limits or Limits(), Line()
        self._jobs: dict[str, dict[str, list[Job]]] = {}

    def home(self, visitor: str | None) -> Path:
        """The folder of a visitor; a name that is not one of ours is refused."""
        if not visitor or not re.fullmatch(r"[A-Za-z0-9_-]{22}", visitor):
            raise ValueError("this page does not know you; load it again")
        return self.out / "visitors" / visitor

    def welcome(self, visitor: str | None) -> str:
        """A visitor's name: the one he has, or a new one that nobody can guess."""
        try:
            self.home(visitor)
        except ValueError:
            return secrets.token_urlsafe(16)
        assert visitor
        return visitor

    def begin(self, session: str, tab: str, visitor: str | None, orders: Sequence[Order]) -> list[Job]:
        """Search for these, in line; a session has one search at a time, and each of its tabs remembers its last.

        Raises:
            ValueError: what is wrong with an order.
        """
        home = self.home(visitor)
        orders = [self.check(order) for order in orders]
        mine = self._jobs.setdefault(session, {})
        if any(job.active for jobs in mine.values() for job in jobs):
            raise ValueError("one search at a time: stop the one at work first")
        if len(self.line) + len(orders) > self.limits.waiting:
            raise ValueError(f"{len(self.line)} searches wait in line already; try again later")
        mine[tab] = [Job(desk=self, order=order, home=home) for order in orders]
        for job in mine[tab]:
            job.search()
        return mine[tab]

    def job(self, session: str, tab: str) -> Job:
        """A session's own search."""
        jobs = self._jobs.get(session, {}).get(tab)
        if not jobs:
            raise ValueError("there is no search yet")
        return jobs[0]

    def warm(self) -> threading.Thread:
        """Load the first model on offer while nobody waits for it; the thread that does it."""

        def load() -> None:
            who = object()
            self.line.join(who)
            self.line.wait(who, lambda: True)
            try:
                self.models.searcher(Order("a", self.offered[0], (self.rewards[0],), candidates=1))
            except Exception as error:  # whoever asks for it is told
                logger.warning("%s could not be loaded: %s", self.offered[0], error)
            finally:
                self.line.leave(who)

        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        return thread

    def stop(self, session: str) -> None:
        """Stop a session's searches."""
        for jobs in self._jobs.get(session, {}).values():
            for job in jobs:
                job.stop()

    def close(self, session: str) -> None:
        """The tab is closed: its searches stop and are forgotten; what was saved stays."""
        self.stop(session)
        self._jobs.pop(session, None)

    def check(self, order: Order) -> Order:
        """The order, tidied.

        Raises:
            ValueError: not on offer, or beyond the limits.
        """
        limits = self.limits
        prompt = " ".join(order.prompt.split())
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least one word")
        if len(prompt) > limits.prompt:
            raise ValueError(f"the prompt has {len(prompt)} characters; at most {limits.prompt} are taken")
        if order.model not in self.offered:
            raise ValueError(f"there is no model {order.model!r} here; there is {', '.join(self.offered)}")
        if not order.rewards or set(order.rewards) - set(self.rewards):
            raise ValueError(f"choose one reward or more of {', '.join(self.rewards)}")
        if order.policy not in POLICIES:
            raise ValueError(f"there is no policy {order.policy!r} here; there is {', '.join(POLICIES)}")
        for name, value, most in (("size", order.size, limits.side), ("steps", order.steps, limits.steps)):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {value}")
        if not 0 <= order.seed < 2**31:
            raise ValueError(f"the seed must be 0 to {2**31 - 1}, got {order.seed}")
        if order.candidates is not None:
            self.check_candidates(order.candidates)
        return replace(order, prompt=prompt)

    def check_candidates(self, count: int) -> None:
        """ValueError where these are too many, or none."""
        if not 1 <= count <= self.limits.candidates:
            raise ValueError(f"a search here starts 1 to {self.limits.candidates} candidates, this would be {count}")

"""Who searches for what: one search at a time on the device, the others in the queue, each visitor's own."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttsnap.app.job import Job
from ttsnap.app.queue import Request
from ttsnap.app.service import Service


class Searches(Service):
    """The searches of all visitors; arguments are those of `Service`."""

    def __init__(self, *offered: Any, **more: Any) -> None:
        super().__init__(*offered, **more)
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

    def begin(self, session: str, tab: str, visitor: str | None, requests: Sequence[Request]) -> list[Job]:
        """Search for these, in the queue; a session has one search at a time, and each of its tabs remembers its last.

        Raises:
            ValueError: what is wrong with a request.
        """
        home = self.home(visitor)
        requests = [self.check(request) for request in requests]
        mine = self._jobs.setdefault(session, {})
        if any(job.active for jobs in mine.values() for job in jobs):
            raise ValueError("one search at a time: stop the one at work first")
        if len(self.queue) + len(requests) > self.limits.waiting:
            raise ValueError(f"{len(self.queue)} searches wait in the queue already; try again later")
        mine[tab] = [Job(searches=self, request=request, home=home) for request in requests]
        for job in mine[tab]:
            job.search()
        return mine[tab]

    def job(self, session: str, tab: str) -> Job:
        """A session's own search."""
        jobs = self._jobs.get(session, {}).get(tab)
        if not jobs:
            raise ValueError("there is no search yet")
        return jobs[0]

    def stop(self, session: str) -> None:
        """Stop a session's searches."""
        for jobs in self._jobs.get(session, {}).values():
            for job in jobs:
                job.stop()

    def close(self, session: str) -> None:
        """The tab is closed: its searches stop and are forgotten; what was saved stays."""
        self.stop(session)
        self._jobs.pop(session, None)

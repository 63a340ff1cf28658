"""Who searches for what: one search at a time on the device, the others in the queue, each visitor's own."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttsnap.app.job import Job
from ttsnap.app.queue import Request
from ttsnap.app.service import Service


class Searches(Service):
    """The searches of all visitors; arguments are those of `Service`."""

    GRACE = 15.0  # seconds in which a page that was closed may be opened again

    def __init__(self, *offered: Any, **more: Any) -> None:
        super().__init__(*offered, **more)
        self._jobs: dict[str, dict[str, list[Job]]] = {}
        self._pages: dict[str, str] = {}

    def home(self, visitor: str | None) -> Path:
        """The folder of a visitor; a name that is not one of ours is refused."""
        if not visitor or not re.fullmatch(r"[A-Za-z0-9_-]{22}", visitor):
            raise ValueError("this page does not know you; load it again")
        return self.out / "visitors" / visitor

    def welcome(self, session: str, visitor: str | None) -> str:
        """A visitor's name: the one he has, or a new one that nobody can guess.

        His page is open now; as long as one is, his searches go on. A page has one name, also where something was
        clicked before it had loaded.
        """
        try:
            self.home(visitor)
        except ValueError:
            visitor = self._pages.get(session) or secrets.token_urlsafe(16)
        assert visitor
        self._pages[session] = visitor
        return visitor

    def begin(self, session: str, tab: str, visitor: str | None, requests: Sequence[Request]) -> list[Job]:
        """Search for these, in the queue; a visitor has one search at a time, and each of his tabs remembers its last.

        Raises:
            ValueError: what is wrong with a request.
        """
        jobs = self._made(session, tab, visitor, requests, len(requests))
        for job in jobs:
            job.search()
        return jobs

    def begin_all(self, session: str, tab: str, visitor: str | None, requests: Sequence[Request]) -> list[Job]:
        """The same for many, one after the other, so that others come between.

        Raises:
            ValueError: what is wrong with a request.
        """
        jobs = self._made(session, tab, visitor, requests, 1)
        for job in jobs:
            job.phase = "waiting"

        def work() -> None:
            for job in jobs:
                if job.phase == "waiting":
                    job.search()
                    job.wait()

        threading.Thread(target=work, daemon=True).start()
        return jobs

    def _made(self, session: str, tab: str, visitor: str | None, requests: Sequence[Request], places: int) -> list[Job]:
        """Jobs that have not begun, `places` of which will wait in the queue at a time."""
        home = self.home(visitor)
        requests = [self.check(request) for request in requests]
        mine = self._jobs.setdefault(str(visitor), {})
        if any(job.active for jobs in mine.values() for job in jobs):
            raise ValueError("one search at a time: stop the one at work first")
        if len(self.queue) + places > self.limits.waiting:
            raise ValueError(f"{len(self.queue)} searches wait in the queue already; try again later")
        self.welcome(session, visitor)
        mine[tab] = [Job(searches=self, request=request, home=home) for request in requests]
        return mine[tab]

    def jobs(self, visitor: str | None, tab: str) -> list[Job]:
        """What a visitor's tab searched for last, or does."""
        return self._jobs.get(str(visitor), {}).get(tab, [])

    def job(self, visitor: str | None, tab: str) -> Job:
        """A visitor's own search."""
        if not (jobs := self.jobs(visitor, tab)):
            raise ValueError("there is no search yet")
        return jobs[0]

    def stop(self, visitor: str | None) -> None:
        """Stop a visitor's searches."""
        for jobs in self._jobs.get(str(visitor), {}).values():
            for job in jobs:
                job.stop()

    def close(self, session: str) -> None:
        """A page is closed: if none of the visitor's is opened soon, his searches stop; what was saved stays."""
        visitor = self._pages.pop(session, None)
        if visitor is not None and visitor not in self._pages.values():
            timer = threading.Timer(self.GRACE, self._forget, [visitor])
            timer.daemon = True
            timer.start()

    def _forget(self, visitor: str) -> None:
        if visitor not in self._pages.values():
            self.stop(visitor)
            self._jobs.pop(visitor, None)

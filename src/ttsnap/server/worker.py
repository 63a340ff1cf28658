"""The thread that owns the model: it searches for all clients at once, in batches that they share.

Searches that differ in the arguments of the pipeline's call cannot share batches. Each such set of arguments has a lane
of its own, with a session that is prepared once and kept; lanes take turns, a batch each.
"""

from __future__ import annotations

import logging
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap.live.engine import MOST_OPEN
from ttsnap.live.reporting import AUTO, NONE
from ttsnap.live.result import SearchResult
from ttsnap.live.settings import ModelSettings, SearchSettings
from ttsnap.server.lanes import CallOptions, Cancelled, Lane, Search, Unavailable
from ttsnap.server.metrics import Metrics
from ttsnap.server.settings import ServerSettings

if TYPE_CHECKING:
    from ttsnap.live.session import Session

logger = logging.getLogger(__name__)

MOST_LANES = 16  # sessions that are kept; the one that was not used for longest makes room for another
LONGEST_WAIT = 600  # seconds that a client is told to wait at most
USUAL = 5.0  # seconds between two ends, where nothing has ended yet


class Worker:
    """Searches for clients, in a thread of its own.

    Args:
        model: what is served.
        search: reward, policy and candidates, or a budget.
        limits: how much is taken at a time.
        metrics: counts.

    Attributes:
        name: of the model.

    Raises:
        ValueError: an option that a server does not take.
    """

    def __init__(self, model: ModelSettings, search: SearchSettings, limits: ServerSettings, metrics: Metrics) -> None:
        if search.different:
            raise ValueError("--different chooses among the images of one search; a server searches for each picture")
        self.model, self.search, self.limits, self.metrics = model, search, limits, metrics
        self.name = model.model
        self._lanes: dict[CallOptions, Lane] = {}
        self._replicas: Any = None  # on other devices, for all lanes
        self._new: list[Search] = []
        self._open: set[Search] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._between, self._last_end = USUAL, 0.0
        self._thread = threading.Thread(target=self._run, name="ttsnap-worker", daemon=True)
        metrics.watch(self)

    def start(self) -> None:
        """Load the model, and begin to search.

        Raises:
            ValueError: what was wrong with the model or an option, and what would work.
        """
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def close(self, patience: float = 30.0) -> None:
        """End: searches that are not over are refused."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience)

    def submit(self, searches: Sequence[Search]) -> None:
        """Search for these; each is told when it has ended.

        Raises:
            Unavailable: too much is asked for at the moment; none of them was taken.
        """
        with self._changed:
            if not self.alive:
                raise Unavailable("the server is about to end", 10)
            mine = sum(search.client == searches[0].client for search in self._open)
            most, most_each = self.limits.max_waiting, self.limits.max_per_client
            if (excess := mine + len(searches) - most_each) > 0:
                raise Unavailable(
                    f"you wait for {mine} pictures already; at most {most_each} are searched for one client at a time",
                    self._wait_for(excess),
                    "client",
                )
            if (excess := len(self._open) + len(searches) - most) > 0:
                raise Unavailable(f"the queue is full: {len(self._open)} pictures of {most}", self._wait_for(excess))
            self._open |= set(searches)
            self._new += searches
            self._changed.notify_all()

    def cancel(self, searches: Sequence[Search]) -> None:
        """The client has gone."""
        for search in searches:
            search.cancel()
        with self._changed:
            self._changed.notify_all()

    def _wait_for(self, ends: int) -> int:
        """Seconds until so many searches are likely to have ended."""
        return min(LONGEST_WAIT, max(1, math.ceil(ends * self._between)))

    # What is told of it.

    def session(self) -> Session:
        """The session of requests that say nothing of the call's arguments; for use while nothing is searched."""
        return self._lanes[CallOptions()].session

    @property
    def alive(self) -> bool:
        """Whether it takes searches."""
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """Searches that have begun."""
        return sum(len(lane.under_way) for lane in list(self._lanes.values()))

    @property
    def waiting(self) -> int:
        """Searches that have not."""
        return max(0, len(self._open) - self.running)

    @property
    def open_calls(self) -> int:
        """Suspended calls of the pipeline."""
        return sum(lane.open_calls for lane in list(self._lanes.values()))

    @property
    def lanes(self) -> int:
        """Sessions that are kept."""
        return len(self._lanes)

    # In its thread.

    def _run(self) -> None:
        try:
            self._load()
        except Exception as error:
            self._failure = error
            self._ready.set()
            return
        self._ready.set()
        while True:
            with self._changed:
                while not (self._new or self._closing or self._busy()):
                    self._changed.wait()
                if self._closing:
                    break
                new, self._new = self._new, []
            while new:  # and no name is left that keeps the last one
                self._admit(new.pop(0))
            for lane in self._busy():
                self._turn(lane)
        for search in list(self._open):
            self._end(search, Unavailable("the server is about to end", 10))
        if self._replicas:
            self._replicas.close()

    def _busy(self) -> list[Lane]:
        return [lane for lane in self._lanes.values() if lane.busy]

    def _room(self) -> bool:
        return self.running < MOST_OPEN

    def _admit(self, search: Search) -> None:
        """Put a search into its lane, which is opened where there is none yet."""
        if search.cancelled:
            self._end(search, Cancelled())
            return
        try:
            if search.options not in self._lanes:
                self._open_lane(search)
        except Exception as error:
            self._end(search, error)
        else:
            self._lanes[search.options].waiting.append(search)

    def _turn(self, lane: Lane) -> None:
        taken, places = lane.engine.occupancy.taken, lane.engine.occupancy.places
        try:
            for search, outcome in lane.turn():
                self._end(search, outcome)
        except Exception as error:  # a mistake of ours, not of a search: those in the lane cannot go on
            logger.error("a lane failed", exc_info=error)
            self._lanes = {options: other for options, other in self._lanes.items() if other is not lane}
            for search in lane.abandon():
                self._end(search, error)
        occupancy = lane.engine.occupancy
        self.metrics.batch(occupancy.taken - taken, occupancy.places - places)

    def _end(self, search: Search, outcome: SearchResult | Exception) -> None:
        with self._changed:
            self._open.discard(search)
        now = time.monotonic()
        if search.begun_at is not None and isinstance(outcome, SearchResult):
            since = now - max(self._last_end, search.begun_at)
            self._between += 0.2 * (since - self._between)
            self._last_end = now
        self.metrics.ended(search, outcome)
        try:
            search.end(outcome)
        except RuntimeError:  # the loop that waited for it has ended
            logger.debug("nobody waits for a search any more")

    # Models.

    def _load(self) -> None:
        from ttsnap import rewards
        from ttsnap.live.session import reward_of
        from ttsnap.pipelines.loading import Loading, find_device, load_model, quiet_libraries, read_devices
        from ttsnap.pipelines.models import MODELS, model_name

        quiet_libraries()
        loading = Loading(**{name: getattr(self.model, name) for name in Loading.__dataclass_fields__})
        if self.model.devices:
            loading = replace(loading, device=read_devices(self.model.devices)[0])
        reward = reward_of(model_name(self.model.model), self.search.reward, pushed=bool(self.model.diversity))
        device = find_device(self.model.reward_device or loading.device)
        self._pipe = load_model(self.model.model, loading)
        self._judges = rewards.load(reward, device, self.model.reward_timeout)
        report = self.search.report_reward  # held out where it is asked for alone: it would judge every picture
        self._held_out = (
            None if report in (None, AUTO, NONE) else rewards.load(report, device, self.model.reward_timeout)
        )
        self._asked = {"reward": reward} if isinstance(reward, str) else {}
        example = MODELS[self.name].example if self.name in MODELS else ""
        first = Search(example or "a photo", 0, done=lambda outcome: None)
        self._open_lane(first)  # complains here, before anybody asks

    def _open_lane(self, search: Search) -> None:
        """Prepare a session for the arguments of a search; the idle lane that was not used for longest makes room."""
        session = self._session(search.options, search.prompt)
        idle = [options for options, lane in self._lanes.items() if not lane.busy]
        if len(self._lanes) >= MOST_LANES and idle:
            oldest = min(idle, key=lambda options: self._lanes[options].used)
            self._lanes.pop(oldest).abandon()
        self._lanes[search.options] = Lane(session, self._room, self.limits.max_candidates)

    def _session(self, options: CallOptions, prompt: str) -> Session:
        from ttsnap.live.session import prepare
        from ttsnap.pipelines.conditions import Pictures
        from ttsnap.pipelines.negtome import parse

        given = {name: getattr(options, name) for name in ("size", "steps", "guidance", "negative_prompt")}
        model = replace(self.model, **{name: value for name, value in given.items() if value is not None})
        arguments: dict[str, Any] = {**model.arguments(), "preview": model.preview}
        arguments |= {"cache": model.cache, "draft_cache": model.draft_cache}
        if self._replicas is None:
            arguments["devices"] = model.devices
        with tempfile.TemporaryDirectory(prefix="ttsnap-") as folder:
            if (edit := options.edit) is not None:
                (image := Path(folder) / "image").write_bytes(edit.image)
                mask = None
                if edit.mask is not None:
                    (mask := Path(folder) / "mask").write_bytes(edit.mask)
                arguments["pictures"] = Pictures(image=(image,), mask=mask, strength=edit.strength)
            session = prepare(
                self._pipe,
                reward=self._judges,
                report=self._held_out,
                prompt=prompt,
                diversity=parse(model.diversity, model.diversity_options),
                **self.search.keywords(),
                **arguments,
            )
        self._replicas = session.sampler.replicas = self._replicas or session.sampler.replicas
        session.asked = session.asked | self._asked
        return session


__all__ = ["Worker"]

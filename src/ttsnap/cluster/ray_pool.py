"""Workers as Ray actors: on this machine, or on a cluster that is there already.

Each actor holds the loaded model and rewards, one per GPU, or per share of the cores. One that dies is replaced.
Nothing is sent home, there is no dashboard, and a Ray that is started here listens on 127.0.0.1 only.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ttsnap.cluster.jobs import Block, Event, Job, Plan, Work, first_line
from ttsnap.cluster.scheduling import LOADS, Message, heard

OBJECT_STORE = 100 << 20  # bytes; only events travel through it
STARTS = 4  # attempts to start Ray


def prepare(address: str | None) -> None:
    """What Ray must be told before it is imported: to send nothing home, and alone to listen on the loopback only."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None and "ray" not in sys.modules:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's name for that switch


def connect(address: str | None, workers: int) -> bool:
    """Join the Ray cluster at `address`, or start one on this machine; true if it was started or joined here.

    Raises:
        ValueError: there is no cluster at that address.
    """
    prepare(address)
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address is None:
        for attempt in range(1, STARTS + 1):
            try:
                ray.init("local", num_cpus=workers, object_store_memory=OBJECT_STORE, **quiet)
            except Exception as error:  # Ray gives its processes 30 s to start, too few on a busy machine
                ray.shutdown()
                if attempt == STARTS:
                    raise ValueError(f"Ray does not start on this machine: {first_line(error)}") from error
            else:
                return True
    try:
        ray.init(address=address, **{key: value for key, value in quiet.items() if key != "include_dashboard"})
    except (ConnectionError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        hint = (
            "" if "RAY_AUTH_MODE" in os.environ else " (one with tokens wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
        )
        raise ValueError(f"no Ray cluster answers at {address}{hint}: {first}") from error
    return True


class _Actor:
    """One worker process."""

    def __init__(self, folder: str, path: list[str], threads: int | None) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)
        sys.path += [entry for entry in path if entry not in sys.path]
        self.threads = threads
        self.work: Work | None = None

    def load(self, job: Job) -> int:
        """Load the job; the process id."""
        if self.threads:
            import torch

            torch.set_num_threads(self.threads)
        with heard():
            self.work = job.load()
        return os.getpid()

    def plan(self) -> Plan:
        assert self.work is not None
        return self.work.plan()

    def run(self, block: Block, shared: Mapping[str, Any]) -> Iterator[Event]:
        """Events of a block, as they come."""
        assert self.work is not None
        events = self.work.run(block, shared)
        while True:
            with heard() as notes:
                event = next(events, None)
            if event is None:
                return
            yield event._replace(notes=(*event.notes, *notes))


@dataclass
class _Slot:
    """A place for a worker: its actor, and what it is waited for (`loading` or `events`)."""

    actor: Any
    loading: Any = None
    events: Any = None
    pid: int = 0
    attempts: int = 0


class RayPool:
    """Workers as Ray actors.

    Args:
        workers: how many (default: one per GPU of the cluster, else 1).
        address: of a cluster, such as `auto` or `ray://host:10001`; None: one is started on this machine.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        self._mine = connect(address, workers or 1)
        import ray

        self._ray = ray
        gpus = ray.cluster_resources().get("GPU", 0)
        self.size = workers or max(1, int(gpus))
        self._gpus = 1 / -(-self.size // int(gpus)) if gpus >= 1 else 0
        threads = os.environ.get("OMP_NUM_THREADS", "")
        share = max(1, (os.cpu_count() or 1) // self.size) if address is None else None
        self._threads = int(threads) if threads.isdigit() else share
        self._slots: dict[int, _Slot] = {}
        self._job: Job | None = None
        self._shared: Any = None

    def start(self, job: Job) -> Plan:
        """Load the workers, and let the first that is ready plan."""
        self._job = job
        for worker in range(self.size):
            self._slots[worker] = self._begin()
        while True:
            message = self.wait(1.0)
            if message and message.kind == "ready":
                try:
                    plan: Plan = self._ray.get(self._slots[message.worker].actor.plan.remote())
                    return plan
                except self._ray.exceptions.RayTaskError as error:
                    raise cause(error) from None
                except self._ray.exceptions.RayError:
                    self._replace(message.worker)

    def _begin(self, attempts: int = 0) -> _Slot:
        actor = (
            self._ray.remote(_Actor)
            .options(num_gpus=self._gpus, num_cpus=1, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")
            .remote(os.getcwd(), [os.path.abspath(entry) for entry in sys.path], self._threads)
        )
        return _Slot(actor, loading=actor.load.remote(self._job), attempts=attempts + 1)

    def _replace(self, worker: int) -> None:
        slot = self._slots[worker]
        self._ray.kill(slot.actor)
        self._slots[worker] = self._begin(slot.attempts if slot.loading else 0)

    def submit(self, worker: int, block: Block, plan: Plan) -> None:
        """Give an idle worker a block."""
        slot = self._slots[worker]
        self._shared = self._shared or self._ray.put(plan.shared)
        slot.events = slot.actor.run.options(num_returns="streaming").remote(block, self._shared)

    def idle(self) -> list[int]:
        """Workers that are loaded and have no block."""
        return [worker for worker, slot in self._slots.items() if not slot.loading and not slot.events]

    def pids(self) -> dict[int, int]:
        """Process id of each worker that is loaded."""
        return {worker: slot.pid for worker, slot in self._slots.items() if not slot.loading}

    def busy(self) -> list[int]:
        """Process ids of the workers that have a block."""
        return [slot.pid for slot in self._slots.values() if slot.events is not None]

    def wait(self, seconds: float) -> Message | None:
        """The next message of any worker."""
        errors = self._ray.exceptions
        pending = {
            slot.loading or slot.events: worker for worker, slot in self._slots.items() if slot.loading or slot.events
        }
        if not pending:
            return None
        ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=seconds)
        if not ready:
            return None
        worker = pending[ready[0]]
        slot = self._slots[worker]
        try:
            if slot.loading:
                slot.pid, slot.loading, slot.attempts = self._ray.get(slot.loading), None, 0
                return Message(worker, "ready")
            return Message(worker, "event", self._ray.get(next(slot.events)))
        except StopIteration:
            slot.events = None
            return Message(worker, "ended")
        except errors.RayTaskError as error:
            if slot.loading:
                raise cause(error) from None
            slot.events = None
            return Message(worker, "failed", cause(error))
        except errors.RayError as error:
            if slot.loading and slot.attempts >= LOADS:
                raise ValueError(f"a worker died {LOADS} times while it loaded: {_sentence(error)}") from error
            self._replace(worker)
            return Message(worker, "died", _sentence(error))

    def close(self) -> None:
        """End the workers, and Ray if it was started for them."""
        for slot in self._slots.values():
            self._ray.kill(slot.actor)
        self._slots.clear()
        if self._mine:
            self._ray.shutdown()


def cause(error: Any) -> Exception:
    """What a worker raised."""
    found = getattr(error, "cause", None)
    if isinstance(found, Exception):
        return found
    return RuntimeError((str(error).strip().splitlines() or ["a worker failed"])[-1])


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "it was killed, perhaps for want of memory" if "SYSTEM_ERROR" in text or "unexpected" in text else text[:200]

"""Copies of a pipeline's models on other devices, each in a process of its own, which run batches of one search.

Calls of candidates and text encoders stay where they are; only what a batch asks of a model goes to a replica, and its
answer comes back. A candidate belongs to no device: before every step the candidates that are left are dealt out anew.
What does not change from step to step, such as the encoding of a prompt, goes to a replica once. A reward stays where
it is, too, or has a copy in each process, among which pictures are dealt out.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ttsnap.pipelines import batching
from ttsnap.pipelines.batching import Layout
from ttsnap.pipelines.call import END, Ask, Call, models, own_containers
from ttsnap.pipelines.features import Place, Tap

if TYPE_CHECKING:
    from ttsnap.pipelines.running import Runner, Waiting

FIXED = 0.25  # what a batch costs beside its candidates, in the time of one candidate


def batch_size(left: Sequence[int], devices: int, most: int) -> int:
    """Candidates in a batch, so that all candidates are soon at their targets.

    Args:
        left: calls that each candidate has still to make [n].
        devices: batches that run at the same time.
        most: candidates that fit into a batch.
    """

    def cost(size: int) -> float:
        rounds = max(max(left), math.ceil(sum(left) / (size * devices)))
        return rounds * (FIXED + size)

    return min(range(min(most, math.ceil(len(left) / devices)), 0, -1), key=cost)


@dataclass(frozen=True)
class Job:
    """A batch for a replica.

    Attributes:
        model: name of the component,
        method: and its method.
        trees: arguments of each candidate [n]; tensors are `Kept` where they went there before.
        positional: how many of the arguments go by place.
        layout: how they are merged.
        autocast: dtype, if the calls wait in one.
        places: of the denoiser, where something listens.
        aspect: height by width of the pictures.
        prompts: of the candidates [n], for what listens.
        forget: kept tensors that nobody needs any more.
    """

    model: str
    method: str
    trees: list[Any]
    positional: int
    layout: Layout
    autocast: Any = None
    places: tuple[Place, ...] = ()
    aspect: float = 1.0
    prompts: tuple[str, ...] = ()
    forget: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kept:
    """A tensor that a replica keeps under a number; it comes with its value the first time."""

    number: int
    value: Tensor | None = None


@dataclass(frozen=True)
class Tool:
    """Something that is called beside the models, such as a reward: `make` makes it for a device."""

    name: str
    make: Callable[[Any], Any]


@dataclass(frozen=True)
class Use:
    """A call of a `Tool` by its name."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]


class Replica:
    """One process with copies of models on one device.

    Args:
        parts: the models by name.
        device: where they run.
    """

    def __init__(self, parts: Mapping[str, Any], device: str) -> None:
        self.device = device
        self._sent: dict[int, tuple[int, int]] = {}  # id of a tensor -> its number and version
        self._gone: list[int] = []
        self._count = 0
        own, other = socket.socketpair()
        paths = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({other.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | paths,
                pass_fds=[other.fileno()],
            )
        with own:
            self._source, self._sink = own.makefile("rb"), own.makefile("wb")
        self.send((parts, device, torch.get_num_threads(), torch.get_float32_matmul_precision()))

    def send(self, what: Any) -> None:
        """Give it a batch, and first of all the models."""
        _Pickler(self._sink, protocol=5).dump(what)
        self._sink.flush()

    def receive(self) -> Any:
        """What it answers.

        Raises:
            EOFError: it has died.
        """
        return pickle.load(self._source)

    def known(self, tree: Any) -> Any:
        """Arguments as they are sent: what is there already, by its number."""

        def put(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            number, version = self._sent.get(id(value), (-1, -1))
            if number >= 0 and version == value._version:
                return Kept(number)
            self._count += 1
            self._sent[id(value)] = self._count, value._version
            weakref.finalize(value, _forget, self._sent, self._gone, id(value), self._count)
            return Kept(self._count, value)

        return tree_map(put, tree)

    def forgotten(self) -> tuple[int, ...]:
        """Numbers of kept tensors that nobody needs any more."""
        gone, self._gone[:] = tuple(self._gone), []
        return gone

    def close(self) -> None:
        """End it."""
        for file in (self._sink, self._source):
            with suppress(OSError):
                file.close()
        self.process.kill()
        self.process.wait()


class _Pickler(pickle.Pickler):
    """Pickles tensors as their bytes, wherever they are, straight into the file."""

    def reducer_override(self, value: Any) -> Any:
        """How a tensor is stored; all else as usual."""
        if type(value) is not Tensor:
            return NotImplemented
        order = sorted(range(value.ndim), key=lambda place: -value.stride()[place])  # convolutions round by it
        flat = value.detach().permute(order).contiguous().cpu()
        data = flat.reshape(-1).view(torch.uint8).numpy()
        return _unpickled, (data, value.dtype, tuple(flat.shape), order)


def _unpickled(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...], order: list[int]) -> Tensor:
    flat = torch.from_numpy(data).view(dtype).reshape(shape)
    return flat.permute([order.index(place) for place in range(len(order))])


def _forget(sent: dict[int, tuple[int, int]], gone: list[int], identity: int, number: int) -> None:
    """A tensor has ended; another may have got its `id`."""
    if sent.get(identity, (0, 0))[0] == number:
        del sent[identity]
    gone.append(number)


class Replicas:
    """All devices of a search: that of the pipeline itself, and the others, each with a replica.

    Args:
        sampler: drives the pipeline, on the first device.
        devices: all of them; one may be named several times.

    Raises:
        ValueError: a device is not there, or the models cannot be copied.
    """

    def __init__(self, sampler: Any, devices: Sequence[str]) -> None:
        from ttsnap.pipelines.loading import find_device

        places = [find_device(device) for device in devices]
        if places[0].type != sampler.device.type or (places[0].index or 0) != (sampler.device.index or 0):
            raise ValueError(f"the pipeline is on {sampler.device}, the first of --devices is {devices[0]}")
        if len(places) > 1:
            spread = [part for part in models(sampler.pipe).values() if getattr(part, "hf_device_map", None)]
            if spread or hasattr(sampler.pipe, "_offload_device") or getattr(sampler.pipe, "hf_device_map", None):
                raise ValueError("--devices is for a pipeline that is on one device; leave out --offload or device_map")
            if sampler.diversity:
                raise ValueError(
                    "candidates that are pushed apart share one device; leave out --devices or the diversity"
                )
        names = {forward.ask.model for forward in sampler.probe.forwards if forward.ask.model in models(sampler.pipe)}
        names &= sampler.probe.merged | {f.ask.model for f in sampler.probe.forwards if f.ask.method == "decode"}
        parts = {name: part for name, part in models(sampler.pipe).items() if name in names}
        self.names = frozenset(parts)
        self.others: list[Replica] = []
        self._closing = weakref.finalize(self, _close, self.others)
        try:
            for place in places[1:]:
                self.others.append(Replica(parts, str(place)))
            for replica in self.others:
                if isinstance(answer := replica.receive(), Exception):
                    raise answer
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, OSError, EOFError) as error:
            self.close()
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the models cannot be copied to {', '.join(devices[1:])} ({first}); leave out --devices, or what "
                "changes the models (compile, quantize)"
            ) from error

    @property
    def count(self) -> int:
        """Devices that are left, with that of the pipeline."""
        return 1 + len(self.others)

    def close(self) -> None:
        """End the other processes."""
        self._closing()

    def deal(self, runner: Runner, group: Sequence[Waiting]) -> list[Sequence[Waiting]]:
        """Batches of calls that can be merged, to be run at the same time; none where this is not for replicas.

        On the CPU the number of devices decides where a batch runs, and never what is in it, so that no bit depends on
        it: all full batches of the group, or the one that is not full. Elsewhere batches are so large that all devices
        have work, and those who arrive are looked at together.
        """
        ask, first = group[0].ask, group[0]
        assert ask is not None
        if ask.model not in self.names or not _plain(ask.tree) or runner.shared(group) is None:
            return []
        most = runner.limits.of(runner.kind(first))
        if runner.device.type == "cpu":
            full = max(1, len(group) // most)
        elif not self.others:
            return []
        else:
            most = batch_size([_left(call) for call in group], self.count, most)
            full = min(self.count, math.ceil(len(group) / most))
        return [group[number * most : (number + 1) * most] for number in range(full)]

    def run(self, runner: Runner, parts: Sequence[Sequence[Waiting]]) -> None:
        """Run batches, as many at a time as there are devices; a batch whose device has died, or is too small, waits.

        Raises:
            MemoryError: not even one candidate fits into memory.
        """
        waiting = list(parts)
        while waiting:
            here, *away = waiting[: self.count]
            sent = [(replica, part) for replica, part in zip(self.others, away, strict=False)]
            sent = [(replica, part) for replica, part in sent if self._sent(runner, replica, part)]
            runner.attempt(here)
            for replica, part in sent:
                for answer in self._received(replica):
                    runner.attempt(part, lambda part=part, answer=answer: self._answered(runner, part, answer))  # type: ignore[misc]
            del waiting[: 1 + len(away)]

    def install(self, tool: Tool) -> None:
        """Have a tool made on each of the other devices.

        Raises:
            ValueError: it cannot be made there.
        """
        try:
            for replica in self.others:
                replica.send(tool)
            for replica in self.others:
                if isinstance(answer := replica.receive(), Exception):
                    raise answer
        except Exception as error:
            self.close()
            raise ValueError(f"{tool.name} cannot be loaded on each device: {error}") from error

    def spread(self, uses: Sequence[Use], here: Callable[..., Any]) -> list[Any]:
        """Answers to calls of a tool, as many at a time as there are devices; one whose device has died is made anew.

        Args:
            uses: the calls.
            here: the tool on this device.
        """
        answers: dict[int, Any] = {}
        while waiting := [number for number in range(len(uses)) if number not in answers]:
            mine, *away = waiting[: self.count]
            pairs = list(zip(self.others, away, strict=False))
            sent = [(replica, number) for replica, number in pairs if self._send(replica, uses[number])]
            try:
                answers[mine] = here(*uses[mine].args, **uses[mine].options)
            except Exception as error:  # the others are listened to first
                answers[mine] = error
            for replica, number in sent:
                for answer in self._received(replica):
                    answers[number] = answer
            for answer in answers.values():
                if isinstance(answer, Exception):
                    raise answer
        return [answers[number] for number in range(len(uses))]

    def _sent(self, runner: Runner, replica: Replica, part: Sequence[Waiting]) -> bool:
        ask = part[0].ask
        assert ask is not None
        tap = runner.tap if runner.hearing(part) else None
        job = Job(
            ask.model,
            ask.method,
            [replica.known(call.ask.tree) for call in part if call.ask is not None],
            len(ask.args),
            runner.probe.layout(ask) or Layout(1, {}),
            getattr(part[0], "autocast", None),
            tap.places if tap else (),
            tap.aspect if tap else 1.0,
            tuple(call.prompt for call in part) if tap else (),
            replica.forgotten(),
        )
        return self._send(replica, job)

    def _send(self, replica: Replica, what: Any) -> bool:
        """Whether a replica was given something; one that has died is left out from now on."""
        try:
            replica.send(what)
        except OSError:
            self._died(replica)
            return False
        return True

    def _received(self, replica: Replica) -> list[Any]:
        """The answer of a replica; none of one that has died, which is left out from now on."""
        try:
            return [replica.receive()]
        except (EOFError, OSError, pickle.UnpicklingError):
            self._died(replica)
            return []

    def _answered(self, runner: Runner, part: Sequence[Waiting], answer: Any) -> None:
        if isinstance(answer, Exception):
            raise answer
        made, cells, words = tree_map(lambda x: x.to(runner.device) if isinstance(x, Tensor) else x, answer)
        if runner.tap:
            runner.tap.remember(words)
        runner.answered(part, made, cells)

    def _died(self, replica: Replica) -> None:
        self.others.remove(replica)
        replica.close()
        warnings.warn(
            f"the process of {replica.device} has died; going on with {self.count} device{'s' * (self.count > 1)}",
            stacklevel=3,
        )


def _close(replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.close()
    replicas.clear()


def _left(call: Waiting) -> int:
    """Denoiser calls until a candidate is looked at."""
    return max(1, call.progress.target - call.step) if isinstance(call, Call) and call.progress.target < END else 1


def _plain(tree: Any) -> bool:
    """Whether arguments can go to another process: tensors, numbers, texts and containers of these."""
    if isinstance(tree, dict):
        return all(map(_plain, tree.values()))
    if isinstance(tree, list | tuple):
        return type(tree) in (list, tuple) and all(map(_plain, tree))
    return tree is None or isinstance(tree, Tensor | str | int | float | bool | torch.dtype | torch.Size)


# In the process of a replica.


def serve(number: int) -> None:
    """Run batches that come through a socket from the process that has begun this one, until that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that began this
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    with socket.socket(fileno=number) as own:
        source, sink = own.makefile("rb"), own.makefile("wb")

    def answer(what: Any) -> None:
        _Pickler(sink, protocol=5).dump(what)
        sink.flush()

    with suppress(EOFError, OSError):
        parts, device, threads, precision = pickle.load(source)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        try:
            work = Work({name: part.to(device) for name, part in parts.items()}, torch.device(device))
        except Exception as error:
            answer(_plain_error(error))
            return
        del parts
        answer("ready")
        with torch.no_grad():
            while True:
                answer(work.answer(pickle.load(source)))


@dataclass
class Work:
    """What a replica has: models, tensors that are kept, what listens, and tools."""

    parts: dict[str, Any]
    device: torch.device
    kept: dict[int, Tensor] = field(default_factory=dict)
    taps: dict[Any, Tap] = field(default_factory=dict)
    tools: dict[str, Any] = field(default_factory=dict)

    def answer(self, job: Job | Tool | Use) -> Any:
        """What a model answers, features that were heard, and words of prompts; what a tool answers; or the error."""
        try:
            if isinstance(job, Tool):
                self.tools[job.name] = job.make(self.device)
                return "ready"
            if isinstance(job, Use):
                args = tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, job.args)
                return self.tools[job.name](*args, **job.options)
            return self._answer(job)
        except Exception as error:
            return _plain_error(error)

    def _answer(self, job: Job) -> Any:
        for number in job.forget:
            self.kept.pop(number, None)
        trees = [tree_map(self._value, tree, is_leaf=lambda x: isinstance(x, Kept)) for tree in job.trees]
        tree = batching.merge(batching.padded(trees, job.layout), job.layout) if len(trees) > 1 else trees[0]
        ask = Ask(job.model, job.method, tuple(tree[n] for n in range(job.positional)), {
            name: value for name, value in tree.items() if not isinstance(name, int)
        })  # fmt: skip
        model = self.parts[ask.model]
        tap = self._tap(job)
        autocast: Any = torch.autocast(self.device.type, job.autocast) if job.autocast else nullcontext()
        listening: Any = tap.listen(job.prompts) if tap else nullcontext([])
        with autocast, listening as heard:
            target = model if ask.method == "forward" else getattr(model, ask.method)
            made = target(*own_containers(ask.args), **own_containers(ask.kwargs))
        words = dict(zip(job.prompts, tap.words(job.prompts), strict=True)) if tap else {}
        return made, heard[0] if heard else None, words

    def _value(self, leaf: Any) -> Any:
        if not isinstance(leaf, Kept):
            return leaf
        if leaf.value is not None:
            self.kept[leaf.number] = leaf.value.to(self.device)
        return self.kept[leaf.number]

    def _tap(self, job: Job) -> Tap | None:
        if not job.places:
            return None
        key = job.model, job.places, job.aspect
        if key not in self.taps:
            self.taps[key] = Tap(self.parts[job.model], job.places, job.aspect)
        return self.taps[key]


def _plain_error(error: Exception) -> Exception:
    """An error that another process can read."""
    if isinstance(error, torch.OutOfMemoryError):
        return torch.OutOfMemoryError(str(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


__all__ = ["Replicas", "Tool", "Use", "batch_size"]

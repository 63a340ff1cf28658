"""Picture files read ahead of what judges them: by threads here where they are few, by processes where they are many.

Python runs one thread at a time, so that decoding many small pictures on threads would hold up the model. A process
of its own also keeps a decoder that crashes on a file from taking everything with it: that file is named. Processes
end with the one that began them, however it ends, as their input does. They begin without numpy, which takes longer
to import than fifty small pictures to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ttsnap.files.decoding import decode, read_file, shown
from ttsnap.files.embedded_prompt import embedded_prompt
from ttsnap.files.reading import ahead

if TYPE_CHECKING:
    from PIL.Image import Image

FEW = 64  # pictures for which no process is begun
PART = 32  # pictures that are read at a time


class Item(NamedTuple):
    """A picture that is to be read: its name, its file or the picture itself; `prompt` None: its metadata says it."""

    name: str
    source: Path | Image
    prompt: str | None


class Read(NamedTuple):
    """A picture that was read.

    Attributes:
        keys: reward -> the key of what it says of this content and prompt.
        prompt: that was given, or is in its metadata; None if neither is.
        note: what else is in its file.
        pixels: of 8 bits, the rows of red, then of green, then of blue; None if nothing is to be judged.
        size: width and height.
        fault: why it cannot be.
    """

    keys: Mapping[str, str] = {}
    prompt: str | None = None
    note: str = ""
    pixels: bytes | None = None
    size: tuple[int, int] = (0, 0)
    fault: str = ""


@dataclass(frozen=True)
class Reading:
    """What is to be done with each picture.

    Attributes:
        rewards: name -> what decides its word, as a text.
        known: keys of what is known already; a picture of which all is known is not decoded.
    """

    rewards: Mapping[str, str]
    known: Collection[str]

    def read(self, item: Item) -> Read:
        """Read one."""
        try:
            data = read_file(item.source) if isinstance(item.source, Path) else None
            content = hashlib.sha256(_bytes_of(item.source) if data is None else data).hexdigest()
            keys = {name: _key(content, item.prompt, reward) for name, reward in self.rewards.items()}
            if all(key in self.known for key in keys.values()):
                return Read(keys)
            found = shown(item.source) if data is None else decode(data)  # type: ignore[arg-type]
            pixels = b"".join(plane.tobytes() for plane in found.picture.split())
            prompt = item.prompt or embedded_prompt(found.info, found.exif)
            return Read(keys, prompt, found.note, pixels, found.picture.size)
        except ValueError as error:
            return Read(fault=str(error))

    @contextlib.contextmanager
    def begin(self, items: Sequence[Item], readers: int | None = None) -> Iterator[Iterator[Read]]:
        """Begin to read, some of them ahead.

        Args:
            items: the pictures.
            readers: processes, or threads for few pictures (default: one per core but one, at most 8).

        Yields:
            What was read, in the order of the pictures.
        """
        count = readers or min(8, max(1, (os.cpu_count() or 1) - 1))
        apart = len(items) > FEW and all(isinstance(item.source, Path) for item in items)
        parts = [items[start : start + PART] for start in range(0, len(items), PART)]
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(count, thread_name_prefix="picture-reader"))
            work = stack.enter_context(_Processes(self, count)).read if apart else self._read_all
            read = ahead(pool, work, ((part,) for part in parts), 2 * count)
            stack.callback(read.close)
            first: list[Read] = next(read, [])  # is begun now, not when it is asked for
            yield itertools.chain(first, itertools.chain.from_iterable(read))

    def _read_all(self, items: Sequence[Item]) -> list[Read]:
        return [self.read(item) for item in items]


class _Processes:
    """Processes that read; each is asked by one thread at a time."""

    def __init__(self, reading: Reading, count: int) -> None:
        self.reading = reading
        self.free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self.begun: list[subprocess.Popen[bytes]] = []
        self.greeted: set[int] = set()  # processes that have begun to work
        for _ in range(count):
            self.free.put(self._begin())

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.begun:
            process.kill()
        for process in self.begun:
            process.communicate()

    def _begin(self) -> subprocess.Popen[bytes]:
        paths = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | paths,
        )
        self.begun.append(process)
        with contextlib.suppress(OSError):
            _send(process.stdin, self.reading)  # type: ignore[arg-type]
        return process

    def read(self, items: Sequence[Item]) -> list[Read]:
        """What a process says of some pictures; where one dies of them, each is read by itself.

        Where processes cannot begin at all, they are read here.
        """
        process = self.free.get()
        if process.pid not in self.greeted:
            if _receive(process.stdout) is None:  # type: ignore[arg-type]
                self.free.put(process)
                return [self.reading.read(item) for item in items]
            self.greeted.add(process.pid)
        try:
            _send(process.stdin, items)  # type: ignore[arg-type]
            found: list[Read] | None = _receive(process.stdout)  # type: ignore[arg-type]
        except OSError:
            found = None
        if found is not None:
            self.free.put(process)
            return found
        self.free.put(self._begin())
        if len(items) == 1:
            return [Read(fault="is damaged: its decoder crashes")]
        return [one for item in items for one in self.read([item])]


def serve() -> None:
    """Read pictures that come on stdin until it ends; what is found goes to stdout."""
    import warnings

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that began this
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    reading = _receive(source)
    try:
        _send(sink, "ready")
        while (items := _receive(source)) is not None:
            _send(sink, [reading.read(item) for item in items])
    except BrokenPipeError:  # the one that began this was killed
        os._exit(0)


def _send(sink: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value, protocol=5)
    sink.write(struct.pack("<Q", len(data)))
    sink.write(data)
    sink.flush()


def _receive(source: BinaryIO) -> Any:
    """What was sent; None at the end."""
    head = source.read(8)
    data = source.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
    return pickle.loads(data) if data else None


def _key(content: str, prompt: str | None, reward: str) -> str:
    return hashlib.sha256(json.dumps([content, prompt, reward]).encode()).hexdigest()[:32]


def _bytes_of(picture: Any) -> bytes:
    return f"{picture.mode} {picture.size} ".encode() + bytes(picture.tobytes())

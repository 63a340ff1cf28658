"""Where results lie: a local path, or any place that fsspec knows (`s3://bucket/folder`, `gs://...`).

`location` gives a `Path` for what is local, and a `Remote` for the rest, which has the few methods of a path that are
needed. `write` stores a file in either, all of it or nothing: locally a temporary file is renamed, and a put to an
object store is atomic by itself. A remote place that fails for a while is asked again, later and later.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

PATIENCE = 120.0  # seconds for which a failing store is asked again; TTSNAP_PATIENCE overrides it
_FINAL: tuple[type[Exception], ...] = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)
_FINAL += (ValueError, TypeError, LookupError, AttributeError)

_TEMPORARY = ".tmp"

T = TypeVar("T")


@dataclass(frozen=True)
class Remote:
    """A file or folder in an object store, with the methods of a `Path` that results need.

    There are no folders in such a store: one exists as soon as something lies in it.
    """

    url: str

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """Such as `.png`."""
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> Remote:
        """The folder it lies in."""
        return Remote(self.url.rsplit("/", 1)[0])

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def with_name(self, name: str) -> Remote:
        """A neighbour."""
        return self.parent / name

    def exists(self) -> bool:
        """Whether it is a file, or a folder with something in it."""
        return bool(self._ask(lambda store, path: store.exists(path)))

    def is_file(self) -> bool:
        """Whether it is a file."""
        return bool(self._ask(lambda store, path: store.isfile(path)))

    def is_dir(self) -> bool:
        """Whether something lies in it."""
        return bool(self._ask(lambda store, path: store.isdir(path)))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: folders need not be made."""

    def iterdir(self) -> Iterator[Remote]:
        """What lies in it."""
        names = self._ask(lambda store, path: store.ls(path, detail=False))
        yield from (self / str(name).rstrip("/").rsplit("/", 1)[-1] for name in names)

    def glob(self, pattern: str) -> Iterator[Remote]:
        """What lies in it and fits."""
        import fnmatch

        yield from (one for one in self.iterdir() if fnmatch.fnmatch(one.name, pattern))

    def read_bytes(self) -> bytes:
        """The whole file."""
        return bytes(self._ask(lambda store, path: store.cat_file(path)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The whole file, to read."""
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, data: bytes) -> None:
        """Store all of it or nothing."""
        self._ask(lambda store, path: store.pipe_file(path, data))

    def create(self, data: bytes) -> bool:
        """Store it if nothing is there; false if something else is, also if that was put at the same moment.

        A store without conditional puts stores it in any case.
        """
        from fsspec.spec import AbstractFileSystem

        def put(store: Any, path: str) -> bool:
            if not store.async_impl and type(store).pipe_file is AbstractFileSystem.pipe_file:  # it looks, then puts
                store.pipe_file(path, data)
                return True
            try:
                store.pipe_file(path, data, mode="create")
            except FileExistsError:
                pass
            except OSError as error:  # some stores do not say which condition failed
                if error.errno != errno.EINVAL:
                    raise
            else:
                return True
            return bool(store.cat_file(path) == data)  # a put whose answer was lost has been there before

        return self._ask(put)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove it."""
        with contextlib.suppress(*((FileNotFoundError,) if missing_ok else ())):
            self._ask(lambda store, path: store.rm_file(path))

    def _ask(self, what: Callable[[Any, str], T]) -> T:
        store, path = filesystem(self.url)
        return patiently(lambda: what(store, path), str(self))


AnyPath = Path | Remote


def location(place: str | Path | Remote, *, absolute: bool = False) -> AnyPath:
    """A `Path`, on request an absolute one, or a `Remote` for what has a scheme such as `s3://`."""
    if isinstance(place, Path | Remote):
        return place
    scheme, separator, rest = place.partition("://")
    if not separator:
        return Path(place).absolute() if absolute else Path(place)
    if scheme == "file":
        return Path(rest)
    if not rest.strip("/"):
        raise ValueError(f"{place} names no folder; give one such as {scheme}://bucket/folder")
    filesystem(place)
    return Remote(place.rstrip("/"))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a url, and the path in it; it never answers from a cache.

    Raises:
        ValueError: fsspec knows no such scheme.
        ModuleNotFoundError: its package is not installed.
    """
    import fsspec
    from fsspec.core import url_to_fs

    try:
        store, path = url_to_fs(url, **options(url))
    except ImportError as error:
        raise ModuleNotFoundError(str(error), name=error.name or "fsspec") from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "abfs", "sftp") if name in fsspec.available_protocols())
        raise ValueError(f"{url}: {error}; known are {known} and others of fsspec") from error
    if hasattr(store, "retries"):
        store.retries = 1
    return store, str(path)


def options(url: str) -> dict[str, Any]:
    """What fsspec is told about a place: answer from no cache, and leave the patience to `patiently`."""
    if not url.startswith(("s3://", "s3a://")):
        return {"use_listings_cache": False}
    return {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}


def patiently(
    work: Callable[[], T],
    what: str,
    patience: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Do it, and when the store fails do it again, after 0.2 s, then twice as long each time, up to 15 s.

    Args:
        work: may raise; what a repetition cannot mend (no such file, no permission) is raised at once.
        what: for the message.
        patience: seconds after which it is given up.
        sleep: waits.
        clock: seconds, of a clock that is never set.

    Raises:
        OSError: it failed for all that time.
    """
    patience = float(os.environ.get("TTSNAP_PATIENCE", PATIENCE)) if patience is None else patience
    pause, start = 0.2, clock()
    while True:
        try:
            return work()
        except _FINAL:
            raise
        except Exception as error:
            if clock() - start >= patience:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise OSError(errno.EIO, f"{what} failed for {clock() - start:.0f} s: {first}") from error
        sleep(pause * random.uniform(0.5, 1.0))  # not all workers at the same moment
        pause = min(15.0, 2 * pause)


def write(path: AnyPath, data: bytes) -> None:
    """Store a file: readers see all of it or nothing."""
    if isinstance(path, Remote):
        path.write_bytes(data)
    else:
        atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(data: Any, path: AnyPath) -> None:
    """Write JSON atomically."""
    write(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def atomically(path: Path, work: Callable[[Path], Any]) -> None:
    """Let `work` make a temporary file beside `path`, then rename it: readers see all of it or nothing.

    Raises:
        OSError: such as a full disk; it names `path`.
    """
    _remove_left(path)
    handle, name = tempfile.mkstemp(_TEMPORARY, f".{path.name}.", path.parent)
    temporary = Path(name)
    try:
        _hold(handle)
        work(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, name):
            error.filename = str(path)
        raise
    finally:
        os.close(handle)


def vanished(out: str | Path) -> OSError:
    """What to raise where an output is gone that was there."""
    return OSError(
        errno.ENOENT, "the output has vanished while it was written; the same command begins again", str(out)
    )


def _publish(folder: Path, place: AnyPath, last: str) -> None:
    """Move a local folder to a place where nothing is: `last` comes last: where it is, all of it is."""
    if isinstance(place, Path):
        os.replace(folder, place)
        return
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path == folder / last)
    for path in files:
        (place / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


@contextlib.contextmanager
def new_folder(place: AnyPath, last: str) -> Iterator[Path]:
    """A name for a temporary local folder, which in the end becomes `place`, where nothing is: `last` comes last."""
    local = isinstance(place, Path)
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(place)
    above = place.parent if isinstance(place, Path) else None
    parent = Path(tempfile.mkdtemp(_TEMPORARY, f".{place.name}." if local else "ttsnap-", above))
    handle = os.open(parent, os.O_RDONLY)
    try:
        _hold(handle)
        yield parent / place.name
        _publish(parent / place.name, place, last)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
        os.close(handle)


def _hold(handle: int) -> None:
    """Lock something temporary while it is made."""
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_EX)


def _remove_left(path: Path) -> None:
    """Remove what killed processes have left of a file or folder: the lock is free when its owner is gone."""
    import fcntl

    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and name.endswith(_TEMPORARY):
            left = path.parent / name
            with contextlib.suppress(OSError):
                handle = os.open(left, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                finally:
                    os.close(handle)


def check_writable(folder: AnyPath) -> None:
    """Make a folder, and see that files can be written there.

    Raises:
        ValueError: it is a file, or nothing can be written there; says what would work.
    """
    if folder.is_file():
        raise ValueError(f"output path {folder} is a file; give a directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}; give another --out") from error

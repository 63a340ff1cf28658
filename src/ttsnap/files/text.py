"""Text files as they come: marked as UTF-8 or UTF-16, or plain UTF-8, and not larger than they should be."""

from __future__ import annotations

from pathlib import Path

MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_text(path: Path, most: int, what: str = "") -> str:
    """The text of a file.

    Args:
        path: the file.
        most: bytes that it may have.
        what: it is, for messages, such as `prompts from` or `the config`.

    Raises:
        ValueError: it is larger, cannot be read, or is no such text.
    """
    source = f"{what} {path}" if what else str(path)
    try:
        if path.is_fifo() and not str(path).startswith("/dev/"):  # as a shell's `<(...)` does
            raise ValueError(f"cannot read {source}: it is a named pipe")
        with path.open("rb") as file:  # of a device its size does not tell
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"{path} is larger than {most >> 20} MiB; split it")
        return data.decode(MARKS.get(data[:2], "utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {source}: it is not UTF-8 text") from error

"""A progress bar that counts images."""

from __future__ import annotations

import time
from typing import Any


class ImageProgress:
    """Images done, images per second and time left, on stderr; usable as a context.

    Images found in place count as done, but not in the rate.
    """

    def __init__(self, what: str, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.what, self.images, self.found, self.total = what, 0, 0, 0
        self._started = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("images{task.fields[rate]}"),
            console=Console(stderr=True),
            transient=True,
            disable=quiet,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("loading the model", total=None, rate="")

    def __enter__(self) -> ImageProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def start(self, total: int) -> None:
        """So many images are to be done."""
        self.total, self._started = total, time.perf_counter()
        self._bar.update(self._task, total=total, description=self.what)

    def advance(self, images: int) -> None:
        """So many more are done."""
        self.images += images
        left = (self.total - self.images - self.found) / max(self.rate, 1e-9)
        self._bar.update(self._task, advance=images, rate=f", {self.rate:.3g} per second, {duration(left)} left")

    def skip(self, images: int) -> None:
        """So many more were there already."""
        self.found += images
        self._bar.update(self._task, advance=images)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / max(self.seconds, 1e-9)

    def report(self) -> dict[str, Any]:
        """For the JSON object."""
        return {"images": self.images, "images_found": self.found, "seconds": self.seconds}

    def summary(self) -> str:
        """For people: `640 images in 2.1 s, 305 per second`."""
        found = f", {self.found} were there already" if self.found else ""
        return f"{self.images} images in {duration(self.seconds)}, {self.rate:.3g} per second{found}"


def duration(seconds: float) -> str:
    """`2.1 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

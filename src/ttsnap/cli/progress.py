"""A progress bar that counts images."""

from __future__ import annotations

import time
from typing import Any


class ImageProgress:
    """Images done, images per second and time left, on stderr; usable as a context."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.images, self.started = 0, time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("images, {task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
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
        """So many images are left to do."""
        self.started = time.perf_counter()
        self._bar.reset(self._task, total=total, description="recording", rate="")

    def advance(self, images: int) -> None:
        """So many more are done."""
        self.images += images
        self._bar.update(self._task, advance=images, rate=f"{self.rate:.3g} per second")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / max(self.seconds, 1e-9)

"""A progress bar that shows itself only when something lasts longer than a second.

What draws it is not even imported before: that takes a good part of the second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PATIENCE = 1.0


class Bar:
    """Counts from the start, draws after `PATIENCE` seconds, and leaves nothing behind."""

    def __init__(self, console: Callable[[], Console], what: str, total: float | None) -> None:
        self._console = console
        self._what = what
        self._total = total
        self._started = time.monotonic()
        self._drawn: tuple[Progress, TaskID] | None = None

    def update(self, done: float) -> None:
        """So much of the total is done."""
        if self._drawn is None:
            if time.monotonic() - self._started < PATIENCE:
                return
            self._drawn = self._draw()
        progress, task = self._drawn
        progress.update(task, completed=done)

    def _draw(self) -> tuple[Progress, TaskID]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=self._console(), transient=True)
        progress.start()
        return progress, progress.add_task(self._what, total=self._total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn is not None:
            self._drawn[0].stop()

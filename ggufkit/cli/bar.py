"""A progress bar that shows itself only when something lasts longer than a second."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PATIENCE = 1.0


class Bar:
    """Counts from the start, draws after `PATIENCE` seconds, and leaves nothing behind."""

    def __init__(self, console: Console, what: str, total: float | None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._what = what
        self._total = total
        self._started = time.monotonic()
        self._task: TaskID | None = None

    def update(self, done: float) -> None:
        """So much of the total is done."""
        if self._task is None:
            if time.monotonic() - self._started < PATIENCE:
                return
            self._progress.start()
            self._task = self._progress.add_task(self._what, total=self._total)
        self._progress.update(self._task, completed=done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

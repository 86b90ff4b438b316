"""Progress bars by bytes, on a terminal; nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from kanbu_backup_dagster.backup.landing import Progress as StreamProgress


class ByteBar:
    """A bar to call with a stream's progress, or `to` with a count of bytes."""

    def __init__(self, progress: Progress, task: TaskID, total: int | None) -> None:
        self._progress = progress
        self._task = task
        self._total = total

    def __call__(self, stream: StreamProgress) -> None:
        # The estimate is a guess: a bar that passes it grows with what came.
        total = max(stream.estimated_bytes, stream.done_bytes) or None
        self._progress.update(self._task, completed=stream.done_bytes, total=total)

    def to(self, count: int) -> None:
        """Show that `count` bytes are done."""
        self._progress.update(self._task, completed=count, total=self._total)


@contextmanager
def byte_bar(doing: str, *, total: int | None = None, silent: bool = False) -> Iterator[ByteBar]:
    """A bar on standard error: bytes, share of `total` (or of the stream's estimate), rate, time."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=silent or not console.is_terminal,
        transient=True,
    )
    with progress:
        yield ByteBar(progress, progress.add_task(doing, total=total), total)

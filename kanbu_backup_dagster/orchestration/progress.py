"""Progress of a stream, told to the run's log and to whoever listens in this process.

What belongs here: throttling and the listener. What does not: measuring (`backup.landing`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar

from dagster import OpExecutionContext

from kanbu_backup_dagster.backup.landing import Progress

_LOG_EVERY_SECONDS = 5.0

# Set by the command line when it runs a job in its own process, to draw a bar.
listener: ContextVar[Callable[[Progress], None] | None] = ContextVar("listener", default=None)


def reporter(context: OpExecutionContext, doing: str, *, of: str = "Backup") -> Callable[[Progress], None]:
    """A callback for a stream: logs every few seconds, and tells the listener each time.

    Args:
        doing: What is being done to the bytes.
        of: What kind of run it is.
    """
    listening = listener.get()
    last = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last
        if listening is not None:
            listening(progress)
        now = time.monotonic()
        if now - last >= _LOG_EVERY_SECONDS:
            last = now
            context.log.info(f"[{of}] {doing}: {progress}")

    return report

"""Taking over a changed schedule file without a restart.

What belongs here: noticing the change, and asking the code server to load its code anew; the web server and the daemon
learn of that from the code server. What does not: reading the file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._grpc.client import DagsterGrpcClient

logger = logging.getLogger("kanbu_backup.server")

POLL_SECONDS = 1.0
_RELOAD_SECONDS = 120


@contextmanager
def following(file: Path, code_server: Path) -> Iterator[None]:
    """Within this, a change of `file` makes the code server on the socket `code_server` load its code anew.

    Runs that go on meanwhile are not touched: the old code's process stays until they have ended.
    """
    stopping = threading.Event()
    thread = threading.Thread(target=_follow, args=(file, code_server, stopping), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()


def _follow(file: Path, code_server: Path, stopping: threading.Event) -> None:
    loaded = _content(file)
    before = loaded
    while not stopping.wait(POLL_SECONDS):
        now = _content(file)
        # Twice the same: an editor may write a file in several steps.
        if now != loaded and now == before and code_server.exists():
            try:
                DagsterGrpcClient(socket=str(code_server)).reload_code(timeout=_RELOAD_SECONDS)
            except DagsterUserCodeUnreachableError:
                logger.warning("[Scheduler] %s has changed; the code server does not answer yet", file)
            else:
                logger.info("[Scheduler] %s has changed and is loaded anew", file)
                loaded = now
        before = now


def _content(file: Path) -> bytes | None:
    """What is compared: small, and unlike a time stamp never the same for two contents."""
    try:
        return file.read_bytes()
    except OSError:
        return None

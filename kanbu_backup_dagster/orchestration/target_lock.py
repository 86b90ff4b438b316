"""Locks: which runs may work on a target at the same time, on every way of starting a run.

What belongs here: readers' and writers' locks by name that die with their process and tell who holds them, and the two
things they are taken on. What does not: when a run takes one (`run_scope`), and Dagster's queue, whose tag limits keep
most runs from ever meeting here; `dagster job execute` and the command line do not pass through it.

A holder is a file in Dagster's home that its process keeps locked (flock), so that a holder that was killed is no
holder any more. Runs on other machines do not see it; `Locks` is the seam for a lock that they do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from kanbu_backup_dagster.errors import BusyError
from kanbu_backup_dagster.settings import dagster_home
from kanbu_backup_dagster.storage.protocol import Storage

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        job: The job's name.
        run_id: Its run.
        pid: The process on this machine.
        since: When it took the lock, UTC, ISO 8601.
    """

    job: str
    run_id: str
    pid: int
    since: str

    @classmethod
    def now(cls, job: str, run_id: str) -> Holder:
        """This process, as of now."""
        return cls(job, run_id, os.getpid(), datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def __str__(self) -> str:
        return f"{self.job}, run {self.run_id}, process {self.pid}, since {self.since}"


class Locks(Protocol):
    """Named locks among all runs that know one another."""

    def hold(
        self, name: str, holder: Holder, *, exclusive: bool, wait_seconds: float = 0
    ) -> AbstractContextManager[None]:
        """Hold `name`, alone or beside others that share it, until the context is left or the process ends.

        Args:
            name: What is locked, in words: it is shown to whoever finds it taken.
            wait_seconds: How long to wait for others to leave.

        Raises:
            BusyError: Others still hold it; says who.
        """


class FolderLocks:
    """Locks among the processes of this machine, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def hold(self, name: str, holder: Holder, *, exclusive: bool, wait_seconds: float = 0) -> Iterator[None]:
        folder = self._folder / hashlib.sha256(name.encode()).hexdigest()[:16]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_seconds
        while True:
            entry = folder / f"{secrets.token_hex(8)}.holder"
            handle, others = _enter(folder, entry, holder, exclusive=exclusive)
            if handle is not None:
                break
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"The {name} is in use.",
                    tried=tuple(f"held by {other}" for other in others),
                    advice="Run again when that is done.",
                )
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            entry.unlink(missing_ok=True)
            os.close(handle)


def _enter(folder: Path, entry: Path, holder: Holder, *, exclusive: bool) -> tuple[int | None, list[Holder]]:
    """Become a holder, unless others are in the way: then no handle, and who they are."""
    gate = os.open(folder / "gate", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        present = [found for path in folder.glob("*.holder") if (found := _living(path)) is not None]
        in_the_way = [other for other, alone in present if exclusive or alone]
        if in_the_way:
            return None, in_the_way
        handle = os.open(entry, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, json.dumps({**asdict(holder), "exclusive": exclusive}).encode())
        return handle, []
    finally:
        os.close(gate)


def _living(path: Path) -> tuple[Holder, bool] | None:
    """The holder of an entry and whether it holds alone; an entry whose process has ended is removed."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # given up since the folder was listed
        return None
    with contextlib.closing(os.fdopen(handle, "rb")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = json.loads(file.read())
            return Holder(content["job"], content["run_id"], content["pid"], content["since"]), content["exclusive"]
        path.unlink(missing_ok=True)
        return None


def open_locks() -> Locks:
    """The locks of this Dagster home."""
    return FolderLocks(dagster_home() / "locks")


def storage_name(storage: Storage) -> str:
    """The lock on a storage's files: whoever reads one shares it, whoever deletes files has it alone."""
    return f"storage {storage.location}"

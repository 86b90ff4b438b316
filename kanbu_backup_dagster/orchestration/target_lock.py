"""Locks: which runs may work on a target at the same time, on every way of starting a run.

What belongs here: readers' and writers' locks by name that die with their process and tell who holds them, and the two
things they are taken on. What does not: when a run takes one (`run_scope`), and Dagster's queue, whose tag limits keep
most runs from ever meeting here; `dagster job execute` and the command line do not pass through it.

Where Dagster's records are in its home, so are the locks: a holder is a file that its process keeps locked (flock).
Where they are in PostgreSQL, which several machines share, a holder is a session there with an advisory lock. Either
way a holder that was killed is no holder any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from kanbu_backup_dagster.errors import BusyError
from kanbu_backup_dagster.orchestration.dagster_database import DagsterDatabase, dagster_database
from kanbu_backup_dagster.settings import dagster_home
from kanbu_backup_dagster.storage.protocol import Storage

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        job: The job's name.
        run_id: Its run; empty for a command that is none.
        pid: The process.
        machine: The machine it runs on.
        since: When it took the lock, UTC, ISO 8601.
    """

    job: str
    run_id: str
    pid: int
    machine: str
    since: str

    @classmethod
    def now(cls, job: str, run_id: str) -> Holder:
        """This process, as of now."""
        return cls(
            job, run_id, os.getpid(), socket.gethostname(), datetime.now(timezone.utc).isoformat(timespec="seconds")
        )

    def __str__(self) -> str:
        run = f", run {self.run_id}" if self.run_id else ""
        return f"{self.job}{run}, process {self.pid} on {self.machine}, since {self.since}"


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
            _wait(name, others, deadline)
        try:
            yield
        finally:
            entry.unlink(missing_ok=True)
            os.close(handle)


def _wait(name: str, others: Sequence[object], deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise BusyError(
            f"The {name} is in use.",
            tried=tuple(f"held by {other}" for other in others),
            advice="Run again when that is done.",
        )
    time.sleep(_POLL_SECONDS)


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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.write(handle, json.dumps({**asdict(holder), "exclusive": exclusive}).encode())
        except BaseException:  # a full disk: an entry that says nothing would be in everybody's way
            entry.unlink(missing_ok=True)
            os.close(handle)
            raise
        return handle, []
    finally:
        os.close(gate)


def _living(path: Path) -> tuple[Holder, bool] | None:
    """The holder of an entry and whether it holds alone; an entry whose process has ended is removed."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # given up since the folder was listed
        return None
    with closing(os.fdopen(handle, "rb")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = json.loads(file.read())
            exclusive = content.pop("exclusive")
            return Holder(**content), exclusive
        path.unlink(missing_ok=True)
        return None


class PostgresLocks:
    """Locks among the processes of all machines whose Dagster keeps its records in one database.

    A holder is a session with an advisory lock
    (https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS), which the server lets go when the
    process or its connection ends; when its machine does, after a minute. Who holds it is said in a comment of the
    statement that took it, which the server shows for as long as the session does nothing else.
    """

    def __init__(self, database: DagsterDatabase) -> None:
        self._database = database

    @contextmanager
    def hold(self, name: str, holder: Holder, *, exclusive: bool, wait_seconds: float = 0) -> Iterator[None]:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        deadline = time.monotonic() + wait_seconds
        with closing(self._database.connect()) as session, session.cursor() as cursor:
            cursor.execute(_KEEP_SESSION)
            take = f"SELECT pg_try_advisory_lock{'' if exclusive else '_shared'}(%s) /* {_as_comment(holder)} */"
            while True:
                # Asked for anew each time: a holder that waits in the server would shut out those that share.
                cursor.execute(take, (key,))
                if cursor.fetchone()[0]:
                    break
                cursor.execute(_HOLDERS, (key,))
                _wait(name, [_from_statement(*row) for row in cursor.fetchall()] or ["a run that just ended"], deadline)
            yield


# A machine that vanishes says nothing to the server, which by default would wait for it for hours; and a session that
# holds a lock for hours is idle, which a server may be set to end.
_KEEP_SESSION = """
SELECT set_config(name, value, false)
FROM (VALUES ('tcp_keepalives_idle', '30'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '3'),
             ('idle_session_timeout', '0')) AS wanted (name, value)
WHERE current_setting(name, true) IS NOT NULL
"""
# A key of 64 bits is shown in two halves: https://www.postgresql.org/docs/current/view-pg-locks.html
_HOLDERS = """
SELECT locks.pid, activity.query FROM pg_locks AS locks LEFT JOIN pg_stat_activity AS activity USING (pid)
WHERE locktype = 'advisory' AND granted AND objsubid = 1
  AND (classid::bigint << 32) | objid::bigint = %s
  AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def _as_comment(holder: Holder) -> str:
    # psycopg2 reads a percent sign as a parameter, and PostgreSQL these two as a comment's end.
    return json.dumps(asdict(holder)).replace("%", "%%").replace("*/", "* /").replace("/*", "/ *")


def _from_statement(session: int, statement: str | None) -> object:
    told = re.search(r"/\* (\{.*\}) \*/", statement or "")
    return Holder(**json.loads(told[1])) if told else f"session {session} of Dagster's PostgreSQL"


def open_locks() -> Locks:
    """The locks among all that share Dagster's records.

    Raises:
        SettingsError: DAGSTER_POSTGRES_URL cannot be used.
    """
    database = dagster_database()
    return PostgresLocks(database) if database is not None else FolderLocks(dagster_home() / "locks")


STORAGE_PATIENCE_SECONDS = 60.0
"""How long a storage's lock is waited for: files are deleted in moments."""


def storage_name(storage: Storage) -> str:
    """The lock on a storage's files: whoever reads one shares it, whoever deletes files has it alone."""
    return f"storage {storage.location}"

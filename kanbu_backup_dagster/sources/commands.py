"""How PostgreSQL's client programs are run: the one thing in which direct and docker mode differ.

What belongs here: the `ServerAccess` protocol and its direct form, running a program on this machine. What does not:
which program to run and what its output means (`postgres`).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.connection import Connection, child_environment, require_connection

CHUNK_BYTES = 1 << 20
STDERR_KEPT_BYTES = 4096
_STDERR_SHOWN_LINES = 6
_TERMINATION_SECONDS = 5
_PR_SET_PDEATHSIG = 1
# Nothing of the user's own settings, no question, and an end at the first error.
PSQL_OPTIONS = ("--no-psqlrc", "--no-password", "--quiet", "--set=ON_ERROR_STOP=1")
_BARE_ROWS = ("--tuples-only", "--no-align")


class Process(Protocol):
    """A client program that is running. A context manager: leaving it ends the program, whatever happened."""

    def chunks(self) -> Iterator[bytes]:
        """What it writes to its standard output, until it closes it. The end proves nothing: ask `wait`."""

    def write(self, chunk: bytes) -> None:
        """Feed its standard input.

        Raises:
            BrokenPipeError: It no longer reads; `wait` and `stderr` tell why.
        """

    def close_input(self) -> None:
        """End its standard input."""

    def wait(self) -> int:
        """Its exit status, once it has ended."""

    @property
    def stderr(self) -> str:
        """The last lines it wrote to standard error."""

    def __enter__(self) -> Process: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ServerAccess(Protocol):
    """A way to run client programs against the server. Frozen and picklable; holds no secret."""

    @property
    def mode(self) -> str:
        """`direct` or `docker`."""

    @property
    def description(self) -> str:
        """Where the server is and how it is reached, for people."""

    @property
    def client_version(self) -> str:
        """The version of `pg_dump` and `psql`."""

    def connection(self, settings: Settings) -> Connection:
        """What the programs connect to."""

    def start(
        self,
        settings: Settings,
        tool: str,
        arguments: Sequence[str],
        *,
        database: str | None = None,
        feeds: bool = False,
    ) -> Process:
        """Start `tool` (`pg_dump`, `psql`...), connected to `database` or else the connection's own.

        Args:
            feeds: Whether its standard input will be written to.
        """


@dataclass(frozen=True)
class DirectAccess:
    """Programs in `folder` on this machine, connecting through DATABASE_URL."""

    folder: str
    client_version: str
    server: str

    @property
    def mode(self) -> str:
        return "direct"

    @property
    def description(self) -> str:
        return f"direct to {self.server}, with {self.folder} ({self.client_version})"

    def connection(self, settings: Settings) -> Connection:
        return require_connection(settings)

    def start(
        self,
        settings: Settings,
        tool: str,
        arguments: Sequence[str],
        *,
        database: str | None = None,
        feeds: bool = False,
    ) -> Process:
        connection = self.connection(settings)
        if database is not None:
            connection = connection.to_database(database)
        return LocalProcess([str(Path(self.folder) / tool), *arguments], child_environment(connection), feeds=feeds)


class LocalProcess:
    """A program on this machine, in a session of its own, so that all of it can be ended."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], *, feeds: bool = False) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE if feeds else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            raise SourceError(f"{command[0]} cannot be started: {os.strerror(error.errno or 0)}.") from None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        _widen(self._process.stdout)
        if self._process.stdin is not None:
            _widen(self._process.stdin)
        self._stderr = b""
        self._reader = threading.Thread(target=self._drain, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def _drain(self, stream: IO[bytes]) -> None:
        while data := stream.read(STDERR_KEPT_BYTES):
            self._stderr = (self._stderr + data)[-STDERR_KEPT_BYTES:]

    def chunks(self) -> Iterator[bytes]:
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        while chunk := os.read(handle, CHUNK_BYTES):
            yield chunk

    def write(self, chunk: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._process.stdin.fileno(), view) :]

    def close_input(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self) -> int:
        status = self._process.wait()
        self._reader.join()
        return status

    @property
    def stderr(self) -> str:
        return shorten(self._stderr)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._process.poll() is None:
                self._signal(signal.SIGTERM)
                try:
                    self._process.wait(_TERMINATION_SECONDS)
                except subprocess.TimeoutExpired:
                    self._signal(signal.SIGKILL)
                    self._process.wait()
        finally:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._reader.join(_TERMINATION_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def shorten(stderr: bytes) -> str:
    """The last lines of what a program wrote to standard error, decoded."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-_STDERR_SHOWN_LINES:])


def _widen(pipe: IO[bytes]) -> None:
    """Fewer switches between processes: a pipe as large as a chunk, where the system allows."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        except OSError:  # beyond the user's allowance; the default size works too
            return


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """For a child to call before it becomes its program: it gets the signal `number` when the thread that started it
    ends, as all do when their process is killed (Linux only)."""
    # A dump whose reader was killed outright may sit waiting for a lock, holding others, and never notice.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _unhindered(*, local: bool) -> str:
    """Statements that undo what a database or role may be set to for its usual requests, which ours are not.

    They give no row, and need no PL/pgSQL, which a database need not have.

    Args:
        local: For one transaction. Behind a pooler, a session's settings would stay with whoever comes next.
    """
    return (
        "SELECT 1 FROM pg_catalog.unnest(ARRAY['statement_timeout', 'lock_timeout', 'transaction_timeout', "
        "'idle_session_timeout', 'idle_in_transaction_session_timeout']) AS name WHERE CASE WHEN "
        "pg_catalog.current_setting(name, true) IS NOT NULL "
        f"THEN pg_catalog.set_config(name, '0', {local}) IS NULL END; SET {'LOCAL' if local else 'SESSION'} ROLE NONE; "
    )


def _in_utf8(*, local: bool) -> str:
    # Whatever the database's own encoding. One that has none (SQL_ASCII) passes bytes as they are, and refuses those
    # that are no UTF-8 to a client that wants it.
    return (
        "SELECT 1 FROM pg_catalog.set_config('client_encoding', CASE pg_catalog.current_setting('server_encoding') "
        f"WHEN 'SQL_ASCII' THEN 'SQL_ASCII' ELSE 'UTF8' END, {local}) AS it WHERE it IS NULL;"
    )


UNHINDERED = f"{_unhindered(local=False)}SET default_transaction_read_only = off;"
"""The same for a session that may write."""


def query(access: ServerAccess, settings: Settings, sql: str, *, database: str | None = None) -> list[dict[str, Any]]:
    """The rows of one SELECT, each as a dictionary.

    Raises:
        SourceError: The server could not be asked, and holds its own words; or two columns have one name.
    """
    # JSON: the one output of psql that survives every character a name may hold.
    statement = f"SELECT coalesce(json_agg(r), '[]') FROM ({sql}\n) r"
    preparation = f"{_unhindered(local=True)}{_in_utf8(local=True)}"
    arguments = [*PSQL_OPTIONS, *_BARE_ROWS, "--single-transaction", "--command", preparation, "--command", statement]
    with access.start(settings, "psql", arguments, database=database) as process:
        output = b"".join(process.chunks())
        status = process.wait()
    if status != 0:
        raise SourceError(
            f"The database cannot be asked ({access.description}): {process.stderr or f'psql ended with {status}'}"
        )
    rows: list[dict[str, Any]] = json.loads(output.decode(errors="surrogateescape"), object_pairs_hook=_without_twins)
    return rows


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise SourceError("Two columns of the answer have one name.", advice="Give them names (AS), or ask for one.")
    return found


def execute(access: ServerAccess, settings: Settings, script: str, *, database: str | None = None) -> str:
    """Run SQL statements one after another, each in a transaction of its own unless they say otherwise.

    Args:
        script: SQL, fed through standard input, which no other user of the machine can read.

    Returns:
        What psql printed: unaligned, without headers.

    Raises:
        SourceError: A statement failed, and none after it was run; holds the server's own words.
    """
    arguments = [*PSQL_OPTIONS, *_BARE_ROWS, "--file=-"]
    with access.start(settings, "psql", arguments, database=database, feeds=True) as process:
        try:
            process.write(f"{UNHINDERED} {_in_utf8(local=False)}\n{script}".encode(errors="surrogateescape"))
        except BrokenPipeError:
            status = process.wait()
        else:
            process.close_input()
            output = b"".join(process.chunks())
            status = process.wait()
    if status != 0:
        raise SourceError(f"The server refused ({access.description}): {process.stderr or f'psql ended with {status}'}")
    return output.decode(errors="surrogateescape")


def quote_identifier(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """`text` as an SQL literal, whatever standard_conforming_strings is."""
    escaped = text.replace("'", "''")
    return f" E'{escaped.replace(chr(92), chr(92) * 2)}'" if "\\" in text else f"'{escaped}'"

"""The staging database: where a backup is loaded and looked at before anything live changes.

What belongs here: making it like the database it may replace, loading a backup into it, dropping it. What does not:
judging the backup beforehand (`plan`) or the result (`checks`), and giving it the live name (`swap`).

psql is fed under `\\restrict` with a key of our own, so that no line of a dump can make it do more than send SQL.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.backup.manifest import DatabaseProperties, Locale
from kanbu_backup_dagster.backup.reading import beginning, content
from kanbu_backup_dagster.backup.sql_dump import DumpFindings, DumpScanner, PsqlInputFilter
from kanbu_backup_dagster.backup.stages import decompress
from kanbu_backup_dagster.errors import CorruptBackupError, RestoreError, SourceError
from kanbu_backup_dagster.restore.properties import (
    event_trigger_statements,
    locale_options,
    reset_statements,
    setting_statements,
)
from kanbu_backup_dagster.restore.server import Database, Server, find_databases, run, run_in
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.commands import (
    PSQL_OPTIONS,
    UNHINDERED,
    Process,
    ServerAccess,
    query,
    quote_identifier,
)
from kanbu_backup_dagster.storage.protocol import Storage

_PREFIX = "kanbu_staging_"
_CLIENT_ENCODING = re.compile(rb"^SET client_encoding = '(\w+)';", re.MULTILINE)
_DATABASE_STATEMENT = re.compile(rb"^(?:CREATE|DROP) DATABASE ", re.MULTILINE)
_SUBSCRIPTIONS_SQL = (
    "SELECT subname FROM pg_subscription WHERE subdbid = "
    "(SELECT oid FROM pg_database WHERE datname = current_database())"
)
_HEAD_BYTES = 1 << 14
_PSQL_LINE = re.compile(r"^psql:<stdin>:(\d+): ", re.MULTILINE)

# First what a database may be set to that gives the same text another meaning, and that a dump does not set back.
# Each statement of a dump is a transaction; waiting for each to reach the disk is of no use before the swap, whose own
# commit brings everything before it to disk. Most of what is not COPY is sorting for indexes, which takes longer with
# the usual 64 MB.
_SESSION = (
    f"{UNHINDERED} SET array_nulls = on; SET transform_null_equals = off; SET synchronous_commit = off; "
    "SELECT pg_catalog.set_config('maintenance_work_mem', '256MB', false) "
    "WHERE pg_catalog.pg_size_bytes(pg_catalog.current_setting('maintenance_work_mem')) < 256 * 1024 * 1024;"
)


def staging_prefix(target: str) -> str:
    """How names of staging databases for the database `target` begin."""
    return f"{_PREFIX}{hashlib.sha256(target.encode()).hexdigest()[:8]}_"


def find_staging(access: ServerAccess, settings: Settings) -> list[str]:
    """The staging databases on a server: of restores under way, or left by killed ones.

    Raises:
        SourceError: It cannot be asked.
    """
    sql = f"SELECT datname FROM pg_database WHERE starts_with(datname, '{_PREFIX}') ORDER BY datname"
    return [row["datname"] for row in query(access, settings, sql)]


def new_staging_name(target: str) -> str:
    """A new name; 30 characters, so that nothing is cut off."""
    return staging_prefix(target) + secrets.token_hex(4)


def create_staging(server: Server, settings: Settings, name: str, *, like: Database) -> None:
    """Make the empty database `name` with the owner, encoding, locale, tablespace and settings of the one it is to
    replace; without event triggers, until `swap.dress`.

    Raises:
        SourceError: The server refused.
    """
    options = [f"OWNER {quote_identifier(like.properties.owner)}", *locale_options(like.properties.locale, server)]
    if like.tablespace != "pg_default":  # to name the default one needs a privilege on it
        options.append(f"TABLESPACE {quote_identifier(like.tablespace)}")
    run(
        server,
        settings,
        [
            _creation(name, options),
            *setting_statements(like.properties, name),
            *event_trigger_statements(server, name, fire=False),
        ],
    )


def create_anew(
    server: Server, settings: Settings, name: str, *, recorded: DatabaseProperties | None, encoding: str | None
) -> list[str]:
    """Make the empty database `name`, which is to replace none.

    Args:
        recorded: What it shall be like, as far as this server can; None: nothing is known of that.
        encoding: The dump's.

    Returns:
        A line about each thing in which it is not like that.

    Raises:
        SourceError: The server refused.
    """
    in_encoding = _in_encoding(server, settings, encoding)
    different = []
    if recorded is None:
        run(server, settings, [_creation(name, in_encoding)])
    else:
        owner = f"OWNER {quote_identifier(recorded.owner)}"
        try:
            run(server, settings, [_creation(name, [owner, *locale_options(recorded.locale, server)])])
        except SourceError as error:
            run(server, settings, [_creation(name, [owner, *in_encoding])])
            different.append(f"Made without the locale {recorded.locale.description}: {error.message}")
        for statement in setting_statements(recorded, name):
            try:
                run(server, settings, [statement])
            except SourceError as error:
                different.append(f"Not set again: {error.message}")
        try:
            run_in(server, settings, name, ["SELECT;"])
        except SourceError as error:
            # As a library to be loaded at the beginning of each session, which is not on this machine.
            run(server, settings, list(reset_statements(recorded, name)))
            different.append(f"None of the settings are set again, since nobody could connect: {error.message}")
    run(server, settings, list(event_trigger_statements(server, name, fire=False)))
    return different


def _in_encoding(server: Server, settings: Settings, encoding: str | None) -> list[str]:
    """Options for a database in the dump's encoding, all else as this server has it."""
    template = find_databases(server, settings)["template0"].properties.locale
    if encoding is None or encoding == template.encoding:
        return []
    # A locale goes with one encoding; C goes with all.
    return [*locale_options(Locale(encoding, "C", "C", "libc"), server)]


def _creation(name: str, options: list[str]) -> str:
    return f"CREATE DATABASE {quote_identifier(name)} TEMPLATE template0 {' '.join(options)};"


def drop_database(server: Server, settings: Settings, name: str) -> None:
    """Drop the database `name`, if there is one, ending connections to it.

    Raises:
        SourceError: The server refused.
    """
    found = find_databases(server, settings).get(name)
    if found is not None:
        if found.is_template:
            run(server, settings, [f"ALTER DATABASE {quote_identifier(name)} IS_TEMPLATE false;"])
        run(server, settings, [f"DROP DATABASE IF EXISTS {quote_identifier(name)} WITH (FORCE);"])


def drop_staging(server: Server, settings: Settings, name: str) -> None:
    """Drop the staging database `name`, if there is one.

    Raises:
        SourceError: The server refused.
    """
    try:
        drop_database(server, settings, name)
    except SourceError as refused:
        # Nobody may be able to connect to it, so that is not tried first. But one with subscriptions cannot be dropped.
        # These came from the dump and never had a slot of their own: the one they name belongs to the live database's.
        try:
            subscriptions = query(server.access, settings, _SUBSCRIPTIONS_SQL, database=name)
        except SourceError:
            raise refused from None
        for row in subscriptions:
            subscription = quote_identifier(row["subname"])
            statements = [
                f"ALTER SUBSCRIPTION {subscription} DISABLE;",
                f"ALTER SUBSCRIPTION {subscription} SET (slot_name = NONE);",
                f"DROP SUBSCRIPTION {subscription};",
            ]
            run_in(server, settings, name, statements)
        drop_database(server, settings, name)


def drop_leftovers(server: Server, settings: Settings, target: str) -> list[str]:
    """Drop the staging databases that killed restores of `target` left.

    The caller holds the lock on the target, so none of them is in use.

    Returns:
        Their names.
    """
    prefix = staging_prefix(target)
    names = [name for name in find_databases(server, settings) if name.startswith(prefix)]
    for name in names:
        drop_staging(server, settings, name)
    return names


@dataclass(frozen=True)
class DumpHead:
    """What the first lines of a dump tell.

    Attributes:
        encoding: The encoding of the database that was dumped; None when they do not say.
        creates_database: Whether it drops or makes a database by itself (`pg_dump --create`).
    """

    encoding: str | None
    creates_database: bool


def read_head(backup: Backup, storage: Storage, keys: Keyring) -> DumpHead:
    """Read the first lines of a backup that was proven.

    Raises:
        CorruptBackupError: It is not gzip although its name says so.
    """
    head = b""
    with closing(_sql(backup, beginning(backup, storage, keys))) as chunks:  # type: ignore[type-var]
        for chunk in chunks:
            head += chunk
            if len(head) >= _HEAD_BYTES:
                break
    encoding = _CLIENT_ENCODING.search(head)
    return DumpHead(encoding[1].decode() if encoding else None, _DATABASE_STATEMENT.search(head) is not None)


def _sql(backup: Backup, chunks: Iterator[bytes]) -> Iterator[bytes]:
    return decompress(chunks) if backup.name.compressed else chunks


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        sql_bytes: Bytes of SQL in the file.
        seconds: How long loading took.
        left_out: Statements that were left out, each with its reason.
        findings: What a file without manifest was found to hold; None for others, whose manifest says.
        remarks: In what a database that replaces none is not like the one that was dumped.
    """

    sql_bytes: int
    seconds: float
    left_out: tuple[str, ...]
    findings: DumpFindings | None
    remarks: tuple[str, ...] = ()


def load(
    backup: Backup,
    storage: Storage,
    keys: Keyring,
    server: Server,
    settings: Settings,
    database: str,
    *,
    proven: str,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Loaded:
    """The second pass: decrypt, decompress and feed psql, verifying once more what was fed.

    Args:
        database: The staging database, empty; of no use after a failure.
        proven: What `reading.prove` gave.

    Raises:
        RestoreError: An SQL statement failed; says which line of the dump, and the server's words.
        CorruptBackupError: The file is not what the first pass read, or not a whole dump.
    """
    begun = time.monotonic()
    manifest = backup.manifest
    scanner = DumpScanner() if manifest is None else None
    strainer = PsqlInputFilter(server.settings)
    total, estimate = 0, manifest.raw_bytes if manifest else 0

    def watched(chunks: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal total
        for chunk in chunks:
            if scanner is not None:
                scanner.feed(chunk)
            yield chunk
            total += len(chunk)
            on_progress(Progress(total, estimate, time.monotonic() - begun))

    head = f"\\restrict {secrets.token_hex(16)}\n{_SESSION}\n"
    arguments = [*PSQL_OPTIONS, "--output=/dev/null", "--file=-"]
    with server.access.start(settings, "psql", arguments, database=database, feeds=True) as process:
        try:
            process.write(head.encode())
            with closing(_sql(backup, content(backup, storage, keys, proven=proven))) as chunks:  # type: ignore[type-var]
                for passed in strainer(watched(chunks)):
                    process.write(passed)
            process.close_input()
        except BrokenPipeError:
            raise _failure(process, head.count("\n")) from None
        for _ in process.chunks():  # --output leaves nothing to read; the end is when psql has run everything
            continue
        if process.wait() != 0:
            raise _failure(process, head.count("\n"))
    return Loaded(total, time.monotonic() - begun, tuple(strainer.left_out), _findings(backup, scanner))


def _findings(backup: Backup, scanner: DumpScanner | None) -> DumpFindings | None:
    try:
        return scanner.finish() if scanner is not None else None
    except SourceError as error:
        raise CorruptBackupError(
            f"{backup.filename}: {error.message}", advice="Nothing was replaced. Try a different backup."
        ) from None


def _failure(process: Process, lines_before: int) -> RestoreError:
    status = process.wait()
    said = process.stderr
    if status < 0 and not said:
        said = f"psql was ended by signal {-status}"
    said = _PSQL_LINE.sub(lambda match: f"line {int(match[1]) - lines_before} of the dump: ", said)
    return RestoreError(
        f"The backup cannot be loaded: {said or f'psql ended with {status}'}",
        advice="Nothing was replaced: the backup was being loaded into a staging database, which is dropped.",
    )

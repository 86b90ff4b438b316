"""A drill: a backup restored aside, on a server of choice, to prove that it can be.

What belongs here: where a drill takes place, what is looked at, and clearing up. What does not: which backups are
drilled and what is told of it (`orchestration`).

A drill makes a database of its own with a random name and drops it again; it never touches another.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import SecretStr

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.backup.manifest import DatabaseProperties
from kanbu_backup_dagster.backup.reading import prove
from kanbu_backup_dagster.errors import KanbuError, NotDrillableError, RestoreError, SettingsError, SourceError
from kanbu_backup_dagster.restore.checks import check_database
from kanbu_backup_dagster.restore.plan import missing_extensions, missing_roles, psql_problem, recorded_properties
from kanbu_backup_dagster.restore.server import Server, find_databases, open_server, run
from kanbu_backup_dagster.restore.staging import create_anew, drop_staging, load, read_head
from kanbu_backup_dagster.schedule_file import Assertion
from kanbu_backup_dagster.settings import PgMode, Settings
from kanbu_backup_dagster.sources.commands import query, quote_identifier, quote_literal
from kanbu_backup_dagster.sources.embedded_postgres import EmbeddedPostgres
from kanbu_backup_dagster.sources.server_binaries import find_server_binaries
from kanbu_backup_dagster.storage.protocol import Storage

_PREFIX = "kanbu_drill_"
_ROLE_COMMENT = "made by kanbu-backup for a drill"
_ROLES_SQL = f"""
SELECT rolname AS name FROM pg_roles
 WHERE shobj_description(oid, 'pg_authid') = {quote_literal(_ROLE_COMMENT)} AND NOT rolcanlogin
"""


@dataclass(frozen=True)
class DrillResult:
    """A drill that passed.

    Attributes:
        filename: The backup.
        tables: Tables restored.
        rows: Rows restored.
        seconds: About what a restore would need: both passes and the checks.
        server: Where it took place.
        assertions: Names of the assertions that held.
        remarks: What is as it was dumped, and yet worth knowing; and what the drill could not clear away.
    """

    filename: str
    tables: int
    rows: int
    seconds: float
    server: str
    assertions: tuple[str, ...]
    remarks: tuple[str, ...]


@contextmanager
def drill_server(
    settings: Settings, backup: Backup, *, tell: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[Server, Settings]]:
    """The server a drill takes place on, and the settings that lead to it.

    It is that of BACKUP_DRILL_DATABASE_URL or in BACKUP_DRILL_CONTAINER, else a new one of our own: of the backup's
    major version where that is installed, else of the newest. First goes what a killed drill left on this machine.

    Args:
        tell: Told in words what was left and went.

    Raises:
        SettingsError: Both are set.
        KanbuError: There is none.
    """
    for leftover in EmbeddedPostgres.remove_leftovers():
        tell(f"Removed what a killed drill left: {leftover}")
    url, container = settings.secret("drill_database_url"), settings.drill_container
    if url is not None and container is not None:
        raise SettingsError(
            "BACKUP_DRILL_DATABASE_URL and BACKUP_DRILL_CONTAINER are both set.",
            advice="Remove the one whose server is not for drills.",
        )
    if url is not None:
        there = _leading_to(settings, url)
        yield open_server(there)[0], there
        return
    if container is not None:
        there = _leading_into(settings, container)
        yield open_server(there)[0], there
        return
    facts = backup.manifest.database if backup.manifest else None
    wanted = re.match(r"\d+", facts.server_version) if facts else None
    majors = {binaries.major for binaries in find_server_binaries()}
    major = int(wanted[0]) if wanted and int(wanted[0]) in majors else max(majors)
    with EmbeddedPostgres.temporary(major=major) as embedded:
        there = _leading_to(settings, embedded.url)
        # Any name will do as the target, so that `postgres` remains to connect to.
        yield open_server(there, target=_PREFIX)[0], there


def _leading_to(settings: Settings, url: str) -> Settings:
    return settings.model_copy(update={"database_url": SecretStr(url), "pg_mode": PgMode.DIRECT})


def _leading_into(settings: Settings, container: str) -> Settings:
    """The container's own variables name the user: DATABASE_URL's may be unknown there."""
    return settings.model_copy(update={"database_url": None, "pg_mode": PgMode.DOCKER, "postgres_container": container})


def lock_name(server: Server) -> str:
    """The lock that a drill holds alone: what it finds left by others is then left by the dead."""
    return f"drill database of server {server.server_id}"


def drill(
    backup: Backup,
    storage: Storage,
    keys: Keyring,
    server: Server,
    settings: Settings,
    assertions: Sequence[Assertion] = (),
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[str], None] = lambda line: None,
) -> DrillResult:
    """Restore `backup` into a database of its own on `server`, look at it, and drop it.

    Args:
        settings: Those that lead to `server`.
        assertions: Queries that must return true there.
        on_progress: Told how far loading is.
        tell: Told in words what is done on the way.

    Raises:
        NotDrillableError: The server lacks an extension that the backup needs.
        KanbuError: The backup cannot be restored, or is not what its manifest says, or an assertion does not hold.
    """
    if (too_old := psql_problem(server)) is not None:
        raise SourceError(f"No drill: {too_old}.")
    if missing := missing_extensions(server, backup):
        raise NotDrillableError(
            f"Not drillable: {backup.filename} needs extensions that {server.access.description} does not have: "
            f"{', '.join(missing)}.",
            advice="Set BACKUP_DRILL_DATABASE_URL or BACKUP_DRILL_CONTAINER to a server that has them.",
        )
    for name in [name for name in find_databases(server, settings) if name.startswith(_PREFIX)]:
        drop_staging(server, settings, name)
        tell(f"Removed what a killed drill left: {name}")
    # It may be of use in this drill; at its end it goes.
    roles_left = [row["name"] for row in query(server.access, settings, _ROLES_SQL, database=server.maintenance)]
    begun = time.monotonic()
    proven = prove(backup, storage, keys)
    head = read_head(backup, storage, keys)
    roles = tuple(missing_roles(server, backup))
    database = _PREFIX + secrets.token_hex(4)
    try:
        _create_roles(server, settings, roles)
        different = create_anew(
            server, settings, database, recorded=_locale_alone(server, backup), encoding=head.encoding
        )
        loaded = load(backup, storage, keys, server, settings, database, proven=proven, on_progress=on_progress)
        for statement in loaded.left_out:
            tell(f"Left out, since this server does not know it: {statement}")
        facts = backup.manifest.database if backup.manifest else None
        expected = facts.rows if facts else loaded.findings.rows if loaded.findings else {}
        checked = check_database(server, settings, database, expected)
        seconds = time.monotonic() - begun
        held = tuple(_assert(server, settings, database, assertion) for assertion in assertions)
    finally:
        left = _clear_up(server, settings, database, (*roles, *roles_left))
        for line in left:
            tell(line)
    rows = sum(checked.rows.values())
    where = server.access.description
    return DrillResult(
        backup.filename, checked.tables, rows, seconds, where, held, (*different, *checked.remarks, *left)
    )


def _locale_alone(server: Server, backup: Backup) -> DatabaseProperties | None:
    """What can decide whether rows fit where they were, and in what order they are; the rest is not for a drill."""
    recorded = recorded_properties(backup)
    return DatabaseProperties(server.role, recorded.locale) if recorded is not None else None


def _create_roles(server: Server, settings: Settings, roles: Sequence[str]) -> None:
    """Create roles that cannot log in, marked, so that the next drill knows those of a killed one."""
    if roles:
        statements = [
            f"CREATE ROLE {name} NOLOGIN; COMMENT ON ROLE {name} IS {quote_literal(_ROLE_COMMENT)};"
            for name in map(quote_identifier, roles)
        ]
        run(server, settings, ["BEGIN;", *statements, "COMMIT;"])


def _clear_up(server: Server, settings: Settings, database: str, roles: Sequence[str]) -> tuple[str, ...]:
    """Drop what the drill made; a line about each that could not be. What the drill itself came to stands."""
    left = []
    try:
        drop_staging(server, settings, database)
    except KanbuError as error:
        left.append(f"The database {database} stays, it cannot be dropped: {error.message}")
    for role in roles:
        try:
            run(server, settings, [f"DROP ROLE IF EXISTS {quote_identifier(role)};"])
        except KanbuError as error:
            left.append(f"The role {role} stays, it cannot be dropped: {error.message}")
    return tuple(left)


def _assert(server: Server, settings: Settings, database: str, assertion: Assertion) -> str:
    """Ask, and give the assertion's name if it holds."""
    try:
        rows = query(server.access, settings, assertion.query.strip().rstrip(";"), database=database)
    except KanbuError as error:
        raise RestoreError(f"The assertion {assertion.name!r} could not be asked: {error.message}") from None
    answers = [list(row.values()) for row in rows]
    if len(answers) != 1 or len(answers[0]) != 1 or answers[0][0] is not True:
        raise RestoreError(
            f"The assertion {assertion.name!r} does not hold in the restored database.",
            tried=(f"asked: {assertion.query.strip()}", f"answer: {rows}"),
            advice="Restored rows are as they were dumped: look at what the database held when it was backed up.",
        )
    return assertion.name

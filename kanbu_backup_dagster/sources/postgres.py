"""PostgreSQL as a source: finding a way in, looking at the database, and the dump.

What belongs here: choosing the mode, what is asked of the server before a dump, and the dump itself. What does not: how
a program is run (`commands`, `docker`) and how a dump is read (`backup.sql_dump`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kanbu_backup_dagster.backup.manifest import DatabaseFacts, DatabaseProperties, Grant, Locale, RoleSettings
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.backup.sql_dump import DumpScanner
from kanbu_backup_dagster.errors import KanbuError, SourceError
from kanbu_backup_dagster.settings import PgMode, Settings
from kanbu_backup_dagster.sources.clients import choose_clients, find_clients, major_version, searched_folders
from kanbu_backup_dagster.sources.commands import DirectAccess, ServerAccess, query
from kanbu_backup_dagster.sources.connection import require_connection
from kanbu_backup_dagster.sources.docker import find_container

NO_METHOD = "No backup method available"

# An empty database is about this large; it says nothing of a dump.
_EMPTY_DATABASE_BYTES = 7_500_000

PROPERTIES_SQL = """
json_build_object(
  'owner', pg_get_userbyid(d.datdba),
  'locale', json_build_object(
     'encoding', pg_encoding_to_char(d.encoding), 'collate', d.datcollate, 'ctype', d.datctype,
     'provider', CASE coalesce(to_jsonb(d) ->> 'datlocprovider', 'c')
                 WHEN 'c' THEN 'libc' WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' ELSE 'unknown' END,
     'name', coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'),
     'rules', to_jsonb(d) ->> 'daticurules'),
  'grants', CASE WHEN d.datacl IS NOT NULL THEN
     (SELECT coalesce(json_agg(json_build_object(
               'grantee', CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee) END,
               'grantor', pg_get_userbyid(a.grantor),
               'privilege', a.privilege_type, 'grantable', a.is_grantable)), '[]')
        FROM aclexplode(d.datacl) a) END,
  'settings',
     (SELECT coalesce(json_agg(json_build_object(
               'role', CASE WHEN s.setrole <> 0 THEN pg_get_userbyid(s.setrole) END,
               'settings', s.setconfig) ORDER BY s.setrole), '[]')
        FROM pg_db_role_setting s WHERE s.setdatabase = d.oid),
  'comment', shobj_description(d.oid, 'pg_database'),
  'connection_limit', d.datconnlimit)
"""
"""A database's own properties, for `read_properties`; `d` is its row of pg_database, whose columns for locales differ
from version to version."""

# Catalogs only: nothing here waits for a lock on a table. Roles come from pg_shdepend, which does not record the
# bootstrap superuser (oid 10), who owns everything in the official images.
_DATABASE_SQL = f"""
SELECT current_database() AS name,
       current_setting('server_version') AS server_version,
       (SELECT system_identifier::text FROM pg_control_system()) AS server_id,
       pg_database_size(current_database()) AS size_bytes,
       (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema') AS tables,
       (SELECT coalesce(sum(relpages::bigint), 0) * current_setting('block_size')::bigint
          FROM pg_class WHERE relkind = 'i') AS index_bytes,
       (SELECT coalesce(json_agg(rolname ORDER BY rolname), '[]') FROM pg_roles
         WHERE rolname !~ '^pg_' AND (oid IN (
           SELECT refobjid FROM pg_shdepend
            WHERE refclassid = 'pg_authid'::regclass
              AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database()))
           OR oid = 10 AND EXISTS (
             SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE c.relowner = 10 AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'))) AS roles,
       (SELECT coalesce(json_object_agg(extname, extversion), '{{}}') FROM pg_extension
         WHERE extname <> 'plpgsql') AS extensions,
       (SELECT {PROPERTIES_SQL} FROM pg_database d WHERE d.datname = current_database()) AS properties,
       greatest(pg_database_size(current_database()) - {_EMPTY_DATABASE_BYTES}, 0) AS content_bytes
"""


def database_target(name: str, server_id: str) -> str:
    """This database among all there are."""
    return f"database {name} of server {server_id}"


@dataclass(frozen=True)
class DatabaseState:
    """What the server said of the database just now. Sizes in bytes.

    Attributes:
        server_id: The server's own identifier, the same by whatever address it is reached.
    """

    name: str
    server_version: str
    server_id: str
    size_bytes: int
    tables: int
    estimated_bytes: int
    roles: tuple[str, ...]
    extensions: tuple[tuple[str, str], ...]
    properties: DatabaseProperties

    @property
    def target(self) -> str:
        """What is locked against a restore while it is worked on."""
        return database_target(self.name, self.server_id)


def inspect_database(access: ServerAccess, settings: Settings, *, database: str | None = None) -> DatabaseState:
    """Ask the server about the database.

    Raises:
        SourceError: It cannot be asked.
    """
    row = query(access, settings, _DATABASE_SQL, database=database)[0]
    return DatabaseState(
        name=row["name"],
        server_version=row["server_version"].split(" ")[0],
        server_id=row["server_id"],
        size_bytes=row["size_bytes"],
        tables=row["tables"],
        estimated_bytes=max(row["content_bytes"] - row["index_bytes"], 0),
        roles=tuple(row["roles"]),
        extensions=tuple(row["extensions"].items()),
        properties=read_properties(row["properties"]),
    )


def read_properties(found: dict[str, Any]) -> DatabaseProperties:
    """What PROPERTIES_SQL gave."""
    return DatabaseProperties(
        owner=found["owner"],
        locale=Locale(**found["locale"]),
        grants=None if found["grants"] is None else tuple(Grant(**grant) for grant in found["grants"]),
        settings=tuple(RoleSettings(entry["role"], tuple(entry["settings"])) for entry in found["settings"]),
        comment=found["comment"],
        connection_limit=found["connection_limit"],
    )


def _recordable(properties: DatabaseProperties) -> DatabaseProperties | None:
    """What of it goes into a manifest, which is text that anybody with the storage can read."""
    if not _is_text(properties.owner):
        return None
    settings = [
        RoleSettings(entry.role, tuple(filter(_is_no_secret, filter(_is_text, entry.settings))))
        for entry in properties.settings
        if entry.role is None or _is_text(entry.role)
    ]
    return replace(
        properties,
        grants=None
        if properties.grants is None
        else tuple(grant for grant in properties.grants if _is_text(f"{grant.grantee}{grant.grantor}")),
        settings=tuple(entry for entry in settings if entry.settings),
        comment=properties.comment if properties.comment is not None and _is_text(properties.comment) else None,
    )


def _is_text(name: str) -> bool:
    # A catalog shared by databases of several encodings holds what was put in, in any of them.
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_no_secret(assignment: str) -> bool:
    # PostgreSQL's own parameters have no dot in their names. What has one is an extension's or the application's.
    return "." not in assignment.partition("=")[0]


@dataclass(frozen=True)
class Method:
    """A way to the server that works.

    Attributes:
        access: How programs are run.
        state: What the server said.
        rejected: Why the ways tried before it were left.
    """

    access: ServerAccess
    state: DatabaseState
    rejected: tuple[str, ...] = ()


def find_method(settings: Settings, *, database: str | None = None) -> Method:
    """The way to the database that BACKUP_PG_MODE asks for; `auto` tries direct, then docker.

    Args:
        database: Another database of the same server, in place of DATABASE_URL's.

    Raises:
        KanbuError: That way, or with `auto` each, does not work; says why.
    """
    if settings.pg_mode is not PgMode.AUTO:
        return Method(*_WAYS[settings.pg_mode](settings, database))
    rejected: list[str] = []
    for mode, way in _WAYS.items():
        try:
            return Method(*way(settings, database), tuple(rejected))
        except KanbuError as error:
            rejected.append("; ".join((f"{mode.value}: {error.message}", *error.tried)))
    raise SourceError(
        f"{NO_METHOD}.",
        tried=tuple(rejected),
        advice="For direct mode (recommended in containers) set DATABASE_URL and install postgresql-client. For docker "
        "mode start Docker, find the container with `docker ps | grep postgres`, and set POSTGRES_CONTAINER to its "
        "name.",
    )


def _direct(settings: Settings, database: str | None) -> tuple[ServerAccess, DatabaseState]:
    connection = require_connection(settings)
    available = find_clients()
    if not available:
        raise SourceError(
            "No PostgreSQL client programs (pg_dump and psql) were found.",
            tried=(f"looked in {', '.join(map(str, searched_folders()))}",),
            advice="Install postgresql-client, or set BACKUP_PG_MODE=docker.",
        )
    # Any psql can ask the server for its version; which pg_dump is used depends on the answer.
    newest = max(available, key=lambda clients: clients.major)
    state = inspect_database(
        DirectAccess(str(newest.folder), newest.version, connection.server), settings, database=database
    )
    chosen = choose_clients(available, state.server_version)
    return DirectAccess(str(chosen.folder), chosen.version, connection.server), state


def _docker(settings: Settings, database: str | None) -> tuple[ServerAccess, DatabaseState]:
    access = find_container(settings)
    state = inspect_database(access, settings, database=database)
    if major_version(access.client_version) < major_version(state.server_version):
        raise SourceError(
            f"No pg_dump for this server: the server is PostgreSQL {state.server_version}, and the container "
            f"{access.container} has pg_dump {access.client_version}.",
            advice="Name the container of the server itself in POSTGRES_CONTAINER.",
        )
    return access, state


_WAYS = {PgMode.DIRECT: _direct, PgMode.DOCKER: _docker}


@dataclass(frozen=True)
class PostgresDump:
    """A plain SQL dump of the database, as a recipe's source."""

    access: ServerAccess
    state: DatabaseState
    lock_timeout_seconds: float

    @property
    def name(self) -> str:
        return "dump"

    @property
    def backup_type(self) -> BackupType:
        return BackupType.DATABASE

    @property
    def estimated_bytes(self) -> int:
        return self.state.estimated_bytes

    def open(self, settings: Settings) -> OpenDump:
        return OpenDump(self, settings)


class OpenDump:
    """The dump, flowing."""

    def __init__(self, dump: PostgresDump, settings: Settings) -> None:
        self._dump = dump
        self._settings = settings
        self._rows: dict[str, int] | None = None

    def chunks(self) -> Iterator[bytes]:
        dump, scanner = self._dump, DumpScanner()
        arguments = [
            "--format=plain",
            "--no-password",
            f"--lock-wait-timeout={round(dump.lock_timeout_seconds * 1000)}",
        ]
        with dump.access.start(self._settings, "pg_dump", arguments, database=dump.state.name) as process:
            for chunk in process.chunks():
                scanner.feed(chunk)
                yield chunk
            status = process.wait()
            if status != 0:
                raise self._failure(status, process.stderr)
        self._rows = scanner.finish().rows

    def _failure(self, status: int, stderr: str) -> SourceError:
        # --lock-wait-timeout is a statement timeout on pg_dump's LOCK TABLE.
        if "LOCK TABLE" in stderr and "timeout" in stderr:
            return SourceError(
                f"A table stayed locked by another session for {self._dump.lock_timeout_seconds:g} seconds: {stderr}",
                advice="Run again when the migration or lock is gone, or raise BACKUP_LOCK_TIMEOUT_SECONDS.",
            )
        ended = f"was ended by signal {-status}" if status < 0 else f"failed with exit status {status}"
        return SourceError(f"pg_dump {ended}: {stderr or 'it said nothing'}")

    def findings(self) -> DatabaseFacts:
        if self._rows is None:
            raise RuntimeError("the dump has not been read to its end")
        state = self._dump.state
        return DatabaseFacts(
            name=state.name,
            server_version=state.server_version,
            server_id=state.server_id,
            pg_dump_version=self._dump.access.client_version,
            mode=self._dump.access.mode,
            size_bytes=state.size_bytes,
            roles=tuple(filter(_is_text, state.roles)),
            extensions=dict(state.extensions),
            rows=self._rows,
            properties=_recordable(state.properties),
        )


def prepare_dump(settings: Settings, *, database: str | None = None) -> tuple[PostgresDump, Method]:
    """Find the way to the database and describe its dump.

    Args:
        database: Another database of the same server, in place of DATABASE_URL's.

    Raises:
        SettingsError, SourceError: There is no way.
    """
    method = find_method(settings, database=database)
    return PostgresDump(method.access, method.state, settings.lock_timeout_seconds), method

"""The server that is restored to, and its databases.

What belongs here: what is asked of the server before anything is changed, and running statements there. What does not:
judging the answers (`plan`), and any change of a live name (`swap`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kanbu_backup_dagster.backup.manifest import DatabaseProperties
from kanbu_backup_dagster.errors import KanbuError, RestoreError, SourceError
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.commands import ServerAccess, execute, query
from kanbu_backup_dagster.sources.postgres import PROPERTIES_SQL, find_method, read_properties

LONGEST_NAME_BYTES = 63
"""Of any name: the server cuts longer ones off (NAMEDATALEN)."""

# A database cannot be renamed by who is connected to it, so all this goes through one that every server has.
_MAINTENANCE_DATABASES = ("postgres", "template1")

# The first minor releases whose psql knows \restrict (August 2025, CVE-2025-8714).
_RESTRICT_SINCE = {13: 22, 14: 19, 15: 14, 16: 10, 17: 6}


def _may_act_as(oid: str) -> str:
    """SQL: whether our role has the rights of that role, and may make things belong to it: two things since 16."""
    return f"""
  pg_has_role({oid}, 'USAGE') AND CASE WHEN current_setting('server_version_num')::int >= 160000
                                       THEN pg_has_role({oid}, 'SET') ELSE pg_has_role({oid}, 'MEMBER') END"""


_SERVER_SQL = f"""
SELECT current_user AS role, rolsuper AS superuser, rolsuper OR rolcreatedb AS creates_databases,
       rolsuper OR rolcreaterole AS creates_roles,
       current_setting('server_version_num')::int AS version_number,
       (SELECT setting FROM pg_settings WHERE name = 'data_directory') AS data_directory,
       (SELECT json_agg(rolname) FROM pg_roles) AS roles,
       (SELECT json_agg(rolname) FROM pg_roles WHERE {_may_act_as("oid")}) AS assumable_roles,
       (SELECT json_agg(name) FROM pg_available_extensions) AS extensions,
       (SELECT json_agg(name) FROM pg_settings) AS settings
  FROM pg_roles WHERE rolname = current_user
"""

_DATABASES_SQL = f"""
SELECT d.oid::bigint AS oid, d.datname AS name,
       {_may_act_as("d.datdba")} AS is_owner,
       {PROPERTIES_SQL} AS properties, t.spcname AS tablespace, d.datistemplate AS is_template,
       (SELECT coalesce(json_agg(gid), '[]') FROM pg_prepared_xacts WHERE database = d.datname) AS prepared
  FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace
"""


@dataclass(frozen=True)
class Server:
    """The server restored to, as our role sees it.

    Attributes:
        access: How client programs are run against it.
        maintenance: The database connected to while others are made, renamed and dropped.
        server_id: Its own identifier.
        version: As it says it, e.g. `16.4`.
        version_number: `server_version_num`, e.g. 160004.
        role: Who we are there.
        superuser, creates_databases, creates_roles: What that role may do.
        roles: All roles.
        assumable_roles: Those whose rights our role has, and that it may make things belong to.
        extensions: Extensions that can be created.
        settings: Parameters it knows.
        data_directory: Where its data are, if our role may know.
    """

    access: ServerAccess
    maintenance: str
    server_id: str
    version: str
    version_number: int
    role: str
    superuser: bool
    creates_databases: bool
    creates_roles: bool
    roles: frozenset[str] = field(repr=False)
    assumable_roles: frozenset[str] = field(repr=False)
    extensions: frozenset[str] = field(repr=False)
    settings: frozenset[str] = field(repr=False)
    data_directory: str | None = None

    @property
    def major(self) -> int:
        """The major version."""
        return self.version_number // 10000


@dataclass(frozen=True)
class Database:
    """A database that is there.

    Attributes:
        is_owner: Whether our role has its owner's rights, and may make things belong to it.
        properties: What belongs to the database itself.
        tablespace, is_template: Likewise, but of use on this server alone.
        prepared: Names of the transactions prepared in it.
    """

    oid: int
    name: str
    is_owner: bool
    properties: DatabaseProperties
    tablespace: str
    is_template: bool
    prepared: tuple[str, ...]


def open_server(settings: Settings, *, target: str | None = None) -> tuple[Server, str]:
    """The server that the settings lead to, and the database on it that is meant, whether that exists or not.

    Args:
        target: The database's name; None: the one that DATABASE_URL or the container names.

    Raises:
        KanbuError: There is no way to it.
        RestoreError: No database can have that name.
    """
    first_error: KanbuError | None = None
    for maintenance in _MAINTENANCE_DATABASES:
        try:
            method = find_method(settings, database=maintenance)
        except KanbuError as error:
            first_error = first_error or error
            continue
        name = target or method.access.connection(settings).database
        if len(name.encode()) > LONGEST_NAME_BYTES:
            raise RestoreError(
                f"The name {name!r} is longer than a database's name can be, {LONGEST_NAME_BYTES} bytes."
            )
        if name == maintenance:  # it will be renamed, and nobody may be connected to it then
            continue
        row = query(method.access, settings, _SERVER_SQL, database=maintenance)[0]
        server = Server(
            access=method.access,
            maintenance=maintenance,
            server_id=method.state.server_id,
            version=method.state.server_version,
            version_number=row["version_number"],
            role=row["role"],
            superuser=row["superuser"],
            creates_databases=row["creates_databases"],
            creates_roles=row["creates_roles"],
            roles=frozenset(row["roles"]),
            assumable_roles=frozenset(row["assumable_roles"]),
            extensions=frozenset(row["extensions"] or ()),
            settings=frozenset(row["settings"]),
            data_directory=row["data_directory"],
        )
        return server, name
    raise first_error or SourceError("There is no other database to connect to.")


def find_databases(server: Server, settings: Settings) -> dict[str, Database]:
    """All databases of the server by name.

    Raises:
        SourceError: It cannot be asked.
    """
    return databases_of(server.access, settings, server.maintenance)


def databases_of(access: ServerAccess, settings: Settings, database: str | None) -> dict[str, Database]:
    """All databases of a server by name, asked through one of them.

    Raises:
        SourceError: It cannot be asked.
    """
    rows = query(access, settings, _DATABASES_SQL, database=database)
    return {
        row["name"]: Database(
            **{**row, "properties": read_properties(row["properties"]), "prepared": tuple(row["prepared"])}
        )
        for row in rows
    }


def run(server: Server, settings: Settings, statements: Sequence[str]) -> str:
    """Run statements in the maintenance database.

    Raises:
        SourceError: One failed, and none after it was run.
    """
    return run_in(server, settings, server.maintenance, statements)


def run_in(server: Server, settings: Settings, database: str, statements: Sequence[str]) -> str:
    """Run statements in `database`.

    Raises:
        SourceError: One failed, and none after it was run.
    """
    return execute(server.access, settings, "\n".join([*statements, ""]), database=database)


def knows_restrict(psql_version: str) -> bool:
    """Whether a psql of this version can be kept from running what a dump tells it to (`\\restrict`)."""
    match = re.match(r"(\d+)(?:\.(\d+))?", psql_version)
    if match is None:
        return False
    major, minor = int(match[1]), int(match[2] or 0)
    return major >= 18 or minor >= _RESTRICT_SINCE.get(major, 1 << 30)

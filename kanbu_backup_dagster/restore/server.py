"""The server that is restored to, and its databases' own properties.

What belongs here: what is asked of the server before anything is changed, and a database's properties as statements
that give them to another. What does not: judging them (`plan`), and any change of a live name (`swap`).

A plain dump holds what is *in* a database. Owner, encoding, locale, grants, settings, comment and connection limit
belong to the database itself, and are taken from the one that is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kanbu_backup_dagster.errors import KanbuError, SourceError
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.commands import ServerAccess, execute, query, quote_identifier, quote_literal
from kanbu_backup_dagster.sources.postgres import find_method

# A database cannot be renamed by who is connected to it, so all this goes through one that every server has.
_MAINTENANCE_DATABASES = ("postgres", "template1")

# The first minor releases whose psql knows \restrict (August 2025, CVE-2025-8714).
_RESTRICT_SINCE = {13: 22, 14: 19, 15: 14, 16: 10, 17: 6}

# Settings that are lists of names: each element is a literal of its own in SET (GUC_LIST_QUOTE in PostgreSQL's
# src/backend/utils/misc/guc_tables.c).
_LIST_SETTINGS = {
    "local_preload_libraries",
    "search_path",
    "session_preload_libraries",
    "shared_preload_libraries",
    "temp_tablespaces",
    "unix_socket_directories",
}

UNHINDERED = "SET statement_timeout = 0; SET default_transaction_read_only = off;"
"""What a database or role may be set to for the sake of its usual requests, which ours are not."""

_SERVER_SQL = """
SELECT current_user AS role, rolsuper AS superuser, rolsuper OR rolcreatedb AS creates_databases,
       rolsuper OR rolcreaterole AS creates_roles,
       current_setting('server_version_num')::int AS version_number,
       (SELECT setting FROM pg_settings WHERE name = 'data_directory') AS data_directory,
       (SELECT json_agg(rolname) FROM pg_roles) AS roles,
       (SELECT json_agg(name) FROM pg_available_extensions) AS extensions,
       (SELECT json_agg(name) FROM pg_settings) AS settings
  FROM pg_roles WHERE rolname = current_user
"""

# to_jsonb of the row: its columns for locales differ from version to version.
_DATABASES_SQL = """
SELECT d.oid::bigint AS oid, d.datname AS name, pg_get_userbyid(d.datdba) AS owner,
       pg_has_role(d.datdba, 'MEMBER') AS is_owner, pg_encoding_to_char(d.encoding) AS encoding,
       to_jsonb(d) - 'datacl' AS catalog_row, t.spcname AS tablespace,
       shobj_description(d.oid, 'pg_database') AS comment,
       d.datacl IS NULL AS default_grants,
       (SELECT coalesce(json_agg(json_build_object(
                 'grantee', CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee) END,
                 'grantor', pg_get_userbyid(a.grantor),
                 'privilege', a.privilege_type, 'grantable', a.is_grantable)), '[]')
          FROM aclexplode(d.datacl) a) AS grants,
       (SELECT coalesce(json_agg(json_build_object(
                 'role', CASE WHEN s.setrole <> 0 THEN pg_get_userbyid(s.setrole) END,
                 'settings', s.setconfig) ORDER BY s.setrole), '[]')
          FROM pg_db_role_setting s WHERE s.setdatabase = d.oid) AS settings,
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
    extensions: frozenset[str] = field(repr=False)
    settings: frozenset[str] = field(repr=False)
    data_directory: str | None = None

    @property
    def major(self) -> int:
        """The major version."""
        return self.version_number // 10000


@dataclass(frozen=True)
class Database:
    """A database's own properties.

    Attributes:
        is_owner: Whether our role is, or is a member of, its owner.
        catalog_row: Its row of pg_database, without grants.
        default_grants: Whether its grants were never changed.
        grants: Grantee (None: everybody), grantor, privilege and whether it may be passed on.
        settings: Per role (None: all): `name=value` as the catalog has them.
        prepared: Names of the transactions prepared in it.
    """

    oid: int
    name: str
    owner: str
    is_owner: bool
    encoding: str
    catalog_row: dict[str, Any]
    tablespace: str
    comment: str | None
    default_grants: bool
    grants: tuple[dict[str, Any], ...]
    settings: tuple[dict[str, Any], ...]
    prepared: tuple[str, ...]

    def creation_options(self) -> Iterator[str]:
        """What CREATE DATABASE needs to make an empty one like it."""
        row = self.catalog_row
        yield f"OWNER {quote_identifier(self.owner)}"
        yield f"ENCODING {quote_literal(self.encoding)}"
        if self.tablespace != "pg_default":  # to name the default one needs a privilege on it
            yield f"TABLESPACE {quote_identifier(self.tablespace)}"
        yield f"LC_COLLATE {quote_literal(row['datcollate'])}"
        yield f"LC_CTYPE {quote_literal(row['datctype'])}"
        # Until 14 there was libc alone; `datlocale` was called `daticulocale` until 16.
        provider = row.get("datlocprovider")
        locale = row.get("datlocale") or row.get("daticulocale") or ""
        if provider == "i":
            yield "LOCALE_PROVIDER icu"
            yield f"ICU_LOCALE {quote_literal(locale)}"
            if row.get("daticurules"):
                yield f"ICU_RULES {quote_literal(row['daticurules'])}"
        elif provider == "b":
            yield "LOCALE_PROVIDER builtin"
            yield f"BUILTIN_LOCALE {quote_literal(locale)}"
        elif provider == "c":
            yield "LOCALE_PROVIDER libc"

    def setting_statements(self, name: str) -> Iterator[str]:
        """Statements that give its settings to the database `name`."""
        for entry in self.settings:
            whose = f"ROLE {quote_identifier(entry['role'])} IN " if entry["role"] is not None else ""
            for assignment in entry["settings"]:
                parameter, _, value = assignment.partition("=")
                yield (
                    f"ALTER {whose}DATABASE {quote_identifier(name)} SET {_parameter(parameter)} TO "
                    f"{_setting_value(parameter, value)};"
                )

    def other_statements(self, name: str) -> Iterator[str]:
        """Statements that give its grants, comment, connection limit and template mark to the database `name`."""
        target = quote_identifier(name)
        if not self.default_grants:
            yield f"REVOKE ALL ON DATABASE {target} FROM PUBLIC;"
            yield f"REVOKE ALL ON DATABASE {target} FROM {quote_identifier(self.owner)};"
            # The owner's own grants first: those of others rest on them.
            for grant in sorted(self.grants, key=lambda grant: bool(grant["grantor"] != self.owner)):
                grantee = "PUBLIC" if grant["grantee"] is None else quote_identifier(grant["grantee"])
                passing_on = " WITH GRANT OPTION" if grant["grantable"] else ""
                statement = f"GRANT {grant['privilege']} ON DATABASE {target} TO {grantee}{passing_on};"
                if grant["grantor"] == self.owner:
                    yield statement
                else:
                    yield f"SET ROLE {quote_identifier(grant['grantor'])};"
                    yield statement
                    yield "RESET ROLE;"
        if self.comment is not None:
            yield f"COMMENT ON DATABASE {target} IS {quote_literal(self.comment)};"
        if self.catalog_row["datconnlimit"] != -1:
            yield f"ALTER DATABASE {target} CONNECTION LIMIT {int(self.catalog_row['datconnlimit'])};"
        if self.catalog_row["datistemplate"]:
            yield f"ALTER DATABASE {target} IS_TEMPLATE true;"


def _parameter(name: str) -> str:
    # An extension's parameter has a dot in it, which belongs to no identifier.
    return ".".join(quote_identifier(part) for part in name.split("."))


def _setting_value(parameter: str, value: str) -> str:
    if parameter not in _LIST_SETTINGS:
        return quote_literal(value)
    elements = re.findall(r'"((?:[^"]|"")*)"|([^\s,"][^,]*?)\s*(?:,|$)', value)
    names = [quoted.replace('""', '"') or plain for quoted, plain in elements]
    return ", ".join(quote_literal(name) for name in names) or "''"


def open_server(settings: Settings, *, target: str | None = None) -> tuple[Server, str]:
    """The server that the settings lead to, and the database on it that is meant, whether that exists or not.

    Args:
        target: The database's name; None: the one that DATABASE_URL or the container names.

    Raises:
        KanbuError: There is no way to it.
    """
    first_error: KanbuError | None = None
    for maintenance in _MAINTENANCE_DATABASES:
        try:
            method = find_method(settings, database=maintenance)
        except KanbuError as error:
            first_error = first_error or error
            continue
        name = target or method.access.connection(settings).database
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
    return {row["name"]: Database(**_with_tuples(row)) for row in rows}


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


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
    return execute(server.access, settings, "\n".join([UNHINDERED, *statements, ""]), database=database)


def knows_restrict(psql_version: str) -> bool:
    """Whether a psql of this version can be kept from running what a dump tells it to (`\\restrict`)."""
    match = re.match(r"(\d+)(?:\.(\d+))?", psql_version)
    if match is None:
        return False
    major, minor = int(match[1]), int(match[2] or 0)
    return major >= 18 or minor >= _RESTRICT_SINCE.get(major, 1 << 30)

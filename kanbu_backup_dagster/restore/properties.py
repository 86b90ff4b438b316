"""A database's own properties, given to another database.

What belongs here: the statements that give them, and fitting recorded ones to a server that may lack what they name.
What does not: asking a server for them (`sources.postgres`), and when they are given (`staging`).

A plain dump holds what is *in* a database. Owner, encoding, locale, grants, settings, comment and connection limit
belong to the database itself: they are taken from the one that is replaced or, where there is none, from what the
manifest recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from kanbu_backup_dagster.backup.manifest import DatabaseProperties, Grant, Locale, RoleSettings
from kanbu_backup_dagster.restore.server import Server
from kanbu_backup_dagster.sources.commands import quote_identifier, quote_literal

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


def locale_options(locale: Locale, server: Server) -> Iterator[str]:
    """What CREATE DATABASE needs for a database of this locale; the server may refuse it."""
    yield f"ENCODING {quote_literal(locale.encoding)}"
    yield f"LC_COLLATE {quote_literal(locale.collate)}"
    yield f"LC_CTYPE {quote_literal(locale.ctype)}"
    if locale.provider == "icu":
        yield "LOCALE_PROVIDER icu"
        yield f"ICU_LOCALE {quote_literal(locale.name or '')}"
        if locale.rules:
            yield f"ICU_RULES {quote_literal(locale.rules)}"
    elif locale.provider == "builtin":
        yield "LOCALE_PROVIDER builtin"
        yield f"BUILTIN_LOCALE {quote_literal(locale.name or '')}"
    elif locale.provider == "libc" and server.major >= 15:  # there was no other until then
        yield "LOCALE_PROVIDER libc"


def setting_statements(properties: DatabaseProperties, name: str) -> Iterator[str]:
    """Statements that give the settings to the database `name`."""
    for entry in properties.settings:
        whose = f"ROLE {quote_identifier(entry.role)} IN " if entry.role is not None else ""
        for assignment in entry.settings:
            parameter, _, value = assignment.partition("=")
            yield (
                f"ALTER {whose}DATABASE {quote_identifier(name)} SET {_parameter(parameter)} TO "
                f"{_setting_value(parameter, value)};"
            )


def event_trigger_statements(server: Server, name: str, *, fire: bool) -> Iterator[str]:
    """Statements that have event triggers fire in the database `name` or not, where our role may say so.

    One that is fired by a login would have its say in what a restored database is found to hold.
    """
    if server.superuser and "event_triggers" in server.settings:  # since 17
        change = "RESET event_triggers" if fire else "SET event_triggers = off"
        yield f"ALTER DATABASE {quote_identifier(name)} {change};"


def reset_statements(properties: DatabaseProperties, name: str) -> Iterator[str]:
    """Statements that take all settings from the database `name`, which was given these."""
    for role in {None, *(entry.role for entry in properties.settings)}:
        whose = f"ROLE {quote_identifier(role)} IN " if role is not None else ""
        yield f"ALTER {whose}DATABASE {quote_identifier(name)} RESET ALL;"


def other_statements(properties: DatabaseProperties, name: str) -> Iterator[str]:
    """Statements that give grants, comment and connection limit to the database `name`."""
    target = quote_identifier(name)
    if properties.grants is not None:
        yield f"REVOKE ALL ON DATABASE {target} FROM PUBLIC;"
        yield f"REVOKE ALL ON DATABASE {target} FROM {quote_identifier(properties.owner)};"
        for grant in _in_order(properties):
            grantee = "PUBLIC" if grant.grantee is None else quote_identifier(grant.grantee)
            passing_on = " WITH GRANT OPTION" if grant.grantable else ""
            statement = f"GRANT {_privilege(grant)} ON DATABASE {target} TO {grantee}{passing_on};"
            if grant.grantor == properties.owner:
                yield statement
            else:
                yield f"SET ROLE {quote_identifier(grant.grantor)}; {statement} SET ROLE NONE;"
    if properties.comment is not None:
        yield f"COMMENT ON DATABASE {target} IS {quote_literal(properties.comment)};"
    if properties.connection_limit != -1:
        yield f"ALTER DATABASE {target} CONNECTION LIMIT {int(properties.connection_limit)};"


def _in_order(properties: DatabaseProperties) -> Iterator[Grant]:
    """The grants, each after the one that its grantor had to have."""
    waiting, may_grant = list(properties.grants or ()), set[tuple[str | None, str]]()
    while waiting:
        ready = [
            grant
            for grant in waiting
            if grant.grantor == properties.owner or (grant.grantor, grant.privilege) in may_grant
        ]
        if not ready:
            return
        yield from ready
        may_grant |= {(grant.grantee, grant.privilege) for grant in ready if grant.grantable}
        waiting = [grant for grant in waiting if grant not in ready]


def _privilege(grant: Grant) -> str:
    # A key word, and no place for what somebody may have written into a manifest.
    return re.sub("[^A-Z ]", "", grant.privilege)


def _parameter(name: str) -> str:
    # An extension's parameter has a dot in it, which belongs to no identifier.
    return ".".join(quote_identifier(part) for part in name.split("."))


def _setting_value(parameter: str, value: str) -> str:
    if parameter not in _LIST_SETTINGS:
        return quote_literal(value)
    elements = re.findall(r'"((?:[^"]|"")*)"|([^\s,"][^,]*?)\s*(?:,|$)', value)
    names = [quoted.replace('""', '"') or plain for quoted, plain in elements]
    return ", ".join(quote_literal(name) for name in names) or "''"


def named_roles(properties: DatabaseProperties) -> set[str]:
    """The roles that the properties name."""
    grants = properties.grants or ()
    return {
        properties.owner,
        *(role for grant in grants for role in (grant.grantee, grant.grantor) if role is not None),
        *(entry.role for entry in properties.settings if entry.role is not None),
    }


def fitted(
    recorded: DatabaseProperties, server: Server, created: tuple[str, ...] = ()
) -> tuple[DatabaseProperties, list[str]]:
    """The properties without what our role cannot give again on `server`, or what names a role or a parameter that it
    does not have.

    Args:
        created: Roles that will be created there.

    Returns:
        The properties, and a line about each thing that is left out.
    """
    roles = server.roles | set(created)
    assumable = server.assumable_roles | (set(created) if server.superuser else set())
    left_out = []
    owner = recorded.owner
    if owner not in assumable:
        why = f"{server.role} may not act as that role" if owner in roles else "there is no such role here"
        left_out.append(f"The owner was {owner}, and will be {server.role}: {why}.")
        owner = server.role

    def now(role: str) -> str:
        return owner if role == recorded.owner else role

    grants = []
    for grant in recorded.grants or ():
        grantor, grantee = now(grant.grantor), grant.grantee and now(grant.grantee)
        if grantor not in assumable or (grantee is not None and grantee not in roles):
            left_out.append(f"Not granted again: {grant.privilege} to {grant.grantee or 'all'}, by {grant.grantor}.")
        else:
            grants.append(replace(grant, grantor=grantor, grantee=grantee))
    # pg_settings does not list `role`.
    known, settings = {"role", *(name.lower() for name in server.settings)}, []
    for entry in recorded.settings:
        kept = []
        for assignment in entry.settings:
            parameter = assignment.partition("=")[0]
            if (entry.role is None or entry.role in roles) and (parameter.lower() in known or "." in parameter):
                kept.append(assignment)
            else:
                left_out.append(f"Not set again: {parameter}{f', of the role {entry.role}' if entry.role else ''}.")
        settings.append(RoleSettings(entry.role, tuple(kept)))
    return (
        replace(
            recorded,
            owner=owner,
            grants=None if recorded.grants is None else tuple(grants),
            settings=tuple(settings),
        ),
        left_out,
    )

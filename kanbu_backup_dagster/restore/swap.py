"""The swap: the staging database takes the live name, and the replaced one a dated name, in one transaction.

What belongs here: that transaction, ending the connections in its way, and what becomes of replaced databases
afterwards. What does not: everything that can be done before the live name is touched (`staging`, `checks`).

How it goes: one session renames both databases in one transaction. The first rename locks the live database, so that
new connections wait, and gives up after five seconds if old ones remain (src/backend/commands/dbcommands.c,
`CountOtherDBBackends`); a second session ends those, picking them by the database's OID, which it keeps under its new
name, so that nobody is thrown out of the restored one. Whoever dies on the way, the server either commits both names or
neither, and no database is ever closed to connections.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain, count

from kanbu_backup_dagster.backup.manifest import DatabaseProperties
from kanbu_backup_dagster.errors import KanbuError, RestoreError, SourceError
from kanbu_backup_dagster.restore.properties import (
    event_trigger_statements,
    fitted,
    other_statements,
    reset_statements,
    setting_statements,
)
from kanbu_backup_dagster.restore.server import (
    LONGEST_NAME_BYTES,
    Database,
    Server,
    databases_of,
    find_databases,
    open_server,
    run,
)
from kanbu_backup_dagster.restore.staging import drop_database
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.commands import UNHINDERED, ServerAccess, query, quote_identifier, quote_literal

_REPLACED = "_replaced_"
_DATED_SUFFIX = f"{_REPLACED}%Y%m%d_%H%M%S"
_COMMENT_PREFIX = "kanbu-backup "
_SECONDS_TO_BEGIN = 5
# Each rename gives up after five seconds by itself.
_SECONDS_TO_END_SESSIONS = 12


@dataclass(frozen=True)
class Swapped:
    """What the swap did.

    Attributes:
        replaced: The name the replaced database has now; None when there was none.
        downtime_seconds: How long the live name could not be used, by the server's clock: from the beginning of the
            transaction until both names were changed. None when the connection was lost after the commit.
        remarks: In what a database that replaces none is not like the one that was dumped.
    """

    replaced: str | None
    downtime_seconds: float | None
    remarks: tuple[str, ...] = ()


def dress(server: Server, settings: Settings, staging: str, *, like: Database) -> None:
    """Give the staging database what else belongs to the one it replaces, as that is now: grants, comment, connection
    limit; and owner and settings, should they have changed since `like` was looked at.

    Raises:
        SourceError: The server refused.
    """
    now = find_databases(server, settings).get(like.name, like)
    properties, _ = fitted(now.properties, server)
    statements = [
        *reset_statements(like.properties, staging),
        *setting_statements(properties, staging),
        *other_statements(properties, staging),
    ]
    if properties.owner != like.properties.owner:
        statements.insert(
            0, f"ALTER DATABASE {quote_identifier(staging)} OWNER TO {quote_identifier(properties.owner)};"
        )
    if now.is_template:
        statements.append(f"ALTER DATABASE {quote_identifier(staging)} IS_TEMPLATE true;")
    run(server, settings, statements)


def dress_anew(server: Server, settings: Settings, staging: str, *, recorded: DatabaseProperties) -> list[str]:
    """Give it, where it replaces none, what was recorded of the database that was dumped.

    Returns:
        A line about each thing that the server refused: what is restored matters more.
    """
    different = []
    run(server, settings, list(event_trigger_statements(server, staging, fire=True)))
    for statement in other_statements(recorded, staging):
        try:
            run(server, settings, [statement])
        except SourceError as error:
            different.append(f"Not given again: {error.message}")
    return different


def swap(
    server: Server, settings: Settings, *, staging: str, target: str, expected: Database | None, by: str
) -> Swapped:
    """Give `staging` the name `target`.

    Args:
        expected: The database `target` as it was looked at, None where there was none; another in its place is not
            replaced.
        by: The backup file's name, recorded with the replaced database.

    Raises:
        RestoreError: It was not done, and nothing changed; says who was in the way.
    """
    databases = find_databases(server, settings)
    loaded = databases.get(staging)
    if loaded is None:
        raise RestoreError(f"The staging database {staging} is gone.", advice="Start the restore again.")
    live = databases.get(target)
    if (live and live.oid) != (expected and expected.oid):
        raise RestoreError(
            f"The database {target} is not the one it was when this restore began.",
            advice="Nothing was replaced. Look at what else works on this server, and start again.",
        )
    replaced = _dated_name(target, databases) if live is not None else None
    key = secrets.randbits(31)
    with server.access.start(
        settings,
        "psql",
        ["--no-psqlrc", "--no-password", "--quiet", "--output=/dev/null", "--file=-"],
        database=server.maintenance,
        feeds=True,
    ) as ender:
        # It waits for the renaming to begin, and that waits for its work; so it is started first.
        # Should it not get in, its words are told if they turn out to matter.
        with suppress(BrokenPipeError):
            ender.write(_ending_script([database.oid for database in (live, loaded) if database], key).encode())
            ender.close_input()
        try:
            answer = run(server, settings, _renaming_script(server, live, loaded, target, replaced, key, by))
        except KanbuError as error:
            refused = error
        else:
            begun, done = map(float, answer.split())
            return Swapped(replaced, done - begun)
        ender.wait()
        denied = ender.stderr
    # The connection may have been lost after the commit: what is true is what the server has.
    now = find_databases(server, settings).get(target)
    if now is not None and now.oid == loaded.oid:
        return Swapped(replaced, None)
    raise RestoreError(
        f"The database {target} could not be replaced, and is as it was: {refused.message}",
        tried=(*_who_is_connected(server, settings, [target, staging]), *([denied] if denied else [])),
        advice="End what uses the database, named above, and start the restore again.",
    )


def _dated_name(target: str, taken: Container[str]) -> str:
    dated = datetime.now(timezone.utc).strftime(_DATED_SUFFIX)
    # Two restores within one second.
    for suffix in chain([dated], (f"{dated}_{number}" for number in count(2))):
        name = target.encode()[: LONGEST_NAME_BYTES - len(suffix)].decode(errors="ignore") + suffix
        if name not in taken:
            break
    return name


def _renaming_script(
    server: Server,
    live: Database | None,
    loaded: Database,
    target: str,
    replaced: str | None,
    key: int,
    by: str,
) -> list[str]:
    statements = [
        # Should we be killed while it waits for others, it lets go of the live name at once.
        *(["SET client_connection_check_interval = '100ms';"] if server.major >= 15 else []),
        "BEGIN;",
        "SET LOCAL synchronous_commit = on;",
        "SET LOCAL lock_timeout = '5s';",
        "SET LOCAL statement_timeout = 0;",
        f"SELECT FROM pg_advisory_xact_lock({key});",
        "SELECT extract(epoch FROM clock_timestamp());",
    ]
    if live is not None and replaced is not None:
        now = datetime.now(timezone.utc).isoformat()
        record = json.dumps(
            {"replaced": target, "by": by, "at": now, "comment": live.properties.comment}, ensure_ascii=False
        )
        statements += [
            f"ALTER DATABASE {quote_identifier(target)} RENAME TO {quote_identifier(replaced)};",
            f"COMMENT ON DATABASE {quote_identifier(replaced)} IS {quote_literal(_COMMENT_PREFIX + record)};",
        ]
    return [
        *statements,
        f"ALTER DATABASE {quote_identifier(loaded.name)} RENAME TO {quote_identifier(target)};",
        "SELECT extract(epoch FROM clock_timestamp());",
        "COMMIT;",
    ]


def _ending_script(oids: list[int], key: int) -> str:
    """End the sessions in the databases `oids` until the renaming session, known by its lock `key`, has come and gone.

    A session that our role may not end is named in a warning, and the renaming gives up on it.
    """
    return f"""
{UNHINDERED}
DO $$
DECLARE
  began timestamptz := clock_timestamp();
  renaming boolean;
  seen boolean := false;
  denied text[] := '{{}}';
  session record;
BEGIN
  LOOP
    renaming := EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = 0 AND objid = {key}
                           AND database = (SELECT oid FROM pg_database WHERE datname = current_database()));
    EXIT WHEN seen AND NOT renaming;
    EXIT WHEN NOT seen AND clock_timestamp() > began + interval '{_SECONDS_TO_BEGIN} s';
    EXIT WHEN clock_timestamp() > began + interval '{_SECONDS_TO_END_SESSIONS} s';
    IF renaming THEN
      seen := true;
      PERFORM pg_stat_clear_snapshot();
      FOR session IN SELECT pid, usename FROM pg_stat_activity
                      WHERE datid IN ({", ".join(map(str, oids))}) AND pid <> pg_backend_pid() LOOP
        BEGIN
          PERFORM pg_terminate_backend(session.pid);
        EXCEPTION WHEN insufficient_privilege THEN
          IF NOT session.usename = ANY (denied) THEN denied := denied || session.usename::text; END IF;
        END;
      END LOOP;
    END IF;
    PERFORM pg_sleep(0.005);
  END LOOP;
  IF denied <> '{{}}' THEN
    RAISE WARNING 'not allowed to end the sessions of %; pg_signal_backend allows it', array_to_string(denied, ', ');
  END IF;
END
$$;
"""


def _who_is_connected(server: Server, settings: Settings, names: list[str]) -> list[str]:
    wanted = ", ".join(map(quote_literal, names))
    rows = query(
        server.access,
        settings,
        "SELECT datname, usename, application_name, client_addr::text AS address, backend_type, count(*) AS sessions "
        f"FROM pg_stat_activity WHERE datname IN ({wanted}) GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5",
        database=server.maintenance,
    )
    return [
        f"{row['sessions']} session(s) in {row['datname']}: {row['usename'] or row['backend_type']}"
        f"{' ' + row['application_name'] if row['application_name'] else ''} from {row['address'] or 'a local socket'}"
        for row in rows
    ]


@dataclass(frozen=True)
class ReplacedDatabase:
    """A database that a restore replaced, and that is still there.

    Attributes:
        name: Its dated name.
        target: The name it had.
        by: The backup file it was replaced by.
        at: When.
    """

    name: str
    target: str
    by: str
    at: datetime


def find_replaced(access: ServerAccess, settings: Settings, *, database: str | None = None) -> list[ReplacedDatabase]:
    """The replaced databases on the server, oldest first: known by what the swap recorded with them.

    Args:
        database: The database to ask through; None: DATABASE_URL's.

    Raises:
        SourceError: It cannot be asked.
    """
    found = []
    for database_found in databases_of(access, settings, database).values():
        comment = database_found.properties.comment
        if comment is not None and comment.startswith(_COMMENT_PREFIX):
            try:
                record = json.loads(comment[len(_COMMENT_PREFIX) :])
                entry = ReplacedDatabase(
                    database_found.name, record["replaced"], record["by"], datetime.fromisoformat(record["at"])
                )
            except (ValueError, KeyError, TypeError):  # somebody else's words that begin like ours
                continue
            # A name that a person gave it back, or another, is a person's decision.
            if _REPLACED in database_found.name:
                found.append(entry)
    return sorted(found, key=lambda entry: entry.at)


def drop_replaced(access: ServerAccess, settings: Settings, target: str, *, before: datetime) -> list[str]:
    """Drop what `target` replaced, now that a verified backup of it was begun at `before`.

    Returns:
        A line about each, dropped or not.

    Raises:
        KanbuError: The server cannot be asked.
    """
    entries = [
        entry
        for entry in find_replaced(access, settings, database=target)
        if entry.target == target and entry.at < before
    ]
    told = []
    if entries:
        server, _ = open_server(settings, target=target)
        for entry in entries:
            try:
                drop_database(server, settings, entry.name)
            except SourceError as error:
                told.append(f"{entry.name} stays, it cannot be dropped: {error.message}")
            else:
                told.append(f"{entry.name} was dropped: {target} has a verified backup since it was replaced")
    return told


def wait_until_unused(server: Server, settings: Settings, database: str, *, seconds: float = 5) -> None:
    """Wait for sessions in `database` to end by themselves: one that is seen by the rename costs it 0.1 s."""
    deadline = time.monotonic() + seconds
    sql = f"SELECT count(*) AS sessions FROM pg_stat_activity WHERE datname = {quote_literal(database)}"
    while query(server.access, settings, sql, database=server.maintenance)[0]["sessions"]:
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)

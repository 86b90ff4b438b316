"""The plan of a restore: everything that can be known before anything is done.

What belongs here: what a user asks for, and judging it against the file, the key and the server. What does not: doing
any of it (`staging`, `checks`, `swap`).

A plan holds no secret and pickles: Dagster's ops hand it on.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from kanbu_backup_dagster.backup.catalog import Backup, Catalog
from kanbu_backup_dagster.backup.keys import NO_KEY, Keyring
from kanbu_backup_dagster.backup.manifest import DatabaseProperties, VerificationStatus
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.errors import (
    CorruptBackupError,
    EncryptionKeyError,
    KanbuError,
    RestoreError,
)
from kanbu_backup_dagster.restore.properties import fitted, named_roles
from kanbu_backup_dagster.restore.server import Database, Server, find_databases, knows_restrict, open_server
from kanbu_backup_dagster.restore.staging import new_staging_name
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.commands import query
from kanbu_backup_dagster.sources.connection import require_connection
from kanbu_backup_dagster.sources.postgres import database_target
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster.storage.protocol import Storage

OVERWRITES = "This will overwrite the current database"
PRE_RESTORE = "A pre-restore backup will be created automatically"
_OLD_DAYS = 30

# Anything a user made: what is there from the beginning has lower OIDs (FirstNormalObjectId).
_IS_EMPTY_SQL = """
SELECT NOT (EXISTS (SELECT FROM pg_class WHERE oid >= 16384) OR EXISTS (SELECT FROM pg_proc WHERE oid >= 16384)
         OR EXISTS (SELECT FROM pg_type WHERE oid >= 16384) OR EXISTS (SELECT FROM pg_namespace WHERE oid >= 16384)
         OR EXISTS (SELECT FROM pg_extension WHERE oid >= 16384) OR EXISTS (SELECT FROM pg_largeobject_metadata))
       AS empty
"""


# Tables as a manifest counts them: without partitioned ones, whose rows are in their partitions. The counters of a
# server that crashed, and of a copied database, begin at nothing: there what ANALYZE found last counts.
_CONTENTS_SQL = """
SELECT pg_database_size(current_database()) AS size_bytes, count(*) AS tables,
       coalesce(sum(CASE WHEN n_live_tup + n_tup_del > 0 THEN n_live_tup ELSE greatest(reltuples, 0) END), 0)::bigint
       AS rows
  FROM pg_stat_user_tables s JOIN pg_class c ON c.oid = s.relid
 WHERE relkind = 'r'
"""


@dataclass(frozen=True)
class RestoreRequest:
    """What a user asks for.

    Attributes:
        file: The backup file's name.
        folder: The folder it is in, when that is not the configured storage.
        target_database: The database to restore to; None: DATABASE_URL's.
        confirm_overwrite: The first confirmation.
        confirm_target: The second one: the target's name, typed again.
        force: Accept a file that is not encrypted or has no manifest although a key is set, or failed verification.
        keep_replaced: Keep the replaced database until the restored one has a verified backup.
        create_missing_roles: Create roles that the backup names and the server lacks, unable to log in.
    """

    file: str
    folder: str | None = None
    target_database: str | None = None
    confirm_overwrite: bool = False
    confirm_target: str = ""
    force: bool = False
    keep_replaced: bool = True
    create_missing_roles: bool = False


@dataclass(frozen=True)
class RestorePlan:
    """A restore that can begin.

    Attributes:
        target: The database's name.
        live: That database as it is now; None when there is none.
        recorded: Where there is none: what the new one shall be like, as far as the manifest tells and the server can.
        empty: Whether there is nothing in it to save, as yet.
        server: Where it is.
        staging: The name of the database that will be loaded.
        missing_roles: Roles to be created first.
        warnings: What the user should know.
    """

    request: RestoreRequest
    target: str
    live: Database | None
    recorded: DatabaseProperties | None
    empty: bool
    server: Server
    staging: str
    missing_roles: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def lock_name(self) -> str:
        """The target among all there are; the same as of a backup of it."""
        return database_target(self.target, self.server.server_id)


@dataclass(frozen=True)
class Contents:
    """What a database holds now: bytes on disk, tables, and about how many rows (the server's statistics)."""

    size_bytes: int
    tables: int
    rows: int


def look_at(server: Server, settings: Settings, database: str) -> Contents:
    """What `database` holds now.

    Raises:
        SourceError: It cannot be asked.
    """
    return Contents(**query(server.access, settings, _CONTENTS_SQL, database=database)[0])


def is_empty(server: Server, settings: Settings, database: str) -> bool:
    """Whether nobody has made anything in `database`.

    Raises:
        SourceError: It cannot be asked.
    """
    empty: bool = query(server.access, settings, _IS_EMPTY_SQL, database=database)[0]["empty"]
    return empty


def find_backup(request: RestoreRequest, storage: Storage, keys: Keyring) -> tuple[Backup, Storage]:
    """The file asked for and where it is; with `force`, a manifest that cannot be trusted is passed over.

    Raises:
        BackupNotFoundError: There is none of that name.
        StorageError: The storage cannot be read.
    """
    if request.folder is not None:
        storage = FolderStorage(Path(request.folder).absolute(), variable="the folder given")
    backup = Catalog(storage, keys).get(request.file)
    if request.force and backup.problem is not None:
        backup = replace(backup, problem=None)
    return backup, storage


def require_overwrite(request: RestoreRequest) -> None:
    """Refuse a restore without its first confirmation.

    Raises:
        RestoreError: It is missing.
    """
    if not request.confirm_overwrite:
        raise RestoreError(f"Not confirmed. {OVERWRITES}.", advice="Set confirm_overwrite: true to go on.")


def require_target(request: RestoreRequest, target: str) -> None:
    """Refuse a restore without its second confirmation.

    Raises:
        RestoreError: It is missing, or names another database.
    """
    if request.confirm_target != target:
        raise RestoreError(
            f"Not confirmed. confirm_target is {request.confirm_target!r}, and the database to be replaced is "
            f"{target!r}.",
            advice="Give the name of the database that is to be replaced.",
        )


def judge_file(
    request: RestoreRequest, storage: Storage, keys: Keyring, *, wanted: BackupType = BackupType.DATABASE
) -> tuple[Backup, Storage, list[str]]:
    """The backup asked for, if it may be restored at all, and warnings about it.

    Raises:
        BackupNotFoundError: "Backup file not found".
        EncryptionKeyError: "Encryption key not set", or another key than the file's.
        CorruptBackupError: Its manifest was edited, or the file has another size than written.
        RestoreError: It is of another type, or may be restored with `force` only.
    """
    found, where = find_backup(request, storage, keys)
    manifest, warnings = found.manifest, []
    if found.type is not wanted:
        other = "into a folder (restore_source, `kanbu-backup restore FILE --into DIR`)"
        raise RestoreError(
            f"{found.filename} is a {found.type.value} backup.",
            advice=f"It is restored {other if found.type is BackupType.SOURCE else 'into a database'}.",
        )
    if found.problem is not None:
        raise CorruptBackupError(found.problem, advice="Try a different backup; `force` passes the manifest over.")
    if found.name.encrypted:
        if not keys.all:
            raise EncryptionKeyError(
                f"Encryption key not set. {NO_KEY}.",
                advice="Set BACKUP_ENCRYPTION_KEY in .env to the key the backup was made with.",
            )
        keys.reading(manifest.key_id if manifest else None)
    if manifest is None:
        warnings.append(f"{found.filename} has no manifest: there is no checksum, and fewer things can be checked.")
    elif found.file.size != manifest.stored_bytes:
        raise CorruptBackupError(
            f"Checksum mismatch: {found.filename} has {found.file.size:,} bytes, and {manifest.stored_bytes:,} were "
            "written.",
            advice="Try a different backup.",
        )
    needs_force = []
    if keys.all and not found.name.encrypted:
        needs_force.append("it is not encrypted, although a key is set")
    if keys.all and manifest is None:
        needs_force.append("it has no manifest that shows it is ours")
    if found.status is VerificationStatus.FAILED:
        needs_force.append("it failed its last verification")
    if needs_force and not request.force:
        raise RestoreError(
            f"{found.filename} is not restored without force: {', and '.join(needs_force)}.",
            advice="Anybody who can write to the storage could have put it there. Use force (--force) if you know it.",
        )
    if found.status is VerificationStatus.PENDING:
        warnings.append(f"{found.filename} was not verified yet; it is now, before it is used.")
    return found, where, warnings + _age_warnings(found, Catalog(where, keys))


def _age_warnings(backup: Backup, catalog: Catalog) -> list[str]:
    warnings = []
    days = (datetime.now(timezone.utc) - backup.created_at).days
    newest = catalog.newest(backup.type)
    if newest is not None and newest.filename != backup.filename:
        warnings.append(f"There is a newer backup: {newest.filename}.")
    if days > _OLD_DAYS:
        warnings.append(f"{backup.filename} is {days} days old.")
    return warnings


def plan_restore(request: RestoreRequest, settings: Settings, storage: Storage, keys: Keyring) -> RestorePlan:
    """Judge a request; nothing is changed.

    Raises:
        KanbuError: It cannot be done; says all that is in the way.
    """
    require_overwrite(request)
    backup, _, warnings = judge_file(request, storage, keys)
    server, target = open_server(settings, target=request.target_database)
    require_target(request, target)
    live = find_databases(server, settings).get(target)
    problems = _server_problems(server, settings, live, backup)
    missing = missing_roles(server, backup)
    recorded, left_out = recorded_properties(backup) if live is None else None, list[str]()
    if live is not None:
        left_out = fitted(live.properties, server)[1]
    elif recorded is not None:
        if request.create_missing_roles:
            # Names that begin so are the server's own: what another version has cannot be created.
            named = {role for role in named_roles(recorded) if not role.startswith("pg_")}
            missing += sorted(named - server.roles - set(missing))
        recorded, left_out = fitted(recorded, server, tuple(missing))
    if missing and not request.create_missing_roles:
        problems.append(
            f"roles that the backup needs are missing: {', '.join(missing)} (create them, or let them be created "
            "without login: create_missing_roles, --create-roles)"
        )
    if missing and request.create_missing_roles and not server.creates_roles:
        problems.append(f"{server.role} may not create the missing roles {', '.join(missing)}")
    if problems:
        raise RestoreError(
            f"{backup.filename} cannot be restored to {target} on {server.access.description}.",
            tried=tuple(problems),
            advice="Nothing was changed.",
        )
    return RestorePlan(
        request=request,
        target=target,
        live=live,
        recorded=recorded,
        empty=live is None or is_empty(server, settings, target),
        server=server,
        staging=new_staging_name(target),
        missing_roles=tuple(missing),
        warnings=(*warnings, *_version_warnings(server, backup), *left_out),
    )


def missing_roles(server: Server, backup: Backup) -> list[str]:
    """Roles that the manifest lists and the server lacks."""
    facts = backup.manifest.database if backup.manifest else None
    return [role for role in (facts.roles if facts else ()) if role not in server.roles]


def missing_extensions(server: Server, backup: Backup) -> list[str]:
    """Extensions that the manifest lists and the server cannot create."""
    facts = backup.manifest.database if backup.manifest else None
    return [name for name in (facts.extensions if facts else {}) if name not in server.extensions]


def recorded_properties(backup: Backup) -> DatabaseProperties | None:
    """What the manifest tells of the database itself."""
    facts = backup.manifest.database if backup.manifest else None
    return facts.properties if facts else None


def psql_problem(server: Server) -> str | None:
    """Why the psql that would be used is refused."""
    version = server.access.client_version
    if knows_restrict(version):
        return None
    return (
        f"psql {version} is too old: it would run shell commands that a backup may hold (\\restrict came with 13.22, "
        "14.19, 15.14, 16.10, 17.6 and 18); update postgresql-client"
    )


def _server_problems(server: Server, settings: Settings, live: Database | None, backup: Backup) -> list[str]:
    problems = []
    if (too_old := psql_problem(server)) is not None:
        problems.append(too_old)
    if not server.creates_databases:
        problems.append(f"the role {server.role} may not create databases (ALTER ROLE ... CREATEDB)")
    if missing := missing_extensions(server, backup):
        problems.append(f"extensions that the backup needs are not installed: {', '.join(missing)}")
    if live is not None:
        if not (live.is_owner or server.superuser):
            problems.append(f"the role {server.role} does not own {live.name}, which {live.properties.owner} does")
        if live.prepared:
            problems.append(
                f"prepared transactions would block the rename: {', '.join(live.prepared)} "
                "(COMMIT PREPARED or ROLLBACK PREPARED them)"
            )
    try:
        _require_room(server, settings, backup)
    except KanbuError as error:
        problems.append(error.message)
    return problems


def _require_room(server: Server, settings: Settings, backup: Backup) -> None:
    """Compare with the room on the server's disk, where that is this machine's."""
    facts = backup.manifest.database if backup.manifest else None
    if facts is None or server.access.mode != "direct" or server.data_directory is None:
        return
    if not require_connection(settings).parameters.get("host", "/").startswith("/"):
        return
    try:
        room = os.statvfs(server.data_directory)
    except OSError:  # a folder that our user may not look into, or a server in a container: it cannot be known
        return
    free = room.f_bavail * room.f_frsize
    if free < facts.size_bytes:
        raise RestoreError(
            f"the server has {free:,} bytes free in {server.data_directory}, and the restored database needs about "
            f"{facts.size_bytes:,}"
        )


def _version_warnings(server: Server, backup: Backup) -> list[str]:
    facts = backup.manifest.database if backup.manifest else None
    major = re.match(r"\d+", facts.server_version) if facts else None
    if facts is None or major is None or int(major[0]) <= server.major:
        return []
    risk = "should the backup hold what only the newer one knows, the restore ends before anything is replaced"
    return [f"The backup is of PostgreSQL {facts.server_version} and the server is {server.version}; {risk}."]

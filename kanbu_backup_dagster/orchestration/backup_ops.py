"""The ops of a backup: `dump` or `archive`, `compress`, `checksum`, `encrypt`, `store`, `verify`.

What belongs here: the ops, each doing what can be done at its own step and handing on the recipe. What does not: the
work, which the library rooms do. `store` alone moves bytes; see `backup.recipe` for why.
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

import time
from dataclasses import dataclass, replace

from dagster import OpExecutionContext, ResourceParam, op

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.environment import Environment
from kanbu_backup_dagster.backup.keys import likely_mistake
from kanbu_backup_dagster.backup.landing import Origin, Progress, expected_stored_bytes, make_backup
from kanbu_backup_dagster.backup.manifest import Trigger, VerificationStatus
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.backup.recipe import Recipe
from kanbu_backup_dagster.backup.stages import GCM_LIMIT_ADVICE, GCM_LIMIT_BYTES
from kanbu_backup_dagster.errors import KanbuError, StorageError
from kanbu_backup_dagster.orchestration import job_names
from kanbu_backup_dagster.orchestration.assets import (
    backup_metadata,
    database_observation,
    source_observation,
)
from kanbu_backup_dagster.orchestration.failures import explained
from kanbu_backup_dagster.orchestration.known_storage import prepare_storage
from kanbu_backup_dagster.orchestration.progress import reporter
from kanbu_backup_dagster.orchestration.register import Register
from kanbu_backup_dagster.orchestration.replaced import let_go_of_replaced
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.run_scope import RunScope
from kanbu_backup_dagster.orchestration.tags import (
    SETTLING,
    SETTLING_FILE,
    TRIGGER,
    WAITING,
    schedule_of,
)
from kanbu_backup_dagster.orchestration.verify_ops import judge, tell_verdict
from kanbu_backup_dagster.schedule_file import load_schedule_file
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.postgres import PostgresDump, prepare_dump
from kanbu_backup_dagster.sources.source_tree import prepare_archive

# A log names some of many; the manifest has them all.
_SHOWN_FILES = 20
# Told while there is time to do something about it.
_NEAR_LIMIT = 0.8


@dataclass(frozen=True)
class StoredBackup:
    """What `store` hands on: the file's name and type.

    Attributes:
        settled: Whether it is known to have arrived where it is kept; `verify` finds out.
    """

    filename: str
    type: BackupType
    settled: bool = True


def origin_of(context: OpExecutionContext, settings: Settings) -> Origin:
    """What started this run, by its tags, and its schedule's policy."""
    schedule_id, schedule_name = schedule_of(context.run.tags) or (None, None)
    row = load_schedule_file(settings.config_file).schedule(schedule_id) if schedule_id is not None else None
    trigger = context.run.tags.get(TRIGGER, Trigger.MANUAL.value)
    if trigger not in {one.value for one in Trigger}:
        raise KanbuError(f"The run's tag {TRIGGER} is {trigger!r}.", advice=f"Leave it out: {Trigger.MANUAL.value}.")
    return Origin(
        trigger=Trigger.PRE_RESTORE if context.job_name == job_names.RESTORE_DATABASE else Trigger(trigger),
        schedule_id=schedule_id,
        schedule_name=schedule_name,
        retention=row.policy if row is not None else None,
        run_id=context.run_id,
    )


@dataclass(frozen=True)
class OtherDatabase:
    """A database of the same server to dump in place of DATABASE_URL's."""

    name: str


@op(description="Chooses how to reach the database, connects, and describes its dump.")
def dump(context: OpExecutionContext, environment: BackupEnvironment, other: OtherDatabase | None = None) -> Recipe:
    with explained():
        settings = environment.load().settings
        source, method = prepare_dump(settings, database=other.name if other else None)
        dropped = method.access.connection(settings).dropped
    for reason in method.rejected:
        context.log.warning(f"[Backup] Left: {reason}")
    if dropped:
        context.log.info(
            f"[Backup] PostgreSQL's programs do not know these parameters of DATABASE_URL: {', '.join(dropped)}"
        )
    state = method.state
    context.log.info(
        f"[Backup] Database {state.name}, PostgreSQL {state.server_version}, {state.tables} tables, "
        f"about {state.estimated_bytes / 1e6:,.0f} MB to dump; {method.access.description}"
    )
    context.add_output_metadata(
        {
            "mode": method.access.mode,
            "server_version": state.server_version,
            "pg_dump_version": method.access.client_version,
            "tables": state.tables,
            "estimated_bytes": state.estimated_bytes,
        }
    )
    return Recipe(source)


@op(description="Looks over the source tree, and describes its archive.")
def archive(context: OpExecutionContext, environment: BackupEnvironment) -> Recipe:
    with explained():
        loaded = environment.load()
        tree, survey = prepare_archive(loaded.settings)
    context.log.info(
        f"[Backup] Source tree {tree.path}: {survey.files:,} files, {survey.folders:,} folders, "
        f"about {survey.archive_bytes / 1e6:,.0f} MB to archive"
    )
    if survey.env_files and loaded.keys.current is None:
        shown = ", ".join(survey.env_files[:_SHOWN_FILES])
        context.log.warning(
            f"[Backup] {len(survey.env_files)} files that may hold secrets go into an archive that is NOT encrypted: "
            f"{shown}. Set BACKUP_ENCRYPTION_KEY, or exclude them (BACKUP_SOURCE_EXCLUDE)."
        )
    context.add_output_metadata(
        {
            "files": survey.files,
            "folders": survey.folders,
            "bytes": survey.bytes,
            "estimated_bytes": survey.archive_bytes,
            "may_hold_secrets": len(survey.env_files),
        }
    )
    return Recipe(tree)


@op(description="Adds gzip at BACKUP_COMPRESSION_LEVEL.")
def compress(context: OpExecutionContext, recipe: Recipe, environment: BackupEnvironment) -> Recipe:
    with explained():
        level = environment.load().settings.compression_level
    context.log.info(f"[Backup] gzip (ISA-L), level {level}")
    return recipe.with_compression(level)


@op(description="Adds the SHA-256 of the compressed bytes, before encryption.")
def checksum(recipe: Recipe) -> Recipe:
    return recipe.with_checksum()


@op(description="Adds AES-256-GCM when BACKUP_ENCRYPTION_KEY is set; a malformed key fails here.")
def encrypt(context: OpExecutionContext, recipe: Recipe, environment: BackupEnvironment) -> Recipe:
    with explained():
        loaded = environment.load()
    key = loaded.keys.current
    if key is None:
        context.log.warning("[Backup] BACKUP_ENCRYPTION_KEY is not set: this backup will NOT be encrypted.")
        return recipe
    mistake = likely_mistake(loaded.settings.secret("encryption_key") or "")
    if mistake is not None:
        context.log.warning(f"[Backup] {mistake}")
    context.log.info(f"[Backup] AES-256-GCM, key {key.key_id}")
    return recipe.with_encryption(key.key_id)


@op(description="Pulls the bytes through all stages, once, into the storage; lands them atomically with the manifest.")
def store(
    context: OpExecutionContext, recipe: Recipe, environment: BackupEnvironment, run_scope: ResourceParam[RunScope]
) -> StoredBackup:
    with explained():
        if isinstance(recipe.source, PostgresDump):
            run_scope.hold(recipe.source.state.target, exclusive=False)
        loaded = environment.load()
        needed = expected_stored_bytes(recipe, _last_backup(loaded, recipe.source.backup_type))
        # An estimate refuses nothing: a backup that is refused and would have fitted is a backup that is missing. One
        # that does not fit ends at the limit, and leaves nothing.
        if recipe.encryption is not None and needed > _NEAR_LIMIT * GCM_LIMIT_BYTES:
            context.log.warning(
                f"[Backup] About {needed:,} bytes are expected, and AES-GCM protects no more than {GCM_LIMIT_BYTES:,} "
                f"in one file: a backup that grows past that fails there. {GCM_LIMIT_ADVICE}"
            )
        for leftover in prepare_storage(context.instance, loaded.storage, needed_bytes=needed):
            context.log.warning(f"[Backup] Removed what a killed run left: {leftover}")
        manifest = make_backup(
            recipe,
            settings=loaded.settings,
            keys=loaded.keys,
            storage=loaded.storage,
            origin=origin_of(context, loaded.settings),
            on_progress=reporter(context, "storing"),
        )
        backup = loaded.catalog.get(manifest.filename)
        storage_facts = loaded.storage.facts
    path = loaded.storage.path(manifest.filename)
    if manifest.database is not None:
        context.log_event(database_observation(manifest.database))
    if manifest.source is not None:
        context.log_event(source_observation(manifest.source))
        for warning in manifest.source.warnings[:_SHOWN_FILES]:
            context.log.warning(f"[Backup] {warning}")
    Register.of_run(context).add(backup, path)
    context.add_output_metadata({**backup_metadata(manifest, path), **storage_facts})
    context.log.info(f"[Backup] Stored {path}: {manifest.stored_bytes:,} bytes")
    return StoredBackup(manifest.filename, manifest.type)


def _last_backup(loaded: Environment, backup_type: BackupType) -> Backup | None:
    try:
        return loaded.catalog.newest(backup_type)
    except StorageError:
        # A folder that is missing is made when the storage is prepared, which also says what is wrong with any other.
        return None


@op(description="Reads the stored file back, decrypts it and compares both hashes; records the verdict.")
def verify(context: OpExecutionContext, stored: StoredBackup, environment: BackupEnvironment) -> StoredBackup:
    with explained():
        loaded = environment.load()
        backup = loaded.catalog.get(stored.filename)
        begun, report = time.monotonic(), reporter(context, "verifying")
        judged = judge(
            context,
            loaded,
            backup,
            deep=False,
            on_bytes=lambda count: report(Progress(count, backup.file.size, time.monotonic() - begun)),
        )
    tell_verdict(context, backup, judged)
    if judged.verdict.status is VerificationStatus.PENDING:
        context.instance.add_run_tags(context.run_id, {SETTLING: WAITING, SETTLING_FILE: stored.filename})
        return replace(stored, settled=False)
    let_go_of_replaced(context, loaded.settings, backup)
    return stored

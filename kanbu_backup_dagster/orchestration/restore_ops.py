"""The ops of a restore of the database: `validate`, the pre-restore backup, `load`, `check`, `swap`, `report`.

What belongs here: the ops, the run's lock and its debt, and what Dagster is told. What does not: the work (`restore`),
and the ops of the pre-restore backup, which are those of `database_backup`.
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dagster import (
    AssetKey,
    AssetMaterialization,
    AssetSpec,
    Config,
    In,
    MetadataValue,
    OpExecutionContext,
    Out,
    Output,
    ResourceParam,
    op,
)
from pydantic import Field

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.environment import Environment
from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.errors import KanbuError, RestoreError
from kanbu_backup_dagster.orchestration.assets import DATABASE_BACKUP
from kanbu_backup_dagster.orchestration.backup_ops import OtherDatabase, StoredBackup
from kanbu_backup_dagster.orchestration.failures import explained
from kanbu_backup_dagster.orchestration.progress import reporter
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.run_scope import RunScope
from kanbu_backup_dagster.orchestration.tags import DATABASE, FILE
from kanbu_backup_dagster.orchestration.target_lock import STORAGE_PATIENCE_SECONDS, storage_name
from kanbu_backup_dagster.restore.checks import Checked
from kanbu_backup_dagster.restore.database import abandon, check_staging, is_kept, load_staging, swap_in
from kanbu_backup_dagster.restore.plan import RestorePlan, RestoreRequest, find_backup, plan_restore
from kanbu_backup_dagster.restore.staging import Loaded, drop_database
from kanbu_backup_dagster.restore.swap import Swapped

RESTORED_DATABASE = AssetKey("restored_database")

RESTORE_ASSETS = [
    AssetSpec(
        RESTORED_DATABASE,
        deps=[DATABASE_BACKUP],
        description="The database as a restore left it: from which file, over what, and how long it was away.",
        group_name="kanbu",
        kinds={"postgres"},
    )
]

NOTHING_TO_SAVE = "nothing to save"
NONE_REPLACED = "none is kept"

_SAVED = In(list[Any], description="The pre-restore backup, or why there is none.")


class RestoreConfig(Config):
    """What is restored, where to, and the two confirmations."""

    file: str = Field(description="The backup file's name, as `kanbu-backup list` shows it.")
    confirm_overwrite: bool = Field(False, description="First confirmation: the target database is replaced.")
    confirm_target: str = Field("", description="Second confirmation: the target database's name.")
    target_database: str | None = Field(None, description="Another database, new or existing; unset: DATABASE_URL's.")
    folder: str | None = Field(None, description="A folder to read the file from in place of the storage.")
    force: bool = Field(
        False, description="Accept a file that is not encrypted or has no manifest although a key is set, or failed."
    )
    keep_replaced: bool = Field(
        True,
        description="Keep the replaced database under a dated name until the restored one has a verified backup. It is "
        "kept in any case where the pre-restore backup could not be verified.",
    )
    create_missing_roles: bool = Field(
        False, description="Create roles that the backup needs and the server lacks, unable to log in."
    )


@dataclass(frozen=True)
class FromFile:
    """What was loaded, and the file it came from: once the swap is done, nothing is asked that could fail."""

    loaded: Loaded
    backup: Backup
    path: str


@dataclass(frozen=True)
class Timed:
    """A step's result and how long it took."""

    result: Any
    seconds: float


def _take_part(context: OpExecutionContext, plan: RestorePlan, loaded: Environment, run_scope: RunScope) -> None:
    """Hold the target alone and the storage's files in place until the run ends, and owe it the staging database's end.

    Raises:
        RestoreError: The run continues another one.
    """
    steps = context.run.step_keys_to_execute
    if steps is not None and validate.name not in steps:
        raise RestoreError(
            "A restore is not continued: what was written since its pre-restore backup would be in no backup.",
            advice="Nothing was replaced. Re-execute all of it, or start it anew.",
        )
    run_scope.hold(plan.lock_name, exclusive=True)
    _, where = find_backup(plan.request, loaded.storage, loaded.keys)
    # The file restored and the pre-restore backup are not pruned meanwhile.
    for storage in (where, loaded.storage):
        run_scope.hold(storage_name(storage), exclusive=False, wait_seconds=STORAGE_PATIENCE_SECONDS)

    def clean_up() -> None:
        try:
            if abandon(plan, loaded.settings):
                context.log.warning(f"[Restore] Dropped the staging database {plan.staging}")
        except KanbuError as error:
            context.log.error(f"[Restore] The staging database {plan.staging} could not be dropped: {error}")

    run_scope.at_end(plan.staging, clean_up)


@op(
    description="Judges the file, the key and the server, and takes the target for this run alone; changes nothing.",
    out={
        "plan": Out(RestorePlan),
        "save": Out(OtherDatabase, is_required=False, description="The database to back up first."),
        "nothing_to_save": Out(str, is_required=False),
    },
)
def validate(
    context: OpExecutionContext,
    config: RestoreConfig,
    environment: BackupEnvironment,
    run_scope: ResourceParam[RunScope],
) -> Iterator[Output[Any]]:
    request = RestoreRequest(**config.model_dump())
    context.instance.add_run_tags(context.run_id, {FILE: request.file})
    with explained():
        loaded = environment.load()
        plan = plan_restore(request, loaded.settings, loaded.storage, loaded.keys)
        context.instance.add_run_tags(context.run_id, {DATABASE: plan.target})
        _take_part(context, plan, loaded, run_scope)
    for warning in plan.warnings:
        context.log.warning(f"[Restore] {warning}")
    replaces = f"replaces the one of {plan.live.properties.owner}" if plan.live else "does not exist yet"
    context.log.info(
        f"[Restore] {request.file} to the database {plan.target}, which {replaces}; {plan.server.access.description}"
    )
    yield Output(
        plan,
        "plan",
        metadata={
            "file": request.file,
            "target": plan.target,
            "server_version": plan.server.version,
            "warnings": MetadataValue.md("\n".join(f"- {warning}" for warning in plan.warnings) or "none"),
        },
    )
    if plan.empty:
        context.log.info(f"[Restore] There is nothing in {plan.target} to save: no pre-restore backup.")
        yield Output(NOTHING_TO_SAVE, "nothing_to_save")
    else:
        yield Output(OtherDatabase(plan.target), "save")


@op(
    description="Verifies the file, then loads it into a staging database, verifying once more what is fed to psql.",
    ins={"plan": In(RestorePlan), "saved": _SAVED},
)
def load(
    context: OpExecutionContext,
    plan: RestorePlan,
    saved: list[Any],
    environment: BackupEnvironment,
    run_scope: ResourceParam[RunScope],
) -> Timed:
    begun = time.monotonic()
    with explained():
        loaded = environment.load()
        _take_part(context, plan, loaded, run_scope)
        if doubt := _doubt(saved):
            context.log.warning(f"[Restore] {doubt}")
        backup, storage = find_backup(plan.request, loaded.storage, loaded.keys)
        verifying = reporter(context, "verifying", of="Restore")
        compressed = backup.manifest.compressed_bytes if backup.manifest else backup.file.size
        result = load_staging(
            plan,
            loaded.settings,
            loaded.storage,
            loaded.keys,
            on_checked=lambda count: verifying(Progress(count, compressed, time.monotonic() - begun)),
            on_progress=reporter(context, "loading", of="Restore"),
            tell=lambda line: context.log.info(f"[Restore] {line}"),
        )
        path = storage.path(backup.filename)
    for remark in result.remarks:
        context.log.warning(f"[Restore] {remark}")
    context.log.info(f"[Restore] Loaded {result.sql_bytes:,} bytes of SQL in {result.seconds:.1f} s")
    context.add_output_metadata({"sql_bytes": result.sql_bytes, "load_seconds": round(result.seconds, 3)})
    return Timed(FromFile(result, backup, path), time.monotonic() - begun)


def _pre_restore_backup(saved: list[Any]) -> StoredBackup | None:
    return next((item for item in saved if isinstance(item, StoredBackup)), None)


def _doubt(saved: list[Any]) -> str | None:
    """Why the pre-restore backup does not yet stand for the database that is replaced; None where it does."""
    backup = _pre_restore_backup(saved)
    if backup is None or backup.settled:
        return None
    return (
        f"The pre-restore backup {backup.filename} is not known to have arrived where it is kept, and is not verified: "
        "the database that is replaced is kept, whatever keep_replaced (--drop-replaced) says."
    )


@op(description="Compares tables and rows with the manifest; looks at indexes, constraints and sequences.")
def check(
    context: OpExecutionContext,
    plan: RestorePlan,
    loading: Timed,
    environment: BackupEnvironment,
    run_scope: ResourceParam[RunScope],
) -> Timed:
    begun = time.monotonic()
    with explained():
        loaded = environment.load()
        _take_part(context, plan, loaded, run_scope)
        checked = check_staging(plan, loaded.settings, loaded.storage, loaded.keys, loading.result.loaded)
    for remark in checked.remarks:
        context.log.warning(f"[Restore] As in the backup: {remark}")
    rows = sum(checked.rows.values())
    context.log.info(f"[Restore] {rows:,} rows in {checked.tables} tables, as backed up")
    context.add_output_metadata({"tables": checked.tables, "rows": rows})
    return Timed(checked, time.monotonic() - begun)


@op(
    description="Gives the restored database the live name, and the replaced one a dated name, in one transaction.",
    ins={"plan": In(RestorePlan), "saved": _SAVED},
)
def swap(
    context: OpExecutionContext,
    plan: RestorePlan,
    saved: list[Any],
    checking: Timed,
    environment: BackupEnvironment,
    run_scope: ResourceParam[RunScope],
) -> Timed:
    begun = time.monotonic()
    with explained():
        loaded = environment.load()
        _take_part(context, plan, loaded, run_scope)
        swapped = swap_in(plan, loaded.settings)
    for remark in swapped.remarks:
        context.log.warning(f"[Restore] {remark}")
    away = "unknown" if swapped.downtime_seconds is None else f"{swapped.downtime_seconds * 1000:.0f} ms"
    context.log.info(f"[Restore] {plan.target} is the restored database; the name was away for {away}")
    kept = swapped.replaced
    if kept is not None and _doubt(saved) is None:
        try:
            if not is_kept(plan, loaded.settings, kept):
                drop_database(plan.server, loaded.settings, kept)
                kept = None
        except KanbuError as error:
            context.log.warning(f"[Restore] The replaced database {kept} is kept: {error}")
    if kept is not None:
        context.log.info(
            f"[Restore] What was replaced is kept as {kept} until {plan.target} has its first verified backup"
        )
    return Timed(replace(swapped, replaced=kept), time.monotonic() - begun)


@op(description="Tells Dagster what was restored, from which file, over what.")
def report(
    context: OpExecutionContext,
    plan: RestorePlan,
    saved: list[Any],
    loading: Timed,
    checking: Timed,
    swapping: Timed,
) -> None:
    source: FromFile = loading.result
    backup, done = source.backup, source.loaded
    checked: Checked = checking.result
    swapped: Swapped = swapping.result
    manifest = backup.manifest
    pre_restore, doubt = _pre_restore_backup(saved), _doubt(saved)
    duration = time.time() - context.instance.get_run_stats(context.run_id).start_time  # type: ignore[operator]
    metadata: dict[str, Any] = {
        "file": MetadataValue.text(backup.filename),
        "backup": MetadataValue.asset(DATABASE_BACKUP),
        "path": MetadataValue.path(source.path),
        "target": MetadataValue.text(plan.target),
        "server": MetadataValue.text(plan.server.access.description),
        "server_version": MetadataValue.text(plan.server.version),
        "pre_restore_file": MetadataValue.text(pre_restore.filename if pre_restore else NOTHING_TO_SAVE),
        "replaced_database": MetadataValue.text(swapped.replaced or NONE_REPLACED),
        "tables": MetadataValue.int(checked.tables),
        "rows": MetadataValue.int(sum(checked.rows.values())),
        "sql_bytes": MetadataValue.int(done.sql_bytes),
        "duration_s": MetadataValue.float(round(duration, 3)),
        "load_s": MetadataValue.float(round(loading.seconds, 3)),
        "check_s": MetadataValue.float(round(checking.seconds, 3)),
        "swap_s": MetadataValue.float(round(swapping.seconds, 3)),
        "left_out": MetadataValue.json(list(done.left_out)),
        "remarks": MetadataValue.json(
            [*plan.warnings, *([doubt] if doubt else []), *done.remarks, *checked.remarks, *swapped.remarks]
        ),
        "run": MetadataValue.dagster_run(context.run_id),
    }
    if swapped.downtime_seconds is not None:
        metadata["downtime_ms"] = MetadataValue.float(round(swapped.downtime_seconds * 1000, 1))
    if manifest is not None and manifest.run_id:
        metadata["backup_run"] = MetadataValue.dagster_run(manifest.run_id)
    context.log_event(
        AssetMaterialization(
            RESTORED_DATABASE,
            description=f"{plan.target} restored from {backup.filename}",
            metadata=metadata,
            tags={"dagster/data_version": manifest.sha256} if manifest else {},
        )
    )
    context.add_output_metadata(metadata)

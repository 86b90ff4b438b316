"""The ops of a restore drill, and the check `restorable` that a drill decides.

What belongs here: which backups are drilled, and what Dagster and the manifest are told. What does not: the drill
itself (`restore.drill`).
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

import random
import warnings
from datetime import datetime, timezone
from typing import Any

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetKey,
    AssetMaterialization,
    AssetSpec,
    Config,
    MetadataValue,
    OpExecutionContext,
    PreviewWarning,
    ResourceParam,
    asset_check,
    op,
)
from pydantic import Field

from kanbu_backup_dagster.backup.environment import Environment
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.errors import BackupNotFoundError, KanbuError, NotDrillableError
from kanbu_backup_dagster.orchestration.assets import DATABASE_BACKUP, DATABASE_FILES
from kanbu_backup_dagster.orchestration.failures import explained
from kanbu_backup_dagster.orchestration.progress import reporter
from kanbu_backup_dagster.orchestration.register import Register
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.run_scope import RunScope
from kanbu_backup_dagster.orchestration.tags import FILE
from kanbu_backup_dagster.orchestration.target_lock import STORAGE_PATIENCE_SECONDS, storage_name
from kanbu_backup_dagster.restore.drill import DrillResult, drill_server, lock_name
from kanbu_backup_dagster.restore.drill import drill as drill_backup
from kanbu_backup_dagster.restore.plan import RestoreRequest, judge_file
from kanbu_backup_dagster.schedule_file import load_schedule_file

# Checks of one partition are a preview in Dagster 1.13; a user can do nothing about that.
warnings.filterwarnings("ignore", message="Specifying a partitions_def", category=PreviewWarning)

RESTORE_DRILL = AssetKey("restore_drill")
RESTORABLE = "restorable"

DRILL_ASSETS = [
    AssetSpec(
        RESTORE_DRILL,
        deps=[DATABASE_BACKUP],
        description="A backup restored aside and looked at: the proof that it can be.",
        group_name="kanbu",
        kinds={"postgres"},
    )
]

# Another drill on the same server ends sooner or later; nothing is lost by waiting for it.
_WAIT_SECONDS = 600


class DrillConfig(Config):
    """Which backups are drilled."""

    file: str | None = Field(None, description="The backup file's name; unset: the newest database backup.")
    older_samples: int | None = Field(
        None, ge=0, description="How many older ones, drawn at random, besides; unset: as kanbu_backup.yaml says."
    )


@op(description="Chooses the backups: the newest, or the one named, and a sample of older ones.")
def choose(context: OpExecutionContext, config: DrillConfig, environment: BackupEnvironment) -> list[str]:
    with explained():
        loaded = environment.load()
        backups = loaded.catalog.backups(BackupType.DATABASE)
        if config.file is not None:
            chosen = [loaded.catalog.get(config.file).filename]
        elif backups:
            chosen = [backups[-1].filename]
        else:
            raise BackupNotFoundError(
                f"Backup file not found: there is no database backup in {loaded.storage.location}."
            )
    file = load_schedule_file(loaded.settings.config_file)
    wanted = file.drill.older_samples if config.older_samples is None else config.older_samples
    older = [backup.filename for backup in backups if backup.filename not in chosen]
    chosen += sorted(random.sample(older, min(wanted, len(older))))
    context.instance.add_run_tags(context.run_id, {FILE: chosen[0]})
    context.log.info(f"[Drill] To be restored aside: {', '.join(chosen)}")
    return chosen


@op(description="Restores each aside, compares rows, asks the assertions; a failure of one does not spare the others.")
def drill(
    context: OpExecutionContext,
    chosen: list[str],
    environment: BackupEnvironment,
    run_scope: ResourceParam[RunScope],
) -> list[DrillResult]:
    with explained():
        loaded = environment.load()
        run_scope.hold(storage_name(loaded.storage), exclusive=False, wait_seconds=STORAGE_PATIENCE_SECONDS)
    register, passed, failed = Register.of_run(context), [], []
    for filename in chosen:
        try:
            passed.append(_drill_one(context, loaded, filename, run_scope))
        except KanbuError as error:
            context.log.error(f"[Drill] {filename}: {error}")
            failed.append((filename, error))
            register.decide(RESTORABLE, filename, BackupType.DATABASE, passed=False, metadata=_told_of(error))
        else:
            context.log_event(_materialization(context, passed[-1]))
            register.decide(RESTORABLE, filename, BackupType.DATABASE, passed=True, metadata=_told_of(passed[-1]))
    if failed:
        first_name, first = failed[0]
        others = f" ({len(failed)} of {len(chosen)} drills did not pass)" if len(chosen) > 1 else ""
        with explained():
            raise type(first)(f"{first_name}: {first.message}{others}", tried=first.tried, advice=first.advice)
    return passed


def _drill_one(context: OpExecutionContext, loaded: Environment, filename: str, run_scope: RunScope) -> DrillResult:
    # A drill says whether a file can be restored; whether it should be without a key's protection is not its question.
    backup, storage, warnings = judge_file(RestoreRequest(filename, force=True), loaded.storage, loaded.keys)
    for warning in warnings:
        context.log.info(f"[Drill] {warning}")
    file = load_schedule_file(loaded.settings.config_file)
    for problem in file.problems:
        context.log.warning(f"[Drill] {problem}")

    def tell(line: str) -> None:
        context.log.info(f"[Drill] {line}")

    with drill_server(loaded.settings, backup, tell=tell) as (server, settings):
        run_scope.hold(lock_name(server), exclusive=True, wait_seconds=_WAIT_SECONDS)
        context.log.info(f"[Drill] {filename} on {server.access.description}, PostgreSQL {server.version}")
        result = drill_backup(
            backup,
            storage,
            loaded.keys,
            server,
            settings,
            file.drill.assertions,
            on_progress=reporter(context, "loading", of="Drill"),
            tell=tell,
        )
    if backup.manifest is not None:
        proven_at = datetime.now(timezone.utc)
        loaded.catalog.amend(filename, lambda manifest: manifest.model_copy(update={"proven_at": proven_at}))
        register = Register.of_run(context)
        if register.knows(backup):
            register.observe(loaded.catalog.get(filename))
    context.log.info(f"[Drill] {filename} is proven: {result.rows:,} rows in {result.tables} tables, as backed up")
    return result


def _told_of(outcome: DrillResult | KanbuError) -> dict[str, Any]:
    if isinstance(outcome, KanbuError):
        result = "not drillable" if isinstance(outcome, NotDrillableError) else "failed"
        return {"result": MetadataValue.text(result), "error": MetadataValue.text(str(outcome))}
    return {
        "result": MetadataValue.text("proven"),
        "file": MetadataValue.text(outcome.filename),
        "tables": MetadataValue.int(outcome.tables),
        "rows": MetadataValue.int(outcome.rows),
        "restore_s": MetadataValue.float(round(outcome.seconds, 3)),
        "server": MetadataValue.text(outcome.server),
        "assertions": MetadataValue.json(list(outcome.assertions)),
        "remarks": MetadataValue.json(list(outcome.remarks)),
    }


def _materialization(context: OpExecutionContext, result: DrillResult) -> AssetMaterialization:
    return AssetMaterialization(
        RESTORE_DRILL,
        description=f"{result.filename} restored aside",
        metadata={
            **_told_of(result),
            "backup": MetadataValue.asset(DATABASE_BACKUP),
            "run": MetadataValue.dagster_run(context.run_id),
        },
    )


@asset_check(
    asset=DATABASE_BACKUP,
    name=RESTORABLE,
    partitions_def=DATABASE_FILES,
    description="The file was restored aside, and what came of it compared with its manifest.",
)
def restorable(
    context: AssetCheckExecutionContext, environment: BackupEnvironment, run_scope: ResourceParam[RunScope]
) -> AssetCheckResult:
    run = context.op_execution_context
    filename = run.partition_key
    try:
        loaded = environment.load()
        run_scope.hold(storage_name(loaded.storage), exclusive=False, wait_seconds=STORAGE_PATIENCE_SECONDS)
        result = _drill_one(run, loaded, filename, run_scope)
    except KanbuError as error:
        return AssetCheckResult(passed=False, metadata=_told_of(error))
    return AssetCheckResult(passed=True, metadata=_told_of(result))


DRILL_CHECKS = [restorable]

"""Pruning in runs: after a backup of a schedule, and as a job of its own.

What belongs here: the ops, the lock they take, deleting, and telling Dagster what went and why. What does not: the plan
(`backup.pruning`, `backup.retention`).
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from dagster import (
    Config,
    DagsterInstance,
    MetadataValue,
    OpExecutionContext,
    ResourceParam,
    RunsFilter,
    TableColumn,
    TableRecord,
    TableSchema,
    op,
)
from pydantic import AwareDatetime, BaseModel, Field

from kanbu_backup_dagster.backup.environment import Environment
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.backup.pruning import PrunePlan, plan_prune
from kanbu_backup_dagster.backup.retention import Verdict
from kanbu_backup_dagster.errors import BusyError, KanbuError, SettingsError, StorageError
from kanbu_backup_dagster.notifications.events import PruneHeld, PrunePart, ScheduleRef
from kanbu_backup_dagster.orchestration.backup_ops import StoredBackup
from kanbu_backup_dagster.orchestration.failures import explained
from kanbu_backup_dagster.orchestration.memory import recall, remember
from kanbu_backup_dagster.orchestration.register import Register
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.run_scope import RunScope
from kanbu_backup_dagster.orchestration.schedules import UNFINISHED
from kanbu_backup_dagster.orchestration.tags import FILE, schedule_of
from kanbu_backup_dagster.orchestration.target_lock import STORAGE_PATIENCE_SECONDS, storage_name
from kanbu_backup_dagster.orchestration.telling import told
from kanbu_backup_dagster.orchestration.verify_ops import observe_counts
from kanbu_backup_dagster.schedule_file import load_schedule_file

# A plan of all files of a busy storage would make a run's page unreadable.
_SHOWN = 1000
_PLAN_SCHEMA = TableSchema(
    columns=[
        TableColumn("file", "string"),
        TableColumn("keep", "bool"),
        TableColumn("rules", "string"),
        TableColumn("reason", "string"),
    ]
)


class Settled(BaseModel):
    """When a type's backups were last pruned, of themselves or accepted: what shrank before counts no more."""

    until: AwareDatetime


def _settled_key(backup_type: BackupType, location: str) -> str:
    return f"kanbu/pruned:{backup_type.value}:{location}"


def settled_until(instance: DagsterInstance, backup_type: BackupType, location: str) -> datetime | None:
    """When the backups of a type in the storage at `location` were last pruned."""
    settled = recall(instance, _settled_key(backup_type, location), Settled)
    return settled.until if settled is not None else None


def files_in_use(instance: DagsterInstance, *, but: str = "") -> dict[str, str]:
    """Files that unfinished runs restore or drill, by name: which run.

    Args:
        but: A run whose own files do not count.
    """
    return {
        run.tags[FILE]: f"{run.job_name}, run {run.run_id}"
        for run in instance.get_runs(RunsFilter(statuses=UNFINISHED))
        if FILE in run.tags and run.run_id != but
    }


@dataclass(frozen=True)
class _Done:
    """What became of a plan: what was deleted, and what could not be."""

    planned: PrunePlan
    deleted: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        return self.planned.brake is not None and not self.deleted and not self.failed


def _prune(
    context: OpExecutionContext, loaded: Environment, backup_type: BackupType, *, accept: bool = False, dry_run: bool
) -> _Done:
    now = datetime.now(timezone.utc)
    location = loaded.storage.location
    schedules = load_schedule_file(loaded.settings.config_file)
    planned = plan_prune(
        loaded.catalog,
        backup_type,
        loaded.settings,
        schedules,
        now=now,
        settled_until=settled_until(context.instance, backup_type, location),
        in_use=files_in_use(context.instance, but=context.run_id),
    )
    deletions = planned.plan.deletions
    problems = tuple(map(str, schedules.problems))
    if problems:
        context.log.warning(
            "\n  - ".join(("[Prune] Nothing is deleted until the schedule file loads whole:", *problems))
        )
        return _Done(planned, problems=problems)
    if planned.brake is not None:
        context.log.warning(f"[Prune] {planned.brake.reason}")
    if dry_run or (planned.brake is not None and not accept):
        return _Done(planned)
    done = _delete(context, loaded, backup_type, deletions)
    remember(context.instance, _settled_key(backup_type, location), Settled(until=now))
    return _Done(planned, *done)


def _delete(
    context: OpExecutionContext, loaded: Environment, backup_type: BackupType, deletions: Sequence[Verdict]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    register, deleted, failed = Register.of_run(context), [], []
    for verdict in deletions:
        try:
            loaded.storage.delete(verdict.filename)
        except StorageError as error:
            # One that cannot be deleted shall not fill the disk with the others.
            context.log.error(f"[Prune] {verdict.filename}: {error}")
            failed.append(f"{verdict.filename}: {error.message}")
            continue
        deleted.append(verdict.filename)
        context.log.info(f"[Prune] Deleted {verdict.filename}: {', '.join(verdict.rules)}, {verdict.reason}")
        register.remove(
            verdict.filename,
            backup_type,
            {
                "status": MetadataValue.text("pruned"),
                "deleted_at": MetadataValue.timestamp(datetime.now(timezone.utc)),
                "rule": MetadataValue.text(", ".join(verdict.rules)),
                "reason": MetadataValue.text(verdict.reason),
                "run": MetadataValue.dagster_run(context.run_id),
            },
        )
    return tuple(deleted), tuple(failed)


def _event(context: OpExecutionContext, done: _Done) -> PruneHeld:
    brake, plan = done.planned.brake, done.planned.plan
    assert brake is not None
    schedule = schedule_of(context.run.tags)
    return PruneHeld(
        key=f"{context.run_id}/{plan.backup_type.value}",
        schedule=ScheduleRef(id=schedule[0], name=schedule[1]) if schedule is not None else None,
        timestamp=datetime.now(timezone.utc),
        prune=PrunePart(
            type=plan.backup_type,
            reason=f"{brake.reason}. To go ahead, run prune_backups with accept: true.",
            held=len(plan.deletions),
        ),
    )


def _metadata(done: _Done, prefix: str = "") -> dict[str, Any]:
    plan = done.planned.plan
    ordered = sorted(plan.verdicts, key=lambda verdict: verdict.keep)[:_SHOWN]
    return {
        f"{prefix}deleted": len(done.deleted),
        f"{prefix}would_go": len(plan.deletions),
        f"{prefix}kept": len(plan.verdicts) - len(plan.deletions),
        f"{prefix}held_back": done.planned.brake.reason if done.planned.brake is not None else "",
        f"{prefix}plan": MetadataValue.table(
            records=[
                TableRecord(
                    {
                        "file": verdict.filename,
                        "keep": verdict.keep,
                        "rules": ", ".join(verdict.rules),
                        "reason": verdict.reason,
                    }
                )
                for verdict in ordered
            ],
            schema=_PLAN_SCHEMA,
        ),
    }


def _undeleted(failed: Sequence[str]) -> StorageError:
    return StorageError(f"{len(failed)} backups could not be deleted.", tried=tuple(failed))


class PruneConfig(Config):
    """Whether to prune after this backup."""

    without_schedule: bool = Field(False, description="Prune after a backup that belongs to no schedule too.")


@op(description="Deletes what the retention policies let go, after a verified backup of a schedule.")
def prune(
    context: OpExecutionContext,
    config: PruneConfig,
    stored: StoredBackup,
    environment: BackupEnvironment,
    run_scope: ResourceParam[RunScope],
) -> None:
    with explained():
        loaded = environment.load()
        if not stored.settled:
            context.log.info(
                "[Prune] The backup may not have arrived where it is kept: nothing is deleted until it has."
            )
            observe_counts(context, loaded, stored.type)
            return
        if schedule_of(context.run.tags) is None and not config.without_schedule:
            context.log.info("[Prune] A backup of no schedule: nothing is deleted.")
            observe_counts(context, loaded, stored.type)
            return
        try:
            run_scope.hold(storage_name(loaded.storage), exclusive=True, wait_seconds=STORAGE_PATIENCE_SECONDS)
        except BusyError as error:
            context.log.warning(f"[Prune] Left to the next backup's prune: {error}")
            observe_counts(context, loaded, stored.type)
            return
        done = _prune(context, loaded, stored.type, dry_run=False)
        context.add_output_metadata({**_metadata(done), **(told(_event(context, done)) if done.held else {})})
        observe_counts(context, loaded, stored.type)
        if done.failed:
            raise _undeleted(done.failed)


class PruneAllConfig(Config):
    """What to prune, and how far to go."""

    type: str = Field("", description="Only backups of this type: database or source.")
    dry_run: bool = Field(False, description="Delete nothing; show each file, keep or delete, and the rule.")
    accept: bool = Field(False, description="Go ahead although a brake holds the plan back.")


@op(description="Deletes what the retention policies let go, of both types or one; or shows what would go.")
def prune_all(
    context: OpExecutionContext,
    config: PruneAllConfig,
    environment: BackupEnvironment,
    run_scope: ResourceParam[RunScope],
) -> None:
    with explained():
        loaded = environment.load()
        types = list(BackupType) if not config.type else [_type_called(config.type)]
        if not config.dry_run:
            run_scope.hold(storage_name(loaded.storage), exclusive=True, wait_seconds=STORAGE_PATIENCE_SECONDS)
        metadata: dict[str, Any] = {}
        done = []
        for backup_type in types:
            done.append(_prune(context, loaded, backup_type, accept=config.accept, dry_run=config.dry_run))
            metadata |= _metadata(done[-1], f"{backup_type.value}_")
            observe_counts(context, loaded, backup_type)
        held = [] if config.dry_run else [_event(context, one) for one in done if one.held]
        context.add_output_metadata({**metadata, **(told(*held) if held else {})})
        failed = [file for one in done for file in one.failed]
        if failed:
            raise _undeleted(failed)
        if done[0].problems and not config.dry_run:
            raise SettingsError("The schedule file does not load whole: nothing was deleted.", tried=done[0].problems)


def _type_called(name: str) -> BackupType:
    try:
        return BackupType(name)
    except ValueError:
        raise KanbuError(f"There is no backup type {name!r}; there are database and source.") from None

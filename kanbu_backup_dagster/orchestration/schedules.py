"""Schedules: one Dagster schedule for each good row of the schedule file.

What belongs here: how a row becomes a schedule, and what its tick refuses. What does not: reading the file, and the
jobs that are started.

A state set in the UI outlives the file's, and a file may change before Dagster has taken it over, so a tick asks the
file and the settings again before it starts anything.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from dagster import (
    DagsterInstance,
    DagsterRunStatus,
    DefaultScheduleStatus,
    JobDefinition,
    RunRequest,
    RunsFilter,
    ScheduleDefinition,
    ScheduleEvaluationContext,
    SkipReason,
)
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.scheduler.instigation import InstigatorStatus

from kanbu_backup_dagster.backup.manifest import Trigger
from kanbu_backup_dagster.orchestration import job_names, tags
from kanbu_backup_dagster.orchestration.configuration import Configuration, load_configuration
from kanbu_backup_dagster.schedule_file import Schedule, ScheduleType, describe_cron, next_runs

JOBS_BY_TYPE = {
    ScheduleType.DATABASE: job_names.DATABASE_BACKUP,
    ScheduleType.SOURCE: job_names.SOURCE_BACKUP,
    ScheduleType.DRILL: job_names.RESTORE_DRILL,
    ScheduleType.VERIFY_PENDING: job_names.VERIFY_PENDING_BACKUPS,
}
BACKUP_TYPES = (ScheduleType.DATABASE, ScheduleType.SOURCE)

ON_TIME = timedelta(minutes=10)
"""A start up to this late is no missed run: a restart of the service takes no longer."""

UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True)
class BuiltSchedules:
    """What became of the file's rows: schedules, and a message for each enabled row without one."""

    schedules: tuple[ScheduleDefinition, ...]
    problems: tuple[str, ...]


def schedule_name(row: Schedule) -> str:
    """The name Dagster knows `row` by: its id, and its name as far as Dagster's names allow, e.g.
    `schedule_1_daily_database_backup`."""
    ascii_name = unicodedata.normalize("NFKD", row.name).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", ascii_name.lower())
    return "_".join(["schedule", str(row.id), *words])


def build_schedules(configuration: Configuration, jobs: Sequence[JobDefinition]) -> BuiltSchedules:
    """A schedule for each good row whose job there is.

    Args:
        configuration: As it is now.
        jobs: The jobs of the code location.
    """
    by_name = {job.name: job for job in jobs}
    schedules, problems = [], []
    for row in configuration.file.schedules:
        job = by_name.get(JOBS_BY_TYPE[row.type])
        if job is None:
            if row.enabled:
                problems.append(f"{row}: there is no job {JOBS_BY_TYPE[row.type]} for the type {row.type.value}")
            continue
        schedules.append(
            ScheduleDefinition(
                name=schedule_name(row),
                cron_schedule=row.cron,
                execution_timezone=configuration.zone_name,
                job=job,
                execution_fn=_tick_of(row),
                tags=run_tags(row),
                description=describe(row, configuration, datetime.now(timezone.utc)),
                default_status=(
                    DefaultScheduleStatus.RUNNING
                    if row.enabled and configuration.runs_schedules
                    else DefaultScheduleStatus.STOPPED
                ),
            )
        )
    return BuiltSchedules(tuple(schedules), tuple(problems))


def run_tags(row: Schedule) -> Mapping[str, str]:
    """The tags of the runs that `row` starts."""
    return {tags.TRIGGER: Trigger.SCHEDULED.value, **tags.schedule_tags(row.id, row.name)}


def describe(row: Schedule, configuration: Configuration, now: datetime) -> str:
    """What a person needs to know of `row`; its next run is the one after `now`, when the file was loaded."""
    upcoming = next_runs(row.cron, configuration.zone, now, 1)[0]
    parts = [
        f"**{row.name}** (id {row.id}): {describe_cron(row.cron)} ({configuration.zone_name}).",
        f"When loaded, the next run was {upcoming:%a %d %b %Y %H:%M %Z}.",
    ]
    if row.type in BACKUP_TYPES:
        parts.append(
            f"Kept {row.retention_days} days; "
            f"{row.keep_daily} daily, {row.keep_weekly} weekly, {row.keep_monthly} monthly."
        )
    if not row.enabled:
        parts.append("Disabled in the schedule file.")
    if not configuration.runs_schedules:
        parts.append("BACKUP_SCHEDULER_MODE is external: its ticks start nothing.")
    return " ".join(parts)


def _tick_of(loaded: Schedule) -> Callable[[ScheduleEvaluationContext], RunRequest | SkipReason]:
    def tick(context: ScheduleEvaluationContext) -> RunRequest | SkipReason:
        refused = why_not(
            loaded,
            load_configuration(),
            context.instance,
            scheduled_for=context.scheduled_execution_time,
            now=datetime.now(timezone.utc),
        )
        if refused is not None:
            context.log.info(f"[Scheduler] {loaded}: {refused}")
            return SkipReason(refused)
        context.log.info(f"[Scheduler] {loaded}: {JOBS_BY_TYPE[loaded.type]} starts")
        return RunRequest(tags=dict(run_tags(loaded)))

    return tick


def why_not(
    loaded: Schedule,
    configuration: Configuration,
    instance: DagsterInstance,
    *,
    scheduled_for: datetime,
    now: datetime,
) -> str | None:
    """Why a tick of `loaded` starts nothing, for people; None when it starts a run.

    Args:
        loaded: The row that the schedule was made of.
        configuration: As it is now. A file that cannot be read now changes nothing: what was scheduled goes on.
        instance: Tells whether the schedule's former run has ended.
        scheduled_for: When the run was to start.
        now: The moment.
    """
    if configuration.readable is not None and not configuration.runs_schedules:
        return "BACKUP_SCHEDULER_MODE is external: schedules start nothing, the trigger does."
    if configuration.readable is not None and configuration.file.parsed_whole:
        row = configuration.file.schedule(loaded.id)
        if row is None:
            return f"The schedule {loaded.id} is no longer in {configuration.file.path}."
        if row.cron != loaded.cron:
            return f"Its times were changed in {configuration.file.path}; the new ones apply once Dagster has reloaded."
        if loaded.enabled and not row.enabled:
            return f"It was disabled in {configuration.file.path}."
    late = now - scheduled_for
    if late > max(ON_TIME, timedelta(hours=loaded.catch_up_hours)):
        return (
            f"It was to start at {scheduled_for:%Y-%m-%d %H:%M %Z}, {late.total_seconds() / 3600:.1f} hours ago, while "
            f"the service was down; catch_up_hours is {loaded.catch_up_hours:g}."
        )
    former = instance.get_runs(RunsFilter(statuses=UNFINISHED, tags={tags.SCHEDULE_ID: str(loaded.id)}), limit=1)
    if former:
        return f"Its former run {former[0].run_id} has not ended ({former[0].status.value.lower()})."
    return None


def states_set_in_ui(instance: DagsterInstance) -> dict[str, bool]:
    """Whether a schedule runs, by its Dagster name, for those that someone started or stopped in the UI. Such a state
    rules over the file's until it is reset there."""
    return {
        state.instigator_name: state.status is InstigatorStatus.RUNNING
        for state in instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
        if state.status is not InstigatorStatus.DECLARED_IN_CODE
    }

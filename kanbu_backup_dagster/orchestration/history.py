"""The history of runs: what Dagster's record says of each, in a row.

What belongs here: reading it. What does not: showing it (`cli`).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import TypedDict

from dagster import DagsterEventType, DagsterInstance, RunRecord, RunsFilter

from kanbu_backup_dagster.orchestration import tags
from kanbu_backup_dagster.orchestration.assets import BACKUP_ASSETS


class RunRow(TypedDict):
    """A run: times are ISO 8601 in UTC, the duration is in seconds; what is not known is None."""

    run_id: str
    job: str
    started_at: str | None
    trigger: str
    schedule_id: int | None
    schedule: str | None
    status: str
    duration_s: float | None
    file: str | None
    error: str | None


def history(instance: DagsterInstance, *, limit: int, job: str | None = None) -> Iterator[RunRow]:
    """The latest runs, the newest first.

    Args:
        job: Only of this job.
    """
    for record in instance.get_run_records(RunsFilter(job_name=job) if job else None, limit=limit):
        yield _row(instance, record)


def _row(instance: DagsterInstance, record: RunRecord) -> RunRow:
    run = record.dagster_run
    file, error = _told(instance, run.run_id)
    schedule_id, schedule = tags.schedule_of(run.tags) or (None, None)
    begun = record.start_time
    return RunRow(
        run_id=run.run_id,
        job=run.job_name,
        started_at=datetime.fromtimestamp(begun, timezone.utc).isoformat(timespec="seconds") if begun else None,
        trigger=run.tags.get(tags.TRIGGER, "manual"),
        schedule_id=schedule_id,
        schedule=schedule,
        status=run.status.value.lower(),
        duration_s=round(record.end_time - begun, 3) if begun and record.end_time else None,
        file=run.tags.get(tags.FILE) or file,
        error=error,
    )


def _told(instance: DagsterInstance, run_id: str) -> tuple[str | None, str | None]:
    """The backup file a run made or looked at, and why its first failed step failed."""
    backups = {key for key, _ in BACKUP_ASSETS.values()}
    file = error = None
    kinds = {
        DagsterEventType.ASSET_MATERIALIZATION,
        DagsterEventType.ASSET_OBSERVATION,
        DagsterEventType.STEP_FAILURE,
    }
    for entry in instance.all_logs(run_id, of_type=kinds):
        event = entry.get_dagster_event()
        if event.event_type is DagsterEventType.STEP_FAILURE:
            failure = event.step_failure_data
            said = failure.user_failure_data.description if failure.user_failure_data else None
            error = error or said or (failure.error.message.strip() if failure.error else f"{event.step_key} failed")
        elif event.asset_key in backups:
            file = file or event.partition
    return file, error

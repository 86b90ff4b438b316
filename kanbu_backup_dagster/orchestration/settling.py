"""Backups that were still on their way to the remote when their run ended (see `storage.rclone`).

What belongs here: the sensor that asks whether they have arrived, has them verified then, and starts the retention that
waited for it. What does not: the asking itself (`storage`), verifying and pruning, which are jobs.

The run that made such a backup is tagged; the file's own status decides what comes next, so that nothing is kept here
but how far the round has come, and a verification started by hand counts as well. Each tick looks at some of the runs
and the next one goes on after them, so that none that stays where it is keeps others from being looked at.
`alerts` tells of the backup when the tag says that it has settled.
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of sensors as objects.

import time
from collections.abc import Iterator, Sequence

from dagster import (
    DagsterInstance,
    DagsterRun,
    DefaultSensorStatus,
    JobDefinition,
    RunRequest,
    RunsFilter,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    SkipReason,
)

from kanbu_backup_dagster.backup.environment import Environment, load_environment
from kanbu_backup_dagster.backup.manifest import VerificationStatus
from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.orchestration import job_names, tags
from kanbu_backup_dagster.orchestration.schedules import UNFINISHED
from kanbu_backup_dagster.storage.open import open_storage

SETTLING_SECONDS = 60
# A tick has to end within Dagster's minute, however long the mount and its remote control take to answer.
_MOUNT_SECONDS = 10.0
_TICK_SECONDS = 20.0
_AT_ONCE = 10
_VERIFICATIONS = 3
"""A file whose verification ends without a verdict so often (no key) is left to `verify_pending_backups`."""


def settling_sensor(jobs: list[JobDefinition]) -> SensorDefinition:
    """The sensor `settling`, which starts two of `jobs`."""

    def settling(context: SensorEvaluationContext) -> SensorResult | SkipReason:
        return _tick(context.instance, context.cursor)

    return SensorDefinition(
        name="settling",
        evaluation_fn=settling,
        jobs=[job for job in jobs if job.name in (job_names.VERIFY_BACKUP, job_names.PRUNE_BACKUPS)],
        minimum_interval_seconds=SETTLING_SECONDS,
        default_status=DefaultSensorStatus.RUNNING,
        description="Has backups verified that waited in rclone's cache once they have arrived, then starts the "
        "retention that waited for them.",
    )


def _tick(instance: DagsterInstance, last: str | None) -> SensorResult | SkipReason:
    """Look at some of the runs that wait, from the one after `last` (an id) on."""
    runs = _waiting(instance, after=last) or _waiting(instance)
    if not runs:
        return SkipReason("No backup is on its way.")
    try:
        environment = _impatient(load_environment())
    except KanbuError as error:
        return SkipReason(str(error))
    requests: list[RunRequest] = []
    said: list[str] = []
    until = time.monotonic() + _TICK_SECONDS
    for run in runs:
        try:
            how = _next_step(instance, environment, run, requests)
        except KanbuError as error:
            how = str(error)
        said.append(f"{run.tags[tags.SETTLING_FILE]}: {how}")
        last = run.run_id
        if time.monotonic() > until:
            break
    return SensorResult(
        run_requests=requests, skip_reason=None if requests else SkipReason("\n".join(said)), cursor=last
    )


def _waiting(instance: DagsterInstance, *, after: str | None = None) -> Sequence[DagsterRun]:
    """The oldest runs that wait, or the oldest after one of them; none when that one was deleted."""
    waiting = RunsFilter(tags={tags.SETTLING: tags.WAITING})
    return instance.get_runs(waiting, cursor=after, limit=_AT_ONCE, ascending=True)


def _impatient(environment: Environment) -> Environment:
    settings = environment.settings
    hurried = settings.model_copy(
        update={"rclone_timeout_seconds": min(settings.rclone_timeout_seconds, _MOUNT_SECONDS)}
    )
    return Environment(settings, environment.keys, open_storage(hurried))


def _next_step(instance: DagsterInstance, environment: Environment, run: DagsterRun, requests: list[RunRequest]) -> str:
    """What is to be done for the backup of `run`, put into `requests`; and how it stands, for people."""
    filename = run.tags[tags.SETTLING_FILE]
    # Its manifest is not opened before it has arrived: that would have rclone wait anew until it uploads it.
    if environment.storage.find(filename) is None:
        return _end(instance, run, "it was deleted")
    settlement = environment.storage.settlement(filename)
    if not settlement.done:
        return settlement.reason
    backup = environment.catalog.get(filename)
    if backup.status is VerificationStatus.VERIFIED:
        if (schedule := tags.schedule_of(run.tags)) is None:
            return _end(instance, run, "verified", tags.SETTLED)
        if list(_started(instance, run, job_names.PRUNE_BACKUPS)):
            return _end(instance, run, "verified, and retention was started", tags.SETTLED)
        requests.append(
            RunRequest(
                run_key=f"prune after {run.run_id}",
                job_name=job_names.PRUNE_BACKUPS,
                run_config={"ops": {"prune_all": {"config": {"type": backup.type.value}}}},
                tags={
                    tags.SETTLED_FOR: run.run_id,
                    **tags.schedule_tags(*schedule),
                },
            )
        )
        return "verified; retention starts"
    if backup.status is not VerificationStatus.PENDING:
        return _end(instance, run, backup.status.value)
    verifications = list(_started(instance, run, job_names.VERIFY_BACKUP))
    if any(one.status in UNFINISHED for one in verifications):
        return "being verified"
    if len(verifications) >= _VERIFICATIONS:
        return _end(instance, run, f"verified {len(verifications)} times without a verdict")
    requests.append(
        RunRequest(
            run_key=f"verify after {run.run_id}, {len(verifications)}",
            job_name=job_names.VERIFY_BACKUP,
            run_config={"ops": {"verify_one": {"config": {"file": filename}}}},
            tags={tags.SETTLED_FOR: run.run_id},
        )
    )
    return "arrived; verification starts"


def _started(instance: DagsterInstance, run: DagsterRun, job_name: str) -> Iterator[DagsterRun]:
    yield from instance.get_runs(RunsFilter(job_name=job_name, tags={tags.SETTLED_FOR: run.run_id}))


def _end(instance: DagsterInstance, run: DagsterRun, how: str, state: str = tags.ENDED) -> str:
    instance.add_run_tags(run.run_id, {tags.SETTLING: state})
    return how

"""Alerts: the sensors that watch, and those that tell.

What belongs here: the two sensors, and the state they keep. What does not: what a run has to tell (`run_events`), what
is wrong without a run (`watch`), the queues (`outbox`), HTTP (`notifications`).

`alerts` reads the ends of all runs from Dagster's event log, by a position of its own: runs of the queue, of
`dagster job execute`, cancelled ones, and those that ended while the daemon was down. Dagster's `run_status_sensor`
forgets an event when telling it fails, and does not see runs of `dagster job execute`. The state is written after each
attempt, in one document, so that a crash repeats a delivery and loses none.
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of sensors as objects.

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial

from dagster import (
    BetaWarning,
    DagsterEventType,
    DagsterInstance,
    DefaultSensorStatus,
    EventLogRecord,
    JobDefinition,
    RunRequest,
    RunsFilter,
    RunStatusChangeRecordsFilter,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    SkipReason,
)
from dagster._core.event_api import RunStatusChangeEventType
from pydantic import AwareDatetime, BaseModel, Field

from kanbu_backup_dagster.backup.manifest import Trigger
from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.notifications.delivery import deliver, ping
from kanbu_backup_dagster.notifications.events import BackupCompleted, Event, parse_event
from kanbu_backup_dagster.orchestration import tags
from kanbu_backup_dagster.orchestration.configuration import Configuration, load_configuration
from kanbu_backup_dagster.orchestration.memory import recall, remember
from kanbu_backup_dagster.orchestration.outbox import GivenUp, Outbox
from kanbu_backup_dagster.orchestration.run_events import (
    BACKUP_JOBS,
    EndedRun,
    events_of,
    read_run,
)
from kanbu_backup_dagster.orchestration.watch import (
    Success,
    Watch,
    external_key,
    judge_configuration,
    judge_silence,
    judge_storage,
)
from kanbu_backup_dagster.settings import Settings

# Dagster sets this beta parameter itself, to nothing, when it copies a sensor or a schedule.
warnings.filterwarnings("ignore", message="Parameter `owners` of", category=BetaWarning)

ALERTS_KEY = "kanbu/alerts"
WATCH_KEY = "kanbu/watch"
WEBHOOK = "webhook"
PING = "ping"

ALERTS_SECONDS = 10
WATCH_SECONDS = 60
BUDGET_SECONDS = 25.0
"""No attempt begins later in a tick: with an attempt's 15 seconds it stays within the minute Dagster allows."""
LAUNCH_PATIENCE = timedelta(minutes=30)
"""A second attempt that could not be launched for so long is no longer waited for."""

_ENDS: tuple[RunStatusChangeEventType, ...] = (
    DagsterEventType.RUN_SUCCESS,
    DagsterEventType.RUN_FAILURE,
    DagsterEventType.RUN_CANCELED,
)
_AT_ONCE = 200
# PostgreSQL gives an event its number before it is committed, so that one with a lower number may appear later.
_LATE_COMMIT = timedelta(minutes=5)


class SecondAttempt(BaseModel):
    """A scheduled backup that failed for a reason that may pass, and is run once more.

    Attributes:
        run_id: The run that failed.
        due_at: When to start.
        tags: Of the new run.
        instead: The events to tell if it cannot be started.
    """

    run_id: str
    job: str
    due_at: AwareDatetime
    tags: dict[str, str]
    instead: list[str]


class Unsettled(BaseModel):
    """A backup that was made, and is not known to have arrived where it is kept.

    Attributes:
        run_id: The run that made it.
        counts_for: Its key in `Alerts.successes`; None when it counts for no schedule.
        completed: The event to tell once it has arrived and is verified.
    """

    run_id: str
    counts_for: str | None
    completed: str


class Alerts(BaseModel):
    """What has been read, and what waits to be told.

    Attributes:
        after: All ends of runs up to this number of the event log have been read; None before the first look.
        seen: Those read beyond it.
        heard: The last number taken over from the watch's journal.
        outboxes: By endpoint.
        second_attempts: Waiting to be started or to be seen.
        unsettled: Backups that count, and are told, once they have arrived.
        successes: The last backup by schedule id, or by `external_key`.
    """

    after: int | None = None
    seen: list[int] = Field(default_factory=list)
    heard: int = 0
    outboxes: dict[str, Outbox] = Field(default_factory=dict)
    second_attempts: list[SecondAttempt] = Field(default_factory=list)
    unsettled: list[Unsettled] = Field(default_factory=list)
    successes: dict[str, Success] = Field(default_factory=dict)


@dataclass(frozen=True)
class AlertsReport:
    """What `kanbu-backup status` shows."""

    alerts: Alerts
    watch: Watch


def alerts_report(instance: DagsterInstance) -> AlertsReport:
    """The state of the alerts."""
    return AlertsReport(recall(instance, ALERTS_KEY, Alerts) or Alerts(), recall(instance, WATCH_KEY, Watch) or Watch())


def build_sensors(jobs: list[JobDefinition], problems: tuple[str, ...]) -> list[SensorDefinition]:
    """The sensors.

    Args:
        jobs: The jobs of the code location.
        problems: What is wrong with rows of the schedule file that are good in themselves.
    """
    backups = [job for job in jobs if job.name in BACKUP_JOBS]

    def alerts(context: SensorEvaluationContext) -> SensorResult:
        return _alerts_tick(context.instance, load_configuration(), context.log.info)

    def watch(context: SensorEvaluationContext) -> SkipReason:
        return SkipReason(_watch_tick(context.instance, load_configuration(), problems))

    return [
        SensorDefinition(
            name="alerts",
            evaluation_fn=alerts,
            jobs=backups,
            minimum_interval_seconds=ALERTS_SECONDS,
            default_status=DefaultSensorStatus.RUNNING,
            description=(
                "Tells the webhook and the ping URL how runs ended, whichever way they were started; starts a "
                "scheduled backup once more when it failed for a passing reason."
            ),
        ),
        SensorDefinition(
            name="watch",
            evaluation_fn=watch,
            minimum_interval_seconds=WATCH_SECONDS,
            default_status=DefaultSensorStatus.RUNNING,
            description="Notices backups that stay away, storage that runs low, and a configuration with problems."
            + "".join(f"\n\n**Problem:** {problem}" for problem in problems),
        ),
    ]


def _watch_tick(instance: DagsterInstance, configuration: Configuration, problems: tuple[str, ...]) -> str:
    now = datetime.now(timezone.utc)
    state = recall(instance, WATCH_KEY, Watch) or Watch()
    alerts = recall(instance, ALERTS_KEY, Alerts) or Alerts()
    state.journal = [entry for entry in state.journal if entry.number > alerts.heard]
    settled = state.settle(now)
    judge_configuration(state, configuration, problems, now)
    unsettled = {
        one.counts_for: BackupCompleted.model_validate_json(one.completed).backup.filename or ""
        for one in alerts.unsettled
        if one.counts_for is not None
    }
    judge_silence(state, configuration, alerts.successes, unsettled, now, settled=settled)
    judge_storage(state, configuration, alerts.successes, now)
    remember(instance, WATCH_KEY, state)
    lines = [*configuration.problems, *problems, state.storage_problem, "Storage is low." if state.storage_low else ""]
    lines += [
        f"Schedule {key} is overdue since {gap.expected_by:%Y-%m-%d %H:%M} UTC." for key, gap in state.gaps.items()
    ]
    return "\n".join(line for line in lines if line) or "All is well."


def _alerts_tick(instance: DagsterInstance, configuration: Configuration, log: Callable[[str], None]) -> SensorResult:
    now = datetime.now(timezone.utc)
    state = recall(instance, ALERTS_KEY, Alerts) or Alerts()
    before = state.model_dump_json()
    if configuration.readable is None:
        # Whom to tell is not known: what is read now could not be queued, and would count as read.
        return SensorResult(skip_reason=SkipReason("\n".join(configuration.settings_problems)))
    _open_outboxes(state, configuration.readable)
    give_up_after = timedelta(days=configuration.file.notifications.give_up_after_days)
    for ended in _new_ends(instance, state, oldest=now - give_up_after):
        _take_in(state, ended, configuration, configuration.readable, now)
    _take_in_settled(instance, state, configuration, now)
    _hear(instance, state, configuration, now)
    requests = list(_second_attempts(instance, state, configuration, now))
    if state.model_dump_json() != before:
        remember(instance, ALERTS_KEY, state)
    lost = _work(instance, state, configuration, give_up_after, log)
    if lost:
        raise KanbuError(
            f"{len(lost)} alerts were given up after {give_up_after.total_seconds() / 86400:g} days.",
            tried=tuple(f"{name}: {one.event} ({one.key}): {one.error}" for name, one in lost),
            advice="Repair the receiver and try it with `kanbu-backup webhook test`; `kanbu-backup status` shows what "
            "was given up.",
        )
    if requests:
        return SensorResult(run_requests=requests)
    lines = [box.summary(name) for name, box in state.outboxes.items()]
    lines += configuration.settings_problems
    return SensorResult(skip_reason=SkipReason("\n".join(filter(None, lines)) or "Nothing to tell."))


def _open_outboxes(state: Alerts, settings: Settings) -> None:
    """A queue for each endpoint that is set, be it one that cannot be used now; none for others."""
    wanted = {WEBHOOK: settings.webhook_url is not None, PING: settings.ping_url is not None}
    state.outboxes = {name: state.outboxes.get(name, Outbox()) for name in (WEBHOOK, PING) if wanted[name]}


def _new_ends(instance: DagsterInstance, state: Alerts, *, oldest: datetime) -> Iterator[EndedRun]:
    """The ends of runs that have not been read, in their order; `state` counts each as read once it is handed out."""
    if state.after is None:
        state.after = _last_before(instance, oldest)
    records: list[EventLogRecord] = []
    cut: int | None = None
    for kind in _ENDS:
        found = instance.fetch_run_status_changes(
            RunStatusChangeRecordsFilter(event_type=kind, after_storage_id=state.after), limit=_AT_ONCE, ascending=True
        )
        records += found.records
        if found.has_more and found.records:
            # Beyond this one, records of this kind are missing, and others would overtake them.
            last = found.records[-1].storage_id
            cut = last if cut is None else min(cut, last)
    settled_before = datetime.now(timezone.utc) - _LATE_COMMIT
    seen = set(state.seen)
    for record in sorted(records, key=lambda one: one.storage_id):
        if cut is not None and record.storage_id > cut:
            break
        at = datetime.fromtimestamp(record.timestamp, timezone.utc)
        if record.storage_id not in seen:
            ended = read_run(instance, record.run_id, _kind(record), at)
            if ended is not None:
                yield ended
            seen.add(record.storage_id)
        if at < settled_before:
            state.after = max(state.after, record.storage_id)
    state.seen = sorted(number for number in seen if number > state.after)


def _kind(record: EventLogRecord) -> DagsterEventType:
    event = record.event_log_entry.dagster_event
    assert event is not None  # a status change is one
    return event.event_type


def _last_before(instance: DagsterInstance, moment: datetime) -> int:
    """The number of the last end of a run before `moment`: what is older than alerts live is not told."""
    numbers = [0]
    for kind in _ENDS:
        found = instance.fetch_run_status_changes(
            RunStatusChangeRecordsFilter(event_type=kind, before_timestamp=moment.timestamp()), limit=1
        )
        numbers += [record.storage_id for record in found.records]
    return max(numbers)


def _take_in(state: Alerts, ended: EndedRun, configuration: Configuration, settings: Settings, now: datetime) -> None:
    events = events_of(ended, encrypts=settings.encryption_key is not None)
    for completed in [event for event in events if isinstance(event, BackupCompleted)]:
        counts_for = _counts_for(ended)
        if ended.settles_later:
            events.remove(completed)
            state.unsettled.append(
                Unsettled(run_id=ended.run.run_id, counts_for=counts_for, completed=completed.to_record())
            )
        elif counts_for is not None:
            state.successes[counts_for] = Success(at=ended.at, backup=completed.backup)
    pause = settings.retry_after_seconds
    if pause and ended.schedule is not None and _deserves_another(ended):
        state.second_attempts.append(
            SecondAttempt(
                run_id=ended.run.run_id,
                job=ended.run.job_name,
                due_at=ended.at + timedelta(seconds=pause),
                tags={
                    tags.TRIGGER: Trigger.SCHEDULED.value,
                    **tags.schedule_tags(ended.schedule.id, ended.schedule.name),
                    tags.SECOND_ATTEMPT_OF: ended.run.run_id,
                },
                instead=[event.to_record() for event in events],
            )
        )
        return
    for event in events:
        _queue(state, event, ended.run.run_id, configuration, now)


def _counts_for(ended: EndedRun) -> str | None:
    """The key in `Alerts.successes` of the backup that `ended` made."""
    if ended.schedule is not None:
        return str(ended.schedule.id)
    if ended.run.tags.get(tags.TRIGGER) == Trigger.EXTERNAL.value:
        return external_key(BACKUP_JOBS[ended.run.job_name])
    return None


def _take_in_settled(instance: DagsterInstance, state: Alerts, configuration: Configuration, now: datetime) -> None:
    """Tell of the backups that have arrived since; let go of those that are waited for no more."""
    if not state.unsettled:
        return
    waiting = set(instance.get_run_ids(RunsFilter(tags={tags.SETTLING: tags.WAITING})))
    for one in [one for one in state.unsettled if one.run_id not in waiting]:
        state.unsettled.remove(one)
        run = instance.get_run_by_id(one.run_id)
        if run is not None and run.tags.get(tags.SETTLING) == tags.SETTLED:
            made = BackupCompleted.model_validate_json(one.completed)
            if one.counts_for is not None:
                state.successes[one.counts_for] = Success(at=now, backup=made.backup)
            _queue(state, made.model_copy(update={"timestamp": now}), one.run_id, configuration, now)


def _deserves_another(ended: EndedRun) -> bool:
    given = ended.run.tags
    return (
        ended.run.job_name in BACKUP_JOBS
        and given.get(tags.TRIGGER) == Trigger.SCHEDULED.value
        and tags.SECOND_ATTEMPT_OF not in given
        and ended.may_pass
    )


def _queue(state: Alerts, event: Event, group: str, configuration: Configuration, now: datetime) -> None:
    notifications = configuration.file.notifications
    webhook = state.outboxes.get(WEBHOOK)
    if webhook is not None and (notifications.on_success if event.is_success else notifications.on_failure):
        webhook.add(event, group, now)
    ping_box = state.outboxes.get(PING)
    if ping_box is not None and isinstance(event, BackupCompleted):
        # A sign of life is no news: the newest is enough.
        ping_box.waiting.clear()
        ping_box.add(event, PING, now)


def _hear(instance: DagsterInstance, state: Alerts, configuration: Configuration, now: datetime) -> None:
    """Take over what the watch has noted."""
    watch = recall(instance, WATCH_KEY, Watch)
    for entry in watch.journal if watch is not None else ():
        if entry.number > state.heard:
            _queue(state, parse_event(entry.record), entry.group, configuration, now)
            state.heard = entry.number


def _second_attempts(
    instance: DagsterInstance, state: Alerts, configuration: Configuration, now: datetime
) -> Iterator[RunRequest]:
    """Start what is due. One is forgotten only when its run is there, and will itself be told."""
    for attempt in list(state.second_attempts):
        started = instance.get_runs(RunsFilter(tags={tags.SECOND_ATTEMPT_OF: attempt.run_id}), limit=1)
        hopeless = now > attempt.due_at + LAUNCH_PATIENCE or not configuration.runs_schedules
        if started or hopeless:
            state.second_attempts.remove(attempt)
            for record in () if started else attempt.instead:
                _queue(state, parse_event(record), attempt.run_id, configuration, now)
        elif now >= attempt.due_at:
            # The key makes Dagster start it once, should this tick be repeated.
            yield RunRequest(run_key=f"second attempt of {attempt.run_id}", job_name=attempt.job, tags=attempt.tags)


def _work(
    instance: DagsterInstance,
    state: Alerts,
    configuration: Configuration,
    give_up_after: timedelta,
    log: Callable[[str], None],
) -> list[tuple[str, GivenUp]]:
    """Let all endpoints work at the same time, so that a slow one holds nobody else up."""
    until = time.monotonic() + BUDGET_SECONDS
    writing = threading.Lock()

    def save() -> None:
        with writing:
            remember(instance, ALERTS_KEY, state)

    def work(name: str, attempt: Callable[[Event], object]) -> list[GivenUp]:
        def told(event: Event) -> None:
            attempt(event)
            log(f"[Notify] {name}: {event.event} ({event.key}) delivered")

        return state.outboxes[name].work(
            told,
            now=lambda: datetime.now(timezone.utc),
            until=until,
            give_up_after=give_up_after,
            changed=save,
        )

    attempts: dict[str, Callable[[Event], object]] = {}
    if WEBHOOK in state.outboxes and configuration.webhook is not None:
        attempts[WEBHOOK] = partial(deliver, endpoint=configuration.webhook)
    if PING in state.outboxes and configuration.ping is not None:
        address = configuration.ping
        attempts[PING] = lambda event: ping(address)
    if not attempts:
        return []
    with ThreadPoolExecutor(len(attempts)) as pool:
        working = {name: pool.submit(work, name, attempt) for name, attempt in attempts.items()}
    return [(name, one) for name, future in working.items() for one in future.result()]

"""What is wrong without any run having failed: backups that stay away, storage that fills, a file that cannot be used.

What belongs here: judging these, once per occurrence, and the journal of events that come of it. What does not:
delivery (`alerts`), and ended runs (`run_events`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone, tzinfo
from itertools import pairwise

from pydantic import AwareDatetime, BaseModel, Field

from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.errors import KanbuError, StorageError
from kanbu_backup_dagster.notifications.events import (
    BackupOverdue,
    BackupPart,
    BackupRecovered,
    ConfigInvalid,
    ConfigPart,
    ConfigProblem,
    Event,
    OverduePart,
    ScheduleRef,
    StorageLow,
    StoragePart,
)
from kanbu_backup_dagster.orchestration.configuration import Configuration
from kanbu_backup_dagster.orchestration.schedules import BACKUP_TYPES
from kanbu_backup_dagster.schedule_file import Schedule, next_runs
from kanbu_backup_dagster.storage.open import open_storage

SETTLING = timedelta(minutes=5)
"""After the service was down, late starts and the alerts of runs that ended meanwhile come first."""
CONFIG_SETTLING = timedelta(minutes=1)
"""A file that is being edited is wrong for a moment."""
STORAGE_EVERY = timedelta(minutes=10)
STORAGE_SECONDS = 10.0
RUNS_COUNTED = 1000


class Success(BaseModel):
    """The last backup that was made for a schedule."""

    at: AwareDatetime
    backup: BackupPart


class Gap(BaseModel):
    """An overdue backup that was told."""

    expected_by: AwareDatetime
    last_success_at: AwareDatetime | None = None


class Journaled(BaseModel):
    """An event to be delivered; numbers only grow."""

    number: int
    record: str
    group: str


class Watch(BaseModel):
    """What has been seen so far.

    Attributes:
        ticked_at: When it was last looked.
        up_since: Since when it has been looked without a break.
        first_seen: When each enabled schedule was first seen, by id: what has never succeeded is waited for from there.
        gaps: Overdue schedules, by id.
        problems: A fingerprint of the configuration's problems, since when, and whether they were told.
        storage_checked_at: When room was last looked for.
        storage_low: Whether it was told to be low.
        journal: Events not yet taken over for delivery.
        numbered: The last number given.
    """

    ticked_at: AwareDatetime | None = None
    up_since: AwareDatetime | None = None
    first_seen: dict[str, AwareDatetime] = Field(default_factory=dict)
    gaps: dict[str, Gap] = Field(default_factory=dict)
    problems: str = ""
    problems_since: AwareDatetime | None = None
    problems_told: bool = False
    storage_checked_at: AwareDatetime | None = None
    storage_low: bool = False
    storage_problem: str = ""
    journal: list[Journaled] = Field(default_factory=list)
    numbered: int = 0

    def note(self, event: Event, group: str) -> None:
        """Put `event` into the journal."""
        self.numbered += 1
        self.journal.append(Journaled(number=self.numbered, record=event.to_record(), group=group))

    def settle(self, now: datetime) -> bool:
        """Take note of this look; whether there has been time enough since the last break."""
        if self.up_since is None or self.ticked_at is None or not timedelta(0) <= now - self.ticked_at <= SETTLING:
            self.up_since = now
        self.ticked_at = now
        return now - self.up_since >= SETTLING


def deadline(row: Schedule, zone: tzinfo, last: datetime, grace: timedelta) -> datetime:
    """Until when a backup of `row` may come whose last one came at `last`: its next time, and the grace."""
    return next_runs(row.cron, zone, last, 1)[0].astimezone(timezone.utc) + grace


def longest_period(row: Schedule, zone: tzinfo, now: datetime) -> timedelta:
    """The longest pause between two of the next 60 times of `row`."""
    times = [time.astimezone(timezone.utc) for time in next_runs(row.cron, zone, now, 60)]
    return max(later - earlier for earlier, later in pairwise(times))


def last_success(row: Schedule, configuration: Configuration, successes: dict[str, Success]) -> Success | None:
    """The last backup that counts for `row`: made for it, or by an external scheduler that named no schedule."""
    found = [successes.get(key) for key in _keys(row)]
    return max((one for one in found if one is not None), key=lambda one: one.at, default=None)


def _keys(row: Schedule) -> tuple[str, str]:
    """What backups that count for `row` are remembered under."""
    return str(row.id), external_key(BackupType(row.type.value))


def external_key(backup_type: BackupType) -> str:
    """Where a triggered backup without a schedule is remembered."""
    return f"external/{backup_type.value}"


def judge_silence(
    watch: Watch,
    configuration: Configuration,
    successes: dict[str, Success],
    unsettled: dict[str, str],
    now: datetime,
    *,
    settled: bool,
) -> None:
    """Note what became overdue, once a gap, and what came back.

    Args:
        successes: The last backup by schedule id, or by `external_key`.
        unsettled: Under the same keys, the file of a backup that is not known to have arrived, which is no success yet.
        settled: Whether the service is up for long enough to tell.
    """
    rows = {str(row.id): row for row in configuration.file.schedules if row.enabled and row.type in BACKUP_TYPES}
    if configuration.file.parsed_whole and configuration.readable is not None:
        watch.first_seen = {key: since for key, since in watch.first_seen.items() if key in rows}
        watch.gaps = {key: gap for key, gap in watch.gaps.items() if key in rows}
    grace = timedelta(hours=configuration.file.notifications.overdue_grace_hours)
    for key, row in rows.items():
        begun = watch.first_seen.setdefault(key, now)
        success = last_success(row, configuration, successes)
        gap = watch.gaps.get(key)
        ref = ScheduleRef(id=row.id, name=row.name)
        if gap is not None:
            if success is not None and (gap.last_success_at is None or success.at > gap.last_success_at):
                del watch.gaps[key]
                watch.note(
                    BackupRecovered(
                        key=f"overdue/{key}/{gap.expected_by.isoformat()}",
                        schedule=ref,
                        timestamp=success.at,
                        backup=success.backup,
                        overdue=OverduePart(last_success_at=gap.last_success_at, expected_by=gap.expected_by),
                    ),
                    group=f"overdue/{key}",
                )
            continue
        # A success from before the schedule was enabled (again) starts no period.
        expected_by = deadline(row, configuration.zone, max(begun, success.at) if success else begun, grace)
        if settled and now > expected_by:
            at = success.at if success else None
            watch.gaps[key] = Gap(expected_by=expected_by, last_success_at=at)
            watch.note(
                BackupOverdue(
                    key=f"overdue/{key}/{expected_by.isoformat()}",
                    schedule=ref,
                    timestamp=now,
                    backup=BackupPart(type=BackupType(row.type.value)),
                    overdue=OverduePart(
                        last_success_at=at,
                        expected_by=expected_by,
                        unsettled=next((unsettled[key] for key in _keys(row) if key in unsettled), None),
                    ),
                ),
                group=f"overdue/{key}",
            )


def judge_configuration(watch: Watch, configuration: Configuration, others: Iterable[str], now: datetime) -> None:
    """Note problems of settings and schedule file that stay for a minute, once each set of them."""
    problems = list(_problems(configuration, others))
    found = (
        hashlib.sha256("\n".join(f"{one.line}:{one.column}:{one.message}" for one in problems).encode()).hexdigest()[
            :16
        ]
        if problems
        else ""
    )
    if found != watch.problems:
        watch.problems, watch.problems_since, watch.problems_told = found, now, False
    if not found or watch.problems_told or watch.problems_since is None or now - watch.problems_since < CONFIG_SETTLING:
        return
    watch.problems_told = True
    all_in_settings = len(problems) == len(configuration.settings_problems)
    watch.note(
        ConfigInvalid(
            key=f"config/{found}/{watch.problems_since.isoformat()}",
            timestamp=now,
            config=ConfigPart(
                file="settings" if all_in_settings else configuration.file.path.name, problems=tuple(problems)
            ),
        ),
        group="config",
    )


def _problems(configuration: Configuration, others: Iterable[str]) -> Iterator[ConfigProblem]:
    for problem in configuration.file.problems:
        row = f"{problem.schedule}: " if problem.schedule else ""
        yield ConfigProblem(line=problem.line, column=problem.column, message=row + problem.message)
    for message in (*configuration.settings_problems, *others):
        yield ConfigProblem(message=message)


def judge_storage(watch: Watch, configuration: Configuration, successes: dict[str, Success], now: datetime) -> None:
    """Note that storage has less room than the backups of the next days need; once, until there is room again."""
    if configuration.settings is None:
        return  # Which storage it is may not be known.
    if watch.storage_checked_at is not None and timedelta(0) <= now - watch.storage_checked_at < STORAGE_EVERY:
        return
    watch.storage_checked_at = now
    needed = needed_bytes(configuration, successes, now)
    if not needed:
        watch.storage_low = False
        return
    try:
        storage = open_storage(configuration.settings)
        free = _in_time(storage.free_bytes)
    except KanbuError as error:
        # Not to be reached is not the same as full; the backups that fail for it tell of it.
        watch.storage_problem = str(error)
        return
    watch.storage_problem = ""
    if free < needed and not watch.storage_low:
        watch.storage_low = True
        watch.note(
            StorageLow(
                key=f"storage/{now.isoformat()}",
                timestamp=now,
                storage=StoragePart(path=storage.location, free_bytes=free, needed_bytes=needed),
            ),
            group="storage",
        )
    elif free >= needed * 1.2:  # a little more than was missing, so that it does not flap
        watch.storage_low = False


def needed_bytes(configuration: Configuration, successes: dict[str, Success], now: datetime) -> int:
    """What the backups of the next days need, each as large as the last of its type: those of enabled schedules, and of
    disabled ones that another scheduler triggers, which their last backup tells."""
    days = configuration.file.notifications.storage_low_days
    sizes: dict[str, tuple[datetime, int]] = {}
    for success in successes.values():
        kind, size = success.backup.type.value, success.backup.file_size
        if size is not None and (kind not in sizes or sizes[kind][0] < success.at):
            sizes[kind] = (success.at, size)
    needed = 0
    for row in configuration.file.schedules:
        if row.type.value in sizes and (row.enabled or _is_triggered(row, configuration.zone, successes, now)):
            needed += sizes[row.type.value][1] * _runs_until(row, configuration.zone, now, now + timedelta(days=days))
    return needed


def _is_triggered(row: Schedule, zone: tzinfo, successes: dict[str, Success], now: datetime) -> bool:
    # Whose times are only about those of the row: twice as long, so that it does not flap.
    success = successes.get(str(row.id))
    return success is not None and now - success.at <= 2 * longest_period(row, zone, now)


def _runs_until(row: Schedule, zone: tzinfo, now: datetime, end: datetime) -> int:
    count, at = 0, now
    while count < RUNS_COUNTED:
        at = next_runs(row.cron, zone, at, 1)[0]
        if at > end:
            break
        count += 1
    return count


def _in_time(ask: Callable[[], int]) -> int:
    """The answer of `ask`, unless it takes longer than a mount that is alive would."""
    answers: list[int | BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            answers.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(STORAGE_SECONDS)
    if not answers:
        raise StorageError(f"Storage not accessible: it did not answer in {STORAGE_SECONDS:g} seconds.")
    if isinstance(answers[0], BaseException):
        raise answers[0]
    return answers[0]

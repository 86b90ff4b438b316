"""Retention: which backups stay, which may go, and why.

What belongs here: the plan, as a pure function of the files with their manifests, the policies, the moment and the
time zone; and the brakes, pure as well, that hold a plan back. What does not: listing files, deleting them, and when.

The rules, in the calendar of the zone, by the time in a file's name:

- `latest`: the newest backup and the newest verified one stay.
- `daily`: the backups of the `keep_daily` most recent days that have any stay, unless older than `retention_days`.
- `weekly`: of the `keep_weekly` most recent weeks (Monday to Sunday) that have one, the Sunday's backups stay; in a
  finished week without, its newest stands in. The week in progress counts once its Sunday's backup is there.
- `monthly`: of the `keep_monthly` most recent months that have any, the backups of the 1st stay; in a month without,
  its earliest stands in. Weeks and months keep beyond `retention_days`.
- `age`: with all three at 0, all up to `retention_days` stay. Days are calendar days: a file has expired when its date
  lies more than `retention_days` before today's.
- What no rule keeps goes: `expired` when older than the `retention_days` of every policy, else `thinned`.

A file stays if any policy keeps it. Policies are those of all schedules of the type, and those recorded in manifests of
files whose schedule is no longer there. A recorded one judges all files of the type, as a schedule's does, for as long
as a file that carries it stays: what one policy promised does not go because a schedule was removed, and a second run
deletes nothing that the first left.

`failed` backups stand for nothing and go only when expired. Of candidates to stand in, a verified one goes first.
`pre_restore` backups stand for nothing: the 3 newest stay (and the 3 newest that have not failed), others for 30 days.
Held files and files in use stay, and stand for their day, week and month like any other. Files without a manifest or
with one that is not trusted, of another type, dated in the future, or with a name that is not a backup's stand for
nothing and are never deleted.

Where the rules leave a choice, more is kept: `latest` holds among all backups and among those that can stand for
something, so that neither a failed nor a pre-restore backup takes the place of the last good one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta, tzinfo
from typing import NamedTuple, Protocol, TypedDict

from kanbu_backup_dagster.backup.manifest import Manifest, Trigger, VerificationStatus
from kanbu_backup_dagster.backup.names import BackupName, BackupType
from kanbu_backup_dagster.schedule_file import RetentionPolicy

PRE_RESTORE_KEPT = 3
PRE_RESTORE_DAYS = 30
MASS_DELETION_FILES = 5

_RULES = ("latest", "daily", "weekly", "monthly", "age", "pre_restore", "failed", "held", "in_use")


class Candidate(Protocol):
    """A file to be judged; `catalog.Backup` is one.

    Attributes:
        filename: The file's name.
        name: It taken apart; None when it is not a backup's.
        manifest: What is known of it; None when there is no manifest or it is not trusted.
        problem: Why a manifest that is there is not trusted.
    """

    @property
    def filename(self) -> str: ...
    @property
    def name(self) -> BackupName | None: ...
    @property
    def manifest(self) -> Manifest | None: ...
    @property
    def problem(self) -> str | None: ...


class VerdictJson(TypedDict):
    """The form of a verdict outside."""

    filename: str
    keep: bool
    rules: list[str]
    reason: str


class Verdict(NamedTuple):
    """What is to become of a file: the names of all rules that keep it, or of the one by which it goes, and why."""

    filename: str
    keep: bool
    rules: tuple[str, ...]
    reason: str

    def to_json(self) -> VerdictJson:
        """The verdict as JSON's types."""
        return {"filename": self.filename, "keep": self.keep, "rules": list(self.rules), "reason": self.reason}


@dataclass(frozen=True)
class RetentionPlan:
    """A verdict for each file.

    Attributes:
        backup_type: The type that was judged.
        verdicts: In the order the files were given.
        judged: How many files could have been deleted by some rule, a coming backup included.
    """

    backup_type: BackupType
    verdicts: tuple[Verdict, ...]
    judged: int

    @property
    def deletions(self) -> tuple[Verdict, ...]:
        """The verdicts on files that go."""
        return tuple(verdict for verdict in self.verdicts if not verdict.keep)

    def to_json(self) -> list[VerdictJson]:
        """The plan as a list of `{filename, keep, rules, reason}`."""
        return [verdict.to_json() for verdict in self.verdicts]


class Brake(NamedTuple):
    """Why a plan is held back: `mass_deletion` or `shrunk`, and the facts in a sentence."""

    name: str
    reason: str


def plan_retention(
    files: Iterable[Candidate],
    *,
    backup_type: BackupType,
    policies: Mapping[int, RetentionPolicy],
    config_whole: bool,
    now: datetime,
    zone: tzinfo,
    coming: datetime | None = None,
    in_use: Mapping[str, str] | None = None,
) -> RetentionPlan:
    """Judge each of `files` by the rules above. Deletes nothing.

    Args:
        files: The files, of any type.
        backup_type: The type to judge; files of another are kept.
        policies: The policies of all schedules of that type, enabled or not, by schedule id
            (`ScheduleFile.policies`). Without any, and none recorded, nothing goes.
        config_whole: Whether the schedule file was read whole (`ScheduleFile.parsed_whole`). If not, nothing goes.
        now: The moment to judge from (aware).
        zone: Whose calendar counts.
        coming: When a backup is to come (aware) that is counted in as made and verified, without a verdict of its own.
            The plan is then the one after it: it is judged from the later of `now` and `coming`.
        in_use: Files that something is reading now, and what it is.

    Raises:
        ValueError: `now` or `coming` has no zone.
    """
    if now.tzinfo is None or (coming is not None and coming.tzinfo is None):
        raise ValueError("a time without a zone")
    candidates = list(files)
    now = max(now, coming) if coming else now
    verdicts, judged = _sort_out(candidates, backup_type, now, zone)
    if coming:
        judged.append(_File(-1, "", coming, coming.astimezone(zone).date(), None))
    if not config_whole:
        reason = "the schedule file has problems: nothing is deleted until it loads whole"
        verdicts.update((file.index, Verdict(file.filename, True, ("config_invalid",), reason)) for file in judged)
    elif not policies and not any(file.carries(policies) for file in judged):
        reason = f"no schedule keeps {backup_type.value} backups by a policy: nothing is deleted"
        verdicts.update((file.index, Verdict(file.filename, True, ("no_policy",), reason)) for file in judged)
    else:
        verdicts.update(_judge(judged, policies, now.astimezone(zone).date(), in_use or {}))
    return RetentionPlan(backup_type, tuple(verdicts[index] for index in range(len(candidates))), len(judged))


class _File:
    """A file that the rules apply to."""

    __slots__ = ("at", "day", "failed", "filename", "index", "manifest", "pre_restore", "verified")

    def __init__(self, index: int, filename: str, at: datetime, day: date, manifest: Manifest | None) -> None:
        """`index` is the place among the candidates; a coming backup has none (-1), and no `manifest` yet."""
        self.index = index
        self.filename = filename
        self.at = at
        self.day = day
        self.manifest = manifest
        status = manifest.verification.status if manifest else VerificationStatus.VERIFIED
        self.verified = status is VerificationStatus.VERIFIED
        self.failed = status is VerificationStatus.FAILED
        self.pre_restore = manifest is not None and manifest.trigger is Trigger.PRE_RESTORE

    def carries(self, policies: Mapping[int, RetentionPolicy]) -> RetentionPolicy | None:
        """The recorded policy, when its schedule is not among `policies`."""
        if self.manifest is None or self.manifest.schedule_id in policies:
            return None
        return self.manifest.retention


def _age_order(file: _File) -> tuple[datetime, str]:
    return file.at, file.filename


def _sort_out(
    candidates: Sequence[Candidate], backup_type: BackupType, now: datetime, zone: tzinfo
) -> tuple[dict[int, Verdict], list[_File]]:
    """Verdicts on what is not to be judged, and the files that are."""
    verdicts: dict[int, Verdict] = {}
    judged: list[_File] = []
    for index, candidate in enumerate(candidates):
        name, manifest = candidate.name, candidate.manifest
        if name is None:
            rule, reason = "foreign_name", "not the name of a backup: not judged"
        elif name.type is not backup_type:
            rule, reason = "other_type", f"a {name.type.value} backup, not a {backup_type.value} backup: not judged"
        elif manifest is None:
            reason = "has no manifest" if candidate.problem is None else "its manifest is not trusted"
            rule, reason = "no_manifest", f"{reason}: not judged (`kanbu-backup adopt` gives it one)"
        elif manifest.type is not backup_type:
            rule, reason = "other_type", f"its manifest is of a {manifest.type.value} backup: not judged"
        elif name.created_at > now:
            rule, reason = "future", "dated in the future: not judged"
        else:
            day = name.created_at.astimezone(zone).date()
            judged.append(_File(index, candidate.filename, name.created_at, day, manifest))
            continue
        verdicts[index] = Verdict(candidate.filename, True, (rule,), reason)
    return verdicts, judged


class _Keeper(NamedTuple):
    """A policy, and whose it is."""

    policy: RetentionPolicy
    owner: str


Reasons = dict[int, dict[str, str]]
"""By a file's index: the rules that keep it, each with its reason."""


def _judge(
    judged: Sequence[_File], policies: Mapping[int, RetentionPolicy], today: date, in_use: Mapping[str, str]
) -> Iterator[tuple[int, Verdict]]:
    calendar = _Calendar([file for file in judged if not file.failed and not file.pre_restore], today)
    always = _kept_whatever_the_policy(judged, today, in_use)
    keepers, reasons = _settle_recorded(judged, policies, calendar, always)
    limit = max(keeper.policy.retention_days for keeper in keepers)
    for file in judged:
        days = (today - file.day).days
        why = reasons.get(file.index, {})
        if file.failed and days <= limit:
            why = {**why, "failed": f"failed verification; stays until it is older than {limit} days"}
        if why:
            rules = tuple(sorted(why, key=_RULES.index)) if len(why) > 1 else tuple(why)
            yield file.index, Verdict(file.filename, True, rules, "; ".join([why[rule] for rule in rules]))
        elif file.pre_restore:
            reason = (
                f"a pre-restore backup, {days} days old; they stay {PRE_RESTORE_DAYS} days, and the newest 3 for good"
            )
            yield file.index, Verdict(file.filename, False, ("expired",), reason)
        elif days > limit:
            reason = f"{days} days old, kept for {limit}; stands for no week or month that is kept"
            yield file.index, Verdict(file.filename, False, ("expired",), reason)
        else:
            reason = "stands for no day, week or month that is kept"
            yield file.index, Verdict(file.filename, False, ("thinned",), reason)


def _kept_whatever_the_policy(judged: Sequence[_File], today: date, in_use: Mapping[str, str]) -> Reasons:
    reasons: Reasons = {}

    def keep(file: _File, rule: str, reason: str) -> None:
        reasons.setdefault(file.index, {}).setdefault(rule, reason)

    standing = [file for file in judged if not file.failed and not file.pre_restore]
    for pool in (judged, standing):
        if pool:
            keep(max(pool, key=_age_order), "latest", "the newest backup")
        if verified := [file for file in pool if file.verified]:
            keep(max(verified, key=_age_order), "latest", "the newest verified backup")
    safety = sorted((file for file in judged if file.pre_restore), key=_age_order, reverse=True)
    newest = [*safety[:PRE_RESTORE_KEPT], *[file for file in safety if not file.failed][:PRE_RESTORE_KEPT]]
    for file in newest:
        keep(file, "pre_restore", f"a pre-restore backup, one of the {PRE_RESTORE_KEPT} newest")
    for file in safety:
        if (today - file.day).days <= PRE_RESTORE_DAYS:
            keep(file, "pre_restore", f"a pre-restore backup, not older than {PRE_RESTORE_DAYS} days")
    for file in judged:
        if file.manifest is not None and file.manifest.held:
            keep(file, "held", "held: stays until it is released")
        if file.filename in in_use:
            keep(file, "in_use", f"in use: {in_use[file.filename]}")
    return reasons


def _settle_recorded(
    judged: Sequence[_File], policies: Mapping[int, RetentionPolicy], calendar: _Calendar, always: Reasons
) -> tuple[list[_Keeper], Reasons]:
    """The policies that count, and all they keep.

    A recorded policy counts while a file that carries it stays; so those whose every carrier goes are taken out, until
    none is left to take out. Otherwise the next run, which no longer sees the carriers, would delete more.
    """
    owners: dict[RetentionPolicy, list[int]] = {}
    for schedule_id, policy in sorted(policies.items()):
        owners.setdefault(policy, []).append(schedule_id)
    keepers = [_Keeper(policy, _called(ids)) for policy, ids in owners.items()]
    carriers: dict[RetentionPolicy, list[_File]] = {}
    for file in judged:
        recorded = file.carries(policies)
        if recorded is not None and recorded not in owners:
            carriers.setdefault(recorded, []).append(file)
    recorded_keepers = [_Keeper(policy, "a schedule that is no longer there") for policy in carriers]
    while True:
        in_force = [*keepers, *recorded_keepers]
        reasons = {index: dict(why) for index, why in always.items()}
        for keeper in in_force:
            for file, rule, reason in calendar.kept_by(keeper):
                reasons.setdefault(file.index, {}).setdefault(rule, reason)
        limit = max(keeper.policy.retention_days for keeper in in_force)
        remaining = [
            keeper
            for keeper in recorded_keepers
            if any(
                file.index in reasons or (file.failed and calendar.age(file.day) <= limit)
                for file in carriers[keeper.policy]
            )
        ]
        # Without any policy the next run deletes nothing at all, so the last ones may have their say.
        if remaining == recorded_keepers or not (keepers or remaining):
            return in_force, reasons
        recorded_keepers = remaining


def _called(schedule_ids: Collection[int]) -> str:
    return f"schedule{'s' if len(schedule_ids) > 1 else ''} {', '.join(map(str, schedule_ids))}"


def _most_recent(count: int, unit: str) -> str:
    return f"the most recent {unit}" if count == 1 else f"one of the {count} most recent {unit}s"


class _Period(NamedTuple):
    """The files that stand for a week or a month, and why they do."""

    files: Sequence[_File]
    reason: str


class _Calendar:
    """Backups that can stand for something, by day, week and month, the most recent first."""

    def __init__(self, standing: Iterable[_File], today: date) -> None:
        self._today = today
        by_day: dict[date, list[_File]] = {}
        for file in standing:
            by_day.setdefault(file.day, []).append(file)
        self._days = sorted(by_day.items(), reverse=True)
        self._weeks = list(self._stand_for_weeks(by_day))
        self._months = list(self._stand_for_months(by_day))

    def age(self, day: date) -> int:
        """Calendar days since `day`."""
        return (self._today - day).days

    def kept_by(self, keeper: _Keeper) -> Iterator[tuple[_File, str, str]]:
        """What a policy keeps: file, rule, reason."""
        policy, owner = keeper
        if policy.keep_daily == policy.keep_weekly == policy.keep_monthly == 0:
            reason = f"not older than {policy.retention_days} days ({owner})"
            for day, files in self._days:
                if self.age(day) > policy.retention_days:
                    break
                for file in files:
                    yield file, "age", reason
        for day, files in self._days[: policy.keep_daily]:
            if self.age(day) > policy.retention_days:
                break
            reason = f"backup of {day}: {_most_recent(policy.keep_daily, 'day')} with backups ({owner})"
            for file in files:
                yield file, "daily", reason
        for periods, kept, rule, unit in (
            (self._weeks, policy.keep_weekly, "weekly", "week"),
            (self._months, policy.keep_monthly, "monthly", "month"),
        ):
            for period in periods[:kept]:
                reason = f"{period.reason}: {_most_recent(kept, unit)} ({owner})"
                for file in period.files:
                    yield file, rule, reason

    def _stand_for_weeks(self, by_day: Mapping[date, list[_File]]) -> Iterator[_Period]:
        weeks: dict[date, list[_File]] = {}
        for day, files in self._days:
            weeks.setdefault(day + timedelta(days=6 - day.weekday()), []).extend(files)
        for sunday, files in weeks.items():
            if sunday in by_day:
                yield _Period(by_day[sunday], f"backup of Sunday {sunday}")
            elif sunday < self._today:
                newest = max(files, key=lambda file: (file.verified, *_age_order(file)))
                yield _Period([newest], f"stands in for Sunday {sunday}, which has none")

    def _stand_for_months(self, by_day: Mapping[date, list[_File]]) -> Iterator[_Period]:
        months: dict[date, list[_File]] = {}
        for day, files in self._days:
            months.setdefault(day.replace(day=1), []).extend(files)
        for first, files in months.items():
            if first in by_day:
                yield _Period(by_day[first], f"backup of {first}")
            else:
                earliest = min(files, key=lambda file: (not file.verified, *_age_order(file)))
                yield _Period([earliest], f"stands in for {first}, which has none")


def mass_deletion_brake(plan: RetentionPlan) -> Brake | None:
    """Held back: a plan that deletes more than 5 files and more than half of those it could have judged.

    A clock that leapt, an outage of a month, or a first policy on an old folder look like this.
    """
    deleted = len(plan.deletions)
    if deleted <= MASS_DELETION_FILES or 2 * deleted <= plan.judged:
        return None
    return Brake(
        "mass_deletion", f"{deleted} of {plan.judged} {plan.backup_type.value} backups would be deleted at once"
    )


def shrink_brake(
    files: Iterable[Candidate],
    *,
    backup_type: BackupType,
    max_shrink: float,
    now: datetime,
    settled_until: datetime | None = None,
) -> Brake | None:
    """Held back: pruning after a backup that lost more than `max_shrink` of its size or rows against the one before.

    An emptied database dumps and verifies perfectly; its backups must not push out the last full ones.

    Args:
        files: The files, of any type.
        backup_type: The type to judge.
        max_shrink: The share of raw bytes, or of rows in all tables, that may be lost (0 to 1).
        now: Backups dated later are left out (aware).
        settled_until: When a prune last went through, of itself or accepted. Falls since then count, until the newest
            backup is no longer below the one before the fall: tonight's small backup beside last night's as small one
            releases nothing. None: only the newest backup against the one before it.
    """
    backups = sorted(
        (
            (file.name.created_at, file.filename, file.manifest)
            for file in files
            if file.name is not None
            and file.name.type is backup_type
            and file.name.created_at <= now
            and file.manifest is not None
            and file.manifest.type is backup_type
            and file.manifest.trigger is not Trigger.PRE_RESTORE
            and file.manifest.verification.status is not VerificationStatus.FAILED
        ),
        key=lambda backup: backup[:2],
    )
    if len(backups) < 2:
        return None
    newest = backups[-1][2]
    newest_rows = _rows(newest)
    for (_, _, before), (at, _, after) in zip(backups[-2::-1], backups[:0:-1], strict=True):
        if settled_until is not None and at <= settled_until:
            break
        for unit, full, small, last in (
            ("bytes", before.raw_bytes, after.raw_bytes, newest.raw_bytes),
            ("rows", _rows(before), _rows(after), newest_rows),
        ):
            if full and small is not None and last is not None and max(small, last) < full * (1 - max_shrink):
                return Brake(
                    "shrunk",
                    f"{newest.filename} holds {last:,} {unit}, {before.filename} held {full:,}: "
                    f"{1 - last / full:.1%} less, where up to {max_shrink:.0%} may be lost",
                )
        if settled_until is None:
            break
    return None


def _rows(manifest: Manifest) -> int | None:
    return sum(manifest.database.rows.values()) if manifest.database else None

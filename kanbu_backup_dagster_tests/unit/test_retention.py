"""Retention: golden cases to read, and properties that hold for any files.

The cases are in `retention_cases/`, one file each; their form is what `Case` reads.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanbu_backup_dagster.backup.manifest import (
    DatabaseFacts,
    Manifest,
    Trigger,
    Verification,
    VerificationStatus,
)
from kanbu_backup_dagster.backup.names import BackupName, BackupType
from kanbu_backup_dagster.backup.retention import (
    Brake,
    RetentionPlan,
    mass_deletion_brake,
    plan_retention,
    shrink_brake,
)
from kanbu_backup_dagster.schedule_file import RetentionPolicy

CASES = sorted((Path(__file__).parent / "retention_cases").glob("*.txt"))
MINUTE = "%a %Y-%m-%d %H:%M"


@dataclass(frozen=True)
class File:
    """A candidate, as the catalog gives them."""

    filename: str
    name: BackupName | None
    manifest: Manifest | None
    problem: str | None = None


FACTS = DatabaseFacts(name="kanbu", server_version="16.4", pg_dump_version="16.4", mode="direct", size_bytes=1)
MANIFEST = Manifest(
    filename="",
    type=BackupType.DATABASE,
    trigger=Trigger.SCHEDULED,
    created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
    raw_bytes=1,
    compressed_bytes=1,
    stored_bytes=1,
    sha256="",
    stored_sha256="",
    encrypted=False,
    duration_seconds=1,
)


def backup(
    at: datetime,
    *,
    status: str = "verified",
    trigger: Trigger = Trigger.SCHEDULED,
    backup_type: BackupType = BackupType.DATABASE,
    schedule_id: int | None = 1,
    recorded: RetentionPolicy | None = None,
    held: bool = False,
    raw_bytes: int = 1000,
    rows: dict[str, int] | None = None,
) -> File:
    name = BackupName(backup_type, at, compressed=True, encrypted=False)
    facts = None if rows is None else FACTS.model_copy(update={"rows": rows})
    manifest = MANIFEST.model_copy(
        update={
            "filename": str(name),
            "type": backup_type,
            "trigger": trigger,
            "schedule_id": schedule_id,
            "created_at": at,
            "raw_bytes": raw_bytes,
            "database": facts,
            "retention": recorded,
            "verification": Verification(status=VerificationStatus(status)),
            "held": held,
        }
    )
    return File(str(name), name, manifest)


def plan(
    files: Sequence[File],
    policies: dict[int, RetentionPolicy],
    now: datetime,
    zone: tzinfo = timezone.utc,
    *,
    config_whole: bool = True,
    coming: datetime | None = None,
    in_use: dict[str, str] | None = None,
) -> RetentionPlan:
    return plan_retention(
        files,
        backup_type=BackupType.DATABASE,
        policies=policies,
        config_whole=config_whole,
        now=now,
        zone=zone,
        coming=coming,
        in_use=in_use,
    )


def moment(text: str) -> datetime:
    at = datetime.strptime(text, MINUTE).replace(tzinfo=timezone.utc)
    assert at.strftime(MINUTE) == text, f"{text} is a {at:%a}"
    return at


@dataclass
class Case:
    """A golden case: what it shows, the setting, the files (times in UTC), and what is to become of them.

    `every day A .. B at HH:MM [not after now]` is a verified backup a day; a file's attributes follow its time. What is
    not `kept`, with all rules that keep it, has to be `gone`, by rule and number.
    """

    title: str
    now: datetime = MANIFEST.created_at
    zone: tzinfo = timezone.utc
    coming: datetime | None = None
    config_whole: bool = True
    policies: dict[int, RetentionPolicy] = field(default_factory=dict)
    files: list[File] = field(default_factory=list)
    in_use: dict[str, str] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Case:
        title, *lines = path.read_text().splitlines()
        case = cls(title)
        part = ""
        named: dict[str, str] = {}
        for line in filter(None, lines):
            word, _, rest = line.strip().partition(" ")
            if not line.startswith(" "):
                part = word
                case._set(word, rest.strip())
            elif part == "files":
                case._add(line.strip(), named)
            elif part == "kept":
                case.kept[named.pop(line.strip()[:20])] = line.strip()[20:].split()
            else:
                case.gone[word] = int(rest)
        return case

    def _set(self, word: str, value: str) -> None:
        if word == "now":
            self.now = moment(value)
        elif word == "coming":
            self.coming = moment(value)
        elif word == "zone":
            self.zone = ZoneInfo(value)
        elif word == "policy":
            schedule_id, text = value.split(": ")
            self.policies[int(schedule_id)] = RetentionPolicy.parse(text)
        elif word == "config":
            self.config_whole = value != "broken"
        else:
            assert word in ("files", "kept", "gone"), word

    def _add(self, line: str, named: dict[str, str]) -> None:
        if days := re.fullmatch(r"every day (\S+) \.\. (\S+) at (\d\d):(\d\d)( not after now)?", line):
            day, last = date.fromisoformat(days[1]), date.fromisoformat(days[2])
            while day <= last:
                at = datetime(day.year, day.month, day.day, int(days[3]), int(days[4]), tzinfo=timezone.utc)
                if not days[5] or at <= self.now:
                    self._add(at.strftime(MINUTE), named)
                day += timedelta(days=1)
            return
        at, words = moment(line[:20]), line[20:].split()
        options = dict(word.split("=") for word in words if "=" in word)
        status = next((word for word in words if word in ("verified", "pending", "failed")), "verified")
        file = backup(
            at,
            status=status,
            trigger=Trigger.PRE_RESTORE if "pre_restore" in words else Trigger.SCHEDULED,
            backup_type=BackupType.SOURCE if "source" in words else BackupType.DATABASE,
            schedule_id=None if "manual" in words else int(options.get("schedule", "1")),
            recorded=RetentionPolicy.parse(options["recorded"]) if "recorded" in options else None,
            held="held" in words,
        )
        if "legacy" in words:
            file = replace(file, manifest=None)
        if "untrusted" in words:
            file = replace(file, manifest=None, problem="it was edited")
        if "foreign" in words:
            file = File(f"notes-{at:%d}.txt", None, file.manifest)
        if "in_use" in words:
            self.in_use[file.filename] = "a restore reads it"
        assert line[:20] not in named, f"{line} stands twice"
        self.files.append(file)
        named[line[:20]] = file.filename


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden_case(path: Path) -> None:
    case = Case.read(path)
    result = plan(
        case.files,
        case.policies,
        case.now,
        case.zone,
        config_whole=case.config_whole,
        coming=case.coming,
        in_use=case.in_use,
    )
    assert [verdict.filename for verdict in result.verdicts] == [file.filename for file in case.files]
    kept = {verdict.filename: list(verdict.rules) for verdict in result.verdicts if verdict.keep}
    assert kept == case.kept, case.title
    assert Counter(verdict.rules[0] for verdict in result.deletions) == case.gone, case.title


def test_there_are_golden_cases() -> None:
    assert len(CASES) > 20


class TestReasons:
    NOW = datetime(2026, 4, 15, 3, tzinfo=timezone.utc)

    def reasons(self, *files: File, policies: dict[int, RetentionPolicy] | None = None) -> list[str]:
        given = {1: RetentionPolicy.parse("10/1/2/1")} if policies is None else policies
        return [verdict.reason for verdict in plan(files, given, self.NOW).verdicts]

    def day(self, month: int, day: int, **options: object) -> File:
        return backup(datetime(2026, month, day, 2, tzinfo=timezone.utc), **options)  # type: ignore[arg-type]

    def test_each_says_what_a_person_needs(self) -> None:
        assert self.reasons(
            self.day(3, 28), self.day(4, 1), self.day(4, 2), self.day(4, 11), self.day(4, 12), self.day(4, 13)
        ) == [
            "18 days old, kept for 10; stands for no week or month that is kept",
            "backup of 2026-04-01: the most recent month (schedule 1)",
            "stands in for Sunday 2026-04-05, which has none: one of the 2 most recent weeks (schedule 1)",
            "stands for no day, week or month that is kept",
            "backup of Sunday 2026-04-12: one of the 2 most recent weeks (schedule 1)",
            "the newest backup; backup of 2026-04-13: the most recent day with backups (schedule 1)",
        ]

    def test_a_reason_names_all_schedules_of_a_policy(self) -> None:
        same = RetentionPolicy.parse("10/1/0/0")
        (reason,) = self.reasons(self.day(4, 14), policies={2: same, 1: same})
        assert reason.endswith("(schedules 1, 2)")

    def test_json_is_a_list_of_filename_keep_rules_reason(self) -> None:
        result = plan([self.day(4, 13), self.day(4, 14)], {1: RetentionPolicy.parse("10/1/0/0")}, self.NOW)
        assert result.to_json() == [
            {
                "filename": "kanbu_backup_2026-04-13T02-00-00.sql.gz",
                "keep": False,
                "rules": ["thinned"],
                "reason": "stands for no day, week or month that is kept",
            },
            {
                "filename": "kanbu_backup_2026-04-14T02-00-00.sql.gz",
                "keep": True,
                "rules": ["latest", "daily"],
                "reason": "the newest backup; backup of 2026-04-14: the most recent day with backups (schedule 1)",
            },
        ]

    def test_a_time_without_zone_is_refused(self) -> None:
        with pytest.raises(ValueError, match="without a zone"):
            plan([], {}, datetime(2026, 1, 1))  # noqa: DTZ001


ZONES = [timezone.utc, ZoneInfo("Europe/Amsterdam"), ZoneInfo("America/New_York"), ZoneInfo("Pacific/Apia")]

policies_ = st.builds(
    RetentionPolicy,
    retention_days=st.integers(0, 60),
    keep_daily=st.integers(0, 9),
    keep_weekly=st.integers(0, 6),
    keep_monthly=st.integers(0, 5),
)
nows = st.datetimes(
    datetime(2027, 12, 1),  # noqa: DTZ001 - hypothesis wants bounds without a zone
    datetime(2028, 12, 31),  # noqa: DTZ001
    timezones=st.just(timezone.utc),
)


@st.composite
def folders(draw: st.DrawFn, *, recorded: bool = True, only_good: bool = False) -> tuple[datetime, list[File]]:
    """A moment and files around it: gaps, many a day, all statuses and triggers, some dated in the future."""
    now = draw(nows)
    minutes = draw(st.lists(st.integers(-3000, 200_000), max_size=40, unique=True))
    clusters = draw(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 12)), max_size=4))
    minutes += [days * 1440 + extra * 7 for days, count in clusters for extra in range(count)]
    files = []
    for age in sorted(set(minutes), reverse=True):
        status = "verified" if only_good else draw(st.sampled_from(["verified", "verified", "pending", "failed"]))
        trigger = (
            Trigger.SCHEDULED if only_good else draw(st.sampled_from([*[Trigger.SCHEDULED] * 5, Trigger.PRE_RESTORE]))
        )
        schedule_id = draw(st.sampled_from([1, 2, 7, 8, None])) if recorded else 1
        file = backup(
            (now - timedelta(minutes=age)).replace(second=0, microsecond=0),
            status=status,
            trigger=trigger,
            schedule_id=schedule_id,
            recorded=draw(st.none() | policies_) if recorded else None,
            held=not only_good and draw(st.integers(0, 15)) == 0,
        )
        if not only_good and draw(st.integers(0, 15)) == 0:
            file = replace(file, manifest=None)
        files.append(file)
    return now, files


def kept(result: RetentionPlan) -> set[str]:
    return {verdict.filename for verdict in result.verdicts if verdict.keep}


def remaining(files: list[File], result: RetentionPlan) -> list[File]:
    return [file for file in files if file.filename in kept(result)]


class TestProperties:
    @given(folders(), st.dictionaries(st.sampled_from([1, 2]), policies_), st.sampled_from(ZONES))
    @settings(max_examples=150, deadline=None)
    def test_running_twice_deletes_nothing_more(
        self, folder: tuple[datetime, list[File]], policies: dict[int, RetentionPolicy], zone: tzinfo
    ) -> None:
        now, files = folder
        rest = remaining(files, plan(files, policies, now, zone))
        assert plan(rest, policies, now, zone).deletions == ()

    @given(folders(), st.dictionaries(st.sampled_from([1, 2]), policies_), st.sampled_from(ZONES))
    @settings(max_examples=150, deadline=None)
    def test_newest_newest_verified_and_what_is_not_judged_stay(
        self, folder: tuple[datetime, list[File]], policies: dict[int, RetentionPolicy], zone: tzinfo
    ) -> None:
        now, files = folder
        stay = kept(plan(files, policies, now, zone))
        past = [
            file
            for file in files
            if file.manifest is not None and file.name is not None and file.name.created_at <= now
        ]
        whole = [file for file in past if file.manifest and file.manifest.verification.status != "failed"]
        good = [file for file in whole if file.manifest and file.manifest.trigger is not Trigger.PRE_RESTORE]
        for pool in (past, good):
            verified = [file for file in pool if file.manifest and file.manifest.verification.status == "verified"]
            for matching in filter(None, (pool, verified)):
                assert max(matching, key=lambda file: file.filename).filename in stay
        assert {file.filename for file in files if file not in past} <= stay
        assert {file.filename for file in past if file.manifest and file.manifest.held} <= stay

    @given(folders(recorded=False), st.lists(policies_, min_size=1, max_size=4), st.sampled_from(ZONES))
    @settings(max_examples=100, deadline=None)
    def test_a_union_keeps_whatever_any_of_its_policies_keeps(
        self, folder: tuple[datetime, list[File]], policies: list[RetentionPolicy], zone: tzinfo
    ) -> None:
        now, files = folder
        together = kept(plan(files, dict(enumerate(policies, 1)), now, zone))
        for policy in policies:
            assert kept(plan(files, {1: policy}, now, zone)) <= together

    @given(folders(), st.dictionaries(st.sampled_from([1, 2]), policies_, min_size=1), st.sampled_from(ZONES))
    @settings(max_examples=100, deadline=None)
    def test_recorded_policies_only_ever_keep_more(
        self, folder: tuple[datetime, list[File]], policies: dict[int, RetentionPolicy], zone: tzinfo
    ) -> None:
        now, files = folder
        bare = [
            replace(file, manifest=file.manifest.model_copy(update={"retention": None}) if file.manifest else None)
            for file in files
        ]
        assert kept(plan(bare, policies, now, zone)) <= kept(plan(files, policies, now, zone))

    @given(folders(recorded=False, only_good=True), policies_, st.sampled_from(ZONES))
    @settings(max_examples=150, deadline=None)
    def test_agrees_with_the_rules_read_out_one_file_at_a_time(
        self, folder: tuple[datetime, list[File]], policy: RetentionPolicy, zone: tzinfo
    ) -> None:
        now, files = folder
        past = [file for file in files if file.name and file.name.created_at <= now]
        expected = {file.filename for file in files if file not in past or by_the_book(file, past, policy, now, zone)}
        assert kept(plan(files, {1: policy}, now, zone)) == expected

    @given(
        folders(only_good=True), st.dictionaries(st.sampled_from([1, 2]), policies_, min_size=1), st.sampled_from(ZONES)
    )
    @settings(max_examples=100, deadline=None)
    def test_preview_is_what_the_next_prune_does(
        self, folder: tuple[datetime, list[File]], policies: dict[int, RetentionPolicy], zone: tzinfo
    ) -> None:
        now, files = folder
        coming = (now + timedelta(hours=7)).replace(microsecond=0)
        preview = plan(files, policies, now, zone, coming=coming)
        made = [*files, backup(coming, schedule_id=1)]
        assert plan(made, policies, coming, zone).verdicts[:-1] == preview.verdicts

    @given(folders(only_good=True, recorded=False), policies_, st.integers(1, 400))
    @settings(max_examples=30, deadline=None)
    def test_day_after_day_the_folder_stays_bounded_and_never_empty(
        self, folder: tuple[datetime, list[File]], policy: RetentionPolicy, days: int
    ) -> None:
        now, files = folder
        files = [file for file in files if file.name and file.name.created_at <= now]
        for day in range(1, min(days, 60)):
            at = now.replace(microsecond=0) + timedelta(days=day)
            files = [*files, backup(at)]
            files = remaining(files, plan(files, {1: policy}, at))
            assert str(at.strftime("kanbu_backup_%Y-%m-%dT%H-%M-%S.sql.gz")) in {file.filename for file in files}


def by_the_book(file: File, files: list[File], policy: RetentionPolicy, now: datetime, zone: tzinfo) -> bool:
    """Whether one of good, verified backups stays, by the rules' own words and no thought of speed."""

    def day(of: File) -> date:
        assert of.name is not None
        return of.name.created_at.astimezone(zone).date()

    def sunday(of: date) -> date:
        return of + timedelta(days=7 - of.isoweekday())

    today = now.astimezone(zone).date()
    mine, days = day(file), sorted({day(other) for other in files}, reverse=True)
    age = (today - mine).days
    if file.filename == max(other.filename for other in files):
        return True
    if policy.keep_daily == policy.keep_weekly == policy.keep_monthly == 0:
        return age <= policy.retention_days
    if mine in days[: policy.keep_daily] and age <= policy.retention_days:
        return True
    weeks = sorted({sunday(d) for d in days if sunday(d) in days or sunday(d) < today}, reverse=True)
    if sunday(mine) in weeks[: policy.keep_weekly]:
        of_week = [other for other in files if sunday(day(other)) == sunday(mine)]
        on_sunday = [other for other in of_week if day(other) == sunday(mine)]
        if file in (on_sunday or [max(of_week, key=lambda other: other.filename)]):
            return True
    months = sorted({(d.year, d.month) for d in days}, reverse=True)
    if (mine.year, mine.month) in months[: policy.keep_monthly]:
        of_month = [other for other in files if (day(other).year, day(other).month) == (mine.year, mine.month)]
        on_first = [other for other in of_month if day(other).day == 1]
        return file in (on_first or [min(of_month, key=lambda other: other.filename)])
    return False


def test_a_hundred_thousand_files_take_less_than_a_second() -> None:
    now = datetime(2026, 3, 31, 3, tzinfo=timezone.utc)
    manifest = backup(now).manifest
    names = [BackupName(BackupType.DATABASE, now - timedelta(minutes=i), True, False) for i in range(100_000)]
    files = [File(str(name), name, manifest) for name in names]
    policies = {1: RetentionPolicy(), 2: RetentionPolicy.parse("60/0/0/12")}
    spent = []
    for _ in range(3):
        started = time.process_time()
        result = plan(files, policies, now, ZoneInfo("Europe/Amsterdam"))
        spent.append(time.process_time() - started)
        assert len(result.verdicts) == 100_000
    assert min(spent) < 1


NOW = datetime(2026, 4, 15, 3, tzinfo=timezone.utc)


def nights(*sizes: int | tuple[int, int], **options: object) -> list[File]:
    """A backup a night up to the last one, of these raw sizes, or sizes and rows."""
    files = []
    for ago, size in enumerate(reversed(sizes)):
        raw, rows = size if isinstance(size, tuple) else (size, None)
        at = NOW.replace(hour=2) - timedelta(days=ago)
        table = None if rows is None else {"public.a": rows // 2, "public.b": rows - rows // 2}
        files.append(backup(at, raw_bytes=raw, rows=table, **options))  # type: ignore[arg-type]
    return files[::-1]


def shrink(files: list[File], max_shrink: float = 0.5, settled_until: datetime | None = None) -> Brake | None:
    return shrink_brake(
        files, backup_type=BackupType.DATABASE, max_shrink=max_shrink, now=NOW, settled_until=settled_until
    )


class TestBrakes:
    @pytest.mark.parametrize(
        ("total", "keep_days", "held_back"),
        [(12, 6, False), (13, 6, True), (9, 4, False), (10, 4, True), (20, 14, False), (365, 30, True)],
    )
    def test_more_than_half_and_more_than_five(self, total: int, keep_days: int, held_back: bool) -> None:
        files = nights(*[1] * total)
        result = plan(
            files, {1: RetentionPolicy(retention_days=365, keep_daily=keep_days, keep_weekly=0, keep_monthly=0)}, NOW
        )
        assert len(result.deletions) == total - keep_days
        brake = mass_deletion_brake(result)
        assert (brake is not None) is held_back
        if brake:
            assert brake.name == "mass_deletion"
            assert brake.reason == f"{total - keep_days} of {total} database backups would be deleted at once"

    def test_files_that_are_not_judged_do_not_make_the_half_larger(self) -> None:
        files = nights(*[1] * 12)
        legacy = [replace(file, manifest=None) for file in nights(*[1] * 100)[:88]]
        assert mass_deletion_brake(plan([*legacy, *files], {1: RetentionPolicy.parse("365/4/0/0")}, NOW)) is not None

    def test_a_clock_that_leapt_a_year_is_held_back(self) -> None:
        files = nights(*[1] * 30)
        assert mass_deletion_brake(plan(files, {1: RetentionPolicy()}, NOW + timedelta(days=365))) is not None

    @pytest.mark.parametrize(
        ("sizes", "held_back"),
        [
            ([1000, 500], False),
            ([1000, 499], True),
            ([1000, 1000, 2000], False),
            ([499], False),
            ([], False),
            ([0, 0], False),
            ([(1000, 1000), (990, 499)], True),
            ([(1000, 1000), (990, 500)], False),
            ([(1000, 1000), (990, 0)], True),
            ([(1000, 0), (990, 0)], False),
        ],
    )
    def test_the_newest_against_the_one_before(self, sizes: list[int | tuple[int, int]], held_back: bool) -> None:
        assert (shrink(nights(*sizes)) is not None) is held_back

    def test_says_which_and_how_much(self) -> None:
        brake = shrink(nights((1000, 12_000), (900, 12)))
        assert brake == Brake(
            "shrunk",
            "kanbu_backup_2026-04-15T02-00-00.sql.gz holds 12 rows, "
            "kanbu_backup_2026-04-14T02-00-00.sql.gz held 12,000: 99.9% less, where up to 50% may be lost",
        )

    def test_the_share_is_set(self) -> None:
        assert shrink(nights(1000, 899), max_shrink=0.1) is not None
        assert shrink(nights(1000, 901), max_shrink=0.1) is None
        assert shrink(nights(1000, 0), max_shrink=1) is None

    def test_a_second_small_backup_releases_nothing_until_settled(self) -> None:
        files = nights(1000, 1000, 100, 100, 100)
        pruned_before_the_fall = NOW - timedelta(days=3)
        assert shrink(files, settled_until=pruned_before_the_fall) is not None
        accepted_after_it = NOW - timedelta(days=1)
        assert shrink(files, settled_until=accepted_after_it) is None

    def test_without_a_settled_time_only_the_newest_pair_counts(self) -> None:
        assert shrink(nights(1000, 100)) is not None
        assert shrink(nights(1000, 100, 100)) is None

    def test_a_backup_of_the_old_size_releases(self) -> None:
        assert shrink(nights(1000, 1000, 0, 0, 1000), settled_until=NOW - timedelta(days=10)) is None

    def test_a_slow_loss_is_none(self) -> None:
        assert shrink(nights(1000, 800, 640, 512, 410), settled_until=NOW - timedelta(days=10)) is None

    def test_failed_pre_restore_and_future_backups_are_no_measure(self) -> None:
        files = nights(1000, 990)
        odd = nights(1, 1, 1, 1)
        tiny = backup(NOW - timedelta(minutes=5), raw_bytes=1, status="failed")
        safety = backup(NOW - timedelta(minutes=4), raw_bytes=1, trigger=Trigger.PRE_RESTORE)
        future = backup(NOW + timedelta(minutes=4), raw_bytes=1)
        source = backup(NOW - timedelta(minutes=3), raw_bytes=1, backup_type=BackupType.SOURCE)
        legacy = replace(odd[0], manifest=None)
        assert shrink([*files, tiny, safety, future, source, legacy]) is None

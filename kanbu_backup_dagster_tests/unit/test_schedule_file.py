"""Reading `kanbu_backup.yaml`: what is good is used, what is not is named by line and column."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from zoneinfo import ZoneInfo

import jsonschema_rs
import pytest
from dagster._utils.schedules import is_valid_cron_string, schedule_execution_time_iterator
from ruamel.yaml import YAML

from kanbu_backup_dagster.schedule_file import (
    Drill,
    Notifications,
    Prune,
    RetentionPolicy,
    Schedule,
    ScheduleFile,
    ScheduleType,
    WebhookFormat,
    cron_problem,
    describe_cron,
    load_schedule_file,
    next_runs,
    parse_schedule_file,
    schema_text,
)

ROOT = Path(__file__).resolve().parents[2]
FILE = Path("kanbu_backup.yaml")
GOOD_ROW = """\
  - id: 1
    name: Good
    type: database
    cron: "0 2 * * *"
"""


def parse(text: str) -> ScheduleFile:
    return parse_schedule_file(text, FILE)


def rows(text: str) -> ScheduleFile:
    """The file whose `schedules:` are a good row (lines 2 to 5) and then `text` (from line 6)."""
    return parse("schedules:\n" + GOOD_ROW + text)


def named(file: ScheduleFile) -> list[tuple[int, int, str]]:
    return [(problem.line, problem.column, problem.message) for problem in file.problems]


class TestGoodFiles:
    def test_all_fields(self) -> None:
        file = parse(
            """\
version: 1
schedules:
  - id: 3
    name: Nächtlich
    type: source
    cron: "@daily"
    enabled: false
    retention_days: 90
    keep_daily: 1
    keep_weekly: 2
    keep_monthly: 12
    catch_up_hours: 0.5
notifications:
  on_success: true
  on_failure: false
  format: slack
  give_up_after_days: 5
  overdue_grace_hours: 1
  storage_low_days: 7
drill:
  older_samples: 2
  assertions:
    - name: users
      query: |
        SELECT count(*) > 0
        FROM users
prune:
  max_shrink: 0.2
"""
        )
        assert file.problems == ()
        assert file.parsed_whole
        (schedule,) = file.schedules
        assert schedule.model_dump() == {
            "id": 3,
            "name": "Nächtlich",
            "type": ScheduleType.SOURCE,
            "cron": "@daily",
            "enabled": False,
            "retention_days": 90,
            "keep_daily": 1,
            "keep_weekly": 2,
            "keep_monthly": 12,
            "catch_up_hours": 0.5,
        }
        assert schedule.policy == RetentionPolicy(retention_days=90, keep_daily=1, keep_weekly=2, keep_monthly=12)
        assert type(schedule.policy) is RetentionPolicy
        assert file.notifications == Notifications(
            on_success=True,
            on_failure=False,
            format=WebhookFormat.SLACK,
            give_up_after_days=5,
            overdue_grace_hours=1,
            storage_low_days=7,
        )
        assert file.drill.older_samples == 2
        assert [(a.name, a.query) for a in file.drill.assertions] == [("users", "SELECT count(*) > 0\nFROM users\n")]
        assert file.prune.max_shrink == 0.2

    def test_defaults_are_the_users_guides(self) -> None:
        file = rows("")
        (schedule,) = file.schedules
        assert schedule.enabled is True
        assert str(schedule.policy) == "30/7/4/3"
        assert (file.notifications.on_success, file.notifications.on_failure) == (False, True)

    @pytest.mark.parametrize("text", ["", "# only words\n", "---\n", "schedules:\n", "schedules: []\n", "drill: {}\n"])
    def test_an_empty_file_is_an_empty_configuration(self, text: str) -> None:
        file = parse(text)
        assert (file.schedules, file.problems, file.parsed_whole) == ((), (), True)

    def test_a_missing_file_is_an_empty_configuration_and_says_so(self, tmp_path: Path) -> None:
        file = load_schedule_file(tmp_path / "none.yaml")
        assert not file.exists
        assert (file.schedules, file.problems, file.parsed_whole) == ((), (), True)

    def test_rows_may_share_fields_by_anchor_and_merge(self) -> None:
        file = parse(
            """\
schedules:
  - &nightly
    id: 1
    name: First
    type: database
    cron: "0 2 * * *"
    keep_daily: 2
  - <<: *nightly
    id: 2
    name: Second
"""
        )
        assert file.problems == ()
        assert [(row.id, row.name, row.keep_daily) for row in file.schedules] == [(1, "First", 2), (2, "Second", 2)]

    def test_policies_are_those_of_a_type_enabled_or_not(self) -> None:
        file = rows(
            "  - {id: 2, name: b, type: database, cron: '0 3 * * *', enabled: false, keep_daily: 1}\n"
            "  - {id: 3, name: c, type: source, cron: '0 3 * * *'}\n"
            "  - {id: 4, name: d, type: drill, cron: '0 3 * * *'}\n"
        )
        assert file.policies("database") == {1: RetentionPolicy(), 2: RetentionPolicy(keep_daily=1)}
        assert file.policies("source") == {3: RetentionPolicy()}
        found = file.schedule(4)
        assert found is not None
        assert found.name == "d"
        assert file.schedule(9) is None

    def test_byte_order_mark_and_windows_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "k.yaml"
        path.write_bytes(b"\xef\xbb\xbf" + ("schedules:\n" + GOOD_ROW).replace("\n", "\r\n").encode())
        assert [row.name for row in load_schedule_file(path).schedules] == ["Good"]


class TestBadRows:
    @pytest.mark.parametrize(
        ("row", "pointed_at", "words"),
        [
            ("- {id: 2, name: b, type: database, cron: 61 2 * * *}", "61 2", "'61 2 * * *' is not a cron expression"),
            ("- id: 2\n    name: b\n    type: database\n    cron: 0 2 * *", "0 2 * *", "has 4 fields instead of 5"),
            ("- id: 2\n    name: b\n    type: database\n    cron: 0 2 30 2 *", "0 2 30 2 *", "never comes"),
            ("- id: 2\n    name: b\n    type: database\n    cron: '@reboot'", "'@reboot'", "fields instead of 5"),
            ("- id: 1\n    name: b\n    type: source\n    cron: 0 3 * * *", "1", "taken already, by row 1 on line 2"),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, keep_dayly: 1}", "keep_dayly", 'mean "keep_daily"?'),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, keep_weekly: -1}", "-1", "at least 0, not -1"),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, keep_weekly: 1.5}", "1.5", "a whole number"),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, keep_daily: '30'}", "'30'", "a whole number"),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, keep_daily: true}", "true", "a whole number"),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, enabled: yes}", "yes", "has to be true or false"),
            ("- {id: 2, name: b, type: sauce, cron: 0 3 * * *}", "sauce", "one of 'database', 'source', 'drill'"),
            ("- {id: two, name: b, type: source, cron: 0 3 * * *}", "two", "id has to be a whole number"),
            ("- {id: 0, name: b, type: source, cron: 0 3 * * *}", "0, name", "id has to be at least 1"),
            ("- {id: 2, name: 7, type: source, cron: 0 3 * * *}", "7", "name has to be text"),
            ("- id: 2\n    name:\n    type: source\n    cron: 0 3 * * *", "name:", "name is empty"),
            ("- {id: 2, name: ' ', type: source, cron: 0 3 * * *}", "' '", "text on one line"),
            ("- {id: 2, name: b, type: source}", "{id: 2", 'needs "cron"'),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, catch_up_hours: .inf}", ".inf", "at most 87600.0"),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, catch_up_hours: 87601}", "87601", "at most 87600.0"),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, enabled: 2026-13-45}", "2026-13-45", "be in 1..12"),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, enabled: !!python/none x}", "!!pyth", "cannot be read"),
            ("- id: 2\n    name: b\n    name: c\n    type: source\n    cron: 0 3 * * *", "name: c", 'key "name"'),
            ("- words", "words", "has to be keys and values"),
            ("-", "", "has to be keys and values"),
            ("- {id: 2, name: b, type: source, cron: 0 3 * * *, 4: 5}", "5", "cannot be used"),
        ],
    )
    def test_is_named_and_takes_no_other_down(self, row: str, pointed_at: str, words: str) -> None:
        text = f"schedules:\n{GOOD_ROW}  {row}\n  - {{id: 9, name: After, type: source, cron: 0 4 * * *}}\n"
        file = parse(text)
        assert [schedule.name for schedule in file.schedules] == ["Good", "After"]
        (problem,) = file.problems
        assert words in problem.message
        assert 6 <= problem.line <= 9
        assert text.split("\n")[problem.line - 1][problem.column - 1 :].startswith(pointed_at)
        assert not file.parsed_whole

    def test_says_file_line_column_and_row(self) -> None:
        file = rows("  - {id: 2, name: Weekly, type: source, cron: 0 3 * * *, keep_weekly: -1}\n")
        assert [str(problem) for problem in file.problems] == [
            "kanbu_backup.yaml, line 6, column 71: schedule 2 (Weekly): keep_weekly has to be at least 0, not -1"
        ]
        assert file.problems[0].schedule_id == 2

    def test_all_problems_of_a_row_are_told_in_order(self) -> None:
        file = rows("  - {id: 2, nam: b, type: source, cron: bad, keep_daily: -2}\n")
        assert [(column, message.split(":")[0]) for _, column, message in named(file)] == [
            (5, 'needs "name"'),
            (13, 'unknown key "nam"'),
            (41, "cron 'bad' has 1 fields instead of 5 (minute, hour, day of month, month, day of week)"),
            (58, "keep_daily has to be at least 0, not -2"),
        ]

    def test_an_id_stays_taken_by_a_bad_row(self) -> None:
        file = rows(
            "  - {id: 2, name: b, type: source, cron: bad}\n  - {id: 2, name: c, type: source, cron: 0 3 * * *}\n"
        )
        assert [row.id for row in file.schedules] == [1]
        assert "taken already, by row 2 on line 6" in file.problems[1].message

    def test_the_schedulers_own_verdict_counts(self) -> None:
        def no_nights(cron: str) -> str | None:
            return "we sleep" if cron.split()[1] == "2" else None

        text = "schedules:\n" + GOOD_ROW + "  - {id: 2, name: b, type: source, cron: 0 3 * * *}\n"
        file = parse_schedule_file(text, FILE, cron_check=no_nights)
        assert [row.id for row in file.schedules] == [2]
        assert named(file) == [(5, 11, "cron '0 2 * * *' is refused by the scheduler: we sleep")]


class TestBadSections:
    def test_a_bad_field_has_its_default_and_the_others_count(self) -> None:
        file = parse("notifications:\n  on_success: true\n  on_failure: maybe\n  format: teams\n")
        assert file.notifications == Notifications(on_success=True)
        assert [(line, column) for line, column, _ in named(file)] == [(3, 15), (4, 11)]
        assert not file.parsed_whole

    def test_a_bad_assertion_leaves_the_others(self) -> None:
        file = parse(
            "drill:\n  older_samples: 1\n  assertions:\n"
            "    - {name: a, query: SELECT true}\n    - {name: b, query: 1}\n    - {nme: c, query: SELECT true}\n"
        )
        assert [assertion.name for assertion in file.drill.assertions] == ["a"]
        assert file.drill.older_samples == 1
        assert [(line, message) for line, _, message in named(file)] == [
            (5, "assertions.2.query has to be text (in quotes, if it looks like something else)"),
            (6, 'needs "name"'),
            (6, 'unknown key "nme": did you mean "name"?'),
        ]

    def test_a_secret_put_here_is_sent_to_the_environment_and_not_repeated(self) -> None:
        secret = "https://hooks.example.com/T0/B0/abcdef"
        file = parse(f"notifications:\n  webhook_url: {secret}\n  format: {secret}\n  on_failure: {secret}\n")
        assert "BACKUP_WEBHOOK_URL" in file.problems[0].message
        assert len(file.problems) == 3
        assert not any("abcdef" in str(problem) for problem in file.problems)

    @pytest.mark.parametrize("section", ["notifications", "drill", "prune"])
    def test_a_section_of_another_shape(self, section: str) -> None:
        file = parse(f"schedules:\n{GOOD_ROW}{section}: 3\n")
        assert [row.id for row in file.schedules] == [1]
        assert (file.notifications, file.drill, file.prune) == (Notifications(), Drill(), Prune())
        assert [(line, message) for line, _, message in named(file)] == [(6, "has to be keys and values")]

    def test_an_unknown_section(self) -> None:
        file = parse("schedule:\n" + GOOD_ROW)
        assert named(file) == [(1, 1, 'unknown key "schedule": did you mean "schedules"?')]
        assert not file.parsed_whole


class TestUnreadableFiles:
    @pytest.mark.parametrize(
        ("text", "line", "column", "words"),
        [
            ("schedules: [\n", 2, 1, "is not YAML"),
            ("schedules:\n\t- id: 1\n", 2, 1, "is not YAML"),
            ("version: 1\nschedules:\n  - cron: * * * * *\n", 3, 12, "begins with * or @ has to be quoted"),
            ("version: 1\nschedules:\n  - cron: @daily\n", 3, 11, "begins with * or @ has to be quoted"),
            ("version: 1\nschedules: []\nschedules: []\n", 3, 1, "twice"),
            ("version: 1\n---\nversion: 1\n", 2, 1, "a single document"),
            ("version: 1\nschedules: *gone\n", 2, 12, "undefined alias"),
            ("version: 1\na: \x07\n", 2, 4, "control character"),
            ("[" * 5000, 1, 1, "nested too deeply"),
            ("- id: 1\n", 1, 1, "has to be keys and values"),
            ("schedules: 3\n", 1, 12, "has to be a list"),
            ("version: one\n", 1, 10, "has to be a whole number"),
            ("version: 0\n", 1, 10, "has to be a whole number"),
        ],
    )
    def test_no_schedules_and_one_problem(self, text: str, line: int, column: int, words: str) -> None:
        file = parse(text)
        assert file.schedules == ()
        (problem,) = file.problems
        assert words in problem.message
        assert (problem.line, problem.column) == (line, column)
        assert not file.parsed_whole

    def test_a_newer_format_is_refused_politely(self) -> None:
        file = parse(f"version: 2\nnew_things: []\nschedules:\n{GOOD_ROW}")
        assert file.schedules == ()
        (problem,) = file.problems
        assert str(problem) == (
            "kanbu_backup.yaml, line 1, column 10: has format version 2; this release reads up to 1. "
            "Upgrade kanbu-backup-dagster to read it"
        )

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "k.yaml"
        path.write_bytes("version: 1\n# Größe\n".encode("latin-1"))
        assert named(load_schedule_file(path)) == [(2, 5, "is not UTF-8 text")]

    def test_a_folder(self, tmp_path: Path) -> None:
        file = load_schedule_file(tmp_path)
        assert file.exists
        assert [message for _, _, message in named(file)] == ["cannot be read: Is a directory"]


class TestSchemaAndExample:
    def test_the_checked_in_schema_is_the_models(self) -> None:
        assert (ROOT / "kanbu_backup.schema.json").read_text() == schema_text(), (
            "run: python -m kanbu_backup_dagster.schedule_file > kanbu_backup.schema.json"
        )

    def test_the_example_is_good_and_names_its_schema(self) -> None:
        path = ROOT / "kanbu_backup.yaml"
        file = load_schedule_file(path)
        assert file.problems == ()
        assert {row.type for row in file.schedules} == set(ScheduleType)
        assert all(is_valid_cron_string(row.cron) for row in file.schedules)
        assert path.read_text().startswith("# yaml-language-server: $schema=kanbu_backup.schema.json\n")
        assert list(errors(path.read_text())) == []

    @pytest.mark.parametrize(
        "row",
        [
            "{id: 2, name: b, type: source, cron: 0 3 * * *, keep_dayly: 1}",
            "{id: 2, name: b, type: source, cron: 0 3 * * *, keep_daily: -1}",
            "{id: 2, name: b, type: source, cron: 0 3 * * *, enabled: yes}",
            "{id: '2', name: b, type: source, cron: 0 3 * * *}",
            "{id: 2, name: b, type: sauce, cron: 0 3 * * *}",
            "{id: 2, type: source, cron: 0 3 * * *}",
        ],
    )
    def test_editors_see_what_the_loader_refuses(self, row: str) -> None:
        assert rows(f"  - {row}\n").problems
        assert len(list(errors(f"schedules:\n  - {row}\n"))) == 1


def errors(text: str) -> list[jsonschema_rs.ValidationError]:
    return list(jsonschema_rs.validator_for(json.loads(schema_text())).iter_errors(YAML(typ="safe").load(text)))


CRONS = [
    "30 2 * * *",
    "0 2 * * *",
    "0 3 * * *",
    "0 1 * * *",
    "30 1 * * *",
    "0 * * * *",
    "*/20 * * * *",
    "5,35 * * * 6,0",
    "30 2,14 * * *",
    "0 */6 * * *",
    "15 */2 * * *",
    "0-30/15 2 * * *",
    "30 2 * * 0",
    "30 2 1 * *",
    "30 2 L * *",
    "0 3 * * 5#2",
    "@daily",
    "@hourly",
    "0 0 29 2 *",
]
AMSTERDAM = ZoneInfo("Europe/Amsterdam")


def local(text: str, zone: ZoneInfo = AMSTERDAM) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone)


class TestCron:
    @pytest.mark.parametrize(
        ("after", "times"),
        [
            # Clocks go from 02:00 to 03:00 on the 29th: there is no 02:30, the run starts when the gap ends.
            (
                "2026-03-28T12:00",
                ["2026-03-29T03:00:00+02:00", "2026-03-30T02:30:00+02:00", "2026-03-31T02:30:00+02:00"],
            ),
            # Clocks go from 03:00 back to 02:00 on the 25th: 02:30 comes twice, the run is at the second.
            (
                "2026-10-24T12:00",
                ["2026-10-25T02:30:00+01:00", "2026-10-26T02:30:00+01:00", "2026-10-27T02:30:00+01:00"],
            ),
        ],
    )
    def test_half_past_two_when_clocks_change(self, after: str, times: list[str]) -> None:
        assert [time.isoformat() for time in next_runs("30 2 * * *", AMSTERDAM, local(after), 3)] == times

    @pytest.mark.parametrize("cron", CRONS)
    @pytest.mark.parametrize(
        "zone", ["UTC", "Europe/Amsterdam", "America/New_York", "Australia/Sydney", "Asia/Kolkata"]
    )
    @pytest.mark.parametrize(
        "after", ["2026-03-07", "2026-03-28", "2026-04-04", "2026-10-03", "2026-10-24", "2026-10-31"]
    )
    def test_next_runs_are_dagsters(self, cron: str, zone: str, after: str) -> None:
        start = local(after, ZoneInfo(zone))
        dagsters = islice(schedule_execution_time_iterator(start.timestamp() + 1, cron, zone), 60)
        ours = next_runs(cron, ZoneInfo(zone), start + timedelta(seconds=1), 60)
        assert [time.timestamp() for time in ours] == [time.timestamp() for time in dagsters]

    def test_next_runs_are_later_than_asked(self) -> None:
        at = datetime(2026, 1, 18, 2, tzinfo=timezone.utc)
        (time,) = next_runs("0 2 * * *", timezone.utc, at, 1)
        assert time == at + timedelta(days=1)

    @pytest.mark.parametrize("cron", [*CRONS, "0 2 * * mon-fri", "0 2 ? * *", "0 2 * * 7", "5/15 * * * *", "@YEARLY"])
    def test_good_ones(self, cron: str) -> None:
        assert cron_problem(cron) is None
        assert is_valid_cron_string(cron)

    @pytest.mark.parametrize(
        "cron",
        [
            "",
            "@every 5m",
            "@reboot",
            "0 2 * * * *",
            "60 2 * * *",
            "0 2 31 4 *",
            "H 2 * * *",
            "R 2 * * *",
            "*/61 * * * *",
        ],
    )
    def test_bad_ones(self, cron: str) -> None:
        assert cron_problem(cron)

    @pytest.mark.parametrize(
        ("cron", "words"),
        [
            ("0 2 * * *", "At 02:00, every day"),
            ("@daily", "At 00:00, every day"),
            ("0 2,14 * * *", "At 02:00 and 14:00, every day"),
            ("0 3 * * 0", "At 03:00, only on Sunday"),
            ("0 4 1 * *", "At 04:00, on day 1 of the month"),
            ("0 */6 * * *", "Every 6 hours"),
            ("nonsense", "nonsense"),
        ],
    )
    def test_in_words(self, cron: str, words: str) -> None:
        assert describe_cron(cron) == words


class TestPolicyText:
    def test_round_trip(self) -> None:
        assert RetentionPolicy.parse("30/7/4/3") == RetentionPolicy()
        assert str(RetentionPolicy.parse("365/0/10/120")) == "365/0/10/120"

    @pytest.mark.parametrize(
        "text", ["", "30", "30/7/4", "30/7/4/3/1", "30/7/4/-3", "a/b/c/d", "30/7/4/\uff13", "30/7/4/3\n"]
    )
    def test_nonsense(self, text: str) -> None:
        with pytest.raises(ValueError, match="policy such as 30/7/4/3"):
            RetentionPolicy.parse(text)

    def test_a_schedule_is_called_by_id_and_name(self) -> None:
        schedule = Schedule(id=1, name="Nightly", type=ScheduleType.DATABASE, cron="0 2 * * *")
        assert str(schedule) == "schedule 1 (Nightly)"

"""Editing `kanbu_backup.yaml`: the change and nothing else, whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.schedule_file import (
    ScheduleType,
    add_schedule,
    edit_schedule,
    load_schedule_file,
    remove_schedule,
)

TEXT = """\
# Our backups. Ask ops before changing.
version: 1

schedules: # the list
  # nightly
  - id:   1 # never reuse
    name: 'Daily "main"'   # aligned
    type: database
    cron: 0 2 * * *

    # policy agreed in May
    keep_daily: 7
  # weekly

  - cron: "0 3 * * 0"  # Sundays
    id: 2
    name: Weekly
    type: source
    enabled: true # for now
  - {id: 3, name: Flow, type: drill, cron: "0 5 2 * *"}
  # the end

# who is told
notifications:
    on_success:   false
"""


MERGED = """\
schedules:
  - &a
    id: 1
    name: a
    type: source
    cron: 0 2 * * *
  - <<: *a # as above
    id: 2
"""
ALIASED = """\
schedules:
  - id: 1
    name: a
    type: source
    cron: &c "0 2 * * *"
  - {id: 2, name: b, type: source, cron: *c}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "kanbu_backup.yaml"
    path.write_text(TEXT)
    return path


def changed_lines(path: Path, before: str = TEXT) -> tuple[list[str], list[str]]:
    """The lines that went, and those that came, between the first and the last difference."""
    old, new = before.splitlines(), path.read_text().splitlines()
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    return old, new


class TestEdit:
    @pytest.mark.parametrize(
        ("schedule_id", "field", "value", "old", "new"),
        [
            (2, "enabled", False, ["    enabled: true # for now"], ["    enabled: false # for now"]),
            (1, "enabled", False, [], ["    enabled: false"]),
            (1, "cron", "30 1 * * *", ["    cron: 0 2 * * *"], ['    cron: "30 1 * * *"']),
            (2, "cron", "30 1 * * *", ['  - cron: "0 3 * * 0"  # Sundays'], ['  - cron: "30 1 * * *"  # Sundays']),
            (1, "name", "It's", ["    name: 'Daily \"main\"'   # aligned"], ["    name: 'It''s'   # aligned"]),
            (2, "name", "Täglich: 2", ["    name: Weekly"], ['    name: "Täglich: 2"']),
            (2, "name", "true", ["    name: Weekly"], ['    name: "true"']),
            (2, "name", "Off-site (2)", ["    name: Weekly"], ["    name: Off-site (2)"]),
            (1, "keep_daily", 14, ["    keep_daily: 7"], ["    keep_daily: 14"]),
            (1, "catch_up_hours", 0.5, [], ["    catch_up_hours: 0.5"]),
            (
                3,
                "enabled",
                False,
                ['  - {id: 3, name: Flow, type: drill, cron: "0 5 2 * *"}'],
                ['  - {id: 3, name: Flow, type: drill, cron: "0 5 2 * *", enabled: false}'],
            ),
            (
                3,
                "name",
                "Other",
                ['  - {id: 3, name: Flow, type: drill, cron: "0 5 2 * *"}'],
                ['  - {id: 3, name: "Other", type: drill, cron: "0 5 2 * *"}'],
            ),
        ],
    )
    def test_changes_its_characters_only(
        self, path: Path, schedule_id: int, field: str, value: str | int | float | bool, old: list[str], new: list[str]
    ) -> None:
        schedule = edit_schedule(path, schedule_id, {field: value})
        assert getattr(schedule, field) == value
        assert load_schedule_file(path).schedule(schedule_id) == schedule
        assert changed_lines(path) == (old, new)

    def test_several_fields_at_once(self, path: Path) -> None:
        edit_schedule(path, 1, {"retention_days": 60, "keep_daily": 1, "type": ScheduleType.SOURCE, "keep_weekly": 0})
        assert changed_lines(path) == (
            ["    type: database", "    cron: 0 2 * * *", "", "    # policy agreed in May", "    keep_daily: 7"],
            [
                "    type: source",
                "    cron: 0 2 * * *",
                "",
                "    # policy agreed in May",
                "    keep_daily: 1",
                "    retention_days: 60",
                "    keep_weekly: 0",
            ],
        )

    def test_a_value_that_is_there_already_writes_nothing(self, path: Path) -> None:
        before = path.stat()
        edit_schedule(path, 2, {"enabled": True})
        assert path.stat() == before

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"cron": "every day"}, "has 2 fields instead of 5"),
            ({"keep_daily": -1}, "keep_daily has to be at least 0, not -1"),
            ({"keep_dayly": 1}, 'unknown key "keep_dayly": did you mean "keep_daily"?'),
            ({"enabled": "yes"}, "enabled has to be true or false"),
            ({"name": ""}, "name has to be some text"),
            ({"name": "two\nlines"}, "name has to be text on one line"),
            ({"catch_up_hours": float("inf")}, "catch_up_hours has to be a number"),
        ],
    )
    def test_what_would_not_be_good_is_refused(
        self, path: Path, changes: dict[str, str | int | float | bool], words: str
    ) -> None:
        with pytest.raises(SettingsError) as refusal:
            edit_schedule(path, 2, changes)
        assert "was not changed" in refusal.value.message
        assert len(refusal.value.tried) == 1
        assert words in refusal.value.tried[0]
        assert path.read_text() == TEXT

    def test_the_schedulers_verdict_counts(self, path: Path) -> None:
        with pytest.raises(SettingsError, match="no Mondays"):
            edit_schedule(
                path, 2, {"cron": "0 1 * * 1"}, cron_check=lambda cron: "no Mondays" if cron[-1] == "1" else None
            )
        assert path.read_text() == TEXT

    def test_ids_stay(self, path: Path) -> None:
        with pytest.raises(SettingsError, match="id cannot be changed"):
            edit_schedule(path, 2, {"id": 9})

    def test_no_such_schedule(self, path: Path) -> None:
        with pytest.raises(SettingsError, match="There is no schedule 9") as refusal:
            edit_schedule(path, 9, {"enabled": False})
        assert refusal.value.advice == "There are: 1, 2, 3."

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"none\.yaml does not exist"):
            edit_schedule(tmp_path / "none.yaml", 1, {"enabled": False})
        assert list(tmp_path.iterdir()) == []

    def test_a_bad_row_can_be_made_good(self, path: Path) -> None:
        path.write_text(TEXT.replace("0 2 * * *", "nonsense").replace("type: drill", "type: dril"))
        edit_schedule(path, 1, {"cron": "0 2 * * *"})
        file = load_schedule_file(path)
        assert [row.id for row in file.schedules] == [1, 2]
        assert [problem.schedule_id for problem in file.problems] == [3]

    def test_a_row_that_stays_bad_is_not_edited(self, path: Path) -> None:
        text = TEXT.replace("0 2 * * *", "nonsense").replace("keep_daily: 7", "keep_daily: -7")
        path.write_text(text)
        with pytest.raises(SettingsError) as refusal:
            edit_schedule(path, 1, {"cron": "0 2 * * *"})
        assert refusal.value.tried == ('schedule 1 (Daily "main"): keep_daily has to be at least 0, not -7',)
        assert path.read_text() == text

    @pytest.mark.parametrize(
        ("text", "schedule_id", "changes", "words"),
        [
            ("schedules: [\n", 1, {"enabled": False}, "cannot be edited until it can be read"),
            (TEXT.replace("id: 2", "id: 1"), 1, {"enabled": False}, "there are 2 schedules 1"),
            (TEXT.replace("version: 1", "version: 2"), 1, {"enabled": False}, "was not changed"),
            (MERGED, 1, {"enabled": False}, "other parts of the file depend"),
            (ALIASED, 1, {"cron": "0 3 * * *"}, "shared by a YAML anchor"),
            (ALIASED, 2, {"cron": "0 3 * * *"}, "shared by a YAML anchor"),
        ],
    )
    def test_what_cannot_be_done_safely_is_left_to_a_person(
        self, path: Path, text: str, schedule_id: int, changes: dict[str, str | int | float | bool], words: str
    ) -> None:
        path.write_text(text)
        with pytest.raises(SettingsError, match=words):
            edit_schedule(path, schedule_id, changes)
        assert path.read_text() == text

    def test_a_merged_field_is_overridden_in_the_row_itself(self, path: Path) -> None:
        path.write_text(MERGED)
        edit_schedule(path, 2, {"enabled": False})
        assert path.read_text() == MERGED + "    enabled: false\n"


NEW = {"name": "New", "type": "database", "cron": "0 1 * * *"}


class TestAdd:
    def test_after_the_last_row(self, path: Path) -> None:
        schedule = add_schedule(path, {**NEW, "keep_daily": 2, "enabled": False})
        assert schedule.id == 4
        assert changed_lines(path) == (
            [],
            [
                "  - id: 4",
                "    name: New",
                "    type: database",
                '    cron: "0 1 * * *"',
                "    enabled: false",
                "    keep_daily: 2",
            ],
        )
        assert [row.id for row in load_schedule_file(path).schedules] == [1, 2, 3, 4]

    def test_to_no_file(self, tmp_path: Path) -> None:
        path = tmp_path / "k.yaml"
        add_schedule(path, NEW)
        assert path.read_text() == (
            "# yaml-language-server: $schema=kanbu_backup.schema.json\nversion: 1\n\nschedules:\n"
            '  - id: 1\n    name: New\n    type: database\n    cron: "0 1 * * *"\n'
        )
        assert stat.S_IMODE(path.stat().st_mode) == 0o644

    ROW = '  - id: 1\n    name: New\n    type: database\n    cron: "0 1 * * *"\n'

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "schedules:\n" + ROW),
            ("# words\n", "# words\n\nschedules:\n" + ROW),
            ("version: 1", "version: 1\n\nschedules:\n" + ROW),
            ("schedules:\n", "schedules:\n" + ROW),
            ("schedules:", "schedules:\n" + ROW.removesuffix("\n")),
            ("schedules: [] # none yet\ndrill: {}\n", "schedules: # none yet\n" + ROW + "drill: {}\n"),
            ("schedules: ~\n# after\n", "schedules:\n" + ROW + "# after\n"),
            ("schedules: # none\n# after\ndrill:\n", "schedules: # none\n" + ROW + "# after\ndrill:\n"),
        ],
    )
    def test_the_first_row(self, path: Path, text: str, expected: str) -> None:
        path.write_text(text)
        add_schedule(path, NEW)
        assert path.read_text() == expected

    def test_in_the_files_own_layout(self, path: Path) -> None:
        row = "-  id: {}\n   name: a\n   type: source\n   cron: 0 2 * * *\n"
        path.write_bytes(("\ufeffschedules:\n" + row.format(5) + "\n" + row.format(6)).replace("\n", "\r\n").encode())
        before = path.read_bytes()
        add_schedule(path, NEW)
        added = b'\r\n- id: 7\r\n  name: New\r\n  type: database\r\n  cron: "0 1 * * *"\r\n'
        assert path.read_bytes() == before + added

    def test_an_id_that_backups_remember_is_not_given_again(self, path: Path) -> None:
        assert add_schedule(path, NEW, used_ids=[11, 2]).id == 12
        with pytest.raises(SettingsError, match="was another schedule's"):
            add_schedule(path, {**NEW, "id": 11}, used_ids=[11])

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({**NEW, "id": 1}, "id 1 is taken already"),
            ({**NEW, "id": "one"}, "id has to be a whole number"),
            ({"name": "New", "type": "database"}, 'needs "cron"'),
            ({**NEW, "type": "data"}, "type has to be one of"),
            ({**NEW, "colour": "red"}, 'unknown key "colour"'),
        ],
    )
    def test_what_would_not_be_good_is_refused(
        self, path: Path, fields: dict[str, str | int | float | bool], words: str
    ) -> None:
        with pytest.raises(SettingsError) as refusal:
            add_schedule(path, fields)
        assert [words in reason for reason in refusal.value.tried] == [True]
        assert path.read_text() == TEXT

    def test_a_list_in_brackets_is_left_to_a_person(self, path: Path) -> None:
        path.write_text("schedules: [{id: 1, name: a, type: source, cron: 0 2 * * *}]\n")
        with pytest.raises(SettingsError, match="not a list of rows with a dash"):
            add_schedule(path, NEW)


class TestRemove:
    def test_its_lines_go_and_comments_above_stay(self, path: Path) -> None:
        remove_schedule(path, 2)
        assert changed_lines(path) == (
            [
                '  - cron: "0 3 * * 0"  # Sundays',
                "    id: 2",
                "    name: Weekly",
                "    type: source",
                "    enabled: true # for now",
            ],
            [],
        )

    def test_the_last_one_leaves_an_empty_list(self, path: Path) -> None:
        for schedule_id in (1, 3, 2):
            remove_schedule(path, schedule_id)
        assert path.read_text() == (
            "# Our backups. Ask ops before changing.\nversion: 1\n\nschedules: [] # the list\n  # nightly\n"
            "  # weekly\n\n  # the end\n\n# who is told\nnotifications:\n    on_success:   false\n"
        )
        assert load_schedule_file(path).parsed_whole
        add_schedule(path, NEW)
        assert [row.name for row in load_schedule_file(path).schedules] == ["New"]

    def test_a_bad_row_can_be_removed(self, path: Path) -> None:
        path.write_text(TEXT.replace("type: drill", "type: dril"))
        remove_schedule(path, 3)
        assert load_schedule_file(path).parsed_whole

    def test_a_row_that_another_needs_stays(self, path: Path) -> None:
        text = "schedules:\n  - &a {id: 1, name: a, type: source, cron: 0 2 * * *}\n  - {<<: *a, id: 2}\n"
        path.write_text(text)
        with pytest.raises(SettingsError, match="was not changed"):
            remove_schedule(path, 1)
        assert path.read_text() == text

    def test_a_dash_on_its_own_line(self, path: Path) -> None:
        row = "  -\n    id: {}\n    name: a\n    type: source\n    cron: 0 2 * * *\n"
        path.write_text("schedules:\n" + row.format(1) + row.format(2))
        remove_schedule(path, 2)
        assert path.read_text() == "schedules:\n" + row.format(1)


class TestWriting:
    def test_keeps_the_mode_and_leaves_nothing_else(self, path: Path) -> None:
        path.chmod(0o640)
        edit_schedule(path, 2, {"enabled": False})
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert list(path.parent.iterdir()) == [path]

    def test_follows_a_link_and_keeps_it(self, path: Path, tmp_path: Path) -> None:
        link = tmp_path / "link.yaml"
        link.symlink_to(path)
        edit_schedule(link, 2, {"enabled": False})
        assert link.is_symlink()
        assert "enabled: false # for now" in path.read_text()

    def test_a_failing_write_leaves_the_old_file(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full_disk(descriptor: int) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(SettingsError, match="cannot be written: No space left on device"):
            edit_schedule(path, 2, {"enabled": False})
        assert path.read_text() == TEXT
        assert list(path.parent.iterdir()) == [path]

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="cannot be written: No such file or directory"):
            add_schedule(tmp_path / "none" / "k.yaml", NEW)

    def test_edits_at_the_same_time_lose_none(self, path: Path) -> None:
        names = [f"Thread {number}" for number in range(12)]
        threads = [threading.Thread(target=add_schedule, args=(path, {**NEW, "name": name})) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        added = load_schedule_file(path).schedules[3:]
        assert sorted(row.name for row in added) == sorted(names)
        assert [row.id for row in added] == list(range(4, 16))


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.just(" "), min_size=1).filter(
            str.strip
        ),
        "type": st.sampled_from(["database", "source", "drill", "verify_pending"]),
        "cron": st.sampled_from(["@daily", "*/5 * * * *", "0 2 * * 1,3", "15 4 L * *"]),
        "enabled": st.booleans(),
        "retention_days": st.integers(0, 10**6),
        "keep_monthly": st.integers(0, 100),
        "catch_up_hours": st.integers(0, 100) | st.floats(0, 87_600),
    },
)


@given(st.lists(st.tuples(st.sampled_from(["add", "edit", "remove"]), st.integers(1, 5), CHANGES), max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_edits_say_what_was_meant_and_keep_every_comment(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, dict[str, str | int | float | bool]]]
) -> None:
    path = tmp_path_factory.mktemp("edits") / "k.yaml"
    path.write_text(TEXT)
    rows = {row.id: row for row in load_schedule_file(path).schedules}
    own_comments = {1: ["# never reuse", "# aligned", "# policy agreed in May"], 2: ["# Sundays", "# for now"]}
    comments = ["# Our backups", "# the list", "# nightly", "# weekly", "# the end", "# who is told"]
    for step, schedule_id, values in steps:
        if step == "add":
            added = add_schedule(path, {**NEW, **values})
            assert added.id == max(rows, default=0) + 1
            rows[added.id] = added
        elif schedule_id not in rows:
            continue
        elif step == "edit":
            edited = edit_schedule(path, schedule_id, values)
            assert edited == rows[schedule_id].model_copy(update=values)
            rows[schedule_id] = edited
        else:
            remove_schedule(path, schedule_id)
            del rows[schedule_id]
            own_comments.pop(schedule_id, None)
        file = load_schedule_file(path)
        assert file.problems == ()
        assert {row.id: row for row in file.schedules} == rows
        text = path.read_text()
        assert [comment for comment in chain(comments, *own_comments.values()) if comment not in text] == []

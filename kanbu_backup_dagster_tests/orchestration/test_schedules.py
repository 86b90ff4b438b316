"""Schedules on a real Dagster instance, and taken over by a running service when the file changes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from click.testing import CliRunner
from dagster import (
    AssetKey,
    DagsterInstance,
    DagsterRunStatus,
    Definitions,
    RunRequest,
    build_schedule_context,
)
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._utils.schedules import schedule_execution_time_iterator

from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.definitions import build_definitions
from kanbu_backup_dagster.orchestration import tags
from kanbu_backup_dagster.orchestration.configuration import load_configuration, refusal
from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.orchestration.jobs import JOBS
from kanbu_backup_dagster.orchestration.schedule_asset import SCHEDULE_FILE
from kanbu_backup_dagster.orchestration.schedules import schedule_name, why_not
from kanbu_backup_dagster.schedule_file import Schedule, next_runs
from kanbu_backup_dagster.server import code_server
from kanbu_backup_dagster_tests.server.serving import PASSWORD, new_serving

FILE = Path("kanbu_backup.yaml")
DAILY = '  - {id: 1, name: "Daily Döner & Backup", type: database, cron: "0 2 * * *"}\n'
OFF = '  - {id: 2, name: Off, type: database, cron: "30 4 1 * *", enabled: false, keep_daily: 3}\n'
ZONE = ZoneInfo("Europe/Amsterdam")


def write(*rows: str) -> None:
    FILE.write_text("schedules:\n" + "".join(rows))


def definitions() -> Definitions:
    built = build_definitions()
    Definitions.validate_loadable(built)
    return built


def names(built: Definitions) -> set[str]:
    return {one.name for one in built.get_repository_def().schedule_defs}


def asset_text(built: Definitions) -> str:
    specs = {spec.key: spec for spec in built.resolve_all_asset_specs()}
    return str(specs[SCHEDULE_FILE].description)


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with open_instance() as one:
        yield one


def test_a_row_becomes_a_schedule_that_says_what_a_person_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_CRON_TIMEZONE", "Europe/Amsterdam")
    write(DAILY, OFF)
    built = definitions().get_repository_def()
    daily = built.get_schedule_def("schedule_1_daily_doner_backup")
    assert daily.execution_timezone == "Europe/Amsterdam"
    assert daily.cron_schedule == "0 2 * * *"
    assert daily.default_status.value == "RUNNING"
    assert daily.job_name == "database_backup"
    for words in ("Daily Döner & Backup", "At 02:00, every day", "Europe/Amsterdam", "30 days; 7 daily", "next run"):
        assert words in str(daily.description), words
    off = built.get_schedule_def("schedule_2_off")
    assert off.default_status.value == "STOPPED"
    assert "Disabled" in str(off.description)
    assert "3 daily" in str(off.description)


def test_a_bad_row_takes_no_other_down_and_is_seen_everywhere() -> None:
    write(
        DAILY,
        '  - {id: 3, name: Never, type: database, cron: "0 0 31 2 *"}\n',
        '  - {id: 1, name: Twice, type: source, cron: "0 3 * * 0"}\n',
        '  - {id: 4, name: Typo, type: database, cron: "0 4 * * *", keep_dayly: 3}\n',
    )
    built = definitions()
    assert names(built) == {"schedule_1_daily_doner_backup"}
    text = asset_text(built)
    shown = CliRunner().invoke(cli, ["schedules"]).output
    for place in (text, shown):
        flat = " ".join(place.split())
        assert "line 3" in flat
        assert "line 4" in flat
        assert "line 5" in flat
        assert "keep_dayly" in flat.replace("\\", "")
    assert "3 problems; nothing is pruned" in text


def test_a_file_that_cannot_be_parsed_leaves_the_jobs_and_holds_retention() -> None:
    FILE.write_text("schedules:\n  - id: 1\n name: broken\n")
    built = definitions()
    assert names(built) == set()
    assert {job.name for job in built.get_repository_def().get_all_jobs()} >= {"database_backup"}
    assert "is not YAML" in asset_text(built)
    assert "is not YAML" in CliRunner().invoke(cli, ["schedules"]).output
    assert not load_configuration().file.parsed_whole


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BACKUP_CRON_TIMEZONE", "Mars/Olympus"),
        ("BACKUP_SCHEDULER_MODE", "sometimes"),
        ("BACKUP_WEBHOOK_URL", "ftp://x/y"),
    ],
)
def test_a_setting_that_cannot_be_used_leaves_the_jobs(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    write(DAILY)
    built = definitions()
    assert variable in asset_text(built)
    assert "ftp://x/y" not in asset_text(built)


def test_dagsters_refusal_names_the_reason() -> None:
    assert refusal("0 2 * * *") is None
    assert refusal("@daily") is None
    for cron in ("0 0 31 2 *", "@reboot", "* * * * * *", "1W * * * *"):
        assert "invalid cron" in str(refusal(cron)), cron


CRONS = ("0 2 * * *", "30 2 * * *", "15 * * * *", "0 */6 * * *", "30 1,2,3 * * *", "0 0 L * *", "0 3 * * 0", "@daily")
CHANGES = ("2026-03-28T12:00", "2026-10-24T12:00")


@pytest.mark.parametrize("zone", ["Europe/Amsterdam", "America/New_York", "Australia/Sydney", "UTC"])
@pytest.mark.parametrize("cron", CRONS)
def test_the_next_runs_shown_are_those_that_dagster_makes(cron: str, zone: str) -> None:
    for after in (*CHANGES, "2026-03-07T12:00", "2026-10-31T12:00", "2026-04-04T12:00", "2026-10-03T12:00"):
        start = datetime.fromisoformat(after).replace(tzinfo=timezone.utc)
        made = schedule_execution_time_iterator(
            start_timestamp=(start + timedelta(seconds=1)).timestamp(),
            cron_schedule=cron,
            execution_timezone=zone,
            ascending=True,
        )
        shown = next_runs(cron, ZoneInfo(zone), start, 30)
        assert [time.timestamp() for time in shown] == [time.timestamp() for time in islice(made, 30)], after


def row(**changes: Any) -> Schedule:
    return Schedule.model_validate({"id": 1, "name": "Daily", "type": "database", "cron": "0 2 * * *", **changes})


def reason(instance: DagsterInstance, loaded: Schedule, *, late: timedelta = timedelta(0)) -> str | None:
    now = datetime(2026, 1, 18, 2, 0, tzinfo=timezone.utc)
    return why_not(loaded, load_configuration(), instance, scheduled_for=now, now=now + late)


def test_a_tick_asks_the_settings_and_the_file_again(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '  - {id: 1, name: Daily, type: database, cron: "0 2 * * *"}\n'
    write(line)
    assert reason(instance, row()) is None
    write(line.replace("}", ", enabled: false}"))
    assert "disabled" in str(reason(instance, row()))
    assert reason(instance, row(enabled=False)) is None  # started in the UI, which rules
    write(line.replace("0 2", "0 5"))
    assert "reloaded" in str(reason(instance, row()))
    write()
    assert "no longer in" in str(reason(instance, row()))
    FILE.write_text(": : :")
    assert reason(instance, row()) is None  # a broken file stops nothing that was scheduled
    write(line)
    for mode, refused in (("external", True), ("both", False), ("internal", False)):
        monkeypatch.setenv("BACKUP_SCHEDULER_MODE", mode)
        assert (reason(instance, row()) is not None) is refused


@pytest.mark.parametrize(
    ("hours", "late", "starts"), [(72, 71, True), (72, 73, False), (0, 0.1, True), (0, 0.2, False)]
)
def test_a_missed_run_starts_late_or_says_why_not(
    hours: float, late: float, starts: bool, instance: DagsterInstance
) -> None:
    write(f'  - {{id: 1, name: Daily, type: database, cron: "0 2 * * *", catch_up_hours: {hours}}}\n')
    said = reason(instance, row(catch_up_hours=hours), late=timedelta(hours=late))
    assert (said is None) is starts
    assert starts or "catch_up_hours" in str(said)


def test_a_schedule_whose_former_run_still_goes_is_skipped_with_the_reason(instance: DagsterInstance) -> None:
    write(DAILY)
    schedule = definitions().get_repository_def().get_schedule_def("schedule_1_daily_doner_backup")

    def tick() -> Any:
        now = datetime.now(timezone.utc)
        with build_schedule_context(instance=instance, scheduled_execution_time=now) as context:
            return schedule.evaluate_tick(context)

    first = tick()
    [request] = first.run_requests
    assert isinstance(request, RunRequest)
    assert {key: request.tags[key] for key in (tags.TRIGGER, tags.SCHEDULE_ID, tags.SCHEDULE_NAME)} == {
        tags.TRIGGER: "scheduled",
        tags.SCHEDULE_ID: "1",
        tags.SCHEDULE_NAME: "Daily Döner & Backup",
    }
    [backup] = [one for one in JOBS if one.name == "database_backup"]
    former = instance.create_run_for_job(backup, tags=dict(request.tags), status=DagsterRunStatus.STARTED)
    assert former.run_id in tick().skip_message
    instance.report_run_failed(former)
    assert tick().run_requests


def test_freshness_is_the_loosest_of_an_assets_schedules() -> None:
    write(DAILY, '  - {id: 2, name: Weekly, type: database, cron: "0 3 * * 0"}\n')
    specs = {spec.key: spec for spec in definitions().resolve_all_asset_specs()}
    policy: Any = specs[AssetKey("database_backup")].freshness_policy
    assert policy.fail_window.to_timedelta() == timedelta(days=7, hours=6)
    assert specs[AssetKey("kanbu_database")].freshness_policy is None


def test_names_are_what_dagster_takes() -> None:
    assert schedule_name(row(id=7, name="日本")) == "schedule_7"
    assert schedule_name(row(id=7, name="  --A/b.C!")) == "schedule_7_a_b_c"


def eventually(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)
    return found


def test_web_server_and_daemon_know_the_code_server_by_one_address(tmp_path: Path) -> None:
    """Dagster files ticks under it: with two, the UI would show none of those that the daemon made."""
    socket = tmp_path / "code-server.sock"
    code_server.write_workspace(tmp_path / "workspace.yaml", socket)
    [daemons] = WorkspaceFileTarget([str(tmp_path / "workspace.yaml")]).create_origins()
    [webs] = code_server.target(socket).create_origins()
    assert daemons == webs
    assert daemons.get_id() == webs.get_id()


_SCHEDULES = """
{ schedulesOrError(repositorySelector: {repositoryName: "__repository__", repositoryLocationName: "kanbu_backup"}) {
    ... on Schedules { results { name cronSchedule scheduleState { id selectorId status
      ticks(limit: 5) { status skipReason runIds } } } }
} }"""
_START = """
mutation($name: String!) { startSchedule(scheduleSelector: {
    scheduleName: $name, repositoryName: "__repository__", repositoryLocationName: "kanbu_backup"})
  { __typename ... on PythonError { message } } }"""


def test_a_running_service_takes_changes_over_and_its_ticks_refuse_by_themselves() -> None:
    """`schedules add`, `edit` and `remove` while `serve` runs; and mode external, with a schedule started in the UI."""
    settings = {"BACKUP_UI_PASSWORD": PASSWORD, "BACKUP_SCHEDULER_MODE": "external", "BACKUP_CRON_TIMEZONE": "UTC"}
    with new_serving(settings) as serving:
        file = serving.folder / "kanbu_backup.yaml"
        file.write_text("# Ours.\nschedules: [] # none yet\n")
        serving.start()
        serving.await_ready()

        def command(*arguments: str) -> str:
            environment = {**settings, "BACKUP_CONFIG_FILE": str(file), "DAGSTER_HOME": str(serving.home)}
            result = CliRunner().invoke(cli, ["schedules", *arguments], env=environment, catch_exceptions=False)
            assert result.exit_code == 0, result.output
            return result.stdout

        def known() -> dict[str, Any]:
            results = serving.graphql(_SCHEDULES)["schedulesOrError"]["results"]
            return {one["name"]: one for one in results}

        assert known() == {}
        command("add", "--name", "Often", "--type", "database", "--cron", "* * * * *")
        begun = time.monotonic()
        found = eventually(known, 30)
        assert time.monotonic() - begun < 20
        assert found["schedule_1_often"]["scheduleState"]["status"] == "STOPPED"
        started = serving.graphql(_START, name="schedule_1_often")
        assert started["startSchedule"]["__typename"] == "ScheduleStateResult"
        [listed] = json.loads(command("--json"))["schedules"]
        assert (listed["set_in_ui"], listed["differs"]) == (True, True)

        def ended_ticks() -> list[dict[str, Any]]:
            ticks = known()["schedule_1_often"]["scheduleState"]["ticks"]
            return [one for one in ticks if one["status"] != "STARTED"]

        tick = eventually(ended_ticks, 100)[0]
        assert tick["status"] == "SKIPPED"
        assert "BACKUP_SCHEDULER_MODE is external" in tick["skipReason"]
        command("edit", "1", "--cron", "5 5 * * *")
        eventually(lambda: known()["schedule_1_often"]["cronSchedule"] == "5 5 * * *", 30)
        command("remove", "1")
        eventually(lambda: not known(), 30)
        assert file.read_text().startswith("# Ours.\n")
        assert "# none yet" in file.read_text()
        assert serving.stop() == 0

"""What a service left alone lives through, one after the other, each with the real daemon: a failure that passes, a
change of the schedules while a backup runs, and a time that it slept through."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from typing import Any

import pytest

from kanbu_backup_dagster.orchestration import tags
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest
from kanbu_backup_dagster_tests.receiver import Receiver
from kanbu_backup_dagster_tests.server.serving import KEY, PASSWORD, Serving, new_serving
from kanbu_backup_dagster_tests.server.test_serve import locked, waiting_backup

_RUNS_AT = """
query($value: String!) {
  runsOrError(filter: {tags: [{key: ".dagster/scheduled_execution_time", value: $value}]}) {
    ... on Runs { results { runId } } } }"""
_RUNS = "{ runsOrError { ... on Runs { results { runId status jobName tags { key value } } } } }"
_SCHEDULES = """
{ schedulesOrError(repositorySelector: {repositoryName: "__repository__", repositoryLocationName: "kanbu_backup"}) {
    ... on Schedules { results { name cronSchedule } } } }"""


def eventually(what: str, holds: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return answer


def config(cron: str) -> str:
    return f'schedules: [{{id: 1, name: Often, type: database, cron: "{cron}"}}]\nnotifications: {{on_success: true}}\n'


def scheduled(serving: Serving) -> list[dict[str, str]]:
    """The runs of schedules, the newest first: their tags, with their id and status."""
    runs = serving.graphql(_RUNS)["runsOrError"]["results"]
    flat = [
        {**{tag["key"]: tag["value"] for tag in run["tags"]}, "id": run["runId"], "status": run["status"]}
        for run in runs
    ]
    return [run for run in flat if run.get(tags.TRIGGER) == "scheduled"]


def crons(serving: Serving) -> dict[str, str]:
    return {one["name"]: one["cronSchedule"] for one in serving.graphql(_SCHEDULES)["schedulesOrError"]["results"]}


@pytest.mark.timeout(900)  # it lives through several minutes of the schedule's clock
def test_a_service_left_alone(newest_postgres: PostgresForTest, receiver: Receiver) -> None:
    url = newest_postgres.database("CREATE TABLE held (id int);")
    name, other = newest_postgres.database_name(url), newest_postgres.database()
    settings = {
        "DATABASE_URL": newest_postgres.tcp_url(url),
        "BACKUP_PG_MODE": "direct",
        "BACKUP_UI_PASSWORD": PASSWORD,
        "BACKUP_TRIGGER_API_KEY": KEY,
        "BACKUP_SCHEDULER_MODE": "both",
        "BACKUP_CRON_TIMEZONE": "UTC",
        "BACKUP_WEBHOOK_URL": receiver.url,
        "BACKUP_RETRY_AFTER_SECONDS": "1",
    }
    with new_serving(settings) as serving:
        file = serving.folder / "kanbu_backup.yaml"
        file.write_text(config("* * * * *"))

        # A failure that passes: the database takes no connections when the schedule comes, and does soon after.
        newest_postgres.execute(other, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        serving.start()
        serving.await_ready()
        first = eventually("the first run fails", lambda: [run for run in scheduled(serving) if failed(run)], 120)[-1]
        newest_postgres.execute(other, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        file.write_text(config("0 0 1 1 *"))
        eventually("the new times are known", lambda: crons(serving)["schedule_1_often"] == "0 0 1 1 *", 30)

        def second_attempt() -> list[dict[str, str]]:
            attempts = [run for run in scheduled(serving) if run.get(tags.SECOND_ATTEMPT_OF) == first["id"]]
            return [run for run in attempts if run["status"] == "SUCCESS"]

        second = eventually("the second attempt", second_attempt, 120)[0]
        assert second[tags.SCHEDULE_ID] == "1"
        eventually("it is told", lambda: receiver.events, 60)
        assert set(receiver.events) == {"backup.completed"}  # the failure is not told, since it passed

        # A change of the schedules while a backup runs.
        with locked(newest_postgres, url, "held"):
            running = waiting_backup(serving)
            file.write_text(config("30 4 * * *"))
            eventually("the new times are known", lambda: crons(serving)["schedule_1_often"] == "30 4 * * *", 30)
        eventually("the backup succeeds", lambda: status(serving, running) == "SUCCESS", 60)

        # A time slept through.
        before = len(scheduled(serving))
        due = (dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=105)).replace(second=0, microsecond=0)
        cron = f"{due.minute} {due.hour} * * *"
        file.write_text(config(cron))
        eventually("the new times are known", lambda: crons(serving)["schedule_1_often"] == cron, 30)
        # The daemon counts from the moment it first saw the schedule at these times.
        time.sleep(3)
        assert serving.stop() == 0, serving.output
        assert dt.datetime.now(dt.timezone.utc) < due
        time.sleep(max(0.0, (due - dt.datetime.now(dt.timezone.utc)).total_seconds()) + 2)
        serving.output = ""
        serving.start()
        serving.await_ready()
        eventually("the late start", lambda: len(scheduled(serving)) > before, 60)
        late = scheduled(serving)[0]
        eventually("it succeeds", lambda: status(serving, late["id"]) == "SUCCESS", 60)
        # Dagster shows nobody the tag with the time that a run is for, but finds runs by it.
        assert [run["runId"] for run in serving.graphql(_RUNS_AT, value=due.isoformat())["runsOrError"]["results"]] == [
            late["id"]
        ]
        for line in (
            r"\[Scheduler\] schedule 1 \(Often\): database_backup starts",
            rf"{late['id']}.*\[Backup\] Stored .*kanbu_backup_",
            rf"\[Notify\] webhook: backup.completed \({late['id']}\) delivered",
        ):
            serving.await_output(line, 60)
        assert len(scheduled(serving)) == before + 1
        assert serving.stop() == 0, serving.output


def failed(run: dict[str, str]) -> bool:
    return run["status"] == "FAILURE"


def status(serving: Serving, run_id: str) -> str:
    runs = serving.graphql(_RUNS)["runsOrError"]["results"]
    return str(next(run["status"] for run in runs if run["runId"] == run_id))

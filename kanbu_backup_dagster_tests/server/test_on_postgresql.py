"""Dagster on PostgreSQL: everything that `kanbu-backup serve` does, with its records in a real server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from dagster import DagsterInstance
from dagster._core.instance.ref import InstanceRef
from dagster._serdes import deserialize_value, serialize_value
from dagster_postgres import PostgresRunStorage
from sqlalchemy import create_engine

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.orchestration.dagster_database import DagsterDatabaseError, dagster_database
from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest
from kanbu_backup_dagster_tests.server.serving import KEY, PASSWORD, REPOSITORY, Serving, new_serving

SCHEDULE = 'schedules: [{id: 1, name: Each Minute, type: database, cron: "* * * * *", retention_days: 14}]\n'
LAUNCH = """
mutation($tags: [ExecutionTag!]!) {
  launchRun(executionParams: {
    selector: {
      repositoryLocationName: "kanbu_backup", repositoryName: "__repository__", jobName: "database_backup"
    },
    executionMetadata: {tags: $tags}
  }) { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } }
}
"""
RUNS = "{ runsOrError { ... on Runs { results { runId status tags { key value } } } } }"


def eventually(what: str, holds: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := holds():
            return answer
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s: {what}")


def statuses(kanbu: Serving) -> dict[str, str]:
    return {run["runId"]: run["status"] for run in kanbu.graphql(RUNS)["runsOrError"]["results"]}


def launch(kanbu: Serving, target: str) -> str:
    answer = kanbu.graphql(LAUNCH, tags=[{"key": "kanbu/target", "value": target}])["launchRun"]
    assert answer["__typename"] == "LaunchRunSuccess", answer
    run_id: str = answer["run"]["runId"]
    return run_id


def test_serve_keeps_its_records_in_postgresql_and_shows_the_url_to_nobody(newest_postgres: PostgresForTest) -> None:
    """UI, daemon, queue, schedule, sensors and two workers at once."""
    records, kanbu_database = newest_postgres.database(), newest_postgres.sample_database()
    settings = {
        "DATABASE_URL": newest_postgres.tcp_url(kanbu_database),
        "BACKUP_PG_MODE": "direct",
        "BACKUP_UI_PASSWORD": PASSWORD,
        "BACKUP_TRIGGER_API_KEY": KEY,
        "BACKUP_SCHEDULER_MODE": "both",
    }
    with new_serving(settings) as kanbu:
        # Prisma's parameters are not in the way here either, and .env counts as everywhere.
        url = newest_postgres.tcp_url(records) + "?schema=public"
        (kanbu.folder / ".env").write_text(f"DAGSTER_POSTGRES_URL={url}\n")
        (kanbu.folder / "kanbu_backup.yaml").write_text(SCHEDULE)
        kanbu.start()
        kanbu.await_ready()
        # A dump waits for this lock, so that both runs are certainly under way at the same time.
        with a_table_locked(kanbu_database):
            first, second = launch(kanbu, "one"), launch(kanbu, "another")
            third = launch(kanbu, "one")

            def dumps() -> bool:
                return len([command for command in kanbu.processes().values() if "pg_dump" in command]) == 2

            eventually("two workers at once", dumps)
            assert [statuses(kanbu)[run] for run in (first, second, third)] == ["STARTED", "STARTED", "QUEUED"]
            shown = kanbu.graphql("{ instance { info } }")["instance"]["info"]
            assert "kanbu_backup_dagster" in shown  # it is the page of the configuration
            seen = shown + "\n".join(kanbu.processes().values())
        for run in (first, second, third):
            eventually(f"run {run} succeeds", lambda run=run: statuses(kanbu)[run] == "SUCCESS")

        def count(sql: str) -> int:
            return int(newest_postgres.query(records, f"SELECT count(*) FROM {sql}")[0][0])

        eventually(
            "the schedule's run",
            lambda: count("run_tags WHERE key = 'dagster/schedule_name'"),
            seconds=90,  # at the next full minute
        )
        eventually("ticks of sensors", lambda: count("job_ticks WHERE type = 'SENSOR'"))
        assert count("job_ticks WHERE type = 'SCHEDULE'") > 0
        assert count("daemon_heartbeats") >= 4
        assert count("event_logs WHERE dagster_event_type = 'ASSET_MATERIALIZATION'") >= 3
        assert kanbu.stop() == 0, kanbu.output

        secret = newest_postgres.password
        for text in (url, url.partition("?")[0], secret, secret.partition("/")[2]):
            assert text not in seen + kanbu.output
        assert not list(kanbu.home.rglob("*.db")), "records in SQLite"
        for file in kanbu.home.rglob("*"):
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file


@contextmanager
def a_table_locked(url: str) -> Iterator[None]:
    """While this lasts, no dump goes on."""
    with closing(psycopg2.connect(url)) as session, session.cursor() as cursor:
        cursor.execute('LOCK TABLE "Task"')
        yield


def test_programs_that_start_at_once_make_the_tables_once(
    newest_postgres: PostgresForTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = newest_postgres.database()
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", newest_postgres.tcp_url(records))
    program = (
        "from kanbu_backup_dagster.orchestration.dagster_home import open_instance\n"
        "with open_instance() as instance:\n    print(instance.get_runs_count())\n"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            # Homes of their own: as on machines of their own, no lock on a file is between them.
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DAGSTER_HOME": str(Path.home() / f"machine-{number}")},
        )
        for number in range(3)
    ]
    assert [start.communicate(timeout=120)[0] for start in starts] == ["0\n"] * 3
    assert [start.returncode for start in starts] == [0] * 3


def test_what_dagster_hands_to_the_process_of_a_run_holds_no_url(
    newest_postgres: PostgresForTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers for containers give it as an argument: `dagster api execute_run {...}`."""
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", newest_postgres.tcp_url(newest_postgres.database()))
    with open_instance() as instance:
        assert isinstance(instance.run_storage, PostgresRunStorage)
        handed_on = serialize_value(instance.get_ref())
    assert "HomeStorage" in handed_on
    assert newest_postgres.password not in handed_on
    assert "postgresql://" not in handed_on
    with DagsterInstance.from_ref(deserialize_value(handed_on, InstanceRef)) as there:
        assert isinstance(there.run_storage, PostgresRunStorage)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p%40s%2Fs@h:5/db?schema=public", "user=u password=p@s/s host=h port=5 dbname=db"),
        ("postgresql+psycopg2://u@h/db?sslmode=require", "user=u host=h dbname=db sslmode=require"),
        ("postgresql://u@h1:1,h2:2/db", "user=u host=h1,h2 port=1,2 dbname=db"),
        ("postgresql:///db?host=/run/postgresql&user=u", "host=/run/postgresql user=u dbname=db"),
    ],
)
def test_forms_of_the_url(monkeypatch: pytest.MonkeyPatch, url: str, expected: str) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", url)
    database = dagster_database()
    assert database is not None
    engine = create_engine(database.sqlalchemy_url)
    _, given = engine.dialect.create_connect_args(engine.url)
    wanted = dict(pair.split("=") for pair in expected.split())
    assert {name: str(value) for name, value in given.items() if name in wanted} == wanted
    assert set(given) - set(wanted) == {"connect_timeout", "application_name"}
    assert "p@s" not in repr(database) + repr(engine.url)


def test_the_variable_is_read_as_all_settings_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dagster_database() is None
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql://environment/db")
    for in_file in ("", "DAGSTER_POSTGRES_URL=postgresql://file/db\n", "DAGSTER_POSTGRES_URL=\n"):
        Path(".env").write_text(in_file)
        database, setting = dagster_database(), load_settings().secret("dagster_postgres_url")
        assert (database and database.parameters["host"]) == (setting and setting.split("/")[2])


def test_a_url_or_server_that_cannot_be_used_is_told_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "mysql://u:s3cret@h/db")
    with pytest.raises(SettingsError, match="DAGSTER_POSTGRES_URL cannot be used") as malformed:
        open_instance()
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql://u:s3cret@127.0.0.1:1/db")
    with pytest.raises(DagsterDatabaseError, match=r"cannot be reached: .*refused") as refused:
        open_instance()
    assert "s3cret" not in f"{malformed.value} {refused.value}"

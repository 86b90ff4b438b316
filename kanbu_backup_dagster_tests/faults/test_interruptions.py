"""A run that is interrupted: ended politely it leaves nothing, killed outright it leaves nothing that looks whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.errors import DagsterExecutionInterruptedError

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.manifest import VerificationStatus
from kanbu_backup_dagster.backup.names import parse_name
from kanbu_backup_dagster.backup.verification import verify
from kanbu_backup_dagster.errors import InterruptedRunError, KanbuError
from kanbu_backup_dagster.orchestration import run_scope
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster.orchestration.target_lock import Holder, open_locks, storage_name
from kanbu_backup_dagster.storage.folder import MARK_NAME, FolderStorage
from kanbu_backup_dagster_tests.backups import store_backup
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

Configure = Callable[..., Path]
PROJECT = Path(__file__).parents[2]

# Backups one after the other, without the seconds that Dagster takes to start, so that most kills hit a backup.
_BACKUPS = """
from kanbu_backup_dagster.backup.keys import load_keyring
from kanbu_backup_dagster.backup.landing import Origin, make_backup
from kanbu_backup_dagster.backup.recipe import Recipe
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster.sources.postgres import prepare_dump
from kanbu_backup_dagster.storage.open import open_storage
settings = load_settings()
keys, storage = load_keyring(settings), open_storage(settings)
recipe = Recipe(prepare_dump(settings)[0]).with_compression(2).with_checksum().with_encryption(keys.current.key_id)
print("ready", flush=True)
while True:
    make_backup(recipe, settings=settings, keys=keys, storage=storage, origin=Origin())
"""


def children_of(process: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == process:
                found.append(int(folder.name))
    return found


def is_running(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@contextmanager
def locked(url: str) -> Iterator[None]:
    """While this lasts, no dump of the table `t` goes on."""
    with psycopg2.connect(url) as session, session.cursor() as cursor:
        cursor.execute("LOCK TABLE t")
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_leaves_no_process_and_no_file(
    newest_postgres: PostgresForTest, configure: Configure, number: signal.Signals
) -> None:
    url = newest_postgres.database("CREATE TABLE t (i int)")
    store = configure(url)
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "kanbu_backup_dagster.definitions"]
    with locked(url):
        worker = subprocess.Popen(
            [*command, "-j", "database_backup"], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(lambda: store.exists() and any(name.endswith(".part") for name in os.listdir(store)))
        eventually(lambda: children_of(worker.pid))
        children = children_of(worker.pid)
        worker.send_signal(number)
        assert worker.wait(30) != 0
        assert not any(is_running(child) for child in children)
    assert os.listdir(store) == [MARK_NAME]
    with DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        assert run.status is DagsterRunStatus.FAILURE
        said = "\n".join(str(entry.user_message) + str(entry.dagster_event) for entry in instance.all_logs(run.run_id))
        assert "interrupted" in said
        assert "store" in said


def start_command(*arguments: str) -> subprocess.Popen[str]:
    """The command line in a process group of its own, as a terminal's shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "kanbu_backup_dagster.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_told_that_it_was_interrupted(command: subprocess.Popen[str], number: signal.Signals) -> None:
    # A terminal sends it to the whole group.
    os.killpg(command.pid, number)
    _, said = command.communicate(timeout=30)
    assert (command.returncode, said) == (130, "error: The run was interrupted.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_backup_ends_with_130(
    newest_postgres: PostgresForTest, configure: Configure, number: signal.Signals
) -> None:
    url = newest_postgres.database("CREATE TABLE t (i int)")
    store = configure(url)
    with locked(url):
        command = start_command("backup", "database")
        eventually(lambda: newest_postgres.query(url, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        is_told_that_it_was_interrupted(command, number)
    assert os.listdir(store) == [MARK_NAME]


@pytest.mark.parametrize("arguments", [("prune",), ("drill",)])
def test_other_commands_that_are_interrupted_end_with_130(configure: Configure, arguments: tuple[str, ...]) -> None:
    store = configure()
    store_backup(store)
    others = Holder.now("rotate_keys", "another run")
    with open_locks().hold(storage_name(FolderStorage(store)), others, exclusive=True):
        command = start_command(*arguments)

        def waits() -> bool:
            with DagsterInstance.get() as instance:
                steps = {
                    stats.step_key for run in instance.get_runs() for stats in instance.get_run_step_stats(run.run_id)
                }
            return bool(steps & {"prune_all", "drill"})

        eventually(waits)
        time.sleep(0.5)
        is_told_that_it_was_interrupted(command, signal.SIGINT)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (DagsterExecutionInterruptedError(), InterruptedRunError, "interrupted"),
        (OSError("the locks are away"), KanbuError, "the locks are away"),
    ],
)
def test_a_run_that_ended_between_steps_says_why(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, fault: BaseException, kind: type[KanbuError], said: str
) -> None:
    configure()

    def fail() -> None:
        raise fault

    monkeypatch.setattr(run_scope, "open_locks", fail)
    outcome = run_job("prune_backups")
    assert not outcome.success
    assert type(outcome.error) is kind
    assert said in str(outcome.error)


def test_a_stage_that_fails_is_named_and_leaves_nothing(newest_postgres: PostgresForTest, configure: Configure) -> None:
    url = newest_postgres.database("CREATE TABLE t (i int)")
    store = configure(url)
    with locked(url):
        runner = subprocess.Popen(
            [sys.executable, "-m", "kanbu_backup_dagster.cli", "backup", "database"],
            cwd=PROJECT,
            stderr=subprocess.PIPE,
            text=True,
        )
        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        eventually(lambda: newest_postgres.query(url, waiting))
        newest_postgres.execute(url, f"SELECT pg_terminate_backend(pid) FROM ({waiting}) s")
        assert runner.stderr is not None
        said = runner.stderr.read()
        assert runner.wait(30) == 1
    assert "stage `dump`" in said
    assert "terminating connection" in said
    assert "Traceback" not in said
    assert os.listdir(store) == [MARK_NAME]


def test_after_kill_9_at_random_moments_every_listed_backup_is_whole(
    newest_postgres: PostgresForTest, configure: Configure
) -> None:
    url = newest_postgres.database(
        "CREATE TABLE t AS SELECT i, md5(i::text) AS a, md5((i * 7)::text) AS b FROM generate_series(1, 60000) i"
    )
    store = configure(url)
    environment = load_environment()
    environment.storage.prepare()
    chance = random.Random(20260118)
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", _BACKUPS], cwd=PROJECT, stdout=subprocess.PIPE) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.9))
            worker.send_signal(signal.SIGKILL)
    listed = environment.catalog.backups()
    assert len(listed) >= 5
    for backup in listed:
        verdict = verify(backup, environment.storage, environment.keys)
        assert verdict.status is VerificationStatus.VERIFIED, (backup.filename, verdict)
    left = {name for name in os.listdir(store) if name.endswith(".part")}
    assert left, "no kill hit a backup: the test proves nothing"
    assert run_job("database_backup").success
    for name in os.listdir(store):
        subject = name.removesuffix(".manifest.json")
        assert name == MARK_NAME or (parse_name(subject) and (store / subject).exists()), name

"""Docker mode when something breaks: always a clear failure, never a backup, and no process stays in the container.

Faults are made by Docker's own command line while a dump flows, on a real engine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.landing import Origin, make_backup
from kanbu_backup_dagster.backup.manifest import Manifest
from kanbu_backup_dagster.backup.recipe import Recipe
from kanbu_backup_dagster.errors import KanbuError, SourceError
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster.sources import docker_exec
from kanbu_backup_dagster.sources.postgres import prepare_dump
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster_tests.docker_engine import DATABASE, USER, DockerEngine
from kanbu_backup_dagster_tests.real_docker import ContainerPostgres

# More than all buffers on the way hold, and nothing that gzip sees the repetition of.
LARGE = """
CREATE TABLE large AS
  SELECT n AS id, random_text
    FROM generate_series(1, 60) n,
         (SELECT string_agg(gen_random_uuid()::text, '') AS random_text FROM generate_series(1, 28000)) once
"""
PROJECT = Path(__file__).parents[2]

Fault = Callable[[], object]


class Victim(ContainerPostgres):
    """A container that a test may break."""

    def pg_dump_pid(self) -> str:
        """The number of the running pg_dump, inside the container."""
        return self.engine.inside(self.container, "ps", "-C", "pg_dump", "-o", "pid=").split()[0]

    def kill_pg_dump(self) -> None:
        self.engine.inside(self.container, "kill", "-KILL", self.pg_dump_pid())

    def end_session(self) -> None:
        self.psql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kanbu-backup'", DATABASE
        )


@pytest.fixture(scope="module")
def _victims(docker_engine: DockerEngine) -> Iterator[list[str]]:
    """The container that the last test left, in whatever state."""
    names: list[str] = []
    yield names
    for name in names:
        docker_engine.docker("rm", "--force", "--volumes", name)


@pytest.fixture
def victim(docker_engine: DockerEngine, _victims: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Victim]:
    if not _victims:
        _victims.append(docker_engine.start_postgres())
        Victim(docker_engine, _victims[0]).psql(LARGE, DATABASE)
    server = Victim(docker_engine, _victims[0])
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    yield server
    if server.container not in docker_engine.docker("ps", "--all", "--format={{.Names}}").split():
        _victims.clear()
        return
    if docker_engine.docker("inspect", "--format={{.State.Status}}", server.container).strip() == "exited":
        docker_engine.docker("start", server.container)
    docker_engine.await_answer(server.container)
    await_no_processes(server)


def await_true(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} seconds"
        time.sleep(0.05)


def await_no_processes(server: ContainerPostgres, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while left := server.processes():
        assert time.monotonic() < deadline, f"still running in the container: {left}"
        time.sleep(0.1)


def recipe() -> Recipe:
    return Recipe(prepare_dump(load_settings())[0]).with_compression(1).with_checksum()


def backup(folder: Path, prepared: Recipe | None = None, on_chunk: Fault = lambda: None) -> Manifest:
    storage = FolderStorage(folder)
    storage.prepare()
    return make_backup(
        prepared or recipe(),
        settings=load_settings(),
        keys=Keyring(),
        storage=storage,
        origin=Origin(),
        on_progress=lambda progress: on_chunk(),
    )


def failed_backup(fault: Fault, folder: Path, prepared: Recipe | None = None) -> KanbuError:
    """Make a backup slowly and, once bytes flow, let `fault` happen beside it; the error that it ends with."""
    FolderStorage(folder).prepare()
    files_before = set(folder.rglob("*"))
    # Not in this thread: while it ends a container the engine waits for its readers, and we are one.
    with ThreadPoolExecutor(1) as beside:
        faults: list[Future[object]] = []

        def on_chunk() -> None:
            if not faults:
                faults.append(beside.submit(fault))
            time.sleep(0.1)

        with pytest.raises(KanbuError) as raised:
            backup(folder, prepared, on_chunk)
        faults[0].result()
    assert set(folder.rglob("*")) == files_before
    return raised.value


def test_pg_dump_is_killed(victim: Victim, tmp_path: Path) -> None:
    error = failed_backup(victim.kill_pg_dump, tmp_path)
    assert error.message.startswith("pg_dump was ended by signal 9")


def test_the_session_is_ended(victim: Victim, tmp_path: Path) -> None:
    error = failed_backup(victim.end_session, tmp_path)
    assert error.message.startswith(
        'pg_dump failed with exit status 1: pg_dump: error: Dumping the contents of table "l'
    )


def test_the_container_is_killed(victim: Victim, tmp_path: Path) -> None:
    error = failed_backup(lambda: victim.engine.docker("kill", victim.container), tmp_path)
    assert error.message.startswith(f"The container {victim.container} is not running: it is exited.")


def test_the_container_is_stopped(victim: Victim, tmp_path: Path) -> None:
    error = failed_backup(lambda: victim.engine.docker("stop", "--time=5", victim.container), tmp_path)
    assert error.message.startswith((f"The container {victim.container} is not running", "pg_dump failed with exit"))


def test_the_container_is_restarted(victim: Victim, tmp_path: Path) -> None:
    error = failed_backup(lambda: victim.engine.docker("restart", "--time=5", victim.container), tmp_path)
    assert error.message.startswith((f"The container {victim.container} ", "pg_dump failed with exit"))


def test_the_container_is_paused(victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_exec, "GUARD_AFTER_SECONDS", 0)
    monkeypatch.setattr(docker_exec, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(docker_exec, "PAUSE_SECONDS", 1)
    monkeypatch.setattr(docker_exec, "ENDING_SECONDS", 1)
    try:
        error = failed_backup(lambda: victim.engine.docker("pause", victim.container), tmp_path)
    finally:
        victim.engine.docker("unpause", victim.container)
    assert error.message.startswith(f"The container {victim.container} was paused while pg_dump ran")
    assert f"docker unpause {victim.container}" in error.advice


def test_a_short_pause_is_waited_out(victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_exec, "SILENCE_SECONDS", 0.3)

    def pause_for_a_while() -> None:
        victim.engine.docker("pause", victim.container)
        time.sleep(1.5)
        victim.engine.docker("unpause", victim.container)

    with ThreadPoolExecutor(1) as beside:
        faults: list[Future[None]] = []

        def on_chunk() -> None:
            if not faults:
                faults.append(beside.submit(pause_for_a_while))
            time.sleep(0.02)

        manifest = backup(tmp_path, on_chunk=on_chunk)
        faults[0].result()
    assert manifest.database is not None
    assert manifest.database.rows == {"public.large": 60}


@pytest.mark.parametrize(("command", "state", "undo"), [("pause", "paused", "unpause"), ("stop", "exited", "start")])
def test_the_container_does_not_run_at_the_start(victim: Victim, command: str, state: str, undo: str) -> None:
    prepared, settings = recipe(), load_settings()
    victim.engine.docker(command, victim.container)
    with pytest.raises(
        SourceError, match=f"the container {victim.container} .POSTGRES_CONTAINER. is {state}"
    ) as raised:
        prepare_dump(settings)
    assert f"docker {undo} {victim.container}" in raised.value.advice
    with pytest.raises(SourceError, match=r"is not running|is paused"):
        next(prepared.source.open(settings).chunks())
    victim.engine.docker(undo, victim.container)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        # The shell speaks for itself; without one the engine does, on the standard output.
        ("pg_dump", r"pg_dump failed with exit status 127: .*not found"),
        ("sh", r"pg_dump cannot be started in the container .*: OCI runtime exec failed"),
    ],
)
def test_a_program_is_missing(victim: Victim, tmp_path: Path, program: str, said: str) -> None:
    prepared = recipe()
    path = victim.engine.inside(victim.container, "bash", "-c", f"type -P {program}").strip()
    FolderStorage(tmp_path).prepare()
    files_before = set(tmp_path.rglob("*"))
    victim.engine.inside(victim.container, "mv", path, f"{path}.away")
    try:
        with pytest.raises(KanbuError, match=said):
            backup(tmp_path, prepared)
        with pytest.raises(SourceError, match=f"{victim.container}"):
            prepare_dump(load_settings())
    finally:
        victim.engine.inside(victim.container, "mv", f"{path}.away", path)
    assert set(tmp_path.rglob("*")) == files_before


def test_the_reader_goes(victim: Victim) -> None:
    opened = recipe().source.open(load_settings())
    chunks = opened.chunks()
    next(chunks)
    assert any(line.startswith("pg_dump") for line in victim.processes())
    begun = time.monotonic()
    chunks.close()
    assert time.monotonic() - begun < 3
    await_no_processes(victim, 1)


READER = """
import sys, time
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster.sources import commands
from kanbu_backup_dagster.sources.postgres import prepare_dump
dump, method = prepare_dump(load_settings())
def dumping():
    chunks = dump.open(load_settings()).chunks()
    next(chunks)
    print("flows", flush=True)
    time.sleep(60)
def waiting():
    print("flows", flush=True)
    commands.execute(method.access, load_settings(), "BEGIN; LOCK TABLE large;")
{what}()
"""


@pytest.mark.parametrize("what", ["dumping", "waiting"])
def test_the_reader_is_killed_outright(victim: Victim, what: str) -> None:
    """kill -9 of our own process, while its dump flows, and while its psql waits for a lock."""
    holder = victim.engine.command_line("exec", "-i", victim.container, "psql", "-U", USER, "-d", DATABASE)
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as lock:
        assert lock.stdin is not None
        assert lock.stdout is not None
        lock.stdin.write("BEGIN; LOCK TABLE large IN ROW EXCLUSIVE MODE;\n\\echo locked\n")
        lock.stdin.flush()
        while "locked" not in lock.stdout.readline():
            pass
        quiet = set(victim.processes())
        reader = subprocess.Popen(
            [sys.executable, "-c", READER.format(what=what)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"flows\n"
        # By now it has its guard; what is shorter ends by itself.
        time.sleep(docker_exec.GUARD_AFTER_SECONDS + 1)
        assert set(victim.processes()) - quiet
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        deadline = time.monotonic() + 5
        while left := set(victim.processes()) - quiet:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        reader.stdout.close()
        lock.stdin.close()


def test_a_guard_leaves_a_slow_dump_alone(victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_exec, "GUARD_AFTER_SECONDS", 0)
    monkeypatch.setattr(docker_exec, "SIGN_OF_LIFE_SECONDS", 0.3)
    monkeypatch.setattr(docker_exec, "GUARD_PATIENCE_SECONDS", 1)
    begun = time.monotonic()
    manifest = backup(tmp_path, on_chunk=lambda: time.sleep(0.06))
    assert time.monotonic() - begun > 3
    assert manifest.database is not None
    assert manifest.database.rows == {"public.large": 60}


def test_the_container_is_removed(victim: Victim, tmp_path: Path) -> None:
    error = failed_backup(lambda: victim.engine.docker("rm", "--force", victim.container), tmp_path)
    assert error.message.startswith(f"The container {victim.container} is gone: it was removed.")


def test_the_engine_is_killed(docker_engine: DockerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_exec, "GUARD_AFTER_SECONDS", 0)
    monkeypatch.setattr(docker_exec, "SIGN_OF_LIFE_SECONDS", 0.3)
    monkeypatch.setattr(docker_exec, "GUARD_PATIENCE_SECONDS", 3)
    with DockerEngine(docker_engine.image) as engine:
        name = engine.start_postgres()
        Victim(engine, name).psql(LARGE, DATABASE)
        for variable, value in Victim(engine, name).variables.items():
            monkeypatch.setenv(variable, value)
        container_id = engine.docker("inspect", "--format={{.Id}}", name).strip()

        def kill_the_engine() -> None:
            # What is over within a second has no guard yet.
            await_true(lambda: "timeout" in programs_of(container_id), 5)
            os.kill(engine.daemon_pid, signal.SIGKILL)

        error = failed_backup(kill_the_engine, tmp_path)
        assert error.message.startswith("The Docker engine does not answer")
        # The container, and what runs in it, outlives its engine.
        assert "postgres" in programs_of(container_id)
        await_true(lambda: "pg_dump" not in programs_of(container_id), 10)


def programs_of(container_id: str) -> set[str]:
    """The names of the programs that run in a container, seen from outside."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if container_id in (folder / "cgroup").read_text():
                found.add((folder / "comm").read_text().strip())
    return found

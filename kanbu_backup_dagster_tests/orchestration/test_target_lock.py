"""Locks on targets: shared, exclusive, told by name, and gone with their process."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from dagster import build_init_resource_context

from kanbu_backup_dagster.errors import BusyError
from kanbu_backup_dagster.orchestration.run_scope import RunScope, run_scope
from kanbu_backup_dagster.orchestration.target_lock import FolderLocks, Holder, Locks, PostgresLocks, open_locks
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

BACKUP = Holder.now("database_backup", "run-of-backup")
RESTORE = Holder.now("restore_database", "run-of-restore")


@pytest.fixture(
    params=["folder", pytest.param("postgresql", marks=pytest.mark.real("postgresql"))],
    autouse=True,
)
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Locks:
    """The locks of Dagster's home, then those of its PostgreSQL."""
    if request.param == "postgresql":
        server = request.getfixturevalue("newest_postgres")
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", server.tcp_url(server.database()))
    return open_locks()


def test_backups_share_a_target_and_a_restore_names_each_of_them(locks: Locks) -> None:
    with locks.hold("kanbu", BACKUP, exclusive=False), locks.hold("kanbu", Holder.now("b", "second"), exclusive=False):
        with pytest.raises(BusyError) as busy, locks.hold("kanbu", RESTORE, exclusive=True):
            pass
        assert "run-of-backup" in str(busy.value)
        assert "second" in str(busy.value)
    with locks.hold("kanbu", RESTORE, exclusive=True):
        pass


def test_a_restore_shuts_everybody_out_of_its_target_and_of_no_other(locks: Locks) -> None:
    with locks.hold("kanbu", RESTORE, exclusive=True):
        for exclusive in (False, True):
            with pytest.raises(BusyError, match="run-of-restore"), locks.hold("kanbu", BACKUP, exclusive=exclusive):
                pass
        with locks.hold("another", BACKUP, exclusive=True):
            pass


def test_one_who_cannot_say_who_he_is_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks = FolderLocks(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"), locks.hold("kanbu", BACKUP, exclusive=True):
            pass
    with locks.hold("kanbu", RESTORE, exclusive=True):
        pass


def test_waiting_ends_when_the_holder_leaves(locks: Locks) -> None:
    release = threading.Event()
    held = threading.Event()

    def hold() -> None:
        with locks.hold("kanbu", RESTORE, exclusive=True):
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    threading.Timer(0.3, release.set).start()
    begun = time.monotonic()
    with locks.hold("kanbu", BACKUP, exclusive=False, wait_seconds=10):
        assert time.monotonic() - begun < 5
    thread.join()


def test_a_killed_holder_holds_nothing(locks: Locks) -> None:
    program = (
        "import time\n"
        "from kanbu_backup_dagster.orchestration.target_lock import Holder, open_locks\n"
        "with open_locks().hold('kanbu', Holder.now('restore_database', '100%'), exclusive=True):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if isinstance(locks, PostgresLocks):  # another machine has a home of its own
        environment["DAGSTER_HOME"] = str(Path.home() / "another")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(BusyError, match=f"run 100%, process {process.pid} on {socket.gethostname()}"),
            locks.hold("kanbu", BACKUP, exclusive=False),
        ):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    # PostgreSQL finds out when it next looks at the connection.
    with locks.hold("kanbu", BACKUP, exclusive=True, wait_seconds=10):
        entries = list(Path(os.environ["DAGSTER_HOME"], "locks").glob("*/*.holder"))
        assert len(entries) == isinstance(locks, FolderLocks)  # the dead one's is gone


@pytest.mark.parametrize("locks", ["postgresql"], indirect=True)
def test_a_long_hold_is_not_ended_as_idle(locks: Locks, newest_postgres: PostgresForTest) -> None:
    newest_postgres.server.psql("ALTER ROLE CURRENT_USER SET idle_session_timeout = '200ms'")
    try:
        with locks.hold("kanbu", RESTORE, exclusive=True):
            time.sleep(0.6)
            with pytest.raises(BusyError), locks.hold("kanbu", BACKUP, exclusive=False):
                pass
    finally:
        newest_postgres.server.psql("ALTER ROLE CURRENT_USER RESET idle_session_timeout")


def test_a_run_holds_a_lock_once_until_it_ends() -> None:
    other = Holder.now("other", "other")
    with run_scope(build_init_resource_context()) as scope:
        scope.hold("kanbu", exclusive=True)
        scope.hold("kanbu", exclusive=False)
        scope.hold("kanbu", exclusive=True)
        with pytest.raises(BusyError), open_locks().hold("kanbu", other, exclusive=False):
            pass
    with open_locks().hold("kanbu", other, exclusive=True):
        pass


def test_duties_are_done_before_the_lock_is_given_back(locks: Locks) -> None:
    done = []

    def duty() -> None:
        with pytest.raises(BusyError), locks.hold("kanbu", BACKUP, exclusive=False):
            pass
        done.append("duty")

    with ExitStack() as stack:
        scope = RunScope(stack, locks, "restore_database", "x")
        scope.hold("kanbu", exclusive=True)
        scope.at_end("duty", duty)
        scope.at_end("duty", duty)
    assert done == ["duty"]

"""Locks on targets: shared, exclusive, told by name, and gone with their process."""

from __future__ import annotations

import os
import signal
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
from kanbu_backup_dagster.orchestration.target_lock import FolderLocks, Holder, open_locks

BACKUP = Holder.now("database_backup", "run-of-backup")
RESTORE = Holder.now("restore_database", "run-of-restore")


@pytest.fixture
def locks(tmp_path: Path) -> FolderLocks:
    return FolderLocks(tmp_path / "locks")


def test_backups_share_a_target_and_a_restore_names_each_of_them(locks: FolderLocks) -> None:
    with locks.hold("kanbu", BACKUP, exclusive=False), locks.hold("kanbu", Holder.now("b", "second"), exclusive=False):
        with pytest.raises(BusyError) as busy, locks.hold("kanbu", RESTORE, exclusive=True):
            pass
        assert "run-of-backup" in str(busy.value)
        assert "second" in str(busy.value)
    with locks.hold("kanbu", RESTORE, exclusive=True):
        pass


def test_a_restore_shuts_everybody_out_of_its_target_and_of_no_other(locks: FolderLocks) -> None:
    with locks.hold("kanbu", RESTORE, exclusive=True):
        for exclusive in (False, True):
            with pytest.raises(BusyError, match="run-of-restore"), locks.hold("kanbu", BACKUP, exclusive=exclusive):
                pass
        with locks.hold("another", BACKUP, exclusive=True):
            pass


def test_waiting_ends_when_the_holder_leaves(locks: FolderLocks) -> None:
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


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from kanbu_backup_dagster.orchestration.target_lock import FolderLocks, Holder\n"
        "with FolderLocks(Path(sys.argv[1])).hold('kanbu', Holder.now('restore_database', 'x'), exclusive=True):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        locks = FolderLocks(tmp_path)
        with pytest.raises(BusyError, match=str(process.pid)), locks.hold("kanbu", BACKUP, exclusive=False):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with locks.hold("kanbu", BACKUP, exclusive=True):
        assert len(list(tmp_path.glob("*/*.holder"))) == 1  # the dead one's is gone


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


def test_duties_are_done_before_the_lock_is_given_back(locks: FolderLocks) -> None:
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

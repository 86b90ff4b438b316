"""Runs whose worker was killed outright, found and reported, so that they hold no place in the queue for ever.

What belongs here: the sign of life that every run gives, and the launcher through which Dagster's run monitoring asks
for it. What does not: what a run does.

A worker that is killed (kill -9, the memory killer, a power cut) reports nothing, and Dagster's default launcher cannot
tell: the run stays STARTED. Here each process that executes a run holds a file lock in Dagster's home meanwhile. The
kernel lets the lock go with the process, whatever ended it, and unlike a process id it is never anybody else's. A file
without a lock is a lost run; no file (another machine's run) says nothing.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagster import DagsterRun, DefaultRunLauncher
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus
from dagster._serdes import ConfigurableClassData

from kanbu_backup_dagster.settings import dagster_home

_FORGET_AFTER_SECONDS = 7 * 24 * 3600


@contextmanager
def sign_of_life(run_id: str) -> Iterator[None]:
    """While within, the run counts as alive. Left by returning or by an exception, nothing is known of it any more."""
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _forget_old(folder)
    path = folder / f"{run_id}.{os.getpid()}"
    # Locked before it has its name: a file is never seen without the lock while its process lives.
    fresh = folder / f".{path.name}"
    handle = os.open(fresh, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        fresh.rename(path)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def is_lost(run_id: str) -> bool:
    """Whether the process that executed the run is gone without having come to its end."""
    # A file a process: an executor may give each step its own.
    return any(_is_abandoned(path) for path in _folder().glob(f"{run_id}.*"))


def _folder() -> Path:
    return dagster_home() / "live_runs"


def _is_abandoned(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _forget_old(folder: Path) -> None:
    before = time.time() - _FORGET_AFTER_SECONDS
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < before and _is_abandoned(path):
                path.unlink()
        except FileNotFoundError:  # another run forgot it first
            continue


class WatchedRunLauncher(DefaultRunLauncher):
    """Dagster's default launcher, which can tell whether a run's worker is there. Named in `dagster.yaml`."""

    @classmethod
    def config_type(cls) -> Mapping[str, Any]:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> WatchedRunLauncher:
        return cls(inst_data=inst_data)

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        if is_lost(run.run_id):
            return CheckRunHealthResult(WorkerStatus.FAILED, "its process was killed; it reported nothing")
        return CheckRunHealthResult(WorkerStatus.RUNNING)

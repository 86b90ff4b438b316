"""A Dagster job as a benchmark runs it: a process of its own, in a Dagster home and a storage that hold nothing yet."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from dagster import DagsterEventType, DagsterInstance

from kanbu_backup_dagster.orchestration.dagster_home import ensure_home

_EXECUTE = (sys.executable, "-m", "dagster", "job", "execute", "-m", "kanbu_backup_dagster.definitions", "-j")


def prepare_environment(folder: Path, **variables: str) -> None:
    """Have jobs keep everything they make in `folder`, encrypted."""
    os.environ |= {
        "BACKUP_LOCAL_PATH": str(folder / "store"),
        "BACKUP_ENCRYPTION_KEY": "a benchmark's passphrase",
        "DAGSTER_HOME": str(folder / "dagster"),
        **variables,
    }


def fresh_job(name: str) -> list[str]:
    """Empty BACKUP_LOCAL_PATH and DAGSTER_HOME, and give the job's command."""
    for variable in ("BACKUP_LOCAL_PATH", "DAGSTER_HOME"):
        shutil.rmtree(os.environ[variable], ignore_errors=True)
    ensure_home()
    return [*_EXECUTE, name]


def step_seconds(step: str) -> float:
    """How long a step of the last run took, by Dagster's own record."""
    with DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        moments = {
            event.dagster_event_type: event.timestamp
            for event in instance.all_logs(run.run_id)
            if event.step_key == step and event.dagster_event_type
        }
    return moments[DagsterEventType.STEP_SUCCESS] - moments[DagsterEventType.STEP_START]

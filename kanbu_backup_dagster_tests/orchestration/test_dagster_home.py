"""Dagster's home: made by whoever comes first, and what the configuration in it decides."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kanbu_backup_dagster.orchestration.dagster_home import open_instance

PROJECT = Path(__file__).parents[2]


def test_first_commands_at_the_same_time_make_the_home_once(
    configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure().mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "new" / "home"))
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "kanbu_backup_dagster.cli", "catalog", "sync", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        for _ in range(3)
    ]
    said = [command.communicate(timeout=120) for command in commands]
    assert [command.returncode for command in commands] == [0] * 3, said
    with open_instance() as instance:
        assert [run.job_name for run in instance.get_runs()] == ["sync_catalog"] * 3
        assert all(run.is_success for run in instance.get_runs())


def test_nothing_is_reported_to_dagsters_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_DISABLE_TELEMETRY")
    with open_instance() as instance:
        assert instance.telemetry_enabled is False

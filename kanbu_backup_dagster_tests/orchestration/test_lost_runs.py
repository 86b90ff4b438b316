"""A run whose process is killed is lost; one that lives, has ended, or is somebody else's, is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRunStatus, job, op
from dagster._core.launcher.base import WorkerStatus

from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.orchestration.lost_runs import WatchedRunLauncher, is_lost, sign_of_life
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment

RUN = "11111111-2222-4333-8444-555555555555"
_WORKER = """
import sys, time
from kanbu_backup_dagster.orchestration.lost_runs import sign_of_life
with sign_of_life(sys.argv[1]):
    print("alive", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def worker() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", _WORKER, RUN], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "alive\n"
    return process


def test_a_killed_process_loses_its_run(worker: subprocess.Popen[str]) -> None:
    assert not is_lost(RUN)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert is_lost(RUN)
    assert is_lost(RUN), "asking must not change the answer"


def test_a_process_that_ends_by_an_exception_reports_for_itself(worker: subprocess.Popen[str]) -> None:
    worker.send_signal(signal.SIGINT)
    worker.communicate()
    assert not is_lost(RUN)


def test_a_run_of_another_machine_is_not_judged() -> None:
    assert not is_lost(RUN)
    with sign_of_life(RUN):
        assert not is_lost(RUN)
        assert not is_lost("99999999-2222-4333-8444-555555555555")
    assert not is_lost(RUN)


def test_old_signs_are_forgotten_and_living_ones_are_not(worker: subprocess.Popen[str]) -> None:
    (sign,) = (Path(os.environ["DAGSTER_HOME"]) / "live_runs").iterdir()
    long_ago = time.time() - 30 * 24 * 3600
    os.utime(sign, (long_ago, long_ago))
    with sign_of_life("another"):
        assert sign.exists()
    worker.kill()
    worker.communicate()
    with sign_of_life("another"):
        assert not sign.exists()


def test_every_run_with_the_environment_gives_its_sign() -> None:
    seen = []

    @op
    def look(context, environment: BackupEnvironment) -> None:  # type: ignore[no-untyped-def]
        seen.extend(path.name for path in (Path(os.environ["DAGSTER_HOME"]) / "live_runs").iterdir())

    @job(resource_defs={"environment": BackupEnvironment()})
    def looking() -> None:
        look()

    result = looking.execute_in_process()
    assert [name.partition(".")[0] for name in seen] == [result.run_id]
    assert not list((Path(os.environ["DAGSTER_HOME"]) / "live_runs").iterdir())


def test_the_home_has_the_launcher_that_can_tell(worker: subprocess.Popen[str]) -> None:
    with open_instance() as instance:
        assert isinstance(instance.run_launcher, WatchedRunLauncher)
        assert instance.run_monitoring_enabled
        run = _run(instance)
        assert instance.run_launcher.check_run_worker_health(run).status is WorkerStatus.RUNNING
        worker.kill()
        worker.communicate()
        assert instance.run_launcher.check_run_worker_health(run).status is WorkerStatus.FAILED


def _run(instance: DagsterInstance):  # type: ignore[no-untyped-def]
    @op
    def nothing() -> None: ...

    @job
    def empty() -> None:
        nothing()

    return instance.create_run_for_job(empty, run_id=RUN, status=DagsterRunStatus.STARTED)

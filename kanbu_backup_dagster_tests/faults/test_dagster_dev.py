"""`dagster dev` in the project's folder: runs launched by GraphQL and `dagster job launch`, and one cancelled."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.orchestration.dagster_home import ensure_home
from kanbu_backup_dagster.storage.folder import MARK_NAME
from kanbu_backup_dagster_tests.faults.test_interruptions import PROJECT, eventually, locked
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

Configure = Callable[..., Path]

_LAUNCH = """
mutation ($job: String!) { launchRun(executionParams: {selector: {repositoryLocationName: "kanbu_backup",
  repositoryName: "__repository__", jobName: $job}, runConfigData: "{}"})
  { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }
"""
_STATUS = "query ($run: ID!) { runOrError(runId: $run) { ... on Run { status } } }"
# A pg_dump that waits for the lock, as the server sees it.
_WAITING = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
_TERMINATE = "mutation ($run: String!) { terminateRun(runId: $run) { __typename } }"


class Webserver:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, query: str, **variables: str) -> dict[str, Any]:
        answer = requests.post(f"{self.url}/graphql", json={"query": query, "variables": variables}, timeout=30).json()
        assert "errors" not in answer, answer
        data: dict[str, Any] = answer["data"]
        return data

    def is_up(self) -> bool:
        try:
            return requests.get(f"{self.url}/server_info", timeout=5).ok
        except requests.ConnectionError:
            return False

    def launch(self, job: str) -> str:
        launched = self.ask(_LAUNCH, job=job)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return str(launched["run"]["runId"])

    def status(self, run: str) -> str:
        return str(self.ask(_STATUS, run=run)["runOrError"]["status"])


@contextmanager
def dagster_dev() -> Iterator[Webserver]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dagster", "dev", "--port", str(port)]
    with subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as served:
        try:
            server = Webserver(port)
            eventually(server.is_up, 120)
            yield server
        finally:
            served.send_signal(signal.SIGINT)
            served.wait(60)


def test_runs_are_launched_and_cancelled(newest_postgres: PostgresForTest, configure: Configure) -> None:
    url = newest_postgres.database("CREATE TABLE t AS SELECT generate_series(1, 100) AS i")
    store = configure(url)
    ensure_home()
    with dagster_dev() as server:
        run = server.launch("database_backup")
        eventually(lambda: server.status(run) in ("SUCCESS", "FAILURE"), 120)
        assert server.status(run) == "SUCCESS"
        (first,) = load_environment().catalog.backups()
        assert first.manifest is not None
        assert first.manifest.run_id == run

        with locked(url):
            run = server.launch("database_backup")
            eventually(lambda: any(name.endswith(".part") for name in os.listdir(store)), 120)
            eventually(lambda: newest_postgres.query(url, _WAITING))
            assert server.ask(_TERMINATE, run=run)["terminateRun"]["__typename"] == "TerminateRunSuccess"
            eventually(lambda: server.status(run) == "CANCELED", 60)
            assert newest_postgres.query(url, _WAITING) == []
        assert set(os.listdir(store)) == {MARK_NAME, first.filename, f"{first.filename}.manifest.json"}

        launched = [sys.executable, "-m", "dagster", "job", "launch", "-j", "database_backup"]
        subprocess.run(launched, cwd=PROJECT, check=True, capture_output=True, timeout=120)
        eventually(lambda: len(load_environment().catalog.backups()) == 2, 120)

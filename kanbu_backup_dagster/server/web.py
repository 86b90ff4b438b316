"""The web process: `python -m kanbu_backup_dagster.server.web`, started and restarted by `serve`.

What belongs here: running the application on a socket that is already open.
"""

from __future__ import annotations

import argparse
import socket
import time
from pathlib import Path

import uvicorn
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster_webserver.cli import DEFAULT_DB_STATEMENT_TIMEOUT, DEFAULT_POOL_MAX_OVERFLOW, DEFAULT_POOL_RECYCLE
from dagster_webserver.version import __version__ as dagster_webserver_version

from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.server import code_server
from kanbu_backup_dagster.server.app import build_server
from kanbu_backup_dagster.server.exposure import check_exposure
from kanbu_backup_dagster.server.logs import log_to_stderr
from kanbu_backup_dagster.settings import load_settings

_CODE_SERVER_SECONDS = 60
_SHUTDOWN_SECONDS = 5


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m kanbu_backup_dagster.server.web")
    parser.add_argument("--listening", type=int, required=True, help="file descriptor of the listening socket")
    parser.add_argument("--code-server", type=Path, required=True, help="socket of the code server")
    parser.add_argument("--tls-certificate", type=Path)
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--insecure-without-password", action="store_true")
    given = parser.parse_args()

    log_to_stderr()
    settings = load_settings()
    listening = socket.socket(fileno=given.listening)
    check_exposure(
        listening.getsockname()[0],
        has_password=settings.ui_password is not None,
        without_password=given.insecure_without_password,
    )
    with open_instance() as instance:
        instance.optimize_for_webserver(DEFAULT_DB_STATEMENT_TIMEOUT, DEFAULT_POOL_RECYCLE, DEFAULT_POOL_MAX_OVERFLOW)
        # Both start at once; a workspace that finds no code server would show an error until it looks again.
        deadline = time.monotonic() + _CODE_SERVER_SECONDS
        while not code_server.answers(given.code_server) and time.monotonic() < deadline:
            time.sleep(0.1)
        with WorkspaceProcessContext(
            instance,
            version=dagster_webserver_version,
            workspace_load_target=code_server.target(given.code_server),
        ) as context:
            config = uvicorn.Config(
                build_server(context, settings),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
                ssl_certfile=given.tls_certificate,
                ssl_keyfile=given.tls_key,
            )
            uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()

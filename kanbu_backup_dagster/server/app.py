"""The ASGI application: Dagster's web server behind its doors, and the trigger beside it.

What belongs here: putting the two together. Dagster's own application is wrapped, not changed.
"""

from __future__ import annotations

from typing import Any

from dagster._core.workspace.context import IWorkspaceProcessContext
from dagster_webserver.webserver import DagsterWebserver
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from kanbu_backup_dagster.server.access import Doors, Login
from kanbu_backup_dagster.server.attempts import FailedAttempts
from kanbu_backup_dagster.server.runs import DagsterRuns
from kanbu_backup_dagster.server.trigger import PREFIX, TriggerEndpoint
from kanbu_backup_dagster.settings import Settings

_LIVE_DATA_POLL_MILLISECONDS = 2000  # Dagster's own default for `dagster-webserver`


class Server:
    """Gives each request to the trigger or, through the doors, to Dagster.

    Attributes:
        dagster: Dagster's application, unguarded; its routes are what the doors guard.
    """

    def __init__(self, dagster: Starlette, doors: ASGIApp, trigger: ASGIApp) -> None:
        self.dagster = dagster
        self._doors = doors
        self._trigger = trigger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        to_trigger = scope["type"] == "http" and scope["path"].startswith(f"{PREFIX}/")
        await (self._trigger if to_trigger else self._doors)(scope, receive, send)


def build_server(
    context: IWorkspaceProcessContext[Any],
    settings: Settings,
    *,
    login_attempts: FailedAttempts | None = None,
    key_attempts: FailedAttempts | None = None,
) -> Server:
    """The application for `context`'s workspace.

    Args:
        context: Dagster's instance and code location.
        settings: The login, the trigger's key and mode, the schedule file.
        login_attempts: In place of the usual limits, for tests; likewise `key_attempts`.
    """
    webserver: DagsterWebserver[Any, Any] = DagsterWebserver(context, live_data_poll_rate=_LIVE_DATA_POLL_MILLISECONDS)
    dagster = webserver.create_asgi_app()
    password = settings.secret("ui_password")
    doors = Doors(
        dagster,
        login=Login(settings.ui_username, password) if password else None,
        allowed_hosts=settings.ui_host_names,
        attempts=login_attempts,
    )
    trigger = TriggerEndpoint(
        DagsterRuns(webserver, context.instance),
        key=settings.secret("trigger_api_key"),
        mode=settings.scheduler_mode,
        schedule_file=settings.config_file,
        attempts=key_attempts,
    )
    return Server(dagster, doors, trigger.app())

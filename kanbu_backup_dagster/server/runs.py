"""Backup runs as the trigger sees them: started, looked up, described.

What belongs here: asking Dagster, through the web server's own GraphQL, and putting its answers into plain words. What
does not: HTTP.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus
from dagster_webserver.webserver import DagsterWebserver
from starlette.requests import Request

from kanbu_backup_dagster.backup.manifest import Trigger
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.orchestration import tags
from kanbu_backup_dagster.orchestration.run_events import BACKUP_JOBS
from kanbu_backup_dagster.schedule_file import Schedule

logger = logging.getLogger("kanbu_backup.server")

LOCATION = "kanbu_backup"  # pyproject.toml's and workspace.yaml's name for the code location
REPOSITORY = "__repository__"  # Dagster's name for a location's one `Definitions`

_LAUNCH = """
mutation Launch($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on Error { message }
  }
}
"""
_LOCATION_STATUS = """
query Location($name: String!) {
  workspaceLocationEntryOrError(name: $name) {
    ... on WorkspaceLocationEntry { locationOrLoadError { __typename } }
  }
}
"""
_STATES = {
    DagsterRunStatus.NOT_STARTED: "queued",
    DagsterRunStatus.QUEUED: "queued",
    DagsterRunStatus.MANAGED: "queued",
    DagsterRunStatus.STARTING: "queued",
    DagsterRunStatus.STARTED: "running",
    DagsterRunStatus.CANCELING: "running",
    DagsterRunStatus.SUCCESS: "succeeded",
    DagsterRunStatus.FAILURE: "failed",
    DagsterRunStatus.CANCELED: "canceled",
}
STATES = ("queued", "running", "succeeded", "failed", "canceled")
ENDED = ("succeeded", "failed", "canceled")


class LaunchError(Exception):
    """Dagster would not start the run; the message is for our log, not for callers."""


@dataclass(frozen=True)
class BackupMade:
    """The file a run has stored."""

    filename: str
    size_bytes: int | None
    sha256: str | None


@dataclass(frozen=True)
class RunState:
    """One backup run.

    Attributes:
        status: One of `STATES`.
        started: Seconds since the epoch, once it has started; likewise `ended`.
        error: Why it failed, for people.
    """

    run_id: str
    type: BackupType
    status: str
    started: float | None
    ended: float | None
    backup: BackupMade | None
    error: str | None


class Runs(Protocol):
    """What the trigger needs of Dagster."""

    async def launch(self, request: Request, backup_type: BackupType, schedule: Schedule | None) -> str:
        """Queue a backup, and return its run id.

        Raises:
            LaunchError: It cannot be.
        """

    async def ready(self, request: Request) -> bool:
        """Whether the jobs are loaded."""

    def state(self, run_id: str) -> RunState | None:
        """A backup run; None when there is no such."""


class DagsterRuns:
    """`Runs` of a Dagster web server."""

    def __init__(self, webserver: DagsterWebserver[Any, Any], instance: DagsterInstance) -> None:
        self._webserver = webserver
        self._instance = instance

    async def launch(self, request: Request, backup_type: BackupType, schedule: Schedule | None) -> str:
        run_tags = {tags.TRIGGER: Trigger.EXTERNAL.value}
        if schedule is not None:
            run_tags |= tags.schedule_tags(schedule.id, schedule.name)
        answer = await self._ask(
            request,
            _LAUNCH,
            {
                "params": {
                    "selector": {
                        "repositoryLocationName": LOCATION,
                        "repositoryName": REPOSITORY,
                        "jobName": next(job for job, kind in BACKUP_JOBS.items() if kind is backup_type),
                    },
                    "runConfigData": {},
                    "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in run_tags.items()]},
                }
            },
        )
        result = (answer.get("data") or {}).get("launchRun") or {}
        if result.get("__typename") != "LaunchRunSuccess":
            raise LaunchError(str(result.get("message") or answer.get("errors") or result.get("__typename")))
        return str(result["run"]["runId"])

    async def ready(self, request: Request) -> bool:
        answer = await self._ask(request, _LOCATION_STATUS, {"name": LOCATION})
        entry = (answer.get("data") or {}).get("workspaceLocationEntryOrError") or {}
        return (entry.get("locationOrLoadError") or {}).get("__typename") == "RepositoryLocation"

    async def _ask(self, request: Request, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        response = await self._webserver.execute_graphql_request(request, query, variables, None)
        answer: dict[str, Any] = json.loads(bytes(response.body))
        return answer

    def state(self, run_id: str) -> RunState | None:
        try:
            known = str(UUID(run_id))
        except ValueError:
            return None
        record = self._instance.get_run_record_by_id(known)
        backup_type = BACKUP_JOBS.get(record.dagster_run.job_name) if record else None
        if record is None or backup_type is None:
            return None
        status = _STATES[record.dagster_run.status]
        return RunState(
            run_id=known,
            type=backup_type,
            status=status,
            started=record.start_time,
            ended=record.end_time,
            backup=self._backup(known) if status in ENDED else None,
            error=self._error(known) if status == "failed" else None,
        )

    def _backup(self, run_id: str) -> BackupMade | None:
        for entry in self._instance.all_logs(run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION):
            event = entry.dagster_event
            if event is not None and event.partition is not None:
                metadata = event.step_materialization_data.materialization.metadata
                size, digest = metadata.get("size_bytes"), metadata.get("sha256")
                return BackupMade(
                    event.partition,
                    int(str(size.value)) if size is not None else None,
                    str(digest.value) if digest is not None else None,
                )
        return None

    def _error(self, run_id: str) -> str:
        for entry in self._instance.all_logs(run_id, of_type=DagsterEventType.STEP_FAILURE):
            event = entry.dagster_event
            if event is None:
                continue
            told = event.step_failure_data.user_failure_data
            if told is not None and told.description:
                return told.description
        # Anything else is a fault of ours, whose words may quote what a caller must not see.
        return "The run failed; its page in the UI tells why."

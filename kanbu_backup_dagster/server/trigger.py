"""`POST /api/backup/trigger`: backups started by an external scheduler with a key.

What belongs here: HTTP, the key, and the body's form. What does not: starting runs (`runs`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.schedule_file import Schedule, load_schedule_file
from kanbu_backup_dagster.server.access import client_of, same_secret
from kanbu_backup_dagster.server.attempts import FailedAttempts
from kanbu_backup_dagster.server.openapi import DOCUMENT, MAX_BODY_BYTES, MAX_WAIT_SECONDS
from kanbu_backup_dagster.server.runs import ENDED, LaunchError, Runs, RunState
from kanbu_backup_dagster.settings import SchedulerMode

logger = logging.getLogger("kanbu_backup.server")

PREFIX = "/api/backup"
_POLL_SECONDS = 0.5


def _whole(value: object) -> object:
    """JSON has one kind of number: 1.0 is an integer there, as JSON Schema says."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class TriggerRequest(BaseModel):
    """The body: what to back up, and for which schedule."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: BackupType
    schedule_id: Annotated[int | None, BeforeValidator(_whole)] = Field(default=None, alias="scheduleId", ge=1)


class _Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.response = _problem(status, code, message, headers)


def _problem(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


class TriggerEndpoint:
    """The routes under `PREFIX`.

    Args:
        runs: Where backups are started.
        key: The only key; None keeps the trigger closed.
        mode: `internal` refuses the trigger.
        schedule_file: Read at each request that names a schedule, so that it is never out of date.
        attempts: Counts wrong keys. A right key is never made to wait: who guesses must not keep backups from running.
    """

    def __init__(
        self,
        runs: Runs,
        *,
        key: str | None,
        mode: SchedulerMode,
        schedule_file: Path,
        attempts: FailedAttempts | None = None,
    ) -> None:
        self._runs = runs
        self._key = key
        self._mode = mode
        self._schedule_file = schedule_file
        self._attempts = FailedAttempts() if attempts is None else attempts

    def app(self) -> Starlette:
        """The ASGI application; answers JSON to everything."""
        return Starlette(
            routes=[
                Route(f"{PREFIX}/trigger", self._answering(self._trigger), methods=["POST"]),
                Route(f"{PREFIX}/trigger/health", self._answering(self._health), methods=["GET"]),
                Route(f"{PREFIX}/runs/{{run_id}}", self._answering(self._run), methods=["GET"]),
                Route(f"{PREFIX}/openapi.json", self._answering(self._document), methods=["GET"]),
            ],
            exception_handlers={HTTPException: _http_problem, Exception: _fault},
        )

    def _answering(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except _Refused as refused:
                response = refused.response
            response.headers["Cache-Control"] = "no-store"
            response.headers["X-Content-Type-Options"] = "nosniff"
            return response

        return answer

    async def _trigger(self, request: Request) -> Response:
        self._check_key(request)
        if self._mode is SchedulerMode.INTERNAL:
            raise _Refused(
                403,
                "internal_mode",
                "BACKUP_SCHEDULER_MODE is internal; set it to external or both to use the trigger.",
            )
        wait = _wait_seconds(request)
        wanted = await _read(request)
        schedule = await run_in_threadpool(self._schedule, wanted)
        deadline = time.monotonic() + wait
        try:
            run_id = await self._runs.launch(request, wanted.type, schedule)
        except LaunchError as error:
            logger.error("[Server] The trigger could not start a %s backup: %s", wanted.type.value, error)
            raise _Refused(
                503, "unavailable", "Dagster cannot start the run now; the server's log tells why."
            ) from None
        logger.info("[Backup] %s backup triggered from %s: run %s", wanted.type.value, client_of(request), run_id)
        state = await self._state(run_id)
        while state.status not in ENDED and time.monotonic() < deadline and not await request.is_disconnected():
            await asyncio.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
            state = await self._state(run_id)
        body = _describe(state, request)
        if state.status not in ENDED or wait == 0:
            return JSONResponse(body, 202, {"Location": body["statusUrl"]})
        return JSONResponse(body, 200 if state.status == "succeeded" else 500)

    async def _state(self, run_id: str) -> RunState:
        state = await run_in_threadpool(self._runs.state, run_id)
        if state is None:
            raise _Refused(500, "run_deleted", f"The run {run_id} was deleted.")
        return state

    def _schedule(self, wanted: TriggerRequest) -> Schedule | None:
        if wanted.schedule_id is None:
            return None
        loaded = load_schedule_file(self._schedule_file)
        schedule = loaded.schedule(wanted.schedule_id)
        if schedule is None:
            broken = " The schedule file has problems: see `kanbu-backup schedules`." if loaded.problems else ""
            raise _Refused(404, "no_such_schedule", f"There is no schedule {wanted.schedule_id}.{broken}")
        if schedule.type.value != wanted.type.value:
            raise _Refused(
                422,
                "type_mismatch",
                f"Schedule {schedule.id} is of type {schedule.type.value}, not {wanted.type.value}.",
            )
        return schedule

    async def _health(self, request: Request) -> Response:
        ready = await self._runs.ready(request)
        reason = (
            "the jobs are not loaded"
            if not ready
            else "BACKUP_TRIGGER_API_KEY is not set"
            if self._key is None
            else "BACKUP_SCHEDULER_MODE is internal"
            if self._mode is SchedulerMode.INTERNAL
            else None
        )
        return JSONResponse(
            {"status": "ok" if ready else "unavailable", "accepting": reason is None, "reason": reason},
            200 if ready else 503,
        )

    async def _run(self, request: Request) -> Response:
        self._check_key(request)
        state = await run_in_threadpool(self._runs.state, request.path_params["run_id"])
        if state is None:
            raise _Refused(404, "no_such_run", "There is no such backup run.")
        return JSONResponse(_describe(state, request))

    async def _document(self, request: Request) -> Response:
        return JSONResponse(DOCUMENT)

    def _check_key(self, request: Request) -> None:
        challenge = {"WWW-Authenticate": "Bearer"}
        if self._key is None:
            raise _Refused(401, "closed", "The trigger is closed: BACKUP_TRIGGER_API_KEY is not set.", challenge)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise _Refused(401, "unauthorized", "Send the header Authorization: Bearer <the key>.", challenge)
        client = client_of(request)
        if same_secret(given.strip().encode("latin-1", "replace"), self._key.encode()):
            self._attempts.succeeded(client)
            return
        wait = self._attempts.wait(client)
        if wait > 0:
            raise _Refused(429, "too_many_failures", "Too many wrong keys.", {"Retry-After": str(math.ceil(wait))})
        self._attempts.failed(client)
        logger.warning("[Server] Wrong trigger key from %s", client)
        raise _Refused(401, "unauthorized", "The key is wrong.", challenge)


def _wait_seconds(request: Request) -> float:
    if unknown := sorted(set(request.query_params) - {"wait"}):
        # A misspelt `wait` would otherwise be answered at once, and taken for the backup's end.
        raise _Refused(422, "invalid", f"{unknown[0][:40]!r} is not a parameter; there is `wait`.")
    given = request.query_params.get("wait")
    if given is None:
        return 0.0
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise _Refused(422, "invalid", f"wait: has to be a number of seconds from 0 to {MAX_WAIT_SECONDS}.")
    return seconds


async def _read(request: Request) -> TriggerRequest:
    essence = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if essence != "application/json":
        raise _Refused(415, "unsupported_media_type", "The content type has to be application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise _Refused(415, "unsupported_media_type", "The body has to come without a content encoding.")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise _Refused(413, "too_large", f"The body has more than {MAX_BODY_BYTES} bytes.")
    except ClientDisconnect:
        raise _Refused(400, "incomplete", "The body ended early.") from None
    try:
        return TriggerRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        if any(detail["type"] == "json_invalid" for detail in details):
            raise _Refused(400, "not_json", "The body is not JSON.") from None
        problems = "; ".join(f"{'.'.join(map(str, detail['loc'])) or 'body'}: {detail['msg']}" for detail in details)
        raise _Refused(422, "invalid", problems) from None


def _describe(state: RunState, request: Request) -> dict[str, Any]:
    base = str(request.base_url).rstrip("/")
    backup = state.backup
    return {
        "runId": state.run_id,
        "type": state.type.value,
        "status": state.status,
        "url": f"{base}/runs/{state.run_id}",
        "statusUrl": f"{base}{PREFIX}/runs/{state.run_id}",
        "startedAt": _timestamp(state.started),
        "endedAt": _timestamp(state.ended),
        "backup": backup and {"filename": backup.filename, "fileSize": backup.size_bytes, "checksum": backup.sha256},
        "error": state.error and {"code": "backup_failed", "message": state.error},
    }


def _timestamp(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    headers = dict(error.headers) if error.headers else None
    return _problem(error.status_code, code, f"{error.detail}.", headers)


async def _fault(request: Request, error: Exception) -> Response:
    return _problem(500, "internal", "The server met a fault; its log tells more.")

"""The trigger's OpenAPI document, served at `/api/backup/openapi.json`."""

from __future__ import annotations

from typing import Any

from kanbu_backup_dagster import __version__
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.server.runs import STATES

MAX_BODY_BYTES = 16 * 1024
MAX_WAIT_SECONDS = 3600


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _error(description: str, **headers: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": _json(_ref("Error")), **({"headers": headers} if headers else {})}


def _run(description: str) -> dict[str, Any]:
    return {"description": description, "content": _json(_ref("Run"))}


_CHALLENGE = {"schema": {"type": "string"}, "description": "`Bearer`"}
_RETRY = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds"}
_LINK = {"schema": {"type": "string"}, "description": "Where the run's state is told"}

_UNAUTHORIZED = {"401": _error("No key, a wrong key, or no key is set", **{"WWW-Authenticate": _CHALLENGE})}
_THROTTLED = {"429": _error("Too many wrong keys from this client", **{"Retry-After": _RETRY})}
_BROKEN = {"500": _error("A fault of the server's")}

DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "Kanbu Backup trigger",
        "version": __version__,
        "description": "Starts backups from an external scheduler.",
    },
    "paths": {
        "/api/backup/trigger": {
            "post": {
                "operationId": "triggerBackup",
                "summary": "Start a backup",
                "security": [{"key": []}],
                "parameters": [
                    {
                        "name": "wait",
                        "in": "query",
                        "description": "Seconds to wait for the run's end before answering",
                        "schema": {"type": "number", "minimum": 0, "maximum": MAX_WAIT_SECONDS},
                    }
                ],
                "requestBody": {"required": True, "content": _json(_ref("TriggerRequest"))},
                "responses": {
                    "200": _run("The backup succeeded within `wait`"),
                    "202": {**_run("The backup is queued or runs"), "headers": {"Location": _LINK}},
                    "400": _error("The body is not JSON"),
                    **_UNAUTHORIZED,
                    "403": _error("BACKUP_SCHEDULER_MODE is `internal`"),
                    "404": _error("No such schedule"),
                    "413": _error(f"The body is longer than {MAX_BODY_BYTES} bytes"),
                    "415": _error("The body's content type is not application/json"),
                    "422": _error("The JSON or `wait` is not what is described here, or the schedule has another type"),
                    **_THROTTLED,
                    "500": {
                        "description": "The backup failed within `wait`, or a fault of the server's",
                        "content": _json({"anyOf": [_ref("Run"), _ref("Error")]}),
                    },
                    "503": _error("Dagster cannot start the run now"),
                },
            }
        },
        "/api/backup/trigger/health": {
            "get": {
                "operationId": "triggerHealth",
                "summary": "Whether the trigger can start backups",
                "security": [],
                "responses": {
                    "200": {"description": "The server works", "content": _json(_ref("Health"))},
                    "503": {"description": "The jobs are not loaded", "content": _json(_ref("Health"))},
                    **_BROKEN,
                },
            }
        },
        "/api/backup/runs/{runId}": {
            "get": {
                "operationId": "backupRun",
                "summary": "A backup run's state",
                "security": [{"key": []}],
                "parameters": [
                    {"name": "runId", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
                ],
                "responses": {
                    "200": _run("The run, whatever its state"),
                    **_UNAUTHORIZED,
                    "404": _error("No such backup run"),
                    **_THROTTLED,
                    **_BROKEN,
                },
            }
        },
    },
    "components": {
        "securitySchemes": {
            "key": {"type": "http", "scheme": "bearer", "description": "The value of BACKUP_TRIGGER_API_KEY"}
        },
        "schemas": {
            "TriggerRequest": {
                "type": "object",
                "required": ["type"],
                "additionalProperties": False,
                "properties": {
                    "type": {"enum": [kind.value for kind in BackupType]},
                    "scheduleId": {
                        "type": ["integer", "null"],
                        "minimum": 1,
                        "description": "A schedule in kanbu_backup.yaml: its retention, its name in webhooks",
                    },
                },
            },
            "Run": {
                "type": "object",
                "required": ["runId", "type", "status", "url", "statusUrl", "startedAt", "endedAt", "backup", "error"],
                "properties": {
                    "runId": {"type": "string", "format": "uuid"},
                    "type": {"enum": [kind.value for kind in BackupType]},
                    "status": {"enum": list(STATES)},
                    "url": {"type": "string", "description": "Its page in the UI"},
                    "statusUrl": {"type": "string"},
                    "startedAt": {"type": ["string", "null"], "format": "date-time"},
                    "endedAt": {"type": ["string", "null"], "format": "date-time"},
                    "backup": {
                        "type": ["object", "null"],
                        "required": ["filename", "fileSize", "checksum"],
                        "properties": {
                            "filename": {"type": "string"},
                            "fileSize": {"type": ["integer", "null"], "description": "Bytes"},
                            "checksum": {"type": ["string", "null"], "description": "SHA-256 before encryption"},
                        },
                    },
                    "error": {"anyOf": [_ref("Problem"), {"type": "null"}]},
                },
            },
            "Health": {
                "type": "object",
                "required": ["status", "accepting", "reason"],
                "properties": {
                    "status": {"enum": ["ok", "unavailable"]},
                    "accepting": {"type": "boolean", "description": "Whether a right key would start a backup"},
                    "reason": {"type": ["string", "null"], "description": "Why not"},
                },
            },
            "Error": {"type": "object", "required": ["error"], "properties": {"error": _ref("Problem")}},
            "Problem": {
                "type": "object",
                "required": ["code", "message"],
                "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}

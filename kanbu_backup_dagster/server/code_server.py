"""The code server: the process that holds the jobs, and starts a process per run.

What belongs here: how it is started and reached. It listens on a unix socket that only its user can open, for Dagster's
gRPC has no login.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.workspace.load_target import GrpcServerTarget
from dagster._grpc.client import DagsterGrpcClient

from kanbu_backup_dagster.server.runs import LOCATION

_DEFINITIONS = "kanbu_backup_dagster.definitions"
_LONGEST_SOCKET_PATH = 100  # of 107 bytes in sockaddr_un, unix(7)


def socket_path(folder: Path, name: str) -> Path:
    """Where a code server listens; in `folder`, unless its path is too long for a socket's."""
    path = folder / f"{name}.sock"
    if len(bytes(path)) <= _LONGEST_SOCKET_PATH:
        return path
    return Path(tempfile.mkdtemp(prefix="kanbu-backup-")) / path.name


def command(socket: Path) -> list[str]:
    """The command that runs a code server on `socket`. It can reload its code, as the UI's button asks."""
    return [
        sys.executable,
        "-m",
        "dagster",
        "code-server",
        "start",
        "--socket",
        str(socket),
        "--module-name",
        _DEFINITIONS,
        "--location-name",
        LOCATION,
        "--log-level",
        "warning",
    ]


def target(socket: Path) -> GrpcServerTarget:
    """The workspace that consists of the code server on `socket`."""
    return GrpcServerTarget(host="localhost", port=None, socket=str(socket), location_name=LOCATION)


def write_workspace(file: Path, socket: Path) -> None:
    """The same as a workspace file, for Dagster's own programs."""
    # `ssl` too: Dagster files ticks under the whole address, so the UI shows those of an address equal to its own.
    entry = {"host": "localhost", "socket": str(socket), "location_name": LOCATION, "ssl": False}
    file.write_text(json.dumps({"load_from": [{"grpc_server": entry}]}), "utf-8")  # JSON is YAML


def answers(socket: Path) -> bool:
    """Whether the code server on `socket`, and the process behind it that holds the code, answer."""
    if not socket.exists():
        return False
    try:
        DagsterGrpcClient(socket=str(socket)).ping("")
    except DagsterUserCodeUnreachableError:
        return False
    return True

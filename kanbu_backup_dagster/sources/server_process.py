"""The process of an embedded PostgreSQL server: what its lock file says, whether it lives, and how it ends.

What belongs here: `postmaster.pid` and signals. What does not: starting one (`embedded_postgres`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from kanbu_backup_dagster.errors import SourceError


@dataclass(frozen=True)
class PidFile:
    """What a running server says of itself in `postmaster.pid` (PostgreSQL's src/include/utils/pidfile.h)."""

    pid: int
    port: int
    socket_folder: Path
    status: str

    @classmethod
    def read(cls, data: Path) -> PidFile | None:
        """None when there is no such file, or the server has not written it to its end yet."""
        try:
            lines = (data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return None
        if len(lines) < 8:
            return None
        return cls(int(lines[0]), int(lines[3]), Path(lines[4]), lines[7].strip())

    @classmethod
    def ready_process(cls, data: Path) -> int | None:
        """The process that has said in this file that it takes connections."""
        pid_file = cls.read(data)
        return pid_file.pid if pid_file is not None and pid_file.status == "ready" else None


def serves(pid: int, data: Path) -> bool:
    """Whether process `pid` is a PostgreSQL server of the folder `data`; the number may have gone to another since."""
    if Path("/proc/self/cmdline").exists():
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return False
        if b"-D" not in arguments[:-1]:
            return False
        theirs = Path(os.fsdecode(arguments[arguments.index(b"-D") + 1]))
        try:
            return theirs.samefile(data)
        except FileNotFoundError:
            return True  # It may be ours, moved since the server was started.
        except PermissionError:
            return False
    answer = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return f"-D {data}" in answer.stdout


def end_server(home: Path, *, immediately: bool = False, timeout: float = 60.0) -> None:
    """Stop the server of `home/data`, if it runs, and wait until it is gone.

    Args:
        immediately: Without a checkpoint.
        timeout: Seconds to wait.

    Raises:
        SourceError: It still runs after `timeout`.
    """
    data = home / "data"
    running = PidFile.read(data)
    if running is None or not serves(running.pid, data):
        return
    # The signals of a fast and of an immediate shutdown: https://www.postgresql.org/docs/current/server-shutdown.html
    os.kill(running.pid, signal.SIGQUIT if immediately else signal.SIGINT)
    deadline = time.monotonic() + timeout
    while serves(running.pid, data):
        if time.monotonic() > deadline:
            raise SourceError(
                f"PostgreSQL in {home} still runs after {timeout:g} s.", advice=f"Its log is {home / 'log'}."
            )
        time.sleep(0.01)
    if running.socket_folder.parent != home:
        shutil.rmtree(running.socket_folder, ignore_errors=True)

"""`kanbu-backup serve` as a real process, and what it leaves behind."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

REPOSITORY = Path(__file__).parents[2]
USERNAME, PASSWORD, KEY = "admin", "a-Pässword:with/colons", "trigger-key-0123456789"
LOGIN = (USERNAME.encode(), PASSWORD.encode())
_MARK = "KANBU_TEST_MARK"


class Serving:
    """One `kanbu-backup serve`, in an empty folder of its own.

    Attributes:
        url: Once it is ready, where the UI is.
        folder: Its working directory; `kanbu_backup.yaml` is read from here.
        storage: Where its backups go.
        output: What it has written so far, standard output and error together.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
        self.folder = folder
        self.storage = folder / "backups"
        self.home = folder / "dagster"
        self.url = ""
        self.output = ""
        self.mark = uuid.uuid4().hex
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(REPOSITORY),
            "DAGSTER_HOME": str(self.home),
            "BACKUP_LOCAL_PATH": str(self.storage),
            _MARK: self.mark,
            **settings,
        }
        self.command = [sys.executable, "-m", "kanbu_backup_dagster.cli", "serve", "--port", "0", *arguments]
        self.process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def start(self, command: Sequence[str] | None = None) -> None:
        """Start it, or `command` in its place."""
        self.process = subprocess.Popen(
            command or self.command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            umask=0,  # the laxest there is, so that what must be private is made so
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.output += line

    def await_output(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """The first match of `pattern` in what it writes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            match = re.search(pattern, self.output)
            if match:
                return match
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} did not come within {seconds} s. What came:\n{self.output}")

    def await_ready(self) -> None:
        """Wait until it says so."""
        ready = self.await_output(r"Ready(?:: (\S+))?\.\s")
        self.url = ready[1] or ""

    def stop(self, number: int = signal.SIGTERM, seconds: float = 90) -> int:
        """Signal it and wait for its end; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def processes(self) -> dict[int, str]:
        """All that live of what it started, however distantly: process ids and commands."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            try:
                if f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # gone meanwhile
                continue
        return found

    def find(self, *parts: str) -> int:
        """The process whose command has all `parts` in it."""
        (pid,) = [pid for pid, command in self.processes().items() if all(part in command for part in parts)]
        return pid

    def kill(self) -> None:
        """Leave nothing behind, whatever state it is in: what was being started meanwhile included."""
        while living := self.processes():
            for pid in living:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        if self.process is not None:
            self.process.wait(10)

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        """The data a GraphQL query gives, logged in."""
        answer = requests.post(
            f"{self.url}/graphql", json={"query": query, "variables": variables}, auth=LOGIN, timeout=30
        )
        body = answer.json()
        assert "errors" not in body, body
        data: dict[str, Any] = body["data"]
        return data

    def trigger(self, body: Any, *, wait: float | None = None, key: str = KEY) -> requests.Response:
        """POST to the trigger."""
        return requests.post(
            f"{self.url}/api/backup/trigger",
            params={} if wait is None else {"wait": wait},
            json=body,
            headers={"Authorization": f"Bearer {key}"},
            timeout=300,
        )


@contextmanager
def new_serving(settings: Mapping[str, str], arguments: Sequence[str] = ()) -> Iterator[Serving]:
    """A `Serving` that is not started yet, and is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="kanbu-serve-", ignore_cleanup_errors=True) as folder:
        serving = Serving(Path(folder), settings, arguments)
        try:
            yield serving
        finally:
            serving.kill()

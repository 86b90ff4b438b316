"""A real rclone: a WebDAV or SFTP server on loopback, and a mount of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import requests

from kanbu_backup_dagster.storage.folder import MARK_NAME
from kanbu_backup_dagster.storage.mounts import MOUNT_TABLE
from kanbu_backup_dagster.storage.rclone import RcloneStorage
from kanbu_backup_dagster.storage.remote_control import RemoteControl

_LOGIN = ("kanbu", "a password that only tests know")
_IMPATIENT = ("--retries", "1", "--timeout", "5s", "--contimeout", "5s")


def missing_for_a_mount() -> str | None:
    """Why rclone cannot mount anything here; None when it can."""
    for program in ("rclone", "fusermount3"):
        if shutil.which(program) is None:
            return f"no {program}: install rclone and fuse3"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened by this user"
    return None


class RcloneMount:
    """The folder `backing` of a remote, served by rclone and mounted at `point` by another.

    Args:
        root: A folder of its own.
        cache_mode: Of the mount: off, minimal, writes or full.
        served_by: webdav or sftp.
        write_back: How long the mount's cache keeps a file before it uploads it.
        tries: How often rclone tries a request; its own default is 10, which makes failures slow.
    """

    def __init__(
        self,
        root: Path,
        cache_mode: str = "off",
        *,
        served_by: str = "webdav",
        write_back: str = "100ms",
        tries: int = 1,
    ) -> None:
        self.backing, self.point, self._cache = root / "backing", root / "mount", root / "cache"
        for folder in (self.backing, self.point, self._cache):
            folder.mkdir(parents=True)
        self.cache_mode = cache_mode
        self._served_by = served_by
        self._write_back = write_back
        self._tries = ("--low-level-retries", str(tries))
        self._configuration = root / "rclone.conf"
        self._port, self._control_port = _free_port(), _free_port()
        self._log = root / "log"
        self._configuration.write_text(self._remote())
        self.server = self._start_server()
        self.mount = self.start_mount()

    def _remote(self) -> str:
        if self._served_by == "webdav":
            return f"[remote]\ntype = webdav\nurl = http://127.0.0.1:{self._port}\nvendor = other\n"
        password = subprocess.run(["rclone", "obscure", "pw"], capture_output=True, text=True, check=True).stdout
        return f"[remote]\ntype = sftp\nhost = 127.0.0.1\nport = {self._port}\nuser = u\npass = {password}"

    def _run(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                ["rclone", *arguments, "--config", self._configuration, *_IMPATIENT, *self._tries],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def _start_server(self) -> subprocess.Popen[bytes]:
        login = ("--user", "u", "--pass", "pw") if self._served_by == "sftp" else ()
        server = self._run(
            "serve",
            self._served_by,
            self.backing,
            "--addr",
            f"127.0.0.1:{self._port}",
            "--dir-cache-time",
            "0s",
            *login,
        )
        until(lambda: _answers(self._port), "the server answers")
        return server

    def restart_server(self) -> None:
        """Start the server again after it was killed."""
        self.server.wait(10)
        self.server = self._start_server()

    def start_mount(self) -> subprocess.Popen[bytes]:
        """Mount, with the remote control on."""
        mount = self._run(
            *(
                "mount",
                "remote:",
                self.point,
                "--vfs-cache-mode",
                self.cache_mode,
                "--vfs-write-back",
                self._write_back,
            ),
            *("--cache-dir", self._cache, "--dir-cache-time", "1s", "--attr-timeout", "0s"),
            *("--rc", "--rc-addr", f"127.0.0.1:{self._control_port}", "--rc-user", _LOGIN[0], "--rc-pass", _LOGIN[1]),
        )
        until(self.is_mounted, "it is mounted")
        until(lambda: _answers(self._control_port), "the remote control answers")
        return mount

    def is_mounted(self) -> bool:
        """Whether the mount table has it."""
        return f" {self.point} " in MOUNT_TABLE.read_text()

    @property
    def control_address(self) -> str:
        """The address of the mount's remote control."""
        return f"http://127.0.0.1:{self._control_port}"

    @property
    def variables(self) -> dict[str, str]:
        """The settings that use this mount."""
        return {
            "BACKUP_STORAGE": "gdrive",
            "BACKUP_GDRIVE_PATH": str(self.point / "kanbu-backups"),
            "BACKUP_RCLONE_RC_ADDR": self.control_address,
            "BACKUP_RCLONE_RC_USER": _LOGIN[0],
            "BACKUP_RCLONE_RC_PASSWORD": _LOGIN[1],
        }

    def storage(self, folder: str = "kanbu-backups", *, controlled: bool = True, patience: float = 20) -> RcloneStorage:
        """A storage in a folder of the mount, with or without the remote control."""
        control = RemoteControl(self.control_address, user=_LOGIN[0], password=_LOGIN[1]) if controlled else None
        return RcloneStorage(self.point / folder, control=control, patience=patience)

    def settled(self) -> bool:
        """Whether the mount's cache has nothing left to upload."""
        answer = requests.post(f"{self.control_address}/vfs/stats", auth=_LOGIN, timeout=10).json()
        cache = answer.get("diskCache") or {}
        return not cache.get("uploadsQueued", 0) + cache.get("uploadsInProgress", 0)

    def wait_until_settled(self) -> None:
        """Wait for the cache's uploads."""
        until(self.settled, "the cache has uploaded everything")

    def on_remote(self, name: str = "kanbu-backups") -> dict[str, bytes]:
        """What the remote really holds in a folder, the storage's mark left out."""
        folder = self.backing / name
        return (
            {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name != MARK_NAME}
            if folder.is_dir()
            else {}
        )

    def unmount(self) -> None:
        """Unmount, whoever is using it."""
        subprocess.run(["fusermount3", "-uz", self.point], check=True, capture_output=True)

    def __enter__(self) -> RcloneMount:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmount and end both processes, whatever became of them."""
        for process in (self.server, self.mount):  # one that a test stopped cannot end
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        # The mount goes first: without its server it would wait for it.
        if self.is_mounted():
            self.unmount()
        for process in (self.mount, self.server):
            process.kill()
            process.wait(20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(is_so: Callable[[], bool], what: str) -> None:
    """Wait until something is so, for at most 20 seconds."""
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)

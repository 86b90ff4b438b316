"""What rclone says of its mount: its remote control (`rclone rc`, HTTP and JSON), and its command line.

What belongs here: asking. What does not: what follows for a backup (`rclone`).

The calls are those of https://rclone.org/rc/: `vfs/stats` (uploads waiting, under way and failed; every version),
`vfs/queue` (which files; from 1.70) and `operations/stat` (what the remote itself lists, past the mount's cache).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import requests

from kanbu_backup_dagster.errors import StorageError
from kanbu_backup_dagster.storage.protocol import SETTLED, Settlement

CACHE_MODES = ("off", "minimal", "writes", "full")
_SECONDS = 10.0
_PROCESSES = Path("/proc")
_CACHE_VARIABLE = "RCLONE_VFS_CACHE_MODE"


class RemoteControl:
    """The remote control at `address` (`http://127.0.0.1:5572`)."""

    def __init__(self, address: str, *, user: str | None = None, password: str | None = None) -> None:
        self._address = address.rstrip("/")
        self._login = (user or "", password or "") if user or password else None

    def cache_mode(self, remote: str) -> str:
        """The cache mode of the mount of `remote`.

        Raises:
            StorageError: The remote control does not answer, or serves another mount.
        """
        options = self._ask("vfs/stats", fs=remote).get("opt") or {}
        mode = options.get("CacheMode")
        if isinstance(mode, int) and 0 <= mode < len(CACHE_MODES):
            return CACHE_MODES[mode]
        if mode in CACHE_MODES:
            return str(mode)
        raise self._unusable(f"says the cache mode {mode!r}")

    def settlement(self, remote: str, sizes: Mapping[str, int]) -> Settlement:
        """Whether files have reached `remote`: nothing of them waits to be uploaded, and the remote itself lists them
        with their sizes. (A remote may list a file that is still growing, and a file just closed may not be queued yet,
        so neither would do alone.)

        Args:
            remote: The remote, as the mount table names it.
            sizes: Path on the remote to size in bytes.

        Raises:
            StorageError: The remote control does not answer, or serves another mount.
        """
        cache = self._ask("vfs/stats", fs=remote).get("diskCache") or {}
        waiting, running, failed = (
            int(cache.get(name, 0)) for name in ("uploadsQueued", "uploadsInProgress", "erroredFiles")
        )
        if failed:
            return Settlement(False, f"rclone says that {failed} files failed in its cache; its log says why")
        if waiting or running:
            queue = self._queue(remote)
            if queue is None:
                return Settlement(False, f"rclone has {waiting} uploads waiting and {running} under way")
            for path in sizes:
                if path in queue:
                    return Settlement(False, _queued(queue[path]))
        for path, size in sizes.items():
            listed = (self._ask("operations/stat", fs=remote, remote=path).get("item") or {}).get("Size")
            if listed != size:
                seen = "does not list it yet" if listed is None else f"lists {listed:,} bytes of {size:,}"
                return Settlement(False, f"{remote} {seen} ({PurePosixPath(path).name})")
        return SETTLED

    def _queue(self, remote: str) -> dict[str, Mapping[str, Any]] | None:
        """What waits, by path on the remote; None where rclone is too old to say."""
        try:
            queue = self._ask("vfs/queue", fs=remote).get("queue") or []
        except _UnknownCallError:
            return None
        return {str(item["name"]): item for item in queue}

    def process_id(self) -> int:
        """The id of the rclone process that answers.

        Raises:
            StorageError: The remote control does not answer.
        """
        return int(self._ask("core/pid")["pid"])

    def _ask(self, call: str, **parameters: str) -> dict[str, Any]:
        try:
            answer = requests.post(
                f"{self._address}/{call}", json=parameters, auth=self._login, timeout=_SECONDS, allow_redirects=False
            )
            content = answer.json()
        except (requests.RequestException, ValueError) as error:
            # The exception's own text may repeat the address, which may hold a password.
            raise self._unusable(f"does not answer ({type(error).__name__})") from None
        if answer.status_code == requests.codes.ok and isinstance(content, dict):
            return content
        said = str(content.get("error", "")) if isinstance(content, dict) else ""
        if answer.status_code == requests.codes.not_found:
            raise _UnknownCallError(f"rclone does not know {call}.")
        if answer.status_code in (401, 403):
            raise self._unusable(
                "wants a login; set BACKUP_RCLONE_RC_USER and BACKUP_RCLONE_RC_PASSWORD, or mount with --rc-no-auth"
            )
        raise self._unusable(f"answered {answer.status_code} to {call}: {said}")

    def _unusable(self, what: str) -> StorageError:
        return StorageError(f"rclone's remote control (BACKUP_RCLONE_RC_ADDR) {what}")


class _UnknownCallError(StorageError):
    """This rclone has no such call."""


def _queued(item: Mapping[str, Any]) -> str:
    if item.get("uploading"):
        return "rclone is uploading it"
    tries = int(item.get("tries") or 0)
    return f"its upload failed {tries} times, and waits to be tried again" if tries else "its upload waits to begin"


@dataclass(frozen=True)
class MountProcess:
    """An rclone process of this machine that made a mount; its cache mode is None where it names one we do not know."""

    pid: int
    cache_mode: str | None


def process_of(point: Path) -> MountProcess | None:
    """The process that mounted `point`, by its command line; None where none can be seen (another machine, container or
    user), or several say so."""
    found = []
    for process in _PROCESSES.iterdir():
        if not process.name.isdigit():
            continue
        try:
            arguments = os.fsdecode((process / "cmdline").read_bytes()).split("\0")[:-1]
            if len(arguments) < 2 or PurePosixPath(arguments[0]).name not in ("rclone", "mount.rclone", "rclonefs"):
                continue
            folder = (process / "cwd").readlink()
            variables = os.fsdecode((process / "environ").read_bytes()).split("\0")
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if any(not part.startswith("-") and Path(os.path.normpath(folder / part)) == point for part in arguments[1:]):
            found.append(MountProcess(int(process.name), _cache_mode(arguments, variables)))
    return found[0] if len(found) == 1 else None


def _cache_mode(arguments: list[str], variables: list[str]) -> str | None:
    """By rclone's rules: the last flag, else the variable, else `off`."""
    given = [value for variable in variables for name, _, value in [variable.partition("=")] if name == _CACHE_VARIABLE]
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--vfs-cache-mode":
            given.append(value if equals else "".join(arguments[position + 1 : position + 2]))
    mode = given[-1].lower() if given else "off"
    return mode if mode in CACHE_MODES else None

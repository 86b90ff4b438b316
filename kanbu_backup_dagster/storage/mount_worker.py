"""The process that touches an rclone mount, so that no other of ours does.

What belongs here: the folder on a mount, and serving it over a pipe. What does not: the side that asks (`rclone`).

A call on a FUSE mount whose server does not answer cannot be ended: not by a signal, and a process that ends flushes
its open files, which then hangs as well. So one process works on the mount, and the one that waits for it can give up.

It stands in the mount's own root and reaches everything by relative paths: what is written goes to that mount or
nowhere, and never into the folder behind a mount point that was unmounted meanwhile.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kanbu_backup_dagster.errors import StorageError
from kanbu_backup_dagster.storage.folder import SIDECAR_TEMPORARY, FolderStorage
from kanbu_backup_dagster.storage.mounts import RCLONE, Mount, mount_of
from kanbu_backup_dagster.storage.protocol import Incoming

VARIABLE = "BACKUP_GDRIVE_PATH"
HOW_TO_MOUNT = (
    "Install rclone (`sudo apt install rclone`), set the remote up (`rclone config`), and mount it: "
    "`rclone mount gdrive: /path/to/mount --daemon`."
)
_REPLACED_WITHIN_SECONDS = 2.0


class MountedFolder(FolderStorage):
    """The folder `path` on the rclone mount `mount`, for a process that stands in the mount's root."""

    def __init__(self, path: Path, mount: Mount) -> None:
        super().__init__(path.relative_to(mount.point), variable=VARIABLE)
        self._mount = mount
        self._shown = path

    @property
    def location(self) -> str:
        return str(self._shown)

    def read_sidecar(self, name: str) -> bytes | None:
        """The sidecar. A remote may replace a file by deleting it first: while one is being replaced, wait for it."""
        until = time.monotonic() + _REPLACED_WITHIN_SECONDS
        while True:
            content = super().read_sidecar(name)
            if content is not None or time.monotonic() > until:
                return content
            with self._translated("list"):
                if not any(entry.startswith(SIDECAR_TEMPORARY) for entry in os.listdir(self._folder)):
                    return super().read_sidecar(name)
            time.sleep(0.1)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """The folder's lock, which everything that changes the folder takes: is the mount still there?"""
        if mount_of(self._shown) != self._mount:
            raise self._inaccessible(f"the mount at {self._mount.point} was unmounted meanwhile.", HOW_TO_MOUNT)
        with super()._locked() as held:
            yield held

    def _is_shared(self) -> bool:
        return True

    def _explained(self, error: OSError) -> tuple[str, str]:
        if error.errno in (errno.EIO, errno.ESPIPE):  # rclone gives both for whatever went wrong with the remote
            return (
                f"rclone could not bring this to {self._mount.source} or from it, or not all of it",
                "The remote may be full, unreachable or refusing; rclone's log says which.",
            )
        return super()._explained(error)


def find_mount(path: Path) -> Mount:
    """The rclone mount that `path` is on, and this process in its root.

    Raises:
        StorageError: It is on none, or the mount is dead.
    """
    mount = mount_of(path)
    if mount is None or mount.fstype != RCLONE:
        on = f"it is on {mount.fstype} ({mount.point})" if mount is not None else "there is no mount table here"
        raise _refused(f"{path} is not on an rclone mount: {on}.", HOW_TO_MOUNT)
    try:
        os.chdir(mount.point)
        here = Path().stat()
    except OSError as error:
        raise _refused(
            f"the rclone mount at {mount.point} ({mount.source}) cannot be used: {os.strerror(error.errno or 0)}.",
            f"If its process has died: `fusermount3 -uz {mount.point}`, then mount it again. {HOW_TO_MOUNT}"
            if error.errno == errno.ENOTCONN
            else "A mount of another user needs rclone's --allow-other.",
        ) from error
    if here.st_dev != mount.device:
        raise _refused(f"the rclone mount at {mount.point} was unmounted.", HOW_TO_MOUNT)
    return mount


def _refused(reason: str, advice: str) -> StorageError:
    return StorageError(f"Storage not accessible: {reason} (set by {VARIABLE})", advice=advice)


class _Server:
    """Does what the pipe asks, one thing after the other.

    A request is a method's name, arguments and keyword arguments; an answer is `("done", value)` or
    `("failed", error)`. Between them `commit` asks back, with `("name",)` and `("sidecar", name)`.
    """

    def __init__(self, pipe: Connection, storage: MountedFolder) -> None:
        self._pipe = pipe
        self._storage = storage
        self._open = ExitStack()
        self._incoming: Incoming | None = None
        self._chunks: Iterator[bytes] = iter(())

    def serve(self) -> None:
        """Until the other side closes the pipe or dies: what it had begun is then discarded."""
        with suppress(EOFError, ConnectionError), self._open:
            while True:
                self._pipe.send(outcome(partial(self._do, *self._pipe.recv())))

    def _do(self, request: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if request == "receive":
            self._incoming = self._open.enter_context(self._storage.receive())
            return None
        if request in ("write", "replace"):
            return getattr(self._incoming, request)(*arguments)
        if request == "commit":
            assert self._incoming is not None
            return self._incoming.commit(self._names(), self._sidecar)
        if request == "read":
            self._chunks = self._storage.read(*arguments, **options)
            return None
        if request == "read_back":
            assert self._incoming is not None
            self._chunks = self._incoming.read_back()
            return None
        if request == "next":
            return next(self._chunks, b"")
        return getattr(self._storage, request)(*arguments, **options)

    def _names(self) -> Iterator[str]:
        while True:
            self._pipe.send(("name",))
            yield self._pipe.recv()

    def _sidecar(self, name: str) -> bytes:
        self._pipe.send(("sidecar", name))
        content: bytes = self._pipe.recv()
        return content


def outcome(work: Callable[[], Any]) -> tuple[str, Any]:
    """The answer to a request: what `work` gives, or its error."""
    try:
        return ("done", work())
    except (StorageError, ValueError) as error:
        return ("failed", error)
    except (EOFError, ConnectionError):  # nobody asks any more
        raise
    except Exception:  # noqa: BLE001  # a fault in our own code, told where it can be seen
        return ("failed", RuntimeError(traceback.format_exc()))


def main(descriptor: int, path: str) -> None:
    """Serve the folder `path` over the socket `descriptor`; the first answer is the mount, and the folder within it."""
    pipe = Connection(descriptor)
    # Links are followed now, in this process: looking at a mount point may hang.
    folder = Path(path).resolve()
    kind, found = outcome(partial(find_mount, folder))
    if kind == "failed":
        pipe.send((kind, found))
        return
    pipe.send((kind, (found, folder.relative_to(found.point))))
    _Server(pipe, MountedFolder(folder, found)).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

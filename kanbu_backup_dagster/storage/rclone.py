"""A folder on an rclone mount (Google Drive) as storage.

What belongs here: waiting for the mount no longer than a while, and telling whether an upload is proven. What does not:
landing files (`folder`), touching the mount (`mount_worker`), rclone's remote control (`remote_control`).

What proves an upload is measured, not believed: fsync does nothing on such a mount. Without a VFS cache (mode `off`) a
close without error does; with one (`minimal`, `writes`, `full`) nothing that is seen in the mount does, and the remote
control is asked.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import kanbu_backup_dagster
from kanbu_backup_dagster.errors import StorageError
from kanbu_backup_dagster.storage import mount_worker
from kanbu_backup_dagster.storage.mount_worker import VARIABLE
from kanbu_backup_dagster.storage.mounts import Mount
from kanbu_backup_dagster.storage.protocol import SETTLED, SIDECAR_SUFFIX, Incoming, Settlement, StoredFile
from kanbu_backup_dagster.storage.remote_control import MountProcess, RemoteControl, process_of

# A chunk may have to wait until rclone has sent a part of its own (8 MiB at Google) over a slow line.
_WRITING = 5
# Closing sends all that rclone has kept back, in the worst case the whole file: this slow a line is still waited for.
_SLOWEST_BYTES_PER_SECOND = 100_000


class RcloneStorage:
    """Backups in the folder `path` on an rclone mount. See `protocol.Storage` for the contract of each method.

    Args:
        path: The folder; made on first use.
        control: The mount's remote control, where there is one.
        patience: Seconds to wait for the mount to answer; writing a chunk may take 5 times as long, and the end of a
            file as much more as its size takes at 100 kB/s.
    """

    def __init__(self, path: Path, *, control: RemoteControl | None = None, patience: float) -> None:
        self._path = path
        self._control = control
        self._patience = patience
        self._shared: _Worker | None = None

    @property
    def location(self) -> str:
        return str(self._path)

    @property
    def facts(self) -> dict[str, str]:
        mount = self._worker().mount
        mode = self._cache_mode(mount, process_of(mount.point))
        return {"mount": str(mount.point), "remote": mount.source, "cache_mode": mode or "unknown"}

    @property
    def replaces_in_one_step(self) -> bool:
        return False  # rclone deletes what is to be replaced first, where the remote can do no better

    def settlement(self, name: str) -> Settlement:
        worker = self._worker()
        remote, process = worker.mount.source, process_of(worker.mount.point)
        mode = self._cache_mode(worker.mount, process)
        if mode == "off":
            return SETTLED
        kept = f"the mount keeps uploads in a cache (mode {mode})" if mode else "the mount's cache mode is not known"
        if self._control is None:
            return Settlement(False, f"{kept}, and BACKUP_RCLONE_RC_ADDR is not set to ask whether this one is done")
        try:
            if process is not None and self._control.process_id() != process.pid:
                return Settlement(False, f"{kept}, and BACKUP_RCLONE_RC_ADDR is another rclone's than the mount's")
            # Looked at, never opened: that would have rclone wait anew until it uploads them.
            files = [file for one in (name, name + SIDECAR_SUFFIX) if (file := self.find(one)) is not None]
            if not files:
                return Settlement(False, "there is no such file")
            return self._control.settlement(remote, {str(worker.folder / file.name): file.size for file in files})
        except StorageError as error:
            return Settlement(False, f"{kept}, and {error.message}")

    def _cache_mode(self, mount: Mount, process: MountProcess | None) -> str | None:
        """`off`, `minimal`, `writes` or `full`; None where nobody can tell."""
        if process is not None:
            return process.cache_mode
        if self._control is not None:
            with suppress(StorageError):  # which says as much: not known
                return self._control.cache_mode(mount.source)
        return None

    def prepare(self, *, known_mark: str | None = None, needed_bytes: int = 0) -> str:
        return str(self._worker().call("prepare", known_mark=known_mark, needed_bytes=needed_bytes))

    def mark(self) -> str:
        """Declare the folder a storage; see `FolderStorage.mark`."""
        return str(self._worker().call("mark"))

    @contextmanager
    def receive(self) -> Iterator[Incoming]:
        with self._new_worker() as worker:
            worker.call("receive")
            yield _IncomingFile(worker)

    def files(self) -> list[StoredFile]:
        files: list[StoredFile] = self._worker().call("files")
        return files

    def sidecars(self) -> list[str]:
        names: list[str] = self._worker().call("sidecars")
        return names

    def find(self, name: str) -> StoredFile | None:
        file: StoredFile | None = self._worker().call("find", name)
        return file

    def read(self, name: str, *, chunk_bytes: int = 1 << 20, cached: bool = False) -> Iterator[bytes]:
        with self._new_worker() as worker:
            worker.call("read", name, chunk_bytes=chunk_bytes, cached=cached)
            while chunk := worker.call("next"):
                yield chunk

    def read_sidecar(self, name: str) -> bytes | None:
        content: bytes | None = self._worker().call("read_sidecar", name)
        return content

    def replace_sidecar(self, name: str, content: bytes, *, expected: bytes | None = None) -> bool:
        return bool(self._worker().call("replace_sidecar", name, content, expected=expected))

    def delete(self, name: str) -> None:
        self._worker().call("delete", name)

    def remove_leftovers(self) -> list[str]:
        removed: list[str] = self._worker().call("remove_leftovers")
        return removed

    def free_bytes(self) -> int:
        return int(self._worker().call("free_bytes"))

    def path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _worker(self) -> _Worker:
        """The worker of all that is no stream. After an error a new one looks at the mount afresh."""
        if self._shared is None or self._shared.failed:
            self._shared = self._new_worker()
        return self._shared

    def _new_worker(self) -> _Worker:
        return _Worker(self._path, self._patience)


class _IncomingFile:
    """The writing half of `RcloneStorage.receive`."""

    def __init__(self, worker: _Worker) -> None:
        self._worker = worker
        self._written = 0

    def write(self, chunk: bytes) -> None:
        # The chunk before this one is waited for only now: the next one was made meanwhile.
        self._worker.settle()
        self._worker.begin("write", (bytes(chunk),), patience=_WRITING)
        self._written += len(chunk)

    def commit(self, names: Iterator[str], sidecar: Callable[[str], bytes]) -> str:
        self._finish("commit")
        return str(self._worker.settle(_Commit(names, sidecar)))

    def read_back(self) -> Iterator[bytes]:
        self._finish("read_back")
        self._finish("next")  # the first one waits for all that was written to be sent
        while chunk := self._worker.settle():
            yield chunk
            self._worker.begin("next")

    def replace(self, name: str) -> None:
        self._finish("replace", name)
        self._worker.settle()

    def _finish(self, request: str, *arguments: str) -> None:
        self._worker.settle()
        more = self._written / _SLOWEST_BYTES_PER_SECOND
        self._worker.begin(request, arguments, patience=_WRITING, more_seconds=more)


@dataclass(frozen=True)
class _Commit:
    """What `commit` asks back for."""

    names: Iterator[str]
    sidecar: Callable[[str], bytes]


class _Worker:
    """A process that serves the folder `path`, and waiting for it. Closed, it ends and discards what it had begun."""

    def __init__(self, path: Path, patience: float) -> None:
        self._path = path
        self._patience = patience
        self._seconds = patience
        self._waiting = True
        self.failed = False
        ours, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", mount_worker.__name__, str(its.fileno()), str(path)],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                # Whoever reads what we print would wait for a worker that hangs.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A key pressed in the terminal is for us; the worker ends when we close the pipe.
                start_new_session=True,
                env={"PYTHONPATH": str(Path(kanbu_backup_dagster.__file__).parents[1])},
            )
        self._pipe = Connection(ours.detach())
        self._end = _End(self._pipe, self._process, patience)
        # Also when nobody closes it: an environment's storage lives for as long as something refers to it.
        self.close = weakref.finalize(self, self._end)
        self.mount: Mount
        self.folder: Path
        self.mount, self.folder = self.settle()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, request: str, *arguments: Any, **options: Any) -> Any:
        """Ask, and wait for the answer."""
        self.begin(request, arguments, options)
        return self.settle()

    def begin(
        self,
        request: str,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
        *,
        patience: int = 1,
        more_seconds: float = 0,
    ) -> None:
        """Ask; `settle` gives the answer, which is waited for `patience` times as long as usual and `more_seconds`."""
        self._seconds = self._patience * patience + more_seconds
        self._send((request, arguments, dict(options)))
        self._waiting = True

    def settle(self, answers: _Commit | None = None) -> Any:
        """The answer to what was asked last; None when it was given already.

        Raises:
            StorageError: What was asked failed, or was not answered in time.
        """
        if not self._waiting:
            return None
        while True:
            kind, *values = self._answer()
            if kind == "done":
                self._waiting = False
                return values[0]
            if kind == "failed":
                self._waiting = False
                self.failed = True
                raise values[0]
            assert answers is not None
            self._send(next(answers.names) if kind == "name" else answers.sidecar(values[0]))

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            raise self._died() from None

    def _answer(self) -> Any:
        try:
            if self._pipe.poll(self._seconds):
                return self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        self.failed = True
        self._process.kill()
        self._end.patience = 1
        raise StorageError(
            f"Storage not accessible: the mount of {self._path} did not answer within {self._seconds:.3g} s. "
            f"(set by {VARIABLE})",
            advice="Is the remote reachable? rclone's log says more. BACKUP_RCLONE_TIMEOUT_SECONDS sets how long it is "
            f"waited for; a mount that is beyond help goes with `fusermount3 -uz`. {mount_worker.HOW_TO_MOUNT}",
        )

    def _died(self) -> StorageError:
        self.failed = True
        return StorageError(
            f"Storage not accessible: the process working on {self._path} died. (set by {VARIABLE})",
            advice="Was it killed, or is the machine out of memory? Try again.",
        )


class _End:
    """The end of a worker. One that hangs in the mount is left to end by itself, once rclone lets go of it."""

    def __init__(self, pipe: Connection, process: subprocess.Popen[bytes], patience: float) -> None:
        self._pipe = pipe
        self._process = process
        self.patience = patience

    def __call__(self) -> None:
        self._pipe.close()
        try:
            self._process.wait(self.patience)  # it may have a file to discard
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.returncode = -signal.SIGKILL  # nobody waits for it, nor need be warned that nobody does

"""A local folder as storage.

What belongs here: landing files atomically in a folder, its mark, and clearing leftovers. What does not: a folder that
may hang or be unmounted (`rclone`), or what the files mean.

How a file lands: it is written as `.kanbu-incoming-*.part`, locked (flock) by its writer for as long as that lives.
Under the folder's lock (flock on the mark) its sidecar is created exclusively, which claims the name; then it gets that
name. So a part nobody holds, or a sidecar without file seen under the folder's lock, is a leftover of a run that died.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import secrets
import stat
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from itertools import count
from pathlib import Path

from kanbu_backup_dagster.errors import StorageError
from kanbu_backup_dagster.storage.mounts import RCLONE, mount_of
from kanbu_backup_dagster.storage.protocol import SETTLED, SIDECAR_SUFFIX, Incoming, Settlement, StoredFile

MARK_NAME = ".kanbu-storage"
_PART_PREFIX, _PART_SUFFIX = ".kanbu-incoming-", ".part"
SIDECAR_TEMPORARY = ".kanbu-sidecar-"
# Another machine's locks cannot be seen on a network file system; what was not touched for this long is not in use.
_NETWORK_LEFTOVER_SECONDS = 2 * 24 * 3600
_FLUSH_EVERY_BYTES = 32 << 20
_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
# Of offsets and lengths with O_DIRECT: no device has larger sectors.
_DIRECT_ALIGNMENT = 4096
# Chunks on their way from the medium while one is worked on: one alone leaves a disk idle in between.
_READ_AHEAD = 3
_NO_HARD_LINKS = {errno.EPERM, errno.EIO, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class FolderStorage:
    """Backups in the folder `path`. See `protocol.Storage` for the contract of each method."""

    def __init__(self, path: Path, *, variable: str = "BACKUP_LOCAL_PATH") -> None:
        self._folder = path
        self._variable = variable

    @property
    def location(self) -> str:
        return str(self._folder)

    @property
    def replaces_in_one_step(self) -> bool:
        mount = mount_of(self._folder)
        # rclone renames over a file by deleting that first, where the remote can do no better.
        return mount is None or mount.fstype != RCLONE

    @property
    def facts(self) -> dict[str, str]:
        return {}

    def settlement(self, name: str) -> Settlement:
        return SETTLED

    def prepare(self, *, known_mark: str | None = None, needed_bytes: int = 0) -> str:
        mark = self._read_mark()
        if known_mark not in (None, mark):
            bears = "bears no mark of it" if mark is None else "bears the mark of another storage"
            raise self._inaccessible(
                f"{self.location} held backups before, and now {bears}. Is the right volume mounted?",
                "Mount it; or, if what is there now is meant to be the storage, run `kanbu-backup storage mark`.",
            )
        if mark is None:
            mark = self.mark()
        with self._translated("write to"):
            probe = self._folder / f"{_PART_PREFIX}{secrets.token_hex(8)}{_PART_SUFFIX}"
            with self._locked():
                _write_new(probe, b"Can this be written?\n")
                probe.unlink()
        free = self.free_bytes()
        if free < needed_bytes:
            raise self._inaccessible(
                f"{self.location} has {free:,} bytes free, and the next backup is expected to need {needed_bytes:,}.",
                "Make room, or shorten the retention.",
            )
        return mark

    def mark(self) -> str:
        """Declare the folder a storage, making it (0700) if missing; gives its mark, an existing one unchanged."""
        with self._translated("make"):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = self._folder / f"{_PART_PREFIX}{secrets.token_hex(8)}{_PART_SUFFIX}"
            content = {"storage": str(uuid.uuid4()), "since": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            _write_new(temporary, (json.dumps(content) + "\n").encode())
            try:
                rename_exclusively(temporary, self._folder / MARK_NAME)
            except (FileExistsError, FileNotFoundError):
                # Another run marked the folder first, and may have cleared our temporary file as a leftover.
                temporary.unlink(missing_ok=True)
            _sync_folder(self._folder)
        mark = self._read_mark()
        if mark is None:
            raise self._inaccessible(f"the mark {MARK_NAME} written to {self.location} cannot be read back.")
        return mark

    def _read_mark(self) -> str | None:
        with self._translated("read"):
            try:
                content = (self._folder / MARK_NAME).read_bytes()
            except FileNotFoundError:
                return None
        try:
            return str(json.loads(content)["storage"])
        except (ValueError, KeyError, TypeError):
            raise self._inaccessible(
                f"the mark {self.location}/{MARK_NAME} is damaged.", "Delete it and run `kanbu-backup storage mark`."
            ) from None

    @contextmanager
    def receive(self) -> Iterator[Incoming]:
        incoming = _IncomingFile(self)
        try:
            yield incoming
        except BaseException:
            with suppress(StorageError):  # what went wrong first is what is told
                incoming.discard()
            raise
        incoming.discard()

    def files(self) -> list[StoredFile]:
        with self._translated("list"):
            found = []
            for name, entry in self._entries():
                # What another run deletes meanwhile is no longer there.
                with suppress(FileNotFoundError):
                    if not name.endswith(SIDECAR_SUFFIX):
                        found.append(_stored_file(name, entry.stat(follow_symlinks=False)))
            return sorted(found, key=lambda file: file.name)

    def sidecars(self) -> list[str]:
        with self._translated("list"):
            return sorted(
                name.removesuffix(SIDECAR_SUFFIX) for name, _ in self._entries() if name.endswith(SIDECAR_SUFFIX)
            )

    def _entries(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Every file, with its name: those of the folder, then those of each folder within that may be read."""
        inner = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_file(follow_symlinks=False):
                    yield entry.name, entry
                elif entry.is_dir(follow_symlinks=False):
                    inner.append(entry.name)
        for folder in inner:
            try:
                with os.scandir(self._folder / folder) as entries:
                    found = [entry for entry in entries if not entry.name.startswith(".")]
            except (PermissionError, FileNotFoundError):  # lost+found for one: nobody's backups
                continue
            for entry in found:
                if entry.is_file(follow_symlinks=False):
                    yield f"{folder}/{entry.name}", entry

    def find(self, name: str) -> StoredFile | None:
        with self._translated("read"):
            try:
                status = self._entry(name).lstat()
            except FileNotFoundError:
                return None
        return _stored_file(name, status) if stat.S_ISREG(status.st_mode) else None

    def read(self, name: str, *, chunk_bytes: int = 1 << 20, cached: bool = False) -> Iterator[bytes]:
        with self._translated("read"):
            if cached:
                yield from _buffered(self._entry(name), chunk_bytes, forget=False)
            else:
                yield from _from_the_medium(self._entry(name), chunk_bytes, direct=not self._is_shared())

    def read_sidecar(self, name: str) -> bytes | None:
        with self._translated("read"):
            try:
                return self._sidecar(name).read_bytes()
            except FileNotFoundError:
                return None

    def replace_sidecar(self, name: str, content: bytes, *, expected: bytes | None = None) -> bool:
        temporary = self._folder / f"{SIDECAR_TEMPORARY}{secrets.token_hex(8)}{_PART_SUFFIX}"
        with self._translated("write to"), self._locked():
            if expected is not None and self._sidecar(name).read_bytes() != expected:
                return False
            try:
                _write_new(temporary, content)
                temporary.replace(self._sidecar(name))
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(self._entry(name).parent)
            return True

    def delete(self, name: str) -> None:
        with self._translated("delete from"), self._locked():
            entry = self._entry(name)
            entry.unlink()
            _sync_folder(entry.parent)
            self._sidecar(name).unlink(missing_ok=True)
            _sync_folder(entry.parent)

    def remove_leftovers(self) -> list[str]:
        removed = []
        youngest = time.time() - _NETWORK_LEFTOVER_SECONDS if self._is_shared() else None
        with self._translated("clean"), self._locked() as exclusive:
            if not exclusive:
                return []
            names = set(os.listdir(self._folder))
            orphans = {
                name
                for name in names
                if name.endswith(SIDECAR_SUFFIX)
                and name.startswith("kanbu_")
                and name[: -len(SIDECAR_SUFFIX)] not in names
            }
            parts = {name for name in names if name.endswith(_PART_SUFFIX) and name.startswith(".kanbu-")}
            for name in sorted(orphans | parts):
                if self._is_abandoned(name, locked_by_writer=name in parts, older_than=youngest):
                    (self._folder / name).unlink(missing_ok=True)
                    removed.append(name)
            if removed:
                _sync_folder(self._folder)
        return removed

    def _is_shared(self) -> bool:
        """Whether other machines may write here."""
        mount = mount_of(self._folder)
        return mount is not None and mount.is_network

    def _is_abandoned(self, name: str, *, locked_by_writer: bool, older_than: float | None) -> bool:
        try:
            if older_than is not None and (self._folder / name).lstat().st_mtime > older_than:
                return False
            handle = os.open(self._folder / name, _READING)
        except FileNotFoundError:
            return False
        try:
            return not locked_by_writer or _try_lock(handle)
        finally:
            os.close(handle)

    def free_bytes(self) -> int:
        with self._translated("read"):
            status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    def path(self, name: str) -> str:
        return f"{self.location}/{self._entry(name).relative_to(self._folder)}"

    def _entry(self, name: str) -> Path:
        parts = name.split("/")
        if len(parts) > 2 or "\0" in name or any(not part or part.startswith(".") for part in parts):
            raise ValueError(f"not a plain file name: {name!r}")
        if len(parts) == 2 and (self._folder / parts[0]).is_symlink():
            raise self._inaccessible(f"{self.location}/{parts[0]} is a link; links are not followed.")
        return self._folder / name

    def _sidecar(self, name: str) -> Path:
        return self._entry(name + SIDECAR_SUFFIX)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the folder's lock, for moments only. Yields False where the file system has no locks."""
        handle = os.open(self._folder / MARK_NAME, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                held = True
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                held = False
            yield held
        finally:
            os.close(handle)

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Turn what the system says into what a user understands."""
        try:
            yield
        except OSError as error:
            reason, advice = self._explained(error)
            raise self._inaccessible(f"cannot {doing} {self.location}: {reason}.", advice) from error

    def _explained(self, error: OSError) -> tuple[str, str]:
        """What went wrong, and what to do."""
        advice = {
            errno.ENOSPC: "Make room, or shorten the retention.",
            errno.EDQUOT: "Make room, or shorten the retention.",
            errno.ENOENT: "Is the volume mounted? Does the folder exist?",
            errno.EROFS: "The file system is mounted read-only.",
            errno.ENOTCONN: "The mount's process has died: mount it again.",
            errno.ECONNABORTED: "The mount's process has died: mount it again.",
        }.get(error.errno or 0, "Check that the folder exists and that this user may write to it.")
        return os.strerror(error.errno) if error.errno else str(error), advice

    def _inaccessible(self, reason: str, advice: str = "") -> StorageError:
        return StorageError(f"Storage not accessible: {reason} (set by {self._variable})", advice=advice)


class _IncomingFile:
    """The writing half of `FolderStorage.receive`."""

    def __init__(self, storage: FolderStorage) -> None:
        self._storage = storage
        self._part = storage._folder / f"{_PART_PREFIX}{secrets.token_hex(8)}{_PART_SUFFIX}"
        self._handle: int | None = None
        self._written = 0
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flush: Future[None] | None = None
        self._flushed = 0

    def write(self, chunk: bytes) -> None:
        with self._storage._translated("write to"):
            handle, view = self._opened(), memoryview(chunk)
            while view:
                view = view[os.write(handle, view) :]
            self._written += len(chunk)
            # Written to the disk while more is coming, so that the sync at the end does not wait for all of it.
            if self._written - self._flushed >= _FLUSH_EVERY_BYTES and (self._flush is None or self._flush.done()):
                if self._flush is not None:
                    # The system tells of pages it could not write once only: the sync at the end would not hear of it.
                    self._flush.result()
                self._flushed = self._written
                self._flush = self._flusher.submit(os.fdatasync, handle)

    def _opened(self) -> int:
        # Not before there is something to write: rclone uploads an empty file some time after it was closed, and thus
        # may bring back one that was removed.
        if self._handle is None:
            with self._storage._locked():
                # Created and locked under the folder's lock: whoever clears leftovers never sees it unlocked.
                self._handle = os.open(self._part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
                _try_lock(self._handle)
        return self._handle

    def commit(self, names: Iterator[str], sidecar: Callable[[str], bytes]) -> str:
        storage = self._storage
        self._make_lasting()
        with storage._translated("write to"), storage._locked():
            for name in names:
                if self._claim_and_name(name, sidecar):
                    break
            _sync_folder(storage._folder)
        self.discard()
        return name

    def read_back(self) -> Iterator[bytes]:
        self._make_lasting()
        with self._storage._translated("read back from"):
            yield from _from_the_medium(self._part, 1 << 20, direct=not self._storage._is_shared())

    def replace(self, name: str) -> None:
        storage = self._storage
        self._make_lasting()
        with storage._translated("write to"), storage._locked():
            final = storage._entry(name)
            if not os.path.lexists(final):
                raise storage._inaccessible(f"{name} was deleted from {storage.location} meanwhile.")
            self._part.replace(final)
            _sync_folder(final.parent)
        self.discard()

    def _make_lasting(self) -> None:
        storage = self._storage
        with storage._translated("write to"):
            handle = self._opened()
            if self._flush is not None:
                self._flush.result()
            os.fsync(handle)
            # Where fsync does nothing, close tells whether the bytes arrived; closing a duplicate keeps the lock.
            os.close(os.dup(handle))
            size = self._part.stat().st_size
        if size != self._written:
            raise storage._inaccessible(f"{size:,} bytes arrived in {storage.location} of {self._written:,} written.")

    def _claim_and_name(self, name: str, sidecar: Callable[[str], bytes]) -> bool:
        final, beside = self._storage._entry(name), self._storage._sidecar(name)
        if os.path.lexists(final):
            return False
        try:
            _write_new(beside, sidecar(name))
        except FileExistsError:
            return False
        try:
            # Whoever reads the file must find its sidecar, also after a crash: its entry is made lasting first.
            _sync_folder(self._storage._folder)
            rename_exclusively(self._part, final)
        except BaseException as error:
            # Interrupted between the two halves of the renaming, the file bears its name, and the sidecar is its own.
            if not _are_one(self._part, final):
                beside.unlink(missing_ok=True)
            if isinstance(error, FileExistsError):  # a writer that does not know our lock took the name
                return False
            raise
        return True

    def discard(self) -> None:
        """Close, which ends the lock, and remove the part if it was not committed."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        self._flusher.shutdown()
        with self._storage._translated("write to"):
            try:
                os.close(handle)
            finally:
                # In this order: closing is what makes rclone upload what there is.
                self._part.unlink(missing_ok=True)


def _are_one(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


def _write_new(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _from_the_medium(path: Path, chunk_bytes: int, *, direct: bool) -> Iterator[bytes]:
    """Read what the medium holds, not what this machine remembers of having written.

    Args:
        direct: Past the page cache where the file system can, which also leaves to others what is theirs in it.
    """
    if direct and chunk_bytes % _DIRECT_ALIGNMENT == 0:
        try:
            handle = os.open(path, _READING | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # "the file system does not support O_DIRECT", open(2)
                raise
        else:
            yield from _direct(handle, chunk_bytes)
            return
    yield from _buffered(path, chunk_bytes, forget=True)


def _buffered(path: Path, chunk_bytes: int, *, forget: bool) -> Iterator[bytes]:
    """Read through the page cache.

    Args:
        forget: Have the system forget the file first: it was synced, so its pages are clean and go.
    """
    handle = os.open(path, _READING)
    try:
        if forget:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while chunk := os.read(handle, chunk_bytes):
            yield chunk
    finally:
        os.close(handle)


def _direct(handle: int, chunk_bytes: int) -> Iterator[bytes]:
    """Read a file opened with O_DIRECT, and close it."""
    with ExitStack() as stack:
        stack.callback(os.close, handle)
        # Memory at a page's start, as the kernel wants it.
        buffers = [stack.enter_context(mmap.mmap(-1, chunk_bytes)) for _ in range(_READ_AHEAD)]

        def block(number: int) -> bytes:
            buffer = buffers[number % _READ_AHEAD]
            return buffer[: os.preadv(handle, [buffer], number * chunk_bytes)]

        # Nobody reads ahead of such a reader, so it does so itself. A buffer is used again once its chunk was taken.
        ahead = stack.enter_context(ThreadPoolExecutor(_READ_AHEAD, "read-ahead"))
        pending = deque(ahead.submit(block, number) for number in range(_READ_AHEAD))
        for number in count(_READ_AHEAD):
            chunk = pending.popleft().result()
            if not chunk:
                return
            pending.append(ahead.submit(block, number))
            yield chunk


def rename_exclusively(part: Path, final: Path) -> None:
    """Rename without overwriting: a hard link refuses an existing name in one step, where the file system has them."""
    try:
        os.link(part, final)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from None
        part.rename(final)
    else:
        part.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return False
        raise
    return True


def _stored_file(name: str, status: os.stat_result) -> StoredFile:
    return StoredFile(name, status.st_size, datetime.fromtimestamp(status.st_mtime, timezone.utc))

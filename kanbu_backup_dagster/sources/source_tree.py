"""The source tree as a source of bytes: a tar archive, made while it is read.

What belongs here: what goes into the archive and how, files that change meanwhile, the facts for the manifest. What
does not: the walk (`tree_walk`), the rules' language (`exclusions`), the bytes of a header (`tar_format`), compression.

The archive holds one top folder, named as the source folder is. It carries names as bytes, permission bits, owners by
number, times to the nanosecond, symbolic links as they are (never followed), further names of a hard-linked file as
links, and sparse files as sparse files. Sockets, FIFOs and devices are skipped with a warning. Extended attributes and
ACLs are not carried, as in GNU tar unless asked.

A file is described by what was opened, not by what its folder's listing said; what changes while it is read is handled
as GNU tar does, with a warning: the entry keeps the size its header promised.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from kanbu_backup_dagster.backup.manifest import SourceFacts
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.settings import OnUnreadable, Settings
from kanbu_backup_dagster.sources.exclusions import DEFAULT_EXCLUSIONS
from kanbu_backup_dagster.sources.git_commit import read_commit
from kanbu_backup_dagster.sources.tar_format import (
    BLOCK,
    EntryType,
    end_of_archive,
    entry_header,
    padding,
    sparse_alias,
    sparse_map,
    sparse_pax,
)
from kanbu_backup_dagster.sources.tree_walk import Entry, EntryKind, Walk, shown

CHUNK = 1 << 20
# A tree with a million warnings has one cause; the manifest need not say it a million times.
MAX_WARNINGS = 1000

# Without O_NONBLOCK, opening what has become a FIFO since its folder was listed waits for a writer for ever.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
# What opening (or readlink) says of an entry that is no longer what its folder's listing said.
_REPLACED_ERRORS = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EINVAL)
_REPLACED = "was replaced while the tree was read: skipped"
_VANISHED = "vanished before it was read: skipped"
_NOT_ARCHIVED = {
    stat.S_IFSOCK: "a socket: skipped",
    stat.S_IFIFO: "a FIFO: skipped",
    stat.S_IFCHR: "a character device: skipped",
    stat.S_IFBLK: "a block device: skipped",
}
_ENV_WITHOUT_SECRETS = (".env.example", ".env.sample", ".env.template")


@dataclass(frozen=True)
class SourceSurvey:
    """What a look over the tree found, without reading files.

    Attributes:
        files: Regular files (each hard link's first name).
        folders: Folders, the top one included.
        links: Symbolic and further hard links.
        bytes: Bytes of the regular files.
        archive_bytes: About how long the archive will be.
        env_files: `.env` files that go into the archive, by their names there: secrets, unless it is encrypted.
    """

    files: int
    folders: int
    links: int
    bytes: int
    archive_bytes: int
    env_files: tuple[str, ...]


@dataclass(frozen=True)
class SourceTree:
    """A source tree to archive: the source of a recipe.

    Attributes:
        path: The folder (`KANBU_SOURCE_PATH`); it may be a link to one.
        exclusions: Rules for what stays out, in the language of `sources.exclusions`.
        storage_folder: Where backups are kept; never archived, wherever in the tree it is and whatever it is called.
        on_unreadable: What a file or folder that cannot be read does to the backup.
        estimated_bytes: About how long the archive will be.
    """

    path: Path
    exclusions: tuple[str, ...] = DEFAULT_EXCLUSIONS
    storage_folder: Path | None = None
    on_unreadable: OnUnreadable = OnUnreadable.FAIL
    estimated_bytes: int = 0

    @property
    def name(self) -> str:
        """The stage's name."""
        return "archive"

    @property
    def backup_type(self) -> BackupType:
        """A source backup."""
        return BackupType.SOURCE

    def survey(self) -> SourceSurvey:
        """Look over the tree, without reading files.

        Raises:
            SourceError: No such folder, it is the storage folder, or (unless skipped) something in it cannot be read.
            SettingsError: A malformed exclusion rule.
        """
        unreadable: list[str] = []

        def on_error(path: bytes, error: OSError) -> None:
            if error.errno != errno.ENOENT and error.errno not in _REPLACED_ERRORS:
                unreadable.append(f"{shown(path)}: {error.strerror}")

        files = folders = links = content = archive = 0
        env_files: list[str] = []
        linked: set[tuple[int, int]] = set()
        with closing(Walk(self.path, self.exclusions, self.storage_folder, on_error).entries()) as entries:
            for entry in entries:
                archive += 2 * BLOCK
                if entry.kind is not EntryKind.FILE:
                    folders += entry.kind is EntryKind.FOLDER
                    links += entry.kind is EntryKind.SYMLINK
                    continue
                try:
                    status = os.stat(entry.name, dir_fd=entry.folder_fd, follow_symlinks=False)
                    if not os.access(entry.name, os.R_OK, dir_fd=entry.folder_fd, effective_ids=True):
                        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                except OSError as error:
                    on_error(entry.path, error)
                    continue
                if status.st_nlink > 1:
                    if (status.st_dev, status.st_ino) in linked:
                        links += 1
                        continue
                    linked.add((status.st_dev, status.st_ino))
                files += 1
                content += status.st_size
                archive += BLOCK + min(status.st_size, status.st_blocks * 512)
                if _may_hold_secrets(entry.name):
                    env_files.append(shown(entry.path))
        if unreadable and self.on_unreadable is OnUnreadable.FAIL:
            raise _unreadable_error(unreadable)
        return SourceSurvey(files, folders, links, content, archive, tuple(env_files))

    def open(self, settings: Settings) -> OpenSourceTree:
        """An archive of the tree, to be pulled once. Nothing is opened before its first chunk is asked for."""
        return OpenSourceTree(self)


def prepare_archive(settings: Settings) -> tuple[SourceTree, SourceSurvey]:
    """What can be done before bytes flow: the source for a recipe, and what it will archive.

    Raises:
        SourceError: KANBU_SOURCE_PATH is not there, or something in it cannot be read and is not to be skipped.
        SettingsError: A malformed exclusion rule.
    """
    tree = SourceTree(
        path=settings.source_path.absolute(),
        exclusions=(*DEFAULT_EXCLUSIONS, *settings.source_exclusions),
        storage_folder=settings.storage_path,
        on_unreadable=settings.source_unreadable,
    )
    survey = tree.survey()
    return replace(tree, estimated_bytes=survey.archive_bytes), survey


class OpenSourceTree:
    """One pass over a source tree."""

    def __init__(self, tree: SourceTree) -> None:
        self._tree = tree
        self._walk = Walk(tree.path, tree.exclusions, tree.storage_folder, self._cannot_open)
        self._files = self._folders = self._links = self._bytes = 0
        self._first_names: dict[tuple[int, int, int, int], bytes] = {}
        self._warnings: list[str] = []
        self._unsaid = 0
        self._commit: str | None = None
        self._whole = False

    def chunks(self) -> Generator[bytes, None, None]:
        """The archive, in chunks of about 1 MiB. Closing the generator closes every file.

        Raises:
            SourceError: The folder is gone, or something in it cannot be read and is not to be skipped.
        """
        self._commit = read_commit(self._tree.path)
        written = waiting = 0
        pieces: list[bytes] = []
        with closing(self._pieces()) as source:
            for piece in source:
                pieces.append(piece)
                waiting += len(piece)
                if waiting >= CHUNK:
                    yield b"".join(pieces)
                    written += waiting
                    waiting = 0
                    pieces.clear()
        pieces.append(end_of_archive(written + waiting))
        yield b"".join(pieces)
        commit = read_commit(self._tree.path)
        if commit != self._commit:
            self._warnings.append(f"another git commit was checked out meanwhile: {self._commit}, then {commit}")
        self._whole = True

    def findings(self) -> SourceFacts:
        """What the archive holds; to be asked when `chunks` is exhausted."""
        if not self._whole:
            raise RuntimeError("the archive has not been read to its end")
        unsaid = (f"and {self._unsaid} more warnings",) if self._unsaid else ()
        return SourceFacts(
            path=shown(os.fsencode(self._tree.path)),
            files=self._files,
            folders=self._folders,
            links=self._links,
            bytes=self._bytes,
            excluded=self._walk.excluded(),
            warnings=(*self._warnings, *unsaid),
            git_commit=self._commit,
        )

    def _pieces(self) -> Generator[bytes, None, None]:
        with closing(self._walk.entries()) as entries:
            for entry in entries:
                if entry.kind is EntryKind.FILE:
                    try:
                        fd = os.open(entry.name, _FILE_FLAGS, dir_fd=entry.folder_fd)
                    except OSError as error:
                        self._cannot_open(entry.path, error)
                        continue
                    try:
                        yield from self._file(entry.path, fd)
                    finally:
                        os.close(fd)
                elif entry.kind is EntryKind.FOLDER:
                    yield _header(entry.path + b"/", EntryType.FOLDER, os.fstat(entry.folder_fd))
                    self._folders += 1
                else:
                    yield from self._not_opened(entry)

    def _not_opened(self, entry: Entry) -> Iterator[bytes]:
        try:
            status = os.stat(entry.name, dir_fd=entry.folder_fd, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                target = os.fsencode(os.readlink(entry.name, dir_fd=entry.folder_fd))
                yield _header(entry.path, EntryType.SYMLINK, status, target=target)
                self._links += 1
            else:
                self._warn(entry.path, _NOT_ARCHIVED.get(stat.S_IFMT(status.st_mode), _REPLACED))
        except OSError as error:
            self._cannot_open(entry.path, error)

    def _file(self, path: bytes, fd: int) -> Iterator[bytes]:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            self._warn(path, _REPLACED)
            return
        size = status.st_size
        # Size and time are part of the key, so that a number used again for another file cannot link the two.
        inode = (status.st_dev, status.st_ino, size, status.st_mtime_ns)
        if status.st_nlink > 1 and inode in self._first_names:
            yield _header(path, EntryType.HARD_LINK, status, target=self._first_names[inode])
            self._links += 1
            return
        extents = _data_extents(fd, status)
        content = self._content(path, fd, extents)
        try:
            # The first read comes before the header: a file that cannot be read leaves no entry.
            first = next(content, b"")
        except OSError as error:
            self._unreadable(path, error, "skipped")
            return
        if extents == [(0, size)]:
            stored = size
            yield _header(path, EntryType.FILE, status, size=stored) + first
        else:
            table = sparse_map(extents)
            stored = len(table) + sum(length for _, length in extents)
            pax = sparse_pax(path, size)
            yield _header(sparse_alias(path), EntryType.FILE, status, size=stored, pax=pax) + table
            yield first
        missing = (yield from content) or 0
        yield padding(stored)
        self._files += 1
        self._bytes += size
        if status.st_nlink > 1:
            self._first_names[inode] = path
        final = os.fstat(fd)
        if missing:
            self._warn(path, f"shrank while it was read: {missing} bytes at its end are zeros in the archive")
        elif final.st_size > size:
            self._warn(path, f"grew by {final.st_size - size} bytes while it was read: cut at {size} in the archive")
        elif (final.st_size, final.st_mtime_ns) != (size, status.st_mtime_ns):
            self._warn(path, "changed while it was read")

    def _content(self, path: bytes, fd: int, extents: list[tuple[int, int]]) -> Generator[bytes, None, int]:
        """The bytes of `extents`, exactly as many as the header says; returns how many the file no longer had.

        Raises:
            OSError: The very first read failed.
        """
        missing = 0
        begun, readable = False, True
        for start, length in extents:
            position, end = start, start + length
            while position < end:
                wanted = min(CHUNK, end - position)
                try:
                    data = os.pread(fd, wanted, position) if readable else b""
                except OSError as error:
                    if not begun:
                        raise
                    self._unreadable(path, error, f"zeros in the archive from byte {position} on")
                    readable, data = False, b""
                begun = True
                if not data:
                    data = bytes(wanted)
                    missing += wanted if readable else 0
                position += len(data)
                yield data
        return missing

    def _cannot_open(self, path: bytes, error: OSError) -> None:
        if error.errno == errno.ENOENT:
            self._warn(path, _VANISHED)
        elif error.errno in _REPLACED_ERRORS:
            self._warn(path, _REPLACED)
        else:
            self._unreadable(path, error, "skipped")

    def _unreadable(self, path: bytes, error: OSError, consequence: str) -> None:
        reason = error.strerror or str(error)
        if self._tree.on_unreadable is OnUnreadable.FAIL:
            raise _unreadable_error([f"{shown(path)}: {reason}"]) from error
        self._warn(path, f"cannot be read ({reason}): {consequence}")

    def _warn(self, path: bytes, what: str) -> None:
        if len(self._warnings) < MAX_WARNINGS:
            self._warnings.append(f"{shown(path)}: {what}")
        else:
            self._unsaid += 1


def _header(
    name: bytes,
    kind: EntryType,
    status: os.stat_result,
    *,
    size: int = 0,
    target: bytes = b"",
    pax: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    return entry_header(
        name,
        kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size=size,
        target=target,
        pax=pax,
    )


def _data_extents(fd: int, status: os.stat_result) -> list[tuple[int, int]]:
    """Where a file holds data, as (offset, length) in whole blocks; one extent over it all unless it has holes.

    A sparse file that ends in a hole has an empty extent at its end, as GNU tar has it.
    """
    size = status.st_size
    everything = [(0, size)]
    if status.st_blocks * 512 >= size:
        return everything
    extents: list[tuple[int, int]] = []
    end = 0
    try:
        while end < size:
            start = os.lseek(fd, end, os.SEEK_DATA)
            if start >= size:  # it grew meanwhile, past what is archived of it
                extents.append((size, 0))
                break
            hole = os.lseek(fd, start, os.SEEK_HOLE)
            start -= start % BLOCK
            end = min(hole + -hole % BLOCK, size)
            extents.append((start, end - start))
    except OSError as error:
        if error.errno != errno.ENXIO:  # not "a hole to the end" but "no such question to this file system"
            return everything
        extents.append((size, 0))
    return extents


def _may_hold_secrets(name: str) -> bool:
    return name == ".env" or (name.startswith(".env.") and name not in _ENV_WITHOUT_SECRETS)


def _unreadable_error(unreadable: list[str]) -> SourceError:
    few = unreadable[:20]
    return SourceError(
        f"{len(unreadable)} of the source tree's entries cannot be read.",
        tried=(*few, f"and {len(unreadable) - len(few)} more") if len(unreadable) > len(few) else tuple(few),
        advice="Let this user read them, exclude them (BACKUP_SOURCE_EXCLUDE), or set BACKUP_SOURCE_UNREADABLE=skip.",
    )

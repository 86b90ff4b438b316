"""Walking a source tree: its entries in order, and what is left out.

What belongs here: listing folders, applying the exclusion rules, keeping out the storage folder. What does not: reading
files, and what becomes of an entry (`source_tree`).

Folders are opened relative to the one above, without following links: somebody who swaps a folder for a link while the
tree is walked cannot lead the walk out of it. One descriptor is held per level.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from kanbu_backup_dagster.backup.manifest import ExclusionFacts
from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.sources.exclusions import Exclusions

STORAGE_RULE = "(storage folder)"

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class EntryKind(Enum):
    """What an entry is, by its folder's listing."""

    FOLDER = "folder"
    FILE = "file"
    SYMLINK = "symlink"
    OTHER = "other"


class Entry(NamedTuple):
    """One thing in the tree.

    Attributes:
        kind: What it is.
        name: Its base name.
        folder_fd: The folder it is in; for a folder, that folder itself.
        path: Its name in an archive: the source folder's base name, and what lies below.
    """

    kind: EntryKind
    name: str
    folder_fd: int
    path: bytes


class _Level(NamedTuple):
    fd: int
    unseen: list[os.DirEntry[str]]  # last first, so that what has been seen can be let go
    path: bytes
    parents: tuple[str, ...]


class Walk:
    """The entries of a tree, depth first, in the order of their names.

    Args:
        top: The source folder; it may be a link to one.
        exclusions: Rules for what stays out.
        storage_folder: Stays out too, wherever in the tree it is and whatever it is called.
        on_error: Told which folder (by its name in an archive) could not be listed and why; raises to end the walk.

    Raises:
        SettingsError: A malformed rule.
    """

    def __init__(
        self,
        top: Path,
        exclusions: tuple[str, ...],
        storage_folder: Path | None,
        on_error: Callable[[bytes, OSError], None],
    ) -> None:
        self._top = top
        self._real_top = os.path.realpath(top)
        self._exclusions = Exclusions(exclusions)
        self._storage_folder = storage_folder
        self._on_error = on_error
        self._excluded = dict.fromkeys(self._exclusions.rules, (0, 0))

    def excluded(self) -> tuple[ExclusionFacts, ...]:
        """What each rule has kept out so far. The storage folder counts as one entry without bytes: it is not read."""
        return tuple(ExclusionFacts(rule=rule, count=n, bytes=size) for rule, (n, size) in self._excluded.items())

    def entries(self) -> Generator[Entry, None, None]:
        """Walk. An entry's descriptor is good until the next entry is asked for.

        Raises:
            SourceError: The source folder is not there, cannot be read, or cannot be archived.
        """
        storage = _Storage(self._storage_folder)
        name = os.path.basename(os.path.abspath(self._top))
        if not name:
            raise _top_error(self._top, "is the root of the file system")
        levels: list[_Level] = []
        try:
            levels.append(self._open_top(os.fsencode(name), storage))
            yield Entry(EntryKind.FOLDER, name, levels[0].fd, levels[0].path)
            while levels:
                level = levels[-1]
                if not level.unseen:
                    os.close(levels.pop().fd)
                    continue
                found = level.unseen.pop()
                folder = found.is_dir(follow_symlinks=False)
                rule = self._exclusions.match(level.parents, found.name, folder=folder)
                if rule is not None:
                    self._exclude(rule, *_measure(level.fd, found, folder))
                    continue
                path = level.path + b"/" + os.fsencode(found.name)
                if not folder:
                    yield Entry(_kind(found), found.name, level.fd, path)
                    continue
                below = self._open_below(level, found.name, path, storage)
                if below is not None:
                    levels.append(below)
                    yield Entry(EntryKind.FOLDER, found.name, below.fd, path)
        finally:
            for level in levels:
                os.close(level.fd)

    def _open_top(self, path: bytes, storage: _Storage) -> _Level:
        try:
            fd = os.open(self._top, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise _top_error(self._top, "does not exist") from None
        except NotADirectoryError:
            raise _top_error(self._top, "is not a folder") from None
        except OSError as error:
            raise _top_error(self._top, f"cannot be opened: {error.strerror}") from None
        try:
            if storage.is_at(fd):
                raise _top_error(self._top, "is the folder where backups are kept")
            return _Level(fd, _listing(fd), path, ())
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise _top_error(self._top, f"cannot be listed: {error.strerror}") from None
            raise

    def _open_below(self, above: _Level, name: str, path: bytes, storage: _Storage) -> _Level | None:
        parents = (*above.parents, name)
        # By path first: a dead network mount is not even touched.
        if storage.path == str(Path(self._real_top, *parents)):
            self._exclude(STORAGE_RULE, 1, 0)
            return None
        try:
            fd = os.open(name, _FOLDER_FLAGS, dir_fd=above.fd)
        except OSError as error:
            self._on_error(path, error)
            return None
        level = None
        try:
            if storage.is_at(fd):
                self._exclude(STORAGE_RULE, 1, 0)
            else:
                level = _Level(fd, _listing(fd), path, parents)
        except OSError as error:
            self._on_error(path, error)
        finally:
            if level is None:
                os.close(fd)
        return level

    def _exclude(self, rule: str, entries: int, size: int) -> None:
        count, total = self._excluded.get(rule, (0, 0))
        self._excluded[rule] = (count + entries, total + size)


class _Storage:
    """The storage folder, known by path and, however it is mounted or linked, by device and inode."""

    def __init__(self, folder: Path | None) -> None:
        self.path = os.path.realpath(folder) if folder else None
        self._inode: tuple[int, int] | None = None
        if folder:
            try:
                status = folder.stat()
            except OSError:  # not there, or a dead mount: known by its path alone
                return
            self._inode = (status.st_dev, status.st_ino)

    def is_at(self, fd: int) -> bool:
        if self._inode is None:
            return False
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino) == self._inode


def shown(path: bytes) -> str:
    """A name for people and JSON: what is no UTF-8 or cannot be printed is escaped."""
    text = path.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _listing(fd: int) -> list[os.DirEntry[str]]:
    with os.scandir(fd) as entries:
        return sorted(entries, key=lambda entry: entry.name, reverse=True)


def _kind(found: os.DirEntry[str]) -> EntryKind:
    if found.is_file(follow_symlinks=False):
        return EntryKind.FILE
    return EntryKind.SYMLINK if found.is_symlink() else EntryKind.OTHER


def _measure(folder_fd: int, found: os.DirEntry[str], folder: bool) -> tuple[int, int]:
    """Entries and bytes of files in something left out. They are figures only: what cannot be read counts as empty."""
    entries = size = 0
    waiting = [found.name] if folder else []
    if not folder:
        entries, size = 1, _size(found)
    while waiting:
        path = waiting.pop()
        entries += 1
        try:
            fd = os.open(path, _FOLDER_FLAGS, dir_fd=folder_fd)
        except OSError:
            continue
        try:
            with os.scandir(fd) as listing:
                for entry in listing:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{path}/{entry.name}")
                    else:
                        entries += 1
                        size += _size(entry)
        except OSError:
            continue
        finally:
            os.close(fd)
    return entries, size


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
    except OSError:
        return 0


def _top_error(top: Path, problem: str) -> SourceError:
    return SourceError(
        f"The source folder {shown(os.fsencode(top))} (KANBU_SOURCE_PATH) {problem}.",
        advice="Set KANBU_SOURCE_PATH to the folder to archive, by the path it has for this process.",
    )

"""Extracting a source backup: a tar archive becomes a folder, whole or not at all.

What belongs here: the safe way from an archive to files. What does not: fetching, decrypting, decompressing and
verifying, which come before, and choosing the folder.

Python's own extraction filter `data` refuses absolute and outward links, which honest source trees hold, and changes
modes. The rules here give the same safety another way: the tree grows in a private folder that holds no symbolic link
before everything else is written, so nothing can be written through one, and every link then comes back as it was.
Names that are absolute or hold `..`, hard links to anything but a file extracted before, names that occur twice,
devices and FIFOs are refused, and with them the whole archive.

Permission bits and times come back as they were. Run as root, owners do too (by number), as with tar; otherwise the
files belong to the user who runs this. Files lose their setuid and setgid bits, with a warning.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from pathlib import Path
from typing import cast

from kanbu_backup_dagster.backup.manifest import SourceFacts
from kanbu_backup_dagster.backup.tar_reading import ArchiveReader, archive_entries
from kanbu_backup_dagster.errors import CorruptBackupError, RestoreError

_CHUNK = 1 << 20
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_SETUID_BITS = stat.S_ISUID | stat.S_ISGID


@dataclass(frozen=True)
class ExtractedTree:
    """What was extracted, counted as in `manifest.SourceFacts`.

    Attributes:
        folder: Where it is.
        files: Regular files.
        folders: Folders.
        links: Symbolic and further hard links.
        bytes: Bytes of the regular files.
        warnings: What is not as it was, one line each.
    """

    folder: Path
    files: int
    folders: int
    links: int
    bytes: int
    warnings: tuple[str, ...]


def check_target(folder: Path) -> None:
    """See that an archive can be extracted into `folder`: an empty one, or a new one in a folder that is there.

    Raises:
        RestoreError: It cannot.
    """
    try:
        if not folder.parent.is_dir():
            problem = f"the folder {folder.parent} does not exist"
        elif folder.is_symlink() and not folder.exists():
            problem = "it is a link to nowhere"
        elif not folder.exists():
            return
        elif not folder.is_dir():
            problem = "it is not a folder"
        elif any(folder.iterdir()):
            problem = "it is not empty"
        elif folder.is_mount():
            # The tree is moved into place in one step, which needs its place to be on the same file system.
            problem = "it is a mount point"
        else:
            return
    except OSError as error:
        problem = f"it cannot be read: {error.strerror}"
    raise RestoreError(
        f"Nothing can be extracted into {folder}: {problem}.",
        advice="Name a new folder, or an empty one; nothing is ever extracted over existing files.",
    )


def extract_archive(chunks: Iterator[bytes], folder: Path, expected: SourceFacts | None = None) -> ExtractedTree:
    """Extract a tar archive into `folder`, which then holds the archive's top folder. All of it, or nothing.

    Args:
        chunks: The archive, decrypted, decompressed and verified. Read to its end before anything appears in `folder`.
        folder: An empty or a new folder (`check_target`). The tree is made in a hidden folder beside it first.
        expected: What the manifest says the archive holds; compared before anything appears in `folder`.

    Raises:
        RestoreError: The folder cannot be used, the disk failed, or the archive holds what is never extracted.
        CorruptBackupError: Not a whole tar archive, or not what the manifest says.
    """
    check_target(folder)
    with _staged(folder.resolve()) as staging:
        extraction = _Extraction(os.fsencode(staging))
        try:
            extraction.run(ArchiveReader(chunks))
            for _ in chunks:  # what follows the archive is of no use, but stages check their own ends
                pass
            extraction.finish()
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise CorruptBackupError(f"The backup does not hold a tar archive that can be read: {error}.") from error
        if expected is not None:
            _compare(extraction, expected)
    return ExtractedTree(
        folder, extraction.files, extraction.folders, extraction.links, extraction.bytes, tuple(extraction.warnings)
    )


def _sync_file_system(folder: Path) -> None:
    """Write out the file system that a folder is on, and no other, which may hang (syncfs(2))."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(handle)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A private folder that takes the place of `folder` when the block ends well, and is gone otherwise."""
    made_here, staging = False, None
    try:
        made_here = not folder.exists()
        if made_here:
            folder.mkdir()
        place = folder.stat()
        staging = Path(tempfile.mkdtemp(prefix=".kanbu-restore-", dir=folder.parent))
        yield staging
        if os.geteuid() == 0:
            os.chown(staging, place.st_uid, place.st_gid)
        staging.chmod(stat.S_IMODE(place.st_mode))
        # Without this a power failure could leave the tree in place and its files empty.
        _sync_file_system(staging)
        staging.rename(folder)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if made_here:
            with suppress(OSError):  # somebody put something there meanwhile: it stays
                folder.rmdir()
        if staging is not None and staging.exists():
            raise RestoreError(f"{error} The partial copy {staging} could not be removed; delete it.") from error
        if isinstance(error, OSError):
            raise RestoreError(
                f"The archive could not be extracted into {folder}: {error.strerror or error}; nothing was left there.",
                tried=(os.fsdecode(error.filename),) if error.filename else (),
            ) from error
        raise


class _Extraction:
    """An archive on its way into the folder `root`."""

    def __init__(self, root: bytes) -> None:
        self.files = self.folders = self.links = self.bytes = 0
        self.warnings: list[str] = []
        self._root = root
        self._as_root = os.geteuid() == 0
        self._made = {b""}
        self._folders: list[tuple[bytes, tarfile.TarInfo]] = []
        self._symlinks: dict[bytes, tarfile.TarInfo] = {}

    def run(self, reader: ArchiveReader) -> None:
        """Extract everything but symbolic links."""
        for member in archive_entries(reader):
            self._extract(reader, member)

    def finish(self) -> None:
        """Make the symbolic links, then give folders their modes and times, the innermost first."""
        for path in self._symlinks:  # all of them before the first link, through which a folder could be made
            self._make_parents(path)
        for path, member in self._symlinks.items():
            place = self._place(path)
            try:
                os.symlink(_encoded(member.linkname), place)
            except FileExistsError:
                raise _refused(member, "occurs twice") from None
            if self._as_root:
                os.lchown(place, member.uid, member.gid)
            os.utime(place, ns=_times(member), follow_symlinks=False)
        for path, member in sorted(self._folders, key=lambda entry: entry[0], reverse=True):
            place = self._place(path)
            if self._as_root:
                os.chown(place, member.uid, member.gid)
            os.chmod(place, stat.S_IMODE(member.mode))
            os.utime(place, ns=_times(member))

    def _extract(self, reader: ArchiveReader, member: tarfile.TarInfo) -> None:
        # Where a sparse file's header says `path` too (long names, by GNU tar), tarfile takes that for the name.
        path = _safe(member, member.pax_headers.get("GNU.sparse.name", member.name))
        if member.isdir():
            self._make_parents(path + b"/.")
            self.folders += 1
            if path:
                self._folders.append((path, member))
        elif not path:
            raise _refused(member, "has no name")
        elif member.isreg():
            self._make_parents(path)
            self._write(reader, member, path)
            self.files += 1
            self.bytes += member.size
        elif member.issym():
            if path in self._symlinks:
                raise _refused(member, "occurs twice")
            self._symlinks[path] = member
            self.links += 1
        elif member.islnk():
            self._link(member, path)
            self.links += 1
        else:
            raise _refused(member, "is a device, a FIFO or of an unknown type")

    def _write(self, reader: ArchiveReader, member: tarfile.TarInfo, path: bytes) -> None:
        try:
            fd = os.open(self._place(path), _NEW_FILE, 0o600)
        except FileExistsError:
            raise _refused(member, "occurs twice") from None
        with open(fd, "wb") as file:
            reader.seek(member.offset_data)
            extents = cast("list[tuple[int, int]] | None", member.sparse)
            for offset, length in [(0, member.size)] if extents is None else extents:
                file.seek(offset)
                while length > 0:
                    data = reader.read(min(_CHUNK, length))
                    if not data:
                        raise CorruptBackupError("The archive in the backup is cut short.")
                    file.write(data)
                    length -= len(data)
            if extents is not None:  # it may end in a hole
                file.truncate(member.size)
            file.flush()
            mode = stat.S_IMODE(member.mode)
            if mode & _SETUID_BITS:
                self.warnings.append(f"{_shown(member)}: setuid and setgid bits left off")
                mode &= ~_SETUID_BITS
            if self._as_root:
                os.fchown(fd, member.uid, member.gid)
            os.fchmod(fd, mode)
            os.utime(fd, ns=_times(member))

    def _link(self, member: tarfile.TarInfo, path: bytes) -> None:
        target = _safe(member, member.linkname)
        if target in self._symlinks and path not in self._symlinks:  # GNU tar links names of a symbolic link too
            self._symlinks[path] = self._symlinks[target]
            return
        self._make_parents(path)
        try:
            if not stat.S_ISREG(os.lstat(self._place(target)).st_mode):
                raise _refused(member, "is a hard link to something that is no file")
            os.link(self._place(target), self._place(path), follow_symlinks=False)
        except FileExistsError:
            raise _refused(member, "occurs twice") from None
        except (FileNotFoundError, NotADirectoryError):
            raise _refused(member, "is a hard link to a file that is not in the archive before it") from None

    def _make_parents(self, path: bytes) -> None:
        parent = path.rpartition(b"/")[0]
        if parent not in self._made:
            try:
                os.makedirs(self._place(parent), exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise RestoreError(f"The archive is refused: {_text(parent)} is both a file and a folder.") from None
            self._made.add(parent)

    def _place(self, path: bytes) -> bytes:
        return self._root + b"/" + path


def _safe(member: tarfile.TarInfo, name: str) -> bytes:
    raw = _encoded(name)
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    if raw.startswith(b"/") or b".." in parts:
        raise _refused(member, "points out of the folder")
    return b"/".join(parts)


def _times(member: tarfile.TarInfo) -> tuple[int, int]:
    try:
        seconds = Decimal(member.pax_headers.get("mtime", str(member.mtime)))
        nanoseconds = int((seconds * 1_000_000_000).to_integral_value())
    except DecimalException:
        raise CorruptBackupError(f"The archive in the backup is damaged: the time of {_shown(member)}.") from None
    return nanoseconds, nanoseconds


def _compare(extraction: _Extraction, expected: SourceFacts) -> None:
    wrong = tuple(
        f"{what}: {found:,} in the archive, {said:,} in the manifest"
        for what, found, said in (
            ("files", extraction.files, expected.files),
            ("folders", extraction.folders, expected.folders),
            ("links", extraction.links, expected.links),
            ("bytes", extraction.bytes, expected.bytes),
        )
        if found != said
    )
    if wrong:
        raise CorruptBackupError(
            "The archive does not hold what its manifest says; nothing was extracted.", tried=wrong
        )


def _refused(member: tarfile.TarInfo, why: str) -> RestoreError:
    return RestoreError(
        f"The archive is refused: {_shown(member)} {why}.",
        advice="A source backup made by this system holds no such entry; nothing was extracted.",
    )


def _shown(member: tarfile.TarInfo) -> str:
    return _text(_encoded(member.name))


def _text(path: bytes) -> str:
    return ascii(path.decode("utf-8", "backslashreplace"))


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")

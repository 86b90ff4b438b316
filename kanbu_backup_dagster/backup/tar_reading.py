"""Walking a tar archive that comes in chunks, strictly: what is damaged is an error, never an early end.

What belongs here: `tarfile` made to walk a stream. What does not: what is done with an entry.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, cast

from typing_extensions import Self

from kanbu_backup_dagster.errors import CorruptBackupError

_CHUNK = 1 << 20


class ArchiveReader:
    """Chunks as a file that can be read and skipped, which is all `tarfile` does with an archive it only walks.

    Attributes:
        last_read: What the last `read` gave.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
        self._position = 0
        self.last_read = b""

    def tell(self) -> int:
        """Bytes read or skipped so far."""
        return self._position

    def seek(self, position: int) -> None:
        """Skip to `position`, or to the end if that comes first."""
        assert position >= self._position
        while position > self._position and self.read(min(position - self._position, _CHUNK)):
            pass

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        parts = []
        while size:
            if not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._rest = memoryview(chunk)
            part, self._rest = self._rest[:size], self._rest[size:]
            self._position += len(part)
            size -= len(part)
            parts.append(part)
        self.last_read = b"".join(parts)
        return self.last_read


class _Member(tarfile.TarInfo):
    """An entry; anything but a good header is an error, where `tarfile` takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            block = cast(ArchiveReader, archive.fileobj).last_read
            if block == bytes(tarfile.BLOCKSIZE):  # what ends an archive
                raise
            if len(block) < tarfile.BLOCKSIZE:
                raise CorruptBackupError("The archive in the backup is cut short.") from None
            raise CorruptBackupError(f"The archive in the backup is damaged: {error}.") from error


class _Archive(tarfile.TarFile):
    tarinfo = _Member
    members: list[tarfile.TarInfo]


def archive_entries(reader: ArchiveReader) -> Iterator[tarfile.TarInfo]:
    """The archive's entries in their order. Content is skipped, unless it is read from `reader` before the next entry.

    Raises:
        CorruptBackupError: A header is damaged, or the archive ends before its end is marked.
        tarfile.TarError, ValueError, OverflowError: A header says what cannot be.
    """
    archive = _Archive(fileobj=cast(IO[bytes], reader), encoding="utf-8", errors="surrogateescape")
    while (member := archive.next()) is not None:
        yield member
        archive.members.clear()  # tarfile remembers every member, which nobody asks for here

"""Reading a backup's content through: is it whole in itself, and does it hold what its manifest says?

What belongs here: what content is, for each kind of backup: gzip, SQL dump, tar archive. What does not: hashes and keys
(`verification`), and doing anything with the content (`restore`).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kanbu_backup_dagster.backup.manifest import Manifest, SourceFacts
from kanbu_backup_dagster.backup.names import BackupName, BackupType
from kanbu_backup_dagster.backup.sql_dump import DumpFindings, DumpScanner
from kanbu_backup_dagster.backup.stages import decompress
from kanbu_backup_dagster.backup.tar_reading import ArchiveReader, archive_entries
from kanbu_backup_dagster.errors import CorruptBackupError, SourceError

_SHOWN_TABLES = 5


@dataclass(frozen=True)
class TreeCounts:
    """What an archive holds, counted as in `manifest.SourceFacts`."""

    files: int
    folders: int
    links: int
    bytes: int


@dataclass(frozen=True)
class Contents:
    """What a whole backup was found to hold.

    Attributes:
        raw_bytes: Bytes of the dump or the archive.
        dump: Of a database.
        tree: Of a source tree.
    """

    raw_bytes: int
    dump: DumpFindings | None = None
    tree: TreeCounts | None = None


class _Counter:
    """Chunks, with their bytes counted."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self.bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.bytes += len(chunk)
            yield chunk


def read_through(name: BackupName, chunks: Iterator[bytes]) -> Contents:
    """Read all of a backup's content.

    Args:
        name: The file's name taken apart: it says what the content is.
        chunks: The content as it was before encryption.

    Raises:
        CorruptBackupError: The gzip data is damaged or cut short, the dump has no end, or the archive is not whole.
    """
    raw = _Counter(decompress(chunks) if name.compressed else chunks)
    if name.type is BackupType.DATABASE:
        dump = _scan_dump(iter(raw))
        return Contents(raw.bytes, dump=dump)
    tree = _walk_archive(iter(raw))
    return Contents(raw.bytes, tree=tree)


def _scan_dump(chunks: Iterator[bytes]) -> DumpFindings:
    scanner = DumpScanner()
    for chunk in chunks:
        scanner.feed(chunk)
    try:
        return scanner.finish()
    except SourceError as error:
        raise CorruptBackupError(f"Checksum verification failed: {error.message}") from None


def _walk_archive(chunks: Iterator[bytes]) -> TreeCounts:
    files = folders = links = size = 0
    reader = ArchiveReader(chunks)
    try:
        for member in archive_entries(reader):
            if member.isdir():
                folders += 1
            elif member.isreg():
                files += 1
                size += member.size
            else:
                links += 1
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise CorruptBackupError(f"Checksum verification failed: no tar archive that can be read: {error}.") from None
    for _ in chunks:  # what fills the last block; the stages check their own ends
        pass
    return TreeCounts(files, folders, links, size)


def compare_content(manifest: Manifest, contents: Contents) -> str:
    """What differs from the manifest, in a sentence; empty when nothing does."""
    differences = []
    if contents.raw_bytes != manifest.raw_bytes:
        differences.append(f"{contents.raw_bytes:,} bytes of content, {manifest.raw_bytes:,} in the manifest")
    if contents.dump is not None and manifest.database is not None:
        differences += _compare_rows(contents.dump.rows, manifest.database.rows)
    if contents.tree is not None and manifest.source is not None:
        differences += _compare_tree(contents.tree, manifest.source)
    return f"Checksum verification failed: {'; '.join(differences)}." if differences else ""


def _compare_rows(found: Mapping[str, int], said: Mapping[str, int]) -> list[str]:
    differing = [table for table in {**said, **found} if found.get(table) != said.get(table)]
    shown = [
        f"{table}: {found.get(table, 'no')} rows, {said.get(table, 'none')} in the manifest"
        for table in differing[:_SHOWN_TABLES]
    ]
    more = len(differing) - len(shown)
    return [*shown, f"{more} more tables differ"] if more else shown


def _compare_tree(found: TreeCounts, said: SourceFacts) -> list[str]:
    return [
        f"{what}: {one:,} in the archive, {other:,} in the manifest"
        for what, one, other in (
            ("files", found.files, said.files),
            ("folders", found.folders, said.folders),
            ("links", found.links, said.links),
            ("bytes", found.bytes, said.bytes),
        )
        if one != other
    ]

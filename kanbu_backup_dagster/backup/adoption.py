"""Adoption: a file without a manifest that can be trusted is read through and given one.

What belongs here: the manifest drawn up from what a file holds. What does not: files of our own, born with one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import datetime, timezone

from kanbu_backup_dagster.backup.catalog import Backup, Catalog
from kanbu_backup_dagster.backup.content_check import Contents, read_through
from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.manifest import (
    DatabaseFacts,
    Manifest,
    SourceFacts,
    Trigger,
    Verification,
    VerificationStatus,
)
from kanbu_backup_dagster.backup.reading import key_of
from kanbu_backup_dagster.backup.stages import decrypt_unverified
from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.storage.protocol import Storage


class _Seen:
    """Bytes that passed: how many, and their SHA-256."""

    def __init__(self) -> None:
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def of(self, chunks: Iterator[bytes], on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[bytes]:
        for chunk in chunks:
            self.bytes += len(chunk)
            self.sha256.update(chunk)
            on_bytes(self.bytes)
            yield chunk


def adopt(
    backup: Backup, storage: Storage, keys: Keyring, *, on_bytes: Callable[[int], None] = lambda count: None
) -> Manifest:
    """Read the file through and store a manifest beside it, verified. From then on retention judges the file.

    What no file tells (the database's name and size, who made it) stays empty.

    Args:
        on_bytes: Told how many stored bytes were read so far.

    Raises:
        KanbuError: It has a manifest.
        EncryptionKeyError: It is encrypted and no key is set.
        CorruptBackupError: It cannot be read through, be it for another key's sake.
    """
    if backup.manifest is not None:
        raise KanbuError(f"{backup.filename} has a manifest already.")
    key = key_of(backup, storage, keys)
    stored, content = _Seen(), _Seen()
    chunks = stored.of(storage.read(backup.filename), on_bytes)
    contents = read_through(backup.name, content.of(decrypt_unverified(chunks, key) if key else chunks))
    manifest = Manifest(
        filename=backup.filename,
        type=backup.type,
        trigger=Trigger.MANUAL,
        created_at=backup.name.created_at,
        raw_bytes=contents.raw_bytes,
        compressed_bytes=content.bytes,
        stored_bytes=stored.bytes,
        sha256=content.sha256.hexdigest(),
        stored_sha256=stored.sha256.hexdigest(),
        encrypted=backup.name.encrypted,
        key_id=key.key_id if key else None,
        database=_database(contents),
        source=_source(contents),
        duration_seconds=0,
        verification=Verification(
            status=VerificationStatus.VERIFIED, at=datetime.now(timezone.utc), detail="adopted", deep=True
        ),
    )
    storage.prepare()  # a folder of Kanbu's own past may bear no mark yet
    storage.replace_sidecar(backup.filename, Catalog(storage, keys).sealed(manifest))
    return manifest


def _database(contents: Contents) -> DatabaseFacts | None:
    if contents.dump is None:
        return None
    return DatabaseFacts(
        name="",
        server_version=contents.dump.server_version or "",
        pg_dump_version=contents.dump.pg_dump_version or "",
        mode="",
        size_bytes=0,
        rows=contents.dump.rows,
    )


def _source(contents: Contents) -> SourceFacts | None:
    tree = contents.tree
    if tree is None:
        return None
    return SourceFacts(path="", files=tree.files, folders=tree.folders, links=tree.links, bytes=tree.bytes)

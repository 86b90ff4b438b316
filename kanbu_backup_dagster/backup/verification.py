"""Verification: reading a stored backup back and judging it.

What belongs here: what is read and compared. What does not: recording the verdict (`catalog`, `orchestration`), and how
content is read through (`content_check`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import datetime, timezone

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.content_check import compare_content, read_through
from kanbu_backup_dagster.backup.keys import EncryptionKey, Keyring
from kanbu_backup_dagster.backup.manifest import Manifest, Verification, VerificationStatus
from kanbu_backup_dagster.backup.reading import key_of
from kanbu_backup_dagster.backup.stages import counted, decrypt_unverified, hashed, hashed_beside
from kanbu_backup_dagster.errors import CorruptBackupError, EncryptionKeyError
from kanbu_backup_dagster.storage.protocol import Storage

MISMATCH = "Checksum verification failed"
_NOT_AS_STORED = f"{MISMATCH}: the stored file is not what was written."


def verify(
    backup: Backup,
    storage: Storage,
    keys: Keyring,
    *,
    deep: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Verification:
    """Read the file back and compare it with its manifest.

    The stored bytes are compared with `stored_sha256`, what they decrypt to with `sha256`. A file without a manifest
    has nothing to be compared with: it is read through as `deep` does.

    Args:
        deep: Read the content through as well: the gzip's own CRC, a dump's trailer and its rows per table, an
            archive's structure and its counts.
        on_bytes: Told how many stored bytes were read so far.

    Returns:
        `verified`, `failed` with the reason, or `no_checksum` for a file without manifest that could be read through.

    Raises:
        EncryptionKeyError: The file is encrypted and its key is not set. The stored bytes are as written, as far as
            that can be known; nothing is judged.
        StorageError: The file cannot be read.
    """
    manifest = backup.manifest
    if backup.problem is not None:
        return _verdict(VerificationStatus.FAILED, backup.problem)
    if manifest is None:
        return _read_legacy(backup, storage, keys, on_bytes)
    try:
        key = keys.reading(manifest.key_id) if manifest.encrypted else None
    except EncryptionKeyError:
        if not _is_as_stored(manifest, storage, on_bytes):
            return _verdict(VerificationStatus.FAILED, _NOT_AS_STORED)
        raise
    stored, content = hashlib.sha256(), hashlib.sha256()
    problem = ""
    chunks = hashed_beside(counted(storage.read(backup.filename), on_bytes), stored.update)
    try:
        plain = decrypt_unverified(chunks, key) if key else chunks
        if deep:
            problem = compare_content(manifest, read_through(backup.name, hashed(plain, content.update)))
        else:
            for chunk in plain:
                content.update(chunk)
    except CorruptBackupError as error:
        problem = error.message
        for _ in chunks:  # the rest of the stored bytes, so that their hash can be named as the first cause
            pass
    if stored.hexdigest() != manifest.stored_sha256:
        return _verdict(VerificationStatus.FAILED, _NOT_AS_STORED)
    if problem:
        return _verdict(VerificationStatus.FAILED, problem)
    if content.hexdigest() != manifest.sha256:
        return _verdict(VerificationStatus.FAILED, f"{MISMATCH}: the content is not what was dumped.")
    return _verdict(VerificationStatus.VERIFIED, "", deep=deep)


def _read_legacy(backup: Backup, storage: Storage, keys: Keyring, on_bytes: Callable[[int], None]) -> Verification:
    try:
        key = key_of(backup, storage, keys)
        read_through(backup.name, _plain(counted(storage.read(backup.filename), on_bytes), key))
    except CorruptBackupError as error:
        return _verdict(VerificationStatus.FAILED, error.message)
    return _verdict(
        VerificationStatus.NO_CHECKSUM, "There is no manifest to compare with; it reads through to its end.", deep=True
    )


def _plain(chunks: Iterator[bytes], key: EncryptionKey | None) -> Iterator[bytes]:
    return decrypt_unverified(chunks, key) if key else chunks


def _is_as_stored(manifest: Manifest, storage: Storage, on_bytes: Callable[[int], None]) -> bool:
    stored = hashlib.sha256()
    for chunk in counted(storage.read(manifest.filename), on_bytes):
        stored.update(chunk)
    return stored.hexdigest() == manifest.stored_sha256


def _verdict(status: VerificationStatus, detail: str, *, deep: bool = False) -> Verification:
    return Verification(status=status, at=datetime.now(timezone.utc), detail=detail, deep=deep)

"""Verification: reading a stored backup back and judging it.

What belongs here: what is read and compared. What does not: recording the verdict (`catalog.amend`, `orchestration`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.manifest import Verification, VerificationStatus
from kanbu_backup_dagster.backup.stages import decrypt_unverified
from kanbu_backup_dagster.errors import CorruptBackupError
from kanbu_backup_dagster.storage.protocol import Storage

MISMATCH = "Checksum verification failed"


def verify(
    backup: Backup, storage: Storage, keys: Keyring, *, on_bytes: Callable[[int], None] = lambda count: None
) -> Verification:
    """Read the file back and compare it with its manifest.

    The stored bytes are compared first of all; then they are decrypted, and the content's hash is compared.

    Args:
        on_bytes: Told how many stored bytes were read so far.

    Returns:
        `verified`, `failed` with the reason, or `no_checksum` for a file without manifest.

    Raises:
        EncryptionKeyError: The file is encrypted and its key is not set; nothing is judged.
        StorageError: The file cannot be read.
    """
    manifest = backup.manifest
    if manifest is None:
        if backup.problem is not None:
            return _verdict(VerificationStatus.FAILED, backup.problem)
        return _verdict(VerificationStatus.NO_CHECKSUM, "There is no manifest to compare with.")
    key = keys.reading(manifest.key_id) if manifest.encrypted else None
    stored, content = hashlib.sha256(), hashlib.sha256()
    with ThreadPoolExecutor(1, "stored-hash") as beside:
        chunks = _hashed_beside(_counted(storage.read(backup.filename), on_bytes), stored.update, beside)
        try:
            for chunk in decrypt_unverified(chunks, key) if key else chunks:
                content.update(chunk)
        except CorruptBackupError as error:
            return _verdict(VerificationStatus.FAILED, error.message)
    if stored.hexdigest() != manifest.stored_sha256:
        return _verdict(VerificationStatus.FAILED, f"{MISMATCH}: the stored file is not what was written.")
    if content.hexdigest() != manifest.sha256:
        return _verdict(VerificationStatus.FAILED, f"{MISMATCH}: the content is not what was dumped.")
    return _verdict(VerificationStatus.VERIFIED, "")


def _verdict(status: VerificationStatus, detail: str) -> Verification:
    return Verification(status=status, at=datetime.now(timezone.utc), detail=detail)


def _counted(chunks: Iterator[bytes], on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        on_bytes(total)
        yield chunk


def _hashed_beside(
    chunks: Iterator[bytes], update: Callable[[bytes], None], beside: ThreadPoolExecutor
) -> Iterator[bytes]:
    """Hash on a second core while the chunk is decrypted on the first; one chunk in flight keeps memory flat."""
    pending: Future[None] | None = None
    for chunk in chunks:
        if pending is not None:
            pending.result()
        pending = beside.submit(update, chunk)
        yield chunk
    if pending is not None:
        pending.result()

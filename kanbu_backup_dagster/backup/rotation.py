"""Key rotation: backups that need a former key, put under the current one, one file at a time.

What belongs here: what has to be done with each file, and doing it so that a kill at any moment leaves a file that can
be read. What does not: locks and Dagster's record (`orchestration`).

The file's name and content stay; its bytes change, and with them key id and hash in the manifest. Two files cannot be
replaced in one step, so for a moment the manifest describes both:

| step | file | manifest | after a kill |
|---|---|---|---|
| decrypted and encrypted anew beside it, in one stream | old | old | as before; the new one is a leftover |
| the new one is read back and proven | old | old | the same |
| the manifest names the new one's IV, key and hash too | old | both | read as old, by its IV; rotated again |
| the new one takes its place | new | both | read as new, by its IV |
| the manifest forgets the old one | new | new | done |

A file without a manifest needs no more than the replacing: its reader tries each key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum

from kanbu_backup_dagster.backup.catalog import Backup, Catalog
from kanbu_backup_dagster.backup.keys import EncryptionKey, Keyring
from kanbu_backup_dagster.backup.manifest import Manifest, Rotation, Verification, VerificationStatus
from kanbu_backup_dagster.backup.reading import key_of
from kanbu_backup_dagster.backup.stages import IV_BYTES, decrypt_unverified, encrypt, hashed
from kanbu_backup_dagster.errors import CorruptBackupError, EncryptionKeyError, KanbuError, StorageError
from kanbu_backup_dagster.storage.protocol import Storage


class Action(str, Enum):
    """What a file needs."""

    NOTHING = "nothing"
    RE_ENCRYPT = "re-encrypt"
    # Only the manifest: its seal is a former key's, or a rotation was killed before its last step.
    RE_SEAL = "re-seal"
    LEAVE = "leave"


@dataclass(frozen=True)
class Planned:
    """What is to be done with a file.

    Attributes:
        key_id: The key it needs now; None when it is not encrypted, or when that is not known.
        reason: Why it is left as it is.
    """

    filename: str
    action: Action
    size: int
    key_id: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Rotated:
    """A file that was rotated.

    Attributes:
        old_key_id: The key it needed.
        manifest: Its manifest now; None when it has none.
    """

    filename: str
    action: Action
    old_key_id: str | None
    new_key_id: str
    manifest: Manifest | None


def require_current(keys: Keyring, storage: Storage) -> EncryptionKey:
    """The key to rotate to.

    Raises:
        EncryptionKeyError: None is set.
        StorageError: The storage cannot replace a file safely.
    """
    if keys.current is None:
        raise EncryptionKeyError(
            "Encryption key not set: there is no key to rotate to.",
            advice="Set BACKUP_ENCRYPTION_KEY to the new key and BACKUP_ENCRYPTION_KEY_PREVIOUS to the former one.",
        )
    if not storage.replaces_in_one_step:
        raise StorageError(
            f"{storage.location} is an rclone mount, where a file cannot be replaced in one step.",
            advice="Copy the backups to a local folder, rotate them there (BACKUP_STORAGE=local), and copy them back.",
        )
    return keys.current


def plan(catalog: Catalog, storage: Storage, keys: Keyring, current: EncryptionKey) -> list[Planned]:
    """What each backup needs, oldest first.

    Of an encrypted file without manifest, the key is found by reading it.

    Raises:
        StorageError: The storage cannot be read.
    """
    return [_judge(backup, storage, keys, current) for backup in catalog.backups()]


def _judge(backup: Backup, storage: Storage, keys: Keyring, current: EncryptionKey) -> Planned:
    def planned(action: Action, key_id: str | None = None, reason: str = "") -> Planned:
        return Planned(backup.filename, action, backup.file.size, key_id, reason)

    if backup.problem is not None:
        return planned(Action.LEAVE, reason=backup.problem)
    try:
        key = key_of(backup, storage, keys)
    except KanbuError as error:
        return planned(Action.LEAVE, backup.manifest.key_id if backup.manifest else None, error.message)
    if key is not None and key != current:
        return planned(Action.RE_ENCRYPT, key.key_id)
    manifest = backup.manifest
    sealed_by = manifest.sealed_by if manifest is not None else None
    if manifest is not None and (manifest.rotation is not None or sealed_by not in (None, current.key_id)):
        if sealed_by not in keys.ids:
            return planned(Action.LEAVE, reason=f"Its manifest is sealed with key {sealed_by}, which is not set.")
        return planned(Action.RE_SEAL, key.key_id if key else None)
    return planned(Action.NOTHING, key.key_id if key else None)


def rotate(
    filename: str,
    catalog: Catalog,
    storage: Storage,
    keys: Keyring,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Rotated | None:
    """Put one backup under the current key. For whoever has the storage's files alone.

    Args:
        on_bytes: Told how many bytes of the file were read so far; each is read twice.

    Returns:
        What was done; None when it needs nothing, as when another run has done it.

    Raises:
        CorruptBackupError: It is not what was written. It is left as it is.
        EncryptionKeyError: Its key is not set.
        StorageError: The storage failed, or cannot replace a file.
        BackupNotFoundError: It is gone.
    """
    current = require_current(keys, storage)
    backup = catalog.get(filename)
    planned = _judge(backup, storage, keys, current)
    if planned.action is Action.NOTHING:
        return None
    if planned.action is Action.LEAVE:
        raise CorruptBackupError(planned.reason)
    manifest = backup.manifest
    if planned.action is Action.RE_ENCRYPT:
        (former,) = (key for key in keys.previous if key.key_id == planned.key_id)
        manifest = _re_encrypt(backup, catalog, storage, former, current, on_bytes)
    elif manifest is not None:
        manifest = catalog.amend(filename, _without_rotation)
    return Rotated(filename, planned.action, planned.key_id, current.key_id, manifest)


def _re_encrypt(
    backup: Backup,
    catalog: Catalog,
    storage: Storage,
    former: EncryptionKey,
    current: EncryptionKey,
    on_bytes: Callable[[int], None],
) -> Manifest | None:
    content, stored, content_again, stored_again = (hashlib.sha256() for _ in range(4))
    read = 0

    def seen(chunks: Iterator[bytes]) -> Generator[bytes, None, None]:
        nonlocal read
        for chunk in chunks:
            read += len(chunk)
            on_bytes(read)
            yield chunk

    with storage.receive() as incoming:
        head = b""
        with closing(seen(storage.read(backup.filename))) as old:
            # The former tag is checked when the stream ends, the new file used only after that.
            plain = hashed(decrypt_unverified(old, former), content.update)
            for chunk in hashed(encrypt(plain, current), stored.update):
                head = head or chunk[:IV_BYTES]
                incoming.write(chunk)
        manifest = backup.manifest
        if manifest is not None and content.hexdigest() != manifest.sha256:
            raise CorruptBackupError(f"Checksum mismatch: {backup.filename} is not what was dumped.")
        with closing(seen(incoming.read_back())) as new:
            for chunk in decrypt_unverified(hashed(new, stored_again.update), current):
                content_again.update(chunk)
        if (content.digest(), stored.digest()) != (content_again.digest(), stored_again.digest()):
            raise CorruptBackupError(f"Checksum mismatch: {backup.filename} does not read back as it was re-encrypted.")
        rotation = Rotation(iv=head.hex(), key_id=current.key_id, stored_sha256=stored.hexdigest())
        if manifest is not None:
            catalog.amend(backup.filename, lambda known: known.model_copy(update={"rotation": rotation}))
        incoming.replace(backup.filename)
    if manifest is None:
        return None
    # Both hashes were compared as verification does, on what is in storage now.
    verified = Verification(
        status=VerificationStatus.VERIFIED,
        at=datetime.now(timezone.utc),
        deep=manifest.verification.deep and manifest.verification.status is VerificationStatus.VERIFIED,
    )
    return catalog.amend(
        backup.filename, lambda known: _without_rotation(known).model_copy(update={"verification": verified})
    )


def _without_rotation(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"rotation": None})

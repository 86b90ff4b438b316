"""Reading a backup's content back: what `decrypt` and a restore get.

What belongs here: handing content on only when it was proven first. What does not: the verdict that is recorded
(`verification`), and what content means.

What is proven is what is handed on, so a second pass may have from the page cache what the first one left there: a file
on a network is fetched once, where memory allows.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.keys import EncryptionKey, Keyring
from kanbu_backup_dagster.backup.stages import counted, decrypt_unverified, hashed_beside
from kanbu_backup_dagster.errors import CorruptBackupError
from kanbu_backup_dagster.storage.protocol import Storage


def prove(
    backup: Backup, storage: Storage, keys: Keyring, *, on_bytes: Callable[[int], None] = lambda count: None
) -> str:
    """The first pass: read all of the file, and hand nothing on.

    Args:
        on_bytes: Told how many content bytes were read so far.

    Returns:
        SHA-256 of the content, hex: what a second pass must see again.

    Raises:
        EncryptionKeyError: The file is encrypted and its key is not set.
        CorruptBackupError: "Checksum mismatch": it is not what was written.
    """
    seen = hashlib.sha256()
    deque(counted(_read(backup, storage, keys, seen.update), on_bytes), maxlen=0)
    manifest = backup.manifest
    if manifest is not None and seen.hexdigest() != manifest.sha256:
        raise CorruptBackupError(
            f"Checksum mismatch: {backup.filename} is not what was dumped.", advice="Try a different backup."
        )
    return seen.hexdigest()


def content(backup: Backup, storage: Storage, keys: Keyring, *, proven: str) -> Iterator[bytes]:
    """The second pass: the backup's content (still compressed, if it is), *unproven until it ends*: throw away what was
    made of it when this raises.

    Args:
        proven: What `prove` gave.

    Raises:
        EncryptionKeyError: The file is encrypted and its key is not set.
        CorruptBackupError: At the end: what was read now is not what was proven.
    """
    seen = hashlib.sha256()
    yield from _read(backup, storage, keys, seen.update)
    if seen.hexdigest() != proven:
        raise CorruptBackupError(
            f"Checksum mismatch: {backup.filename} changed while it was being read.",
            advice="Try again, or a different backup.",
        )


def beginning(backup: Backup, storage: Storage, keys: Keyring) -> Iterator[bytes]:
    """The first chunks of the content of a backup that was proven; to be closed, not exhausted."""
    return _read(backup, storage, keys, lambda chunk: None)


def _read(backup: Backup, storage: Storage, keys: Keyring, update: Callable[[bytes], None]) -> Iterator[bytes]:
    if backup.manifest is None and backup.problem is not None:
        raise CorruptBackupError(backup.problem)
    key = key_of(backup, storage, keys)
    with closing(storage.read(backup.filename, cached=True)) as stored:  # type: ignore[type-var]  # a generator can be closed
        yield from hashed_beside(decrypt_unverified(stored, key) if key else stored, update)


def key_of(backup: Backup, storage: Storage, keys: Keyring) -> EncryptionKey | None:
    """The key to read the backup with; None when it is not encrypted.

    A file without a manifest does not say. Where there are several keys, it is read through with one after the other,
    until the tag at its end fits.

    Raises:
        EncryptionKeyError: Its key is not set.
        CorruptBackupError: No manifest, and no key fits.
    """
    if not backup.name.encrypted:
        return None
    if backup.manifest is not None:
        return keys.reading(backup.manifest.key_id)
    first = keys.reading(None)
    if len(keys.all) == 1:
        return first
    for key in keys.all:
        try:
            with closing(storage.read(backup.filename, cached=True)) as stored:  # type: ignore[type-var]  # a generator can be closed
                deque(decrypt_unverified(stored, key), maxlen=0)
        except CorruptBackupError:
            continue
        return key
    raise CorruptBackupError(
        f"Checksum mismatch: {backup.filename} fits none of the {len(keys.all)} keys that are set; it is damaged, cut "
        "short, or of another key."
    )

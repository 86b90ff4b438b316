"""The catalog: every backup in a storage, with what its manifest says.

What belongs here: joining files and manifests into backups, finding one by name, rewriting a manifest. What does not:
judging a backup (`verification`), choosing which may go (`retention`), Dagster's record of them (`orchestration`).

Storage is the truth: the catalog is read from it each time and kept nowhere.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime

from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.manifest import Manifest, Verification, VerificationStatus, parse_manifest
from kanbu_backup_dagster.backup.names import BackupName, BackupType, parse_name, require_name
from kanbu_backup_dagster.backup.stages import IV_BYTES
from kanbu_backup_dagster.errors import BackupNotFoundError, CorruptBackupError, EncryptionKeyError
from kanbu_backup_dagster.storage.protocol import Storage, StoredFile


@dataclass(frozen=True)
class Backup:
    """A backup file and what is known of it.

    Attributes:
        file: The file as the storage lists it.
        name: Its name taken apart.
        manifest: Its manifest; None when there is none (a legacy backup) or it cannot be trusted.
        problem: Why a manifest that is there is not trusted.
    """

    file: StoredFile
    name: BackupName
    manifest: Manifest | None = None
    problem: str | None = None

    @property
    def filename(self) -> str:
        """The file's name."""
        return self.file.name

    @property
    def type(self) -> BackupType:
        """What it holds."""
        return self.name.type

    @property
    def created_at(self) -> datetime:
        """When it was begun (UTC): the manifest's moment, else the name's second."""
        return self.manifest.created_at if self.manifest else self.name.created_at

    @property
    def status(self) -> VerificationStatus:
        """What is known of its integrity."""
        if self.problem is not None:
            return VerificationStatus.FAILED
        return self.manifest.verification.status if self.manifest else VerificationStatus.NO_CHECKSUM

    @property
    def verification(self) -> Verification:
        """The last verdict on it, or what stands for one where its manifest tells none."""
        if self.manifest is not None:
            return self.manifest.verification
        return Verification(status=self.status, detail=self.problem or "")

    @property
    def fingerprint(self) -> str:
        """16 hex characters that differ when anything that is known of the file does, its seal left out."""
        known = (
            self.manifest.model_dump_json(exclude={"seal"})
            if self.manifest is not None
            else f"{self.problem}\n{self.file.size}\n{self.file.modified.isoformat()}"
        )
        return hashlib.sha256(known.encode()).hexdigest()[:16]


class Catalog:
    """The backups of `storage`; manifests are read with `keys`."""

    def __init__(self, storage: Storage, keys: Keyring) -> None:
        self._storage = storage
        self._keys = keys

    def backups(self, backup_type: BackupType | None = None) -> list[Backup]:
        """Every backup (of one type), oldest first.

        Raises:
            StorageError: The storage cannot be listed.
        """
        found = []
        with _uncollected():
            for file in self._storage.files():
                name = parse_name(file.name)
                if name is not None and backup_type in (None, name.type):
                    found.append(self._read(file, name))
        return sorted(found, key=lambda backup: (backup.created_at, backup.filename))

    def newest(self, backup_type: BackupType) -> Backup | None:
        """The youngest backup of a type, by its name; no other manifest is read.

        Raises:
            StorageError: The storage cannot be listed.
        """
        named = [(file, parse_name(file.name)) for file in self._storage.files()]
        youngest = max(
            ((file, name) for file, name in named if name is not None and name.type is backup_type),
            key=lambda pair: pair[1].created_at,
            default=None,
        )
        return self._read(*youngest) if youngest else None

    def get(self, filename: str) -> Backup:
        """The backup called `filename`.

        Raises:
            BackupNotFoundError: There is none, or the name cannot be one.
            StorageError: The storage cannot be read.
        """
        name = require_name(filename)
        file = self._storage.find(filename)
        if file is None:
            raise BackupNotFoundError(
                f"Backup file not found: {filename} is not in {self._storage.location}.",
                advice="`kanbu-backup list` shows what is there.",
            )
        return self._read(file, name)

    def _read(self, file: StoredFile, name: BackupName) -> Backup:
        content = self._storage.read_sidecar(file.name)
        if content is None:
            return Backup(file, name)
        try:
            manifest = parse_manifest(file.name, content, self._keys)
            if manifest.rotation is not None:
                with closing(self._storage.read(file.name, chunk_bytes=IV_BYTES, cached=True)) as chunks:  # type: ignore[type-var]
                    manifest = manifest.of_file_beginning(next(chunks, b""))
            return Backup(file, name, manifest)
        except CorruptBackupError as error:
            return Backup(file, name, problem=str(error))

    def amend(self, filename: str, change: Callable[[Manifest], Manifest]) -> Manifest:
        """Rewrite a backup's manifest: `change` gives the new one from the one in storage now.

        Raises:
            BackupNotFoundError: No such backup.
            CorruptBackupError: Its manifest is missing or cannot be trusted.
            EncryptionKeyError: It was sealed with a key that is not set: without it nothing can be changed, since the
                new one would have no seal, or the seal of a key that never proved the old one.
        """
        while True:
            before = self._storage.read_sidecar(filename)
            backup = self.get(filename)
            if backup.manifest is None:
                raise CorruptBackupError(
                    backup.problem or f"{filename} has no manifest.", advice="`kanbu-backup adopt` gives a file one."
                )
            if before is None:  # it got one between the two looks, and "whatever is there" is not to be written over
                continue
            sealed_by = backup.manifest.sealed_by
            if sealed_by is not None and (self._keys.current is None or sealed_by not in self._keys.ids):
                raise EncryptionKeyError(
                    f"The manifest of {filename} is sealed with key {sealed_by}, which is not set; it stays as it is.",
                    advice="Set BACKUP_ENCRYPTION_KEY to the key the backup was made with.",
                )
            manifest = change(backup.manifest)
            # What another process wrote meanwhile is not written over, but amended.
            if self._storage.replace_sidecar(filename, self.sealed(manifest), expected=before):
                return manifest

    def record_verdict(self, backup: Backup, verdict: Verification) -> bool:
        """Write a verdict to the backup's manifest. One that is none, `pending`, takes the place of no other.

        Returns:
            Whether it was: not where there is no manifest that can be trusted, nor without the key that sealed it,
            nor when the file's bytes are no longer those that were judged (its key was rotated meanwhile).

        Raises:
            BackupNotFoundError: The file was deleted meanwhile.
            StorageError: The storage cannot be written.
        """

        def judged(manifest: Manifest) -> Manifest:
            if backup.manifest is None or manifest.stored_sha256 != backup.manifest.stored_sha256:
                raise _StaysError
            known = manifest.verification.status
            if verdict.status is VerificationStatus.PENDING and known is not VerificationStatus.PENDING:
                raise _StaysError
            return manifest.model_copy(update={"verification": verdict})

        try:
            self.amend(backup.filename, judged)
        except (CorruptBackupError, EncryptionKeyError, _StaysError):
            return False
        return True

    def sealed(self, manifest: Manifest) -> bytes:
        """The manifest's JSON, sealed under the current key where one is set."""
        return manifest.to_json(self._keys.current)


class _StaysError(Exception):
    """What was to be written to a manifest is not about what is there now."""


@contextmanager
def _uncollected() -> Iterator[None]:
    """Hold the search for reference cycles off: among 100,000 manifests, which have none, it takes half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

"""The catalog: every backup in a storage, with what its manifest says.

What belongs here: joining files and manifests into backups, finding one by name, rewriting a manifest. What does not:
judging a backup (`verification`), choosing which may go (`retention`), Dagster's record of them (`orchestration`).

Storage is the truth: the catalog is read from it each time and kept nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.manifest import Manifest, VerificationStatus, parse_manifest
from kanbu_backup_dagster.backup.names import BackupName, BackupType, parse_name, require_name
from kanbu_backup_dagster.errors import BackupNotFoundError, CorruptBackupError
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
            return Backup(file, name, parse_manifest(file.name, content, self._keys))
        except CorruptBackupError as error:
            return Backup(file, name, problem=str(error))

    def amend(self, filename: str, change: Callable[[Manifest], Manifest]) -> Manifest:
        """Rewrite a backup's manifest: `change` gives the new one from the one in storage now.

        Raises:
            BackupNotFoundError: No such backup.
            CorruptBackupError: Its manifest is missing or cannot be trusted.
        """
        backup = self.get(filename)
        if backup.manifest is None:
            raise CorruptBackupError(backup.problem or f"{filename} has no manifest.")
        manifest = change(backup.manifest)
        self._storage.replace_sidecar(filename, self.sealed(manifest))
        return manifest

    def sealed(self, manifest: Manifest) -> bytes:
        """The manifest's JSON, sealed under the current key where one is set."""
        return manifest.to_json(self._keys.current)

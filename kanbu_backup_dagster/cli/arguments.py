"""What a FILE argument may be: the name of a backup in the storage, or a path to a file that is one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kanbu_backup_dagster.backup.catalog import Backup, Catalog
from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster.storage.protocol import Storage


@dataclass(frozen=True)
class Found:
    """A backup, the storage it is in, and the keys to read it with."""

    backup: Backup
    storage: Storage
    keys: Keyring

    @property
    def catalog(self) -> Catalog:
        """The backups of that storage."""
        return Catalog(self.storage, self.keys)


def open_backup(file: str) -> Found:
    """The backup that `file` names.

    Raises:
        BackupNotFoundError: There is none, or what is there is not a backup.
    """
    environment = load_environment()
    storage: Storage = environment.storage
    path = Path(file)
    if len(path.parts) > 1:
        storage = FolderStorage(path.parent.absolute(), variable="the path given")
    return Found(
        Catalog(storage, environment.keys).get(path.name if len(path.parts) > 1 else file), storage, environment.keys
    )

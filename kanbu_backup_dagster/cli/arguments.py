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
    """A backup, the storage it is in, and the keys to read it with.

    Attributes:
        elsewhere: Whether it is in a folder that was given, not in the configured storage.
    """

    backup: Backup
    storage: Storage
    keys: Keyring
    elsewhere: bool = False

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
    elsewhere = len(path.parts) > 1 and path.parent.resolve() != Path(storage.location).resolve()
    if elsewhere:
        storage = FolderStorage(path.parent.absolute(), variable="the path given")
    backup = Catalog(storage, environment.keys).get(path.name if len(path.parts) > 1 else file)
    return Found(backup, storage, environment.keys, elsewhere)

"""What a FILE argument may be: the name of a backup in the storage, or a path to a file that is one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kanbu_backup_dagster.backup.catalog import Backup, Catalog
from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.names import parse_name
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


def name_and_folder(file: str) -> tuple[str, Path | None]:
    """What `file` names: a backup's name, and the folder it is in if that is another than the configured storage.

    A name may begin with a folder within the storage (`production/kanbu_backup_...`); a path that exists comes first.
    """
    path = Path(file)
    if len(path.parts) == 1 or (parse_name(file) is not None and not path.exists()):
        return file, None
    return path.name, path.parent.absolute()


def open_backup(file: str) -> Found:
    """The backup that `file` names.

    Raises:
        BackupNotFoundError: There is none, or what is there is not a backup.
    """
    environment = load_environment()
    storage: Storage = environment.storage
    name, folder = name_and_folder(file)
    elsewhere = folder is not None and folder.resolve() != Path(storage.location).resolve()
    if folder is not None and elsewhere:
        storage = FolderStorage(folder, variable="the path given")
    return Found(Catalog(storage, environment.keys).get(name), storage, environment.keys, elsewhere)

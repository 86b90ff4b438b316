"""The storage that the settings ask for."""

from __future__ import annotations

from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster.storage.protocol import Storage


def open_storage(settings: Settings) -> Storage:
    """The storage of BACKUP_STORAGE; nothing is read or made yet.

    Raises:
        SettingsError: Its path is not set.
    """
    return FolderStorage(settings.storage_path)

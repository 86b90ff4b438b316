"""The storage that the settings ask for."""

from __future__ import annotations

from kanbu_backup_dagster.settings import Settings, StorageKind
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster.storage.protocol import Storage
from kanbu_backup_dagster.storage.rclone import RcloneStorage
from kanbu_backup_dagster.storage.remote_control import RemoteControl


def open_storage(settings: Settings) -> Storage:
    """The storage of BACKUP_STORAGE; nothing is read or made yet.

    Raises:
        SettingsError: Its path is not set.
    """
    if settings.storage is StorageKind.LOCAL:
        return FolderStorage(settings.storage_path)
    control = None
    if (address := settings.secret("rclone_rc_addr")) is not None:
        control = RemoteControl(address, user=settings.rclone_rc_user, password=settings.secret("rclone_rc_password"))
    return RcloneStorage(settings.storage_path, control=control, patience=settings.rclone_timeout_seconds)

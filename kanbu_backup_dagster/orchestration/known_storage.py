"""Which storages Dagster's history knows, so that an empty folder or another disk in place of one is refused."""

from __future__ import annotations

from dagster import DagsterInstance

from kanbu_backup_dagster.storage.protocol import Storage


def prepare_storage(instance: DagsterInstance, storage: Storage, *, needed_bytes: int) -> list[str]:
    """Check the storage, remember its mark, and remove what killed runs left in it.

    Returns:
        The names of the leftovers removed.

    Raises:
        StorageError: It cannot be written, has too little room, or is not the one it was.
    """
    key = _key(storage)
    known = instance.run_storage.get_cursor_values({key}).get(key)
    mark = storage.prepare(known_mark=known, needed_bytes=needed_bytes)
    if mark != known:
        instance.run_storage.set_cursor_values({key: mark})
    return storage.remove_leftovers()


def accept_storage(instance: DagsterInstance, storage: Storage) -> str:
    """Take what is there now for the storage, whatever was there before, and remember its mark.

    Returns:
        The mark; a new one where there was none.

    Raises:
        StorageError: It cannot be written.
    """
    mark = storage.prepare()
    instance.run_storage.set_cursor_values({_key(storage): mark})
    return mark


def _key(storage: Storage) -> str:
    return f"kanbu/storage-mark:{storage.location}"

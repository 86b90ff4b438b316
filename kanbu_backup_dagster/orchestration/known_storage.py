"""Which storages Dagster's history knows, so that an empty folder in place of one is refused rather than filled."""

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
    memory, key = instance.run_storage, f"kanbu/storage-mark:{storage.location}"
    known = memory.get_cursor_values({key}).get(key)
    mark = storage.prepare(known_mark=known, needed_bytes=needed_bytes)
    if mark != known:
        memory.set_cursor_values({key: mark})
    return storage.remove_leftovers()

"""The jobs, by the names the UI, `dagster job` and GraphQL know them by."""

from __future__ import annotations

from dagster import job

from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.orchestration import backup_ops, tags


@job(
    description="Backs the database up: one stream from pg_dump into the storage, verified, then retention.",
    tags={tags.TYPE: BackupType.DATABASE.value, tags.TARGET: BackupType.DATABASE.value},
)
def database_backup() -> None:
    recipe = backup_ops.encrypt(backup_ops.checksum(backup_ops.compress(backup_ops.dump())))
    backup_ops.prune(backup_ops.verify(backup_ops.store(recipe)))


JOBS = [database_backup]

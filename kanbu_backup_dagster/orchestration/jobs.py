"""The jobs, by the names the UI, `dagster job` and GraphQL know them by."""

from __future__ import annotations

from dagster import in_process_executor, job

from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.orchestration import (
    backup_ops,
    catalog_sync,
    drill_ops,
    job_names,
    prune_ops,
    restore_ops,
    restore_source_ops,
    rotate_ops,
    tags,
    verify_ops,
)
from kanbu_backup_dagster.orchestration.webhook_test import test_webhook


@job(
    name=job_names.DATABASE_BACKUP,
    description="Backs the database up: one stream from pg_dump into the storage, verified, then retention.",
    tags={tags.TYPE: BackupType.DATABASE.value, tags.TARGET: BackupType.DATABASE.value},
)
def database_backup() -> None:
    recipe = backup_ops.encrypt(backup_ops.checksum(backup_ops.compress(backup_ops.dump())))
    prune_ops.prune(backup_ops.verify(backup_ops.store(recipe)))


@job(
    name=job_names.SOURCE_BACKUP,
    description="Backs the source tree up: one stream from the folder into the storage, verified, then retention.",
    tags={tags.TYPE: BackupType.SOURCE.value, tags.TARGET: BackupType.SOURCE.value},
)
def source_backup() -> None:
    recipe = backup_ops.encrypt(backup_ops.checksum(backup_ops.compress(backup_ops.archive())))
    prune_ops.prune(backup_ops.verify(backup_ops.store(recipe)))


@job(
    name=job_names.RESTORE_DATABASE,
    description="Replaces the database by a backup of it, once both confirmations are given: loaded and checked aside, "
    "then swapped in. What was replaced is backed up first, and kept.",
    tags={tags.TYPE: BackupType.DATABASE.value, tags.TARGET: BackupType.DATABASE.value},
    # One process holds the target's lock for all ops, so this is not left to the definitions' choice.
    executor_def=in_process_executor,
)
def restore_database() -> None:
    plan, save, nothing_to_save = restore_ops.validate()
    recipe = backup_ops.encrypt(backup_ops.checksum(backup_ops.compress(backup_ops.dump(save))))
    saved = [backup_ops.verify(backup_ops.store(recipe)), nothing_to_save]
    loading = restore_ops.load(plan, saved)
    checking = restore_ops.check(plan, loading)
    swapping = restore_ops.swap(plan, saved, checking)
    restore_ops.report(plan, saved, loading, checking, swapping)


@job(
    name=job_names.RESTORE_DRILL,
    description="Restores the newest backup aside, on a server of its own or the configured one, and compares it with "
    "its manifest: the proof that it can be restored.",
    tags={tags.TYPE: BackupType.DATABASE.value},
    executor_def=in_process_executor,
)
def restore_drill() -> None:
    drill_ops.drill(drill_ops.choose())


@job(
    name=job_names.RESTORE_SOURCE,
    description="Extracts a source backup into an empty or new folder: all of it, or nothing.",
    tags={tags.TYPE: BackupType.SOURCE.value},
    executor_def=in_process_executor,
)
def restore_source() -> None:
    restore_source_ops.extract(restore_source_ops.validate_source())


@job(name=job_names.VERIFY_BACKUP, description="Verifies one backup file.")
def verify_backup() -> None:
    verify_ops.verify_one()


@job(name=job_names.VERIFY_PENDING_BACKUPS, description="Verifies every backup that waits for it, deeply.")
def verify_pending_backups() -> None:
    verify_ops.verify_many()


@job(
    name=job_names.ROTATE_KEYS,
    description="Puts backups that need a former key under the current one, a file at a time: what is killed half-way "
    "can be read, and goes on when run again. `dry_run` only tells.",
    tags={tags.TARGET: "keys"},
    executor_def=in_process_executor,
)
def rotate_keys() -> None:
    rotate_ops.rotate()


@job(name=job_names.PRUNE_BACKUPS, description="Deletes what the retention policies let go, or shows what would go.")
def prune_backups() -> None:
    prune_ops.prune_all()


@job(name=job_names.SYNC_CATALOG, description="Makes Dagster know every backup in storage, from the manifests alone.")
def sync_catalog() -> None:
    catalog_sync.sync()


JOBS = [
    database_backup,
    source_backup,
    restore_database,
    restore_drill,
    restore_source,
    rotate_keys,
    test_webhook,
    verify_backup,
    verify_pending_backups,
    prune_backups,
    sync_catalog,
]

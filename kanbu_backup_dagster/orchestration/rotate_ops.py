"""The op of `rotate_keys`: each backup that needs a former key, put under the current one.

What belongs here: the order, the lock and Dagster's record. What does not: how a file is rotated (`backup.rotation`).
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

import time

from dagster import (
    AssetObservation,
    Config,
    MetadataValue,
    OpExecutionContext,
    TableColumn,
    TableRecord,
    TableSchema,
    op,
)
from pydantic import Field

from kanbu_backup_dagster.backup.environment import Environment
from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.backup.rotation import Action, Planned, Rotated, plan, require_current
from kanbu_backup_dagster.backup.rotation import rotate as rotate_file
from kanbu_backup_dagster.errors import BackupNotFoundError, CorruptBackupError, EncryptionKeyError
from kanbu_backup_dagster.orchestration.assets import state_observation
from kanbu_backup_dagster.orchestration.failures import explained
from kanbu_backup_dagster.orchestration.known_storage import prepare_storage
from kanbu_backup_dagster.orchestration.progress import reporter
from kanbu_backup_dagster.orchestration.register import Register
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.target_lock import Holder, open_locks, storage_name

# A restore that reads files may take as long; whoever runs this again goes on where it ended.
_WAIT_SECONDS = 600
_SCHEMA = TableSchema(
    columns=[
        TableColumn("file", "string"),
        TableColumn("action", "string"),
        TableColumn("key_id", "string", description="The key it needs now."),
        TableColumn("reason", "string"),
    ]
)


class RotateConfig(Config):
    """What a rotation may do."""

    dry_run: bool = Field(False, description="Only tell what would be done.")


@op(description="Re-encrypts what needs a former key, one file at a time; each goes only after the new one is proven.")
def rotate(context: OpExecutionContext, config: RotateConfig, environment: BackupEnvironment) -> None:
    with explained():
        loaded = environment.load()
        current = require_current(loaded.keys, loaded.storage)
        planned = plan(loaded.catalog, loaded.storage, loaded.keys, current)
        todo = [item for item in planned if item.action in (Action.RE_ENCRYPT, Action.RE_SEAL)]
        left = [item for item in planned if item.action is Action.LEAVE]
        context.add_output_metadata(_told(planned, current.key_id, dry_run=config.dry_run))
        for item in left:
            context.log.warning(f"[Rotation] {item.filename} is left as it is: {item.reason}")
        if config.dry_run:
            for item in todo:
                context.log.info(f"[Rotation] {item.filename} would be rotated ({item.action.value})")
            return
        largest = max((item.size for item in todo), default=0)
        for leftover in prepare_storage(context.instance, loaded.storage, needed_bytes=largest):
            context.log.warning(f"[Rotation] Removed what a killed run left: {leftover}")
        failed = _rotate_all(context, loaded, todo)
        if failed:
            raise CorruptBackupError(
                f"{len(failed)} of {len(todo)} backups could not be rotated.",
                tried=tuple(failed),
                advice="They are as they were. Keep the former key for as long as you keep them.",
            )


def _rotate_all(context: OpExecutionContext, loaded: Environment, todo: list[Planned]) -> list[str]:
    """Rotate each; what went wrong with which, a line each. A storage that fails ends it."""
    failed = []
    # Each is read, and what was made of it is read back.
    total, done, begun = 2 * sum(item.size for item in todo), 0, time.monotonic()
    report = reporter(context, "re-encrypting", of="Rotation")

    def seen(count: int) -> None:
        report(Progress(done + count, total, time.monotonic() - begun))

    locks, name = open_locks(), storage_name(loaded.storage)
    for item in todo:
        try:
            # Given back after each file, so that a restore need not wait for all of them.
            holder = Holder.now(context.job_name, context.run_id)
            with locks.hold(name, holder, exclusive=True, wait_seconds=_WAIT_SECONDS):
                rotated = rotate_file(item.filename, loaded.catalog, loaded.storage, loaded.keys, on_bytes=seen)
        except BackupNotFoundError:
            context.log.info(f"[Rotation] {item.filename} was deleted meanwhile")
        except (CorruptBackupError, EncryptionKeyError) as error:
            context.log.error(f"[Rotation] {item.filename}: {error.message}")
            failed.append(f"{item.filename}: {error.message}")
        else:
            if rotated is not None:
                context.log.info(f"[Rotation] {item.filename}: {rotated.old_key_id} -> {rotated.new_key_id}")
                _record(context, loaded, rotated)
        done += 2 * item.size
    return failed


def _record(context: OpExecutionContext, loaded: Environment, rotated: Rotated) -> None:
    """An observation of the file's partition. Its content is the same, and so is its data version."""
    backup = loaded.catalog.get(rotated.filename)
    register = Register.of_run(context)
    if not register.knows(backup):
        register.add(backup, loaded.storage.path(backup.filename))
    state, manifest = state_observation(backup), backup.manifest
    metadata = {
        **state.metadata,
        "old_key_id": MetadataValue.text(rotated.old_key_id or ""),
        "new_key_id": MetadataValue.text(rotated.new_key_id),
        "action": MetadataValue.text(rotated.action.value),
    }
    if manifest is not None:
        metadata["stored_sha256"] = MetadataValue.text(manifest.stored_sha256)
    context.log_event(
        AssetObservation(
            asset_key=state.asset_key,
            partition=rotated.filename,
            description=f"Rotated to key {rotated.new_key_id}",
            metadata=metadata,
            tags={"dagster/data_version": manifest.sha256} if manifest is not None else {},
        )
    )


def _told(planned: list[Planned], current: str, *, dry_run: bool) -> dict[str, MetadataValue]:
    counts = {action: sum(item.action is action for item in planned) for action in Action}
    return {
        "dry_run": MetadataValue.bool(dry_run),
        "current_key_id": MetadataValue.text(current),
        "to_re_encrypt": MetadataValue.int(counts[Action.RE_ENCRYPT]),
        "to_re_seal": MetadataValue.int(counts[Action.RE_SEAL]),
        "left": MetadataValue.int(counts[Action.LEAVE]),
        "files": MetadataValue.table(
            records=[
                TableRecord(
                    {
                        "file": item.filename,
                        "action": item.action.value,
                        "key_id": item.key_id or "",
                        "reason": item.reason,
                    }
                )
                for item in planned
                if item.action is not Action.NOTHING
            ],
            schema=_SCHEMA,
        ),
    }

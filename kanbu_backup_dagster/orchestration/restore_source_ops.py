"""The ops of extracting a source backup into a folder: `validate_source` and `extract`.

What belongs here: the ops and what Dagster is told. What does not: extraction (`restore.source_tree`).
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster import (
    AssetKey,
    AssetMaterialization,
    AssetSpec,
    Config,
    MetadataValue,
    OpExecutionContext,
    ResourceParam,
    op,
)
from pydantic import Field

from kanbu_backup_dagster.backup.environment import Environment
from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.backup.reading import content, prove
from kanbu_backup_dagster.backup.stages import decompress
from kanbu_backup_dagster.errors import RestoreError
from kanbu_backup_dagster.orchestration.failures import explained
from kanbu_backup_dagster.orchestration.progress import reporter
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.run_scope import RunScope
from kanbu_backup_dagster.orchestration.tags import FILE
from kanbu_backup_dagster.orchestration.target_lock import STORAGE_PATIENCE_SECONDS, storage_name
from kanbu_backup_dagster.restore.plan import RestoreRequest, find_backup, judge_file
from kanbu_backup_dagster.restore.source_tree import check_target, extract_archive

RESTORED_SOURCE = AssetKey("restored_source")

RESTORE_SOURCE_ASSETS = [
    AssetSpec(
        RESTORED_SOURCE,
        deps=[AssetKey("source_backup")],
        description="A source tree as a restore laid it out: from which file, in which folder.",
        group_name="kanbu",
    )
]


class RestoreSourceConfig(Config):
    """What is extracted, and where to."""

    file: str = Field(description="The source backup's file name, as `kanbu-backup list` shows it.")
    into: str = Field(description="The folder: an empty one, or a new one in a folder that exists.")
    folder: str | None = Field(None, description="A folder to read the file from in place of the storage.")
    force: bool = Field(
        False, description="Accept a file that is not encrypted or has no manifest although a key is set, or failed."
    )


@dataclass(frozen=True)
class Extraction:
    """A file and the folder it is extracted into."""

    request: RestoreRequest
    into: str


def _hold_files(extraction: Extraction, loaded: Environment, run_scope: RunScope) -> None:
    _, storage = find_backup(extraction.request, loaded.storage, loaded.keys)
    run_scope.hold(storage_name(storage), exclusive=False, wait_seconds=STORAGE_PATIENCE_SECONDS)


@op(description="Judges the file, the key and the folder; changes nothing.")
def validate_source(
    context: OpExecutionContext,
    config: RestoreSourceConfig,
    environment: BackupEnvironment,
    run_scope: ResourceParam[RunScope],
) -> Extraction:
    extraction = Extraction(RestoreRequest(config.file, folder=config.folder, force=config.force), config.into)
    context.instance.add_run_tags(context.run_id, {FILE: config.file})
    with explained():
        loaded = environment.load()
        _, _, warnings = judge_file(extraction.request, loaded.storage, loaded.keys, wanted=BackupType.SOURCE)
        if not Path(config.into).is_absolute():
            raise RestoreError(f"{config.into!r} is not an absolute path.", advice="A run has no folder of its own.")
        check_target(Path(config.into))
        _hold_files(extraction, loaded, run_scope)
    for warning in warnings:
        context.log.warning(f"[Restore] {warning}")
    return extraction


@op(description="Verifies all of the file, then extracts it: the whole tree appears in the folder, or nothing does.")
def extract(
    context: OpExecutionContext,
    extraction: Extraction,
    environment: BackupEnvironment,
    run_scope: ResourceParam[RunScope],
) -> None:
    begun = time.monotonic()
    with explained():
        loaded = environment.load()
        _hold_files(extraction, loaded, run_scope)
        backup, storage = find_backup(extraction.request, loaded.storage, loaded.keys)
        manifest = backup.manifest
        verifying, size = reporter(context, "verifying", of="Restore"), backup.file.size
        proven = prove(
            backup,
            storage,
            loaded.keys,
            on_bytes=lambda count: verifying(Progress(count, size, time.monotonic() - begun)),
        )
        with closing(content(backup, storage, loaded.keys, proven=proven)) as chunks:  # type: ignore[type-var]  # a generator
            tree = extract_archive(
                decompress(chunks), Path(extraction.into), manifest.source if manifest is not None else None
            )
    for warning in tree.warnings:
        context.log.warning(f"[Restore] {warning}")
    context.log.info(f"[Restore] {tree.files:,} files in {tree.folder}")
    metadata: dict[str, Any] = {
        "file": MetadataValue.text(backup.filename),
        "path": MetadataValue.path(storage.path(backup.filename)),
        "target": MetadataValue.path(str(tree.folder)),
        "files": MetadataValue.int(tree.files),
        "folders": MetadataValue.int(tree.folders),
        "links": MetadataValue.int(tree.links),
        "bytes": MetadataValue.int(tree.bytes),
        "duration_s": MetadataValue.float(round(time.monotonic() - begun, 3)),
        "remarks": MetadataValue.json(list(tree.warnings)),
        "run": MetadataValue.dagster_run(context.run_id),
    }
    context.log_event(
        AssetMaterialization(
            RESTORED_SOURCE,
            description=f"{tree.folder} extracted from {backup.filename}",
            metadata=metadata,
            tags={"dagster/data_version": manifest.sha256} if manifest else {},
        )
    )

"""Assets: what Dagster shows of the database, the source tree and their backup files.

What belongs here: keys, specs, partitions, and what events about them say. What does not: making backups, and which
events are logged when (`register`).

`kanbu_database` and `kanbu_source` are outside things, observed; each backup file is one dynamic partition of
`database_backup` or `source_backup`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dagster import (
    AssetKey,
    AssetMaterialization,
    AssetObservation,
    AssetSpec,
    DynamicPartitionsDefinition,
    MetadataValue,
    TableColumn,
    TableRecord,
    TableSchema,
)
from dagster._core.definitions.metadata.metadata_value import MetadataValue as AnyMetadata

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.manifest import DatabaseFacts, Manifest, SourceFacts, VerificationStatus
from kanbu_backup_dagster.backup.names import BackupType

KANBU_DATABASE = AssetKey("kanbu_database")
DATABASE_BACKUP = AssetKey("database_backup")

KANBU_SOURCE = AssetKey("kanbu_source")
SOURCE_BACKUP = AssetKey("source_backup")

DATABASE_FILES = DynamicPartitionsDefinition(name="database_backup_files")
SOURCE_FILES = DynamicPartitionsDefinition(name="source_backup_files")

ASSETS = [
    AssetSpec(
        KANBU_DATABASE,
        description="Kanbu's PostgreSQL database, observed at each backup.",
        group_name="kanbu",
        kinds={"postgres"},
    ),
    AssetSpec(
        DATABASE_BACKUP,
        deps=[KANBU_DATABASE],
        description="Backups of the database: a partition per file. Its data version is the content's SHA-256.",
        group_name="kanbu",
        kinds={"gzip"},
        partitions_def=DATABASE_FILES,
    ),
    AssetSpec(
        KANBU_SOURCE,
        description="Kanbu's source tree, observed at each backup.",
        group_name="kanbu",
        kinds={"git"},
    ),
    AssetSpec(
        SOURCE_BACKUP,
        deps=[KANBU_SOURCE],
        description="Backups of the source tree: a partition per file. Its data version is the content's SHA-256.",
        group_name="kanbu",
        kinds={"gzip"},
        partitions_def=SOURCE_FILES,
    ),
]

# Backup type to its asset, and the name of the partition set its files are in.
BACKUP_ASSETS = {
    BackupType.DATABASE: (DATABASE_BACKUP, "database_backup_files"),
    BackupType.SOURCE: (SOURCE_BACKUP, "source_backup_files"),
}

# The entry of a file's observation that names the state of its manifest then (`Backup.fingerprint`).
FINGERPRINT = "manifest"
# The entry that says why a file that was to be verified could not be judged.
NOT_JUDGED = "not_judged"

_STAGE_SCHEMA = TableSchema(
    columns=[
        TableColumn("stage", "string", description="In the order bytes go through them."),
        TableColumn("bytes_in", "int"),
        TableColumn("bytes_out", "int"),
        TableColumn("busy_seconds", "float", description="Spent in the stage itself."),
    ]
)
_EXCLUDED_SCHEMA = TableSchema(
    columns=[TableColumn("rule", "string"), TableColumn("entries", "int"), TableColumn("bytes", "int")]
)
_ROWS_SCHEMA = TableSchema(columns=[TableColumn("table", "string"), TableColumn("rows", "int")])


def backup_metadata(manifest: Manifest, path: str) -> dict[str, AnyMetadata]:
    """What a backup file's partition tells. Numbers are numbers, so that they plot."""
    duration = manifest.duration_seconds
    metadata: dict[str, AnyMetadata] = {
        "summary": MetadataValue.md(_summary(manifest)),
        "path": MetadataValue.path(path),
        "size_bytes": MetadataValue.int(manifest.stored_bytes),
        "raw_bytes": MetadataValue.int(manifest.raw_bytes),
        "compression_ratio": MetadataValue.float(round(manifest.raw_bytes / max(manifest.compressed_bytes, 1), 3)),
        "duration_s": MetadataValue.float(duration),
        "rate_mb_s": MetadataValue.float(round(manifest.raw_bytes / 1e6 / max(duration, 0.001), 3)),
        "sha256": MetadataValue.text(manifest.sha256),
        "stored_sha256": MetadataValue.text(manifest.stored_sha256),
        "encrypted": MetadataValue.bool(manifest.encrypted),
        "trigger": MetadataValue.text(manifest.trigger.value),
        "stages": MetadataValue.table(
            records=[
                TableRecord(
                    {
                        "stage": stage.name,
                        "bytes_in": stage.bytes_in,
                        "bytes_out": stage.bytes_out,
                        "busy_seconds": stage.busy_seconds,
                    }
                )
                for stage in manifest.stages
            ],
            schema=_STAGE_SCHEMA,
        ),
    }
    if manifest.key_id is not None:
        metadata["key_id"] = MetadataValue.text(manifest.key_id)
    if manifest.database is not None:
        metadata |= _database_metadata(manifest.database)
    if manifest.source is not None:
        metadata |= _source_metadata(manifest.source)
    if manifest.schedule_id is not None:
        metadata["schedule"] = MetadataValue.text(f"{manifest.schedule_id} ({manifest.schedule_name})")
    if manifest.run_id:
        metadata["run"] = MetadataValue.dagster_run(manifest.run_id)
    return metadata


def _database_metadata(facts: DatabaseFacts) -> dict[str, AnyMetadata]:
    return {
        "database": MetadataValue.text(facts.name),
        "server_version": MetadataValue.text(facts.server_version),
        "pg_dump_version": MetadataValue.text(facts.pg_dump_version),
        "mode": MetadataValue.text(facts.mode),
        "tables": MetadataValue.int(len(facts.rows)),
        "rows": MetadataValue.int(sum(facts.rows.values())),
        "rows_per_table": MetadataValue.table(
            records=[TableRecord({"table": table, "rows": rows}) for table, rows in facts.rows.items()],
            schema=_ROWS_SCHEMA,
        ),
    }


def _source_metadata(facts: SourceFacts) -> dict[str, AnyMetadata]:
    metadata: dict[str, AnyMetadata] = {
        "source_path": MetadataValue.path(facts.path),
        **_source_counts(facts),
        "excluded": MetadataValue.table(
            records=[
                TableRecord({"rule": one.rule, "entries": one.count, "bytes": one.bytes}) for one in facts.excluded
            ],
            schema=_EXCLUDED_SCHEMA,
        ),
        "warnings": MetadataValue.json(list(facts.warnings)),
    }
    if facts.git_commit is not None:
        metadata["git_commit"] = MetadataValue.text(facts.git_commit)
    return metadata


def _source_counts(facts: SourceFacts) -> dict[str, AnyMetadata]:
    return {
        "files": MetadataValue.int(facts.files),
        "folders": MetadataValue.int(facts.folders),
        "links": MetadataValue.int(facts.links),
        "files_bytes": MetadataValue.int(facts.bytes),
    }


def _summary(manifest: Manifest) -> str:
    what = manifest.type.value
    if manifest.database is not None:
        facts = manifest.database
        what = (
            f"database `{facts.name}` (PostgreSQL {facts.server_version}), "
            f"{sum(facts.rows.values()):,} rows in {len(facts.rows)} tables"
        )
    elif manifest.source is not None:
        what = f"source tree `{manifest.source.path}`, {manifest.source.files:,} files"
    how = f"AES-256-GCM, key `{manifest.key_id}`" if manifest.encrypted else "**not encrypted**"
    return (
        f"**{manifest.filename}**: {what}; {manifest.raw_bytes / 1e6:,.1f} MB became "
        f"{manifest.stored_bytes / 1e6:,.1f} MB in {manifest.duration_seconds:.1f} s; {how}."
    )


def materialization(backup: Backup, path: str) -> AssetMaterialization:
    """The event that makes a backup file known to Dagster.

    Args:
        path: Where the file is, for people.
    """
    key, _ = BACKUP_ASSETS[backup.type]
    manifest = backup.manifest
    if manifest is not None:
        metadata, tags = backup_metadata(manifest, path), {"dagster/data_version": manifest.sha256}
    else:
        # A file of Kanbu's own past, or one whose manifest cannot be trusted: its name and size are all that is known.
        tags = {}
        metadata = {
            "path": MetadataValue.path(path),
            "size_bytes": MetadataValue.int(backup.file.size),
            "encrypted": MetadataValue.bool(backup.name.encrypted),
        }
    return AssetMaterialization(asset_key=key, partition=backup.filename, metadata=metadata, tags=tags)


def state_observation(backup: Backup, *, not_judged: str = "") -> AssetObservation:
    """What may change about a backup file while it stays the same file: its verdict, whether it is held, drills.

    Args:
        not_judged: Why a verdict could not be reached just now.
    """
    manifest = backup.manifest
    metadata: dict[str, AnyMetadata] = {
        "verification": MetadataValue.text(backup.status.value),
        "held": MetadataValue.bool(manifest is not None and manifest.held),
        FINGERPRINT: MetadataValue.text(backup.fingerprint),
    }
    if manifest is not None:
        verdict = manifest.verification
        metadata["deep"] = MetadataValue.bool(verdict.deep)
        if verdict.at is not None:
            metadata["verified_at"] = MetadataValue.timestamp(verdict.at)
        if manifest.proven_at is not None:
            metadata["proven_at"] = MetadataValue.timestamp(manifest.proven_at)
    if detail := backup.problem or (manifest.verification.detail if manifest is not None else ""):
        metadata["detail"] = MetadataValue.text(detail)
    if not_judged:
        metadata[NOT_JUDGED] = MetadataValue.text(not_judged)
    return AssetObservation(BACKUP_ASSETS[backup.type][0], partition=backup.filename, metadata=metadata)


def counts_observation(backup_type: BackupType, backups: Sequence[Backup]) -> AssetObservation:
    """How many backups of a type there are, by status, so that the numbers plot."""
    counts = Counter(backup.status for backup in backups)
    return AssetObservation(
        BACKUP_ASSETS[backup_type][0],
        metadata={
            "backups": MetadataValue.int(len(backups)),
            **{status.value: MetadataValue.int(counts[status]) for status in VerificationStatus},
            "stored_bytes": MetadataValue.int(sum(backup.file.size for backup in backups)),
        },
    )


def database_observation(facts: DatabaseFacts) -> AssetObservation:
    """What the database was when it was dumped, so that its history plots."""
    return AssetObservation(
        asset_key=KANBU_DATABASE,
        metadata={
            "size_bytes": MetadataValue.int(facts.size_bytes),
            "tables": MetadataValue.int(len(facts.rows)),
            "rows": MetadataValue.int(sum(facts.rows.values())),
            "server_version": MetadataValue.text(facts.server_version),
            "database": MetadataValue.text(facts.name),
        },
    )


def source_observation(facts: SourceFacts) -> AssetObservation:
    """What the source tree was when it was archived, so that its history plots."""
    metadata = _source_counts(facts)
    if facts.git_commit is not None:
        metadata["git_commit"] = MetadataValue.text(facts.git_commit)
    return AssetObservation(asset_key=KANBU_SOURCE, metadata=metadata)

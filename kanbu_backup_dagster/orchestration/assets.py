"""Assets: what Dagster shows of databases, source trees and their backup files.

What belongs here: keys, specs, partitions, and the events that make a backup file known. What does not: making backups.

`kanbu_database` is an outside thing, observed; each backup file is one dynamic partition of `database_backup`.
"""

from __future__ import annotations

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

from kanbu_backup_dagster.backup.manifest import DatabaseFacts, Manifest
from kanbu_backup_dagster.backup.names import BackupType

KANBU_DATABASE = AssetKey("kanbu_database")
DATABASE_BACKUP = AssetKey("database_backup")

DATABASE_FILES = DynamicPartitionsDefinition(name="database_backup_files")

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
]

# Backup type to its asset, and the name of the partition set its files are in.
BACKUP_ASSETS = {BackupType.DATABASE: (DATABASE_BACKUP, "database_backup_files")}

_STAGE_SCHEMA = TableSchema(
    columns=[
        TableColumn("stage", "string", description="In the order bytes go through them."),
        TableColumn("bytes_in", "int"),
        TableColumn("bytes_out", "int"),
        TableColumn("busy_seconds", "float", description="Spent in the stage itself."),
    ]
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
        "verification": MetadataValue.text(manifest.verification.status.value),
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


def _summary(manifest: Manifest) -> str:
    what = (
        f"database `{manifest.database.name}` (PostgreSQL {manifest.database.server_version}), "
        f"{sum(manifest.database.rows.values()):,} rows in {len(manifest.database.rows)} tables"
        if manifest.database
        else f"{manifest.type.value}"
    )
    how = f"AES-256-GCM, key `{manifest.key_id}`" if manifest.encrypted else "**not encrypted**"
    return (
        f"**{manifest.filename}**: {what}; {manifest.raw_bytes / 1e6:,.1f} MB became "
        f"{manifest.stored_bytes / 1e6:,.1f} MB in {manifest.duration_seconds:.1f} s; {how}."
    )


def materialization(manifest: Manifest, path: str) -> AssetMaterialization:
    """The event that makes a backup file known to Dagster."""
    key, _ = BACKUP_ASSETS[manifest.type]
    return AssetMaterialization(
        asset_key=key,
        partition=manifest.filename,
        metadata=backup_metadata(manifest, path),
        tags={"dagster/data_version": manifest.sha256},
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

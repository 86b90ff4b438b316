"""Dagster's record of the backup files: written here, whoever has news of one.

What belongs here: which events say that a file is there, what it is worth, and that it is gone. What does not: what the
events hold (`assets`), and the files themselves (`backup.catalog`).

The order matters: a materialization takes a file's verdict away, so it comes first; an evaluation names the
materialization it is about, or Dagster counts it for no partition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dagster import (
    AssetCheckEvaluation,
    AssetCheckSeverity,
    AssetMaterialization,
    AssetObservation,
    AssetRecordsFilter,
    DagsterInstance,
    MetadataValue,
    OpExecutionContext,
)
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,
)
from dagster._core.definitions.metadata.metadata_value import MetadataValue as AnyMetadata

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.manifest import Verification, VerificationStatus
from kanbu_backup_dagster.backup.names import BackupType, parse_name
from kanbu_backup_dagster.orchestration.assets import BACKUP_ASSETS, materialization, state_observation

CHECK = "verified"
JUDGED = (VerificationStatus.VERIFIED, VerificationStatus.FAILED)

AssetEvent = AssetMaterialization | AssetObservation | AssetCheckEvaluation


class Register:
    """Dagster's record of backup files.

    Args:
        instance: The instance that keeps it.
        log: Takes each event: a run's `log_event`, or outside of runs the instance's `report_runless_asset_event`.
    """

    def __init__(self, instance: DagsterInstance, log: Callable[[AssetEvent], None]) -> None:
        self._instance = instance
        self._log = log

    @classmethod
    def of_run(cls, context: OpExecutionContext) -> Register:
        """The register whose events are the run's."""
        # An evaluation is accepted too, which the annotation of `log_event` does not say.
        return cls(context.instance, context.log_event)  # type: ignore[arg-type]

    @classmethod
    def without_run(cls, instance: DagsterInstance) -> Register:
        """The register for a command that is no run."""
        return cls(instance, instance.report_runless_asset_event)

    def add(self, backup: Backup, path: str) -> None:
        """Make a file known, or known anew: any verdict Dagster had of it is taken away."""
        _, partitions = BACKUP_ASSETS[backup.type]
        self._instance.add_dynamic_partitions(partitions, [backup.filename])
        self._log(materialization(backup, path))

    def knows(self, backup: Backup) -> bool:
        """Whether the file is one of the asset's partitions."""
        return self._instance.has_dynamic_partition(BACKUP_ASSETS[backup.type][1], backup.filename)

    def observe(self, backup: Backup, *, not_judged: str = "") -> None:
        """Record the state of a file.

        Args:
            not_judged: Why it was to be verified just now and could not be.
        """
        self._log(state_observation(backup, not_judged=not_judged))

    def evaluate(self, backup: Backup, verdict: Verification, *, seconds: float | None = None) -> None:
        """Record a verdict as the outcome of the check `verified`; one that is none (`no_checksum`) is left out."""
        if verdict.status in JUDGED:
            self.decide(
                CHECK,
                backup.filename,
                backup.type,
                passed=verdict.status is VerificationStatus.VERIFIED,
                description=verdict.detail or None,
                metadata=verdict_metadata(verdict, seconds),
            )

    def decide(
        self,
        check: str,
        filename: str,
        backup_type: BackupType,
        *,
        passed: bool,
        metadata: Mapping[str, AnyMetadata],
        description: str | None = None,
    ) -> None:
        """Record the outcome of a check of a file. Of a file that was never made known it would count for nothing, and
        is left out."""
        key, _ = BACKUP_ASSETS[backup_type]
        records = self._instance.fetch_materializations(
            AssetRecordsFilter(key, asset_partitions=[filename]), limit=1
        ).records
        if not records:
            return
        self._log(
            AssetCheckEvaluation(
                asset_key=key,
                check_name=check,
                partition=filename,
                passed=passed,
                severity=AssetCheckSeverity.ERROR,
                description=description,
                metadata=metadata,
                target_materialization_data=AssetCheckEvaluationTargetMaterializationData(
                    storage_id=records[0].storage_id, run_id=records[0].run_id, timestamp=records[0].timestamp
                ),
            )
        )

    def remove(self, filename: str, backup_type: BackupType, metadata: dict[str, AnyMetadata]) -> None:
        """Record that a file is gone, and how. Its events stay under its key, which no other file gets."""
        assert parse_name(filename) is not None
        key, partitions = BACKUP_ASSETS[backup_type]
        self._log(
            AssetObservation(key, partition=filename, metadata={"file": MetadataValue.text(filename), **metadata})
        )
        self._instance.delete_dynamic_partition(partitions, filename)


def verdict_metadata(verdict: Verification, seconds: float | None) -> dict[str, AnyMetadata]:
    """What the check `verified` tells of a verdict."""
    metadata: dict[str, AnyMetadata] = {
        "verification": MetadataValue.text(verdict.status.value),
        "deep": MetadataValue.bool(verdict.deep),
    }
    if seconds is not None:
        metadata["seconds"] = MetadataValue.float(round(seconds, 3))
    if verdict.at is not None:
        metadata["verified_at"] = MetadataValue.timestamp(verdict.at)
    return metadata

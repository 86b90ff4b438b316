"""Verification in runs: of one file, of all that wait for it, and as the asset check `verified`.

What belongs here: the ops and checks, the lock they take, and telling storage and Dagster the verdict. What does not:
what is read and compared (`backup.verification`).
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    Config,
    DynamicPartitionsDefinition,
    Failure,
    MetadataValue,
    OpExecutionContext,
    PreviewWarning,
    asset_check,
    op,
)
from pydantic import Field

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.environment import Environment
from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.backup.manifest import Verification, VerificationStatus
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.backup.verification import verify
from kanbu_backup_dagster.errors import CorruptBackupError, KanbuError
from kanbu_backup_dagster.orchestration.assets import (
    BACKUP_ASSETS,
    DATABASE_FILES,
    SOURCE_FILES,
    counts_observation,
)
from kanbu_backup_dagster.orchestration.failures import ERROR_KIND, explained
from kanbu_backup_dagster.orchestration.progress import reporter
from kanbu_backup_dagster.orchestration.register import CHECK, Register, verdict_metadata
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.target_lock import STORAGE_PATIENCE_SECONDS, Holder, open_locks, storage_name
from kanbu_backup_dagster.storage.protocol import SETTLED

# Checks of one partition are a preview in Dagster 1.13; a user can do nothing about that.
warnings.filterwarnings("ignore", message="Specifying a partitions_def", category=PreviewWarning)


@dataclass(frozen=True)
class Judged:
    """A verdict, and how long it took to reach."""

    verdict: Verification
    seconds: float


def judge(
    context: OpExecutionContext,
    loaded: Environment,
    backup: Backup,
    *,
    deep: bool,
    on_bytes: Callable[[int], None],
) -> Judged:
    """Verify a file, held against deletion meanwhile; record the verdict in its manifest and as its state in Dagster.

    One that may not have arrived where it is kept is not judged: it stays `pending`, with the reason.

    The check `verified` is the caller's to record.

    Raises:
        EncryptionKeyError: Its key is not set; nothing was recorded.
        StorageError, BackupNotFoundError: It cannot be read, or is no longer there.
        BusyError: Files are being deleted for too long.
    """
    register = Register.of_run(context)
    holder = Holder.now(context.job_name, context.run_id)
    with open_locks().hold(
        storage_name(loaded.storage), holder, exclusive=False, wait_seconds=STORAGE_PATIENCE_SECONDS
    ):
        # Its key may have been rotated while the lock was waited for.
        backup = loaded.catalog.get(backup.filename)
        if not register.knows(backup):
            register.add(backup, loaded.storage.path(backup.filename))
        begun = time.monotonic()
        # What is still on its way would be read from this machine's own cache.
        settlement = loaded.storage.settlement(backup.filename) if backup.manifest is not None else SETTLED
        verdict = (
            verify(backup, loaded.storage, loaded.keys, deep=deep, on_bytes=on_bytes)
            if settlement.done
            else Verification(
                status=VerificationStatus.PENDING, detail=f"Not known to have arrived: {settlement.reason}"
            )
        )
        judged = Judged(verdict, time.monotonic() - begun)
        recorded = loaded.catalog.record_verdict(backup, verdict)
        if not recorded and verdict.status is VerificationStatus.FAILED:
            context.log.warning(f"[Verify] {backup.filename}: the verdict cannot be written to its manifest.")
        register.observe(loaded.catalog.get(backup.filename))
    return judged


class VerifyConfig(Config):
    """Which file, and how thoroughly."""

    file: str = Field(description="The backup file's name, as `kanbu-backup list` shows it.")
    deep: bool = Field(False, description="Read the content through too: gzip, the dump's end and rows, the archive.")


@op(description="Reads one backup back, compares it with its checksums, and records the verdict.")
def verify_one(context: OpExecutionContext, config: VerifyConfig, environment: BackupEnvironment) -> None:
    with explained():
        loaded = environment.load()
        backup = loaded.catalog.get(config.file)
        begun, report = time.monotonic(), reporter(context, "verifying", of="Verify")
        judged = judge(
            context,
            loaded,
            backup,
            deep=config.deep,
            on_bytes=lambda count: report(Progress(count, backup.file.size, time.monotonic() - begun)),
        )
        Register.of_run(context).evaluate(backup, judged.verdict, seconds=judged.seconds)
        observe_counts(context, loaded, backup.type)
    tell_verdict(context, backup, judged)


def tell_verdict(context: OpExecutionContext, backup: Backup, judged: Judged) -> None:
    """Log the verdict and put it in the op's output; a failed one fails the step."""
    verdict = judged.verdict
    if verdict.status is VerificationStatus.FAILED:
        raise Failure(
            description=f"{verdict.detail} ({backup.filename})",
            metadata={
                "verification": MetadataValue.text(verdict.status.value),
                ERROR_KIND: CorruptBackupError.__name__,
            },
            allow_retries=False,
        )
    context.add_output_metadata({**verdict_metadata(verdict, judged.seconds)})
    log = context.log.warning if verdict.status is VerificationStatus.PENDING else context.log.info
    log(f"[Verify] {backup.filename}: {verdict.status.value} {verdict.detail}".rstrip())


class VerifyManyConfig(Config):
    """Which files, and how thoroughly."""

    all: bool = Field(False, description="Every backup, not only those that are pending.")
    deep: bool = Field(True, description="Read the content through too: gzip, the dump's end and rows, the archive.")


@op(description="Verifies every backup that is pending; goes on past a bad one, and fails at the end if any failed.")
def verify_many(context: OpExecutionContext, config: VerifyManyConfig, environment: BackupEnvironment) -> None:
    with explained():
        loaded = environment.load()
        backups = [
            backup for backup in loaded.catalog.backups() if config.all or backup.status is VerificationStatus.PENDING
        ]
        bad: list[str] = []
        waiting = 0
        errors: list[KanbuError] = []
        begun, done, report = time.monotonic(), 0, reporter(context, "verifying", of="Verify")
        total = sum(backup.file.size for backup in backups)
        for number, backup in enumerate(backups, 1):
            before = done
            done += backup.file.size
            try:
                judged = judge(
                    context,
                    loaded,
                    backup,
                    deep=config.deep,
                    on_bytes=lambda count, before=before: report(  # type: ignore[misc]
                        Progress(before + count, total, time.monotonic() - begun)
                    ),
                )
            except KanbuError as error:
                context.log.error(f"[Verify] {number} of {len(backups)}, {backup.filename}: {error}")
                errors.append(error)
                bad.append(f"{backup.filename}: {error.message}")
                continue
            Register.of_run(context).evaluate(backup, judged.verdict, seconds=judged.seconds)
            said = f"[Verify] {number} of {len(backups)}, {backup.filename}: {judged.verdict.status.value}"
            if judged.verdict.status is VerificationStatus.FAILED:
                context.log.error(f"{said}: {judged.verdict.detail}")
                bad.append(f"{backup.filename}: {judged.verdict.detail}")
            elif judged.verdict.status is VerificationStatus.PENDING:
                context.log.warning(f"{said}: {judged.verdict.detail}")
                waiting += 1
            else:
                context.log.info(said)
        for backup_type in BackupType:
            observe_counts(context, loaded, backup_type)
        context.add_output_metadata(
            {"verified": len(backups) - len(bad) - waiting, "failed": len(bad), "waiting": waiting, "bytes": total}
        )
        if bad:
            # Where nothing is damaged, but a key is missing or the storage is away, the run says that.
            kind = type(errors[0]) if len(errors) == len(bad) else KanbuError
            raise kind(f"{len(bad)} of {len(backups)} backups are not verified.", tried=tuple(bad))


def observe_counts(context: OpExecutionContext, loaded: Environment, backup_type: BackupType) -> None:
    """Tell Dagster how many backups of a type there are, by status."""
    context.log_event(counts_observation(backup_type, loaded.catalog.backups(backup_type)))


class CheckConfig(Config):
    """How thoroughly."""

    deep: bool = Field(False, description="Read the content through too: gzip, the dump's end and rows, the archive.")


def _verified_check(backup_type: BackupType, files: DynamicPartitionsDefinition) -> AssetChecksDefinition:
    @asset_check(
        asset=BACKUP_ASSETS[backup_type][0],
        name=CHECK,
        partitions_def=files,
        description="The file in storage is what was written. Executing it reads the file back.",
    )
    def verified(
        context: AssetCheckExecutionContext, config: CheckConfig, environment: BackupEnvironment
    ) -> AssetCheckResult:
        run = context.op_execution_context
        with explained():
            loaded = environment.load()
            backup = loaded.catalog.get(context.partition_key)
            begun, report = time.monotonic(), reporter(run, "verifying", of="Verify")
            judged = judge(
                run,
                loaded,
                backup,
                deep=config.deep,
                on_bytes=lambda count: report(Progress(count, backup.file.size, time.monotonic() - begun)),
            )
        verdict = judged.verdict
        # A file without a checksum is not known to be damaged.
        return AssetCheckResult(
            passed=verdict.status is VerificationStatus.VERIFIED,
            severity=(
                AssetCheckSeverity.ERROR if verdict.status is VerificationStatus.FAILED else AssetCheckSeverity.WARN
            ),
            description=verdict.detail or None,
            metadata=verdict_metadata(verdict, judged.seconds),
        )

    return verified


CHECKS = [
    _verified_check(BackupType.DATABASE, DATABASE_FILES),
    _verified_check(BackupType.SOURCE, SOURCE_FILES),
]

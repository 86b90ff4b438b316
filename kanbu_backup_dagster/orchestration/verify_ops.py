"""Verification in runs: of one file, of all that wait for it, and as the asset check `verified`.

What belongs here: the ops and checks, the lock they take, and telling storage and Dagster the verdict. What does not:
what is read and compared (`backup.verification`).
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

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
from kanbu_backup_dagster.errors import BackupNotFoundError, CorruptBackupError, KanbuError
from kanbu_backup_dagster.orchestration.assets import (
    BACKUP_ASSETS,
    DATABASE_FILES,
    NOT_JUDGED,
    SOURCE_FILES,
    counts_observation,
)
from kanbu_backup_dagster.orchestration.failures import ERROR_KIND, explained
from kanbu_backup_dagster.orchestration.progress import reporter
from kanbu_backup_dagster.orchestration.register import CHECK, Register, verdict_metadata
from kanbu_backup_dagster.orchestration.replaced import let_go_of_replaced
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.tags import SETTLED_FOR
from kanbu_backup_dagster.orchestration.target_lock import STORAGE_PATIENCE_SECONDS, Holder, open_locks, storage_name
from kanbu_backup_dagster.storage.protocol import SETTLED

# Checks of one partition are a preview in Dagster 1.13; a user can do nothing about that.
warnings.filterwarnings("ignore", message="Specifying a partitions_def", category=PreviewWarning)


@dataclass(frozen=True)
class Judged:
    """What a file is worth, and how long it took to find out.

    Attributes:
        verdict: The verdict; where none could be reached, what was known before.
        not_judged: Why none could be reached.
    """

    verdict: Verification
    seconds: float
    not_judged: str = ""


def judge(
    context: OpExecutionContext,
    loaded: Environment,
    backup: Backup,
    *,
    deep: bool,
    on_bytes: Callable[[int], None],
) -> Judged:
    """Verify a file, held against deletion meanwhile; record the verdict in its manifest and as its state in Dagster.

    One that may not have arrived where it is kept is not judged: it stays what it was, `pending` with the reason.

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
        not_judged = "" if settlement.done else f"Not known to have arrived: {settlement.reason}"
        verdict = (
            verify(backup, loaded.storage, loaded.keys, deep=deep, on_bytes=on_bytes)
            if settlement.done
            else Verification(status=VerificationStatus.PENDING, detail=not_judged)
        )
        seconds = time.monotonic() - begun
        recorded = loaded.catalog.record_verdict(backup, verdict)
        if not recorded and verdict.status is VerificationStatus.FAILED:
            context.log.warning(f"[Verify] {backup.filename}: the verdict cannot be written to its manifest.")
        known = loaded.catalog.get(backup.filename)
        register.observe(known, not_judged=not_judged)
    return Judged(known.verification if not_judged else verdict, seconds, not_judged)


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
        observe_counts(context, loaded, backup.type)
    tell_verdict(context, backup, judged)
    # The backup's own run ended before it had arrived, and could not do this.
    if SETTLED_FOR in context.run.tags and judged.verdict.status is VerificationStatus.VERIFIED:
        let_go_of_replaced(context, loaded.settings, backup)


def tell_verdict(context: OpExecutionContext, backup: Backup, judged: Judged) -> None:
    """Record the check `verified`, log the verdict and put it in the op's output; a failed one fails the step.

    What could not be judged is a warning, and the check stays what it was.
    """
    verdict = judged.verdict
    if judged.not_judged:
        context.add_output_metadata({**verdict_metadata(verdict, None), NOT_JUDGED: judged.not_judged})
        context.log.warning(f"[Verify] {_not_judged(backup, judged)}")
        return
    Register.of_run(context).evaluate(backup, verdict, seconds=judged.seconds)
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
    context.log.info(f"[Verify] {backup.filename}: {verdict.status.value} {verdict.detail}".rstrip())


def _not_judged(backup: Backup, judged: Judged) -> str:
    return f"{backup.filename} was not judged, and stays {judged.verdict.status.value}: {judged.not_judged}"


class VerifyManyConfig(Config):
    """Which files, and how thoroughly."""

    all: bool = Field(False, description="Every backup, not only those that are pending.")
    deep: bool = Field(True, description="Read the content through too: gzip, the dump's end and rows, the archive.")


@op(description="Verifies every backup that is pending; goes on past a bad file, and fails at the end if any failed.")
def verify_many(context: OpExecutionContext, config: VerifyManyConfig, environment: BackupEnvironment) -> None:
    with explained():
        loaded = environment.load()
        backups = [
            backup for backup in loaded.catalog.backups() if config.all or backup.status is VerificationStatus.PENDING
        ]
        found = _verify_each(context, loaded, backups, deep=config.deep)
        for backup_type in BackupType:
            observe_counts(context, loaded, backup_type)
        context.add_output_metadata(
            {
                "verified": found.good,
                "failed": len(found.bad),
                "waiting": found.waiting,
                "bytes": sum(backup.file.size for backup in backups),
            }
        )
        if found.bad:
            # Where nothing is damaged, but a key is missing or the storage is away, the run says that.
            kind = type(found.errors[0]) if len(found.errors) == len(found.bad) else KanbuError
            raise kind(f"{len(found.bad)} of {len(backups)} backups are not verified.", tried=tuple(found.bad))


@dataclass
class _Found:
    """What verifying many came to.

    Attributes:
        good: How many were not found bad.
        waiting: How many could not be judged yet.
        bad: The others, a line each: damaged ones, and those that could not be read.
        errors: Why those could not.
    """

    good: int = 0
    waiting: int = 0
    bad: list[str] = field(default_factory=list)
    errors: list[KanbuError] = field(default_factory=list)


def _verify_each(context: OpExecutionContext, loaded: Environment, backups: list[Backup], *, deep: bool) -> _Found:
    found = _Found()
    total, done, begun = sum(backup.file.size for backup in backups), 0, time.monotonic()
    report = reporter(context, "verifying", of="Verify")

    def seen(count: int) -> None:
        report(Progress(done + count, total, time.monotonic() - begun))

    for number, backup in enumerate(backups, 1):
        place = f"[Verify] {number} of {len(backups)}"
        try:
            judged = judge(context, loaded, backup, deep=deep, on_bytes=seen)
        except BackupNotFoundError:
            context.log.info(f"{place}, {backup.filename} was deleted meanwhile")
        except KanbuError as error:
            context.log.error(f"{place}, {backup.filename}: {error}")
            found.errors.append(error)
            found.bad.append(f"{backup.filename}: {error.message}")
        else:
            _take(context, backup, judged, found, place)
        done += backup.file.size
    return found


def _take(context: OpExecutionContext, backup: Backup, judged: Judged, found: _Found, place: str) -> None:
    """Record what one of many is worth, and count it."""
    verdict = judged.verdict
    if judged.not_judged:
        context.log.warning(f"{place}, {_not_judged(backup, judged)}")
        found.waiting += 1
        return
    Register.of_run(context).evaluate(backup, verdict, seconds=judged.seconds)
    said = f"{place}, {backup.filename}: {verdict.status.value}"
    if verdict.status is VerificationStatus.FAILED:
        context.log.error(f"{said}: {verdict.detail}")
        found.bad.append(f"{backup.filename}: {verdict.detail}")
    else:
        context.log.info(said)
        found.good += 1


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
        passed = verdict.status is VerificationStatus.VERIFIED
        if judged.not_judged:
            # Dagster wants an outcome, which takes the last one's place: what was known is said again.
            return AssetCheckResult(
                passed=passed,
                severity=AssetCheckSeverity.WARN,
                description=_not_judged(backup, judged),
                metadata={**verdict_metadata(verdict, None), NOT_JUDGED: MetadataValue.text(judged.not_judged)},
            )
        # A file without a checksum is not known to be damaged.
        return AssetCheckResult(
            passed=passed,
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

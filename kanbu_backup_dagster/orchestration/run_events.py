"""What an ended run has to tell: its events, out of what Dagster's event log says of it.

What belongs here: from a run to events. What does not: which runs, who hears of them (`alerts`).

Every end counts: success, failure, cancellation, a worker that died. What an op has to say beyond that it puts into the
log by `telling`; events that a run told itself are not made again here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dagster import (
    AssetCheckSeverity,
    AssetKey,
    AssetMaterialization,
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    IntMetadataValue,
)
from dagster._core.definitions.metadata.metadata_value import MetadataValue as AnyMetadata
from dagster._core.errors import DagsterExecutionInterruptedError

from kanbu_backup_dagster.backup.names import BackupType, parse_name
from kanbu_backup_dagster.notifications.events import (
    BackupCompleted,
    BackupFailed,
    BackupPart,
    DrillCompleted,
    DrillFailed,
    DrillPart,
    Event,
    PruneHeld,
    PrunePart,
    RestoreCompleted,
    RestoreFailed,
    RestorePart,
    ScheduleRef,
    VerificationFailed,
    VerificationPart,
)
from kanbu_backup_dagster.orchestration import job_names, tags
from kanbu_backup_dagster.orchestration.assets import BACKUP_ASSETS
from kanbu_backup_dagster.orchestration.drill_ops import RESTORABLE
from kanbu_backup_dagster.orchestration.failures import ERROR_KIND
from kanbu_backup_dagster.orchestration.restore_ops import NONE_REPLACED
from kanbu_backup_dagster.orchestration.telling import events_in

BACKUP_JOBS = {job_names.DATABASE_BACKUP: BackupType.DATABASE, job_names.SOURCE_BACKUP: BackupType.SOURCE}
_RESTORE_JOBS = {job_names.RESTORE_DATABASE: BackupType.DATABASE, job_names.RESTORE_SOURCE: BackupType.SOURCE}
_STORE = "store"
_VERIFY_JOBS = (job_names.VERIFY_BACKUP, job_names.VERIFY_PENDING_BACKUPS)
_INTERRUPTED = DagsterExecutionInterruptedError.__name__
_PASSING = {"SourceError", "StorageError", "BusyError", _INTERRUPTED}
_READ = {
    DagsterEventType.ASSET_MATERIALIZATION,
    DagsterEventType.ASSET_OBSERVATION,
    DagsterEventType.ASSET_CHECK_EVALUATION,
    DagsterEventType.STEP_OUTPUT,
    DagsterEventType.STEP_FAILURE,
}


@dataclass
class EndedRun:
    """A run that has ended, and what its log says.

    Attributes:
        run: The run.
        end: RUN_SUCCESS, RUN_FAILURE or RUN_CANCELED.
        at: When it ended.
        duration_ms: None when it never started.
        stored: The backup file it made, with its metadata.
        reports: The metadata of the restores and drills that it recorded.
        failed_step: The first step that failed, why, and the kind of error, where known.
        told: What its ops asked to be told.
        bad_checks: What checks of backup files found, by the check's name and the file's.
    """

    run: DagsterRun
    end: DagsterEventType
    at: datetime
    duration_ms: int | None
    stored: AssetMaterialization | None = None
    reports: list[Mapping[str, AnyMetadata]] = field(default_factory=list)
    failed_step: str | None = None
    error: str | None = None
    error_kind: str | None = None
    verdict: str | None = None
    told: list[Event] = field(default_factory=list)
    bad_checks: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        """Whether all steps did."""
        return self.end is DagsterEventType.RUN_SUCCESS

    @property
    def schedule(self) -> ScheduleRef | None:
        """The schedule it ran for."""
        schedule = tags.schedule_of(self.run.tags)
        return ScheduleRef(id=schedule[0], name=schedule[1]) if schedule is not None else None

    @property
    def may_pass(self) -> bool:
        """Whether it failed for a reason that may be gone soon: the database or the storage was away, or the worker was
        ended, though by no user."""
        if self.end is not DagsterEventType.RUN_FAILURE or self.stored is not None:
            return False
        return self.error_kind in _PASSING if self.failed_step else True

    @property
    def made_a_backup(self) -> bool:
        """Whether a backup was stored and nothing but the clean-up after it failed."""
        return self.stored is not None and (self.succeeded or self.failed_step == "prune")

    @property
    def settles_later(self) -> bool:
        """Whether its backup was not known to have arrived where it is kept when the run ended."""
        return tags.SETTLING in self.run.tags

    @property
    def reason(self) -> str:
        """Why it did not succeed, for people."""
        if self.end is DagsterEventType.RUN_CANCELED:
            return "The run was canceled."
        if self.error:
            return self.error
        if self.failed_step:
            return f"The step {self.failed_step} failed; the run's page in the UI tells why ({self.run.run_id})."
        return f"The run ended without a word, as when its process is killed ({self.run.run_id})."


def read_run(instance: DagsterInstance, run_id: str, end: DagsterEventType, at: datetime) -> EndedRun | None:
    """The run and what its log says; None when it was deleted."""
    record = instance.get_run_record_by_id(run_id)
    if record is None:
        return None
    duration = round((at.timestamp() - record.start_time) * 1000) if record.start_time is not None else None
    ended = EndedRun(record.dagster_run, end, at, max(duration, 0) if duration is not None else None)
    for entry in instance.all_logs(run_id, of_type=_READ):
        if entry.dagster_event is not None:
            _take(ended, entry.dagster_event)
    return ended


def _take(ended: EndedRun, event: DagsterEvent) -> None:
    metadata: Mapping[str, AnyMetadata] = {}
    kind = event.event_type
    if kind is DagsterEventType.ASSET_MATERIALIZATION:
        materialization = event.step_materialization_data.materialization
        metadata = materialization.metadata
        if _type_of(materialization.asset_key) is None:
            ended.reports.append(metadata)
        elif event.step_key == _STORE and materialization.partition is not None:
            # Other steps make known what they find in storage; this run made only what `store` stored.
            ended.stored = materialization
    elif kind is DagsterEventType.ASSET_OBSERVATION:
        metadata = event.asset_observation_data.asset_observation.metadata
    elif kind is DagsterEventType.ASSET_CHECK_EVALUATION:
        check = event.asset_check_evaluation_data
        metadata = check.metadata
        # A warning says that a file cannot be judged, not that it is bad.
        bad = not check.passed and check.severity is AssetCheckSeverity.ERROR
        if bad and _type_of(check.asset_key) is not None and check.partition:
            error = check.description or _text(metadata.get("error")) or f"The check {check.check_name} failed."
            ended.bad_checks[check.check_name, check.partition] = error
    elif kind is DagsterEventType.STEP_OUTPUT:
        metadata = event.step_output_data.metadata
    elif kind is DagsterEventType.STEP_FAILURE:
        said = event.step_failure_data.user_failure_data
        metadata = said.metadata if said is not None else {}
        if ended.failed_step is None:
            ended.failed_step = event.step_key
            ended.verdict = _text(metadata.get("verification"))
            fault = event.step_failure_data.error
            if said is not None:
                ended.error, ended.error_kind = said.description, _text(metadata.get(ERROR_KIND))
            elif fault is not None and fault.cls_name == _INTERRUPTED:
                ended.error, ended.error_kind = "The run was interrupted.", _INTERRUPTED
    ended.told += events_in(metadata)


def _type_of(key: AssetKey) -> BackupType | None:
    return next((kind for kind, entry in BACKUP_ASSETS.items() if entry[0] == key), None)


def _text(value: AnyMetadata | None) -> str | None:
    return None if value is None or value.value is None else str(value.value)


def events_of(ended: EndedRun, *, encrypts: bool | None = None) -> list[Event]:
    """What `ended` has to tell, in the order of its happening.

    Args:
        encrypts: Whether backups are encrypted now, which a failed one would have been.
    """
    events = list(ended.told)
    damaged = {event.verification.filename for event in events if isinstance(event, VerificationFailed)}
    events += [event for event in _verdicts(ended) if event.verification.filename not in damaged]
    known = {event.event for event in events}
    job = ended.run.job_name
    if job in BACKUP_JOBS:
        events += _of_backup(ended, BACKUP_JOBS[job], encrypts)
    elif job in _RESTORE_JOBS and not known & {"restore.completed", "restore.failed"}:
        events.append(_of_restore(ended, _RESTORE_JOBS[job]))
    elif job == job_names.RESTORE_DRILL and not known & {"drill.completed", "drill.failed"}:
        events.append(_of_drill(ended))
    elif job == job_names.PRUNE_BACKUPS and not ended.succeeded and "prune.held" not in known:
        events.append(_held(ended, None))
    elif job in _VERIFY_JOBS and not ended.succeeded and "verification.failed" not in known:
        # No file was found to be bad: the verification itself could not be done.
        named = parse_name(_file(ended) or "")
        part = VerificationPart(type=named.type if named is not None else None)
        events.append(VerificationFailed(**_common(ended), verification=part, error=ended.reason))
    if job != job_names.RESTORE_DRILL:
        events += _failed_drills(ended)
    return events


def _common(ended: EndedRun) -> dict[str, Any]:
    return {"key": ended.run.run_id, "schedule": ended.schedule, "timestamp": ended.at}


def _verdicts(ended: EndedRun) -> Iterator[VerificationFailed]:
    """Each damaged file once, be it told by a check, by the failed step, or by both."""
    damaged = {filename: error for (check, filename), error in ended.bad_checks.items() if check != RESTORABLE}
    if ended.stored is not None and ended.verdict == "failed":
        damaged.setdefault(str(ended.stored.partition), ended.reason)
    for filename, error in damaged.items():
        name = parse_name(filename)
        if name is not None:
            made = backup_part(ended) if ended.stored is not None and ended.stored.partition == filename else None
            part = VerificationPart(
                type=name.type,
                filename=filename,
                file_size=made.file_size if made else None,
                is_encrypted=name.encrypted,
                checksum=made.checksum if made else None,
            )
            common = {**_common(ended), "key": f"{ended.run.run_id}/{filename}"}
            yield VerificationFailed(**common, verification=part, error=error)


def backup_part(ended: EndedRun) -> BackupPart:
    """The backup that `ended` stored.

    Raises:
        ValueError: It stored none.
    """
    if ended.stored is None:
        raise ValueError(f"the run {ended.run.run_id} stored no backup")
    metadata = ended.stored.metadata
    name = parse_name(str(ended.stored.partition))
    kind = _type_of(ended.stored.asset_key)
    assert kind is not None  # what is kept in `stored` has one
    size = _text(metadata.get("size_bytes"))
    return BackupPart(
        type=kind,
        filename=str(ended.stored.partition),
        file_size=int(size) if size else None,
        is_encrypted=name.encrypted if name else None,
        checksum=_text(metadata.get("sha256")),
        duration_ms=ended.duration_ms,
    )


def _of_backup(ended: EndedRun, backup_type: BackupType, encrypts: bool | None) -> Iterator[Event]:
    if ended.made_a_backup:
        yield BackupCompleted(**_common(ended), backup=backup_part(ended))
        if not ended.succeeded:
            yield _held(ended, backup_type)
        return
    part = (
        backup_part(ended)
        if ended.stored is not None
        else BackupPart(type=backup_type, is_encrypted=encrypts, duration_ms=ended.duration_ms)
    )
    yield BackupFailed(**_common(ended), backup=part, error=ended.reason)


def _held(ended: EndedRun, backup_type: BackupType | None) -> PruneHeld:
    return PruneHeld(**_common(ended), prune=PrunePart(type=backup_type, reason=f"Clean-up failed: {ended.reason}"))


def _of_restore(ended: EndedRun, backup_type: BackupType) -> Event:
    report = _report(ended)
    replaced = _text(report.get("replaced_database"))
    part = RestorePart(
        type=backup_type,
        filename=_file(ended),
        target=ended.run.tags.get(tags.DATABASE) or _text(report.get("target")),
        previous=None if replaced == NONE_REPLACED else replaced,
        duration_ms=ended.duration_ms,
    )
    if ended.succeeded:
        return RestoreCompleted(**_common(ended), restore=part)
    return RestoreFailed(**_common(ended), restore=part, error=ended.reason)


def _of_drill(ended: EndedRun) -> Event:
    report = _report(ended) if ended.succeeded else {}
    part = DrillPart(
        type=BackupType.DATABASE,
        filename=_file(ended),
        tables=_count(report.get("tables")),
        rows=_count(report.get("rows")),
        duration_ms=ended.duration_ms,
    )
    if ended.succeeded:
        return DrillCompleted(**_common(ended), drill=part)
    return DrillFailed(**_common(ended), drill=part, error=ended.reason)


def _failed_drills(ended: EndedRun) -> Iterator[DrillFailed]:
    """Drills of single files, started from the file's page in the UI."""
    for (check, filename), error in ended.bad_checks.items():
        if check == RESTORABLE:
            part = DrillPart(type=BackupType.DATABASE, filename=filename, duration_ms=ended.duration_ms)
            yield DrillFailed(**{**_common(ended), "key": f"{ended.run.run_id}/{filename}"}, drill=part, error=error)


def _report(ended: EndedRun) -> Mapping[str, AnyMetadata]:
    """What the run recorded of the file that it was about."""
    named = ended.run.tags.get(tags.FILE)
    about = (report for report in ended.reports if _text(report.get("file")) == named)
    return next(about, ended.reports[-1] if ended.reports else {})


def _count(value: AnyMetadata | None) -> int | None:
    return value.value if isinstance(value, IntMetadataValue) else None


def _file(ended: EndedRun) -> str | None:
    """The backup that the run was about: what the run says, else what its config says."""
    named = ended.run.tags.get(tags.FILE) or _text(_report(ended).get("file"))
    return named or next((text for text in _texts(ended.run.run_config) if parse_name(text) is not None), None)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)

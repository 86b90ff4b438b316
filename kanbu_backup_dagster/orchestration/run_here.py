"""Running a job in this process, as `dagster job execute` does, for the command line.

What belongs here: starting a run and telling how it ended. What does not: any job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dagster import DagsterEvent, DagsterEventType, execute_job
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.events import RunFailureReason
from dagster._core.execution.plan.objects import StepFailureData
from dagster._utils.interrupts import capture_interrupts

from kanbu_backup_dagster import errors
from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.errors import InterruptedRunError, KanbuError
from kanbu_backup_dagster.orchestration import progress
from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.orchestration.failures import ERROR_KIND

_DEFINITIONS = ("kanbu_backup_dagster.definitions", "defs")
_INTERRUPTED = "The run was interrupted."


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        materialized: The asset partitions it made, in order: names of backup files.
        errors: What the failed steps said, for the user; where no step failed, why the run did.
        report: The plain values of the metadata of the last asset that was materialized.
        observed: Asset partitions that were observed, with the plain values of their metadata, in order.
        said: The plain values of the metadata of the steps' outputs.
    """

    run_id: str
    success: bool
    materialized: tuple[str, ...]
    errors: tuple[KanbuError, ...]
    report: Mapping[str, Any] = field(default_factory=dict)
    observed: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> KanbuError:
        """The first error, for a run that did not succeed."""
        return self.errors[0]


def run_job(
    name: str,
    *,
    run_config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    verbose: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Run the job `name` here and wait for its end. SIGINT and SIGTERM end it cleanly.

    Args:
        verbose: Whether Dagster's log is printed to standard error.
        on_progress: Told how far the stream is.
    """
    config = {
        "loggers": {"console": {"config": {"log_level": "INFO" if verbose else "CRITICAL"}}},
        **(run_config or {}),
    }
    token = progress.listener.set(on_progress)
    try:
        with capture_interrupts(), open_instance() as instance:
            job = ReconstructableRepository.for_module(*_DEFINITIONS).get_reconstructable_job(name)
            # Entered as a context it would set the run's resources up once more, to load outputs that nobody asks for.
            result = execute_job(job, instance=instance, run_config=config, tags=dict(tags or {}), raise_on_error=False)
            materialized = tuple(
                str(event.partition)
                for event in result.all_events
                if event.event_type is DagsterEventType.ASSET_MATERIALIZATION and event.partition is not None
            )
            failed = tuple(
                _error(event.step_failure_data)
                for event in result.all_events
                if event.event_type is DagsterEventType.STEP_FAILURE
            )
            if not (result.success or failed):
                failed = (_error_at_the_end(result.all_events[-1]),)
            reports = [
                event.step_materialization_data.materialization.metadata
                for event in result.all_events
                if event.event_type is DagsterEventType.ASSET_MATERIALIZATION
            ]
            report = {name: entry.value for name, entry in reports[-1].items()} if reports else {}
            # What a step logged before it failed is in the log, and not among the result's events.
            observed = tuple(
                (str(event.partition), {name: entry.value for name, entry in seen.metadata.items()})
                for logged in instance.all_logs(result.run_id, of_type={DagsterEventType.ASSET_OBSERVATION})
                for event in [logged.get_dagster_event()]
                if event.partition is not None
                for seen in [event.asset_observation_data.asset_observation]
            )
            said = {
                name: entry.value
                for event in result.all_events
                if event.event_type is DagsterEventType.STEP_OUTPUT
                for name, entry in event.step_output_data.metadata.items()
            }
            return Outcome(result.run_id, result.success, materialized, failed, report, observed, said)
    finally:
        progress.listener.reset(token)


def _error_at_the_end(event: DagsterEvent) -> KanbuError:
    """Why a run ended in which no step failed, by its last event: interrupted between steps, or never got to one."""
    if event.event_type is DagsterEventType.RUN_FAILURE:
        failure = event.job_failure_data
        if failure.error is not None and failure.failure_reason is not RunFailureReason.UNEXPECTED_TERMINATION:
            return KanbuError(failure.error.to_string())
    return InterruptedRunError(_INTERRUPTED)


def _error(failure: StepFailureData) -> KanbuError:
    told = failure.user_failure_data
    if failure.error is not None and failure.error.cls_name == DagsterExecutionInterruptedError.__name__:
        return InterruptedRunError(_INTERRUPTED)
    if told is None or told.description is None:
        return KanbuError(failure.error.to_string() if failure.error else "The step failed.")
    kind = told.metadata.get(ERROR_KIND)
    return getattr(errors, str(kind.value), KanbuError)(told.description) if kind else KanbuError(told.description)

"""Running a job in this process, as `dagster job execute` does, for the command line.

What belongs here: starting a run and telling how it ended. What does not: any job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dagster import DagsterEventType, execute_job
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._utils.interrupts import capture_interrupts

from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.orchestration import progress
from kanbu_backup_dagster.orchestration.dagster_home import open_instance

_DEFINITIONS = ("kanbu_backup_dagster.definitions", "defs")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        outputs: What its ops handed on, by op name.
        errors: What the failed steps said, for the user.
    """

    run_id: str
    success: bool
    outputs: Mapping[str, Any]
    errors: tuple[str, ...]


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
            with execute_job(
                job, instance=instance, run_config=config, tags=dict(tags or {}), raise_on_error=False
            ) as result:
                done = {
                    event.step_key for event in result.all_events if event.event_type is DagsterEventType.STEP_SUCCESS
                }
                outputs = {
                    str(step): result.output_for_node(str(step))
                    for step in done
                    if result.success and result.job_def.graph.node_named(str(step)).definition.output_dict
                }
                errors = tuple(
                    _message(event.step_failure_data)
                    for event in result.all_events
                    if event.event_type is DagsterEventType.STEP_FAILURE
                )
                return Outcome(result.run_id, result.success, outputs, errors)
    finally:
        progress.listener.reset(token)


def _message(failure: Any) -> str:
    described = failure.user_failure_data.description if failure.user_failure_data else None
    return str(described or (failure.error.to_string() if failure.error else "the step failed"))

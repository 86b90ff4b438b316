"""What ops are given: the environment, read when a run needs it.

What belongs here: thin adapters over plain objects. What does not: any work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dagster import ConfigurableResource, InitResourceContext
from typing_extensions import Self

from kanbu_backup_dagster.backup.environment import Environment, load_environment
from kanbu_backup_dagster.orchestration.lost_runs import sign_of_life


class BackupEnvironment(ConfigurableResource[Environment]):
    """Gives ops the environment; has no configuration, so that no secret is ever in run config."""

    @contextmanager
    def yield_for_execution(self, context: InitResourceContext) -> Iterator[Self]:  # type: ignore[override]  # ops get us
        """Called by Dagster around a run: every run of ours has this resource, so every run gives a sign of life."""
        if context.run is None:  # a sensor's or a schedule's evaluation
            yield self
            return
        with sign_of_life(context.run.run_id):
            yield self

    def load(self) -> Environment:
        """Read the environment now."""
        return load_environment()

"""What ops are given: the environment, read when a run needs it.

What belongs here: thin adapters over plain objects. What does not: any work.
"""

from __future__ import annotations

from dagster import ConfigurableResource

from kanbu_backup_dagster.backup.environment import Environment, load_environment


class BackupEnvironment(ConfigurableResource[Environment]):
    """Gives ops the environment; has no configuration, so that no secret is ever in run config."""

    def load(self) -> Environment:
        """Read the environment now."""
        return load_environment()

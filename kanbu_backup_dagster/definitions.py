"""The front door: what Dagster loads.

What belongs here: putting the parts together. What does not: logic, and I/O beyond loading configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from dagster import Definitions, in_process_executor

from kanbu_backup_dagster.orchestration.alerts import build_sensors
from kanbu_backup_dagster.orchestration.assets import ASSETS
from kanbu_backup_dagster.orchestration.configuration import load_configuration
from kanbu_backup_dagster.orchestration.drill_ops import DRILL_ASSETS, DRILL_CHECKS
from kanbu_backup_dagster.orchestration.jobs import JOBS
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.restore_ops import RESTORE_ASSETS
from kanbu_backup_dagster.orchestration.restore_source_ops import RESTORE_SOURCE_ASSETS
from kanbu_backup_dagster.orchestration.run_scope import run_scope
from kanbu_backup_dagster.orchestration.schedule_asset import schedule_file_asset, with_freshness
from kanbu_backup_dagster.orchestration.schedules import build_schedules
from kanbu_backup_dagster.orchestration.settling import settling_sensor
from kanbu_backup_dagster.orchestration.verify_ops import CHECKS


def build_definitions(*, resource_overrides: Mapping[str, Any] | None = None) -> Definitions:
    """Fresh definitions.

    Args:
        resource_overrides: Resources in place of the usual ones, by name; for tests.
    """
    configuration = load_configuration()
    schedules = build_schedules(configuration, JOBS)
    assets = with_freshness(
        [*ASSETS, *RESTORE_ASSETS, *RESTORE_SOURCE_ASSETS, *DRILL_ASSETS], configuration, datetime.now(timezone.utc)
    )
    return Definitions(
        assets=[*assets, schedule_file_asset(configuration, schedules.problems)],
        asset_checks=[*CHECKS, *DRILL_CHECKS],
        jobs=JOBS,
        schedules=schedules.schedules,
        sensors=[*build_sensors(JOBS, schedules.problems), settling_sensor(JOBS)],
        resources={"environment": BackupEnvironment(), "run_scope": run_scope, **(resource_overrides or {})},
        # The stream flows within one op, so a process per op would only add its start: 1.5 seconds each.
        executor=in_process_executor,
    )


defs = build_definitions()

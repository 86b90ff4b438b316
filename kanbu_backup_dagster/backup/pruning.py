"""Pruning: what the retention plan is for the backups in a storage now, and what holds it back.

What belongs here: gathering what a plan depends on. What does not: the rules (`retention`), deleting, and recording
what was deleted (`orchestration`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.backup.retention import (
    Brake,
    Candidate,
    RetentionPlan,
    mass_deletion_brake,
    plan_retention,
    shrink_brake,
)
from kanbu_backup_dagster.schedule_file import RetentionPolicy, ScheduleFile
from kanbu_backup_dagster.settings import Settings


@dataclass(frozen=True)
class Stranger:
    """A file in the storage that is no backup."""

    filename: str
    name: None = None
    manifest: None = None
    problem: None = None


@dataclass(frozen=True)
class PrunePlan:
    """What pruning would do.

    Attributes:
        plan: A verdict for each file.
        brake: Why none of it is done without a person's word.
    """

    plan: RetentionPlan
    brake: Brake | None


def plan_prune(
    catalog: Catalog,
    backup_type: BackupType,
    settings: Settings,
    schedules: ScheduleFile,
    *,
    now: datetime,
    settled_until: datetime | None,
    in_use: Mapping[str, str],
    coming: datetime | None = None,
    policies: Mapping[int, RetentionPolicy] | None = None,
    strangers: Sequence[Stranger] = (),
) -> PrunePlan:
    """Plan for the backups of a type, as they are in the storage now.

    Args:
        schedules: The schedule file; if it was not read whole nothing goes.
        settled_until: When the type was last pruned, of itself or accepted.
        in_use: Files that something is reading now, and what it is.
        coming: When a backup is to come that is counted in as made.
        policies: In place of the file's, to try them out.
        strangers: Files that are no backups, to be named in the plan.

    Raises:
        StorageError: The storage cannot be listed.
    """
    files: list[Candidate] = [*catalog.backups(backup_type), *strangers]
    plan = plan_retention(
        files,
        backup_type=backup_type,
        policies=schedules.policies(backup_type.value) if policies is None else policies,
        config_whole=schedules.parsed_whole,
        now=now,
        zone=ZoneInfo(settings.cron_timezone),
        coming=coming,
        in_use=in_use,
    )
    brake = mass_deletion_brake(plan) or shrink_brake(
        files,
        backup_type=backup_type,
        max_shrink=schedules.prune.max_shrink,
        now=now,
        settled_until=settled_until,
    )
    return PrunePlan(plan, brake)

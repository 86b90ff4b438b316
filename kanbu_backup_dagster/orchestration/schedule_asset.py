"""What the UI shows of the schedule file: an asset that says what is in it and what is wrong, and freshness.

What belongs here: the asset's text, and how old the newest backup may be. What does not: schedules themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from dagster import AssetKey, AssetSpec, FreshnessPolicy

from kanbu_backup_dagster.orchestration.assets import BACKUP_ASSETS
from kanbu_backup_dagster.orchestration.configuration import Configuration
from kanbu_backup_dagster.orchestration.watch import longest_period
from kanbu_backup_dagster.schedule_file import ScheduleType, describe_cron

SCHEDULE_FILE = AssetKey("schedule_file")


def schedule_file_asset(configuration: Configuration, problems: Sequence[str]) -> AssetSpec:
    """The schedule file as an asset, its problems first.

    Args:
        configuration: As it was loaded.
        problems: What is wrong with rows that are good in themselves.
    """
    file = configuration.file
    found = [*configuration.problems, *problems]
    lines = [f"`{file.path}`, as Dagster has it loaded." if file.exists else "There is no schedule file."]
    if found:
        lines.append(
            f"**{len(found)} problem{'s' if len(found) > 1 else ''}; nothing is pruned until the file is whole:**"
        )
        lines += [f"- {_as_markdown(problem)}" for problem in found]
    for row in file.schedules:
        state = "" if row.enabled else " (disabled)"
        lines.append(f"- {_as_markdown(str(row))}{state}: {row.type.value}, {describe_cron(row.cron)}")
    return AssetSpec(
        SCHEDULE_FILE,
        description="\n\n".join([lines[0], "\n".join(lines[1:])]).strip(),
        group_name="kanbu",
        kinds={"yaml"},
        tags={"kanbu/problems": str(len(found))},
    )


def _as_markdown(text: str) -> str:
    return text.replace("\n", " ").replace("*", r"\*").replace("<", "&lt;")


def with_freshness(assets: Sequence[AssetSpec], configuration: Configuration, now: datetime) -> list[AssetSpec]:
    """`assets`, backups among them with the age that they are overdue at: the loosest of their schedules' periods."""
    return [_fresh(asset, configuration, now) for asset in assets]


def _fresh(asset: AssetSpec, configuration: Configuration, now: datetime) -> AssetSpec:
    window = allowed_age(asset.key, configuration, now)
    if window is None:
        return asset
    return asset.replace_attributes(freshness_policy=FreshnessPolicy.time_window(fail_window=window))


def allowed_age(key: AssetKey, configuration: Configuration, now: datetime) -> timedelta | None:
    """How old the newest backup of the asset `key` may be; None where no enabled schedule makes any."""
    grace = timedelta(hours=configuration.file.notifications.overdue_grace_hours)
    types = {ScheduleType(kind.value) for kind, entry in BACKUP_ASSETS.items() if entry[0] == key}
    periods = [
        longest_period(row, configuration.zone, now)
        for row in configuration.file.schedules
        if row.enabled and row.type in types
    ]
    return max(periods) + grace if periods else None

"""`kanbu-backup retention preview`, `prune`: what would be deleted and why, and deleting it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from zoneinfo import ZoneInfo

import click
from rich.table import Table
from rich.text import Text

from kanbu_backup_dagster.backup.environment import Environment, load_environment
from kanbu_backup_dagster.backup.names import BackupType, parse_name
from kanbu_backup_dagster.backup.pruning import PrunePlan, Stranger, plan_prune
from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.cli.tables import print_table
from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.orchestration import job_names
from kanbu_backup_dagster.schedule_file import (
    RetentionPolicy,
    Schedule,
    ScheduleFile,
    load_schedule_file,
    next_runs,
)

_TYPE = click.Choice([kind.value for kind in BackupType])


@cli.group()
def retention() -> None:
    """Which backups stay, which go, and why."""


def _policy(context: click.Context, parameter: click.Parameter, value: str | None) -> RetentionPolicy | None:
    try:
        return RetentionPolicy.parse(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@retention.command("preview")
@click.option("--schedule", "schedule_id", type=int, help="Of this schedule's type, at its next run.")
@click.option("--type", "only", type=_TYPE, help="Only backups of this type.")
@click.option(
    "--policy",
    callback=_policy,
    metavar="DAYS/DAILY/WEEKLY/MONTHLY",
    help="Try this policy, in place of the schedule's, or without --schedule of all schedules'.",
)
@click.option("--now", "at_once", is_flag=True, help="What pruning now would do, without the coming backup.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of {filename, keep, rules, reason}.")
def preview(
    schedule_id: int | None, only: str | None, policy: RetentionPolicy | None, at_once: bool, as_json: bool
) -> None:
    """Show each file, keep or delete, and the rule, as the next prune will judge: the coming backup is counted in."""
    environment = load_environment()
    schedules = load_schedule_file(environment.settings.config_file)
    for problem in schedules.problems:
        click.echo(f"Warning: {problem}", err=True)
    schedule = _schedule(schedules, schedule_id)
    if schedule is not None:
        types = [BackupType(schedule.type.value)]
    else:
        types = [BackupType(only)] if only else list(BackupType)
    plans = _plans(environment, schedules, types, schedule, policy, at_once=at_once)
    if as_json:
        click.echo(json.dumps([one for planned in plans for one in planned.plan.to_json()], indent=2))
    else:
        for planned in plans:
            _print(planned)
    for planned in plans:
        if planned.brake is not None:
            click.echo(f"Held back: {planned.brake.reason}.", err=True)


def _schedule(schedules: ScheduleFile, schedule_id: int | None) -> Schedule | None:
    if schedule_id is None:
        return None
    schedule = schedules.schedule(schedule_id)
    if schedule is None or schedule.type.value not in {kind.value for kind in BackupType}:
        raise SettingsError(
            f"There is no schedule {schedule_id} of backups in {schedules.path}.",
            advice="`kanbu-backup schedules` shows those that there are.",
        )
    return schedule


def _plans(
    environment: Environment,
    schedules: ScheduleFile,
    types: list[BackupType],
    schedule: Schedule | None,
    policy: RetentionPolicy | None,
    *,
    at_once: bool,
) -> list[PrunePlan]:
    # When a type was last pruned, and what is being restored, is in Dagster's record.
    from kanbu_backup_dagster.orchestration.dagster_home import open_instance
    from kanbu_backup_dagster.orchestration.prune_ops import files_in_use, settled_until

    now = datetime.now(timezone.utc)
    zone = ZoneInfo(environment.settings.cron_timezone)
    strangers = [Stranger(file.name) for file in environment.storage.files() if parse_name(file.name) is None]
    plans = []
    with open_instance() as instance:
        in_use = files_in_use(instance)
        for number, backup_type in enumerate(types):
            rows = [row for row in schedules.schedules if row.type.value == backup_type.value]
            waiting = [schedule] if schedule is not None else [row for row in rows if row.enabled]
            coming = min((next_runs(row.cron, zone, now, 1)[0] for row in waiting), default=None)
            plans.append(
                plan_prune(
                    environment.catalog,
                    backup_type,
                    environment.settings,
                    schedules,
                    now=now,
                    settled_until=settled_until(instance, backup_type, environment.storage.location),
                    in_use=in_use,
                    coming=None if at_once else coming,
                    policies=_tried(schedules, backup_type, schedule, policy),
                    strangers=strangers if number == 0 else (),
                )
            )
    return plans


def _tried(
    schedules: ScheduleFile, backup_type: BackupType, schedule: Schedule | None, policy: RetentionPolicy | None
) -> Mapping[int, RetentionPolicy] | None:
    if policy is None:
        return None
    policies = schedules.policies(backup_type.value)
    if schedule is not None:
        return {**policies, schedule.id: policy}
    return dict.fromkeys(policies, policy) or {0: policy}


def _print(planned: PrunePlan) -> None:
    if not planned.plan.verdicts:
        click.echo(f"No {planned.plan.backup_type.value} backups.")
        return
    table = Table("File", "", "Rules", "Reason", box=None, header_style="bold")
    for verdict in planned.plan.verdicts:
        fate = Text("keep") if verdict.keep else Text("delete", style="bold red")
        table.add_row(verdict.filename, fate, ", ".join(verdict.rules), verdict.reason)
    print_table(table)
    plan = planned.plan
    click.echo(f"{len(plan.verdicts) - len(plan.deletions)} stay, {len(plan.deletions)} go.")


@cli.command()
@click.option("--type", "only", type=_TYPE, help="Only backups of this type.")
@click.option("--dry-run", is_flag=True, help="Delete nothing, and say how many would go.")
@click.option("--accept", is_flag=True, help="Go ahead although a brake holds the plan back.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@click.option("--verbose", is_flag=True, help="Show the run's log.")
def prune(only: str | None, dry_run: bool, accept: bool, as_json: bool, verbose: bool) -> None:
    """Delete what the retention policies let go, by running the job `prune_backups` in this process."""
    from kanbu_backup_dagster.orchestration.run_here import run_job

    config = {"type": only or "", "dry_run": dry_run, "accept": accept}
    outcome = run_job(job_names.PRUNE_BACKUPS, run_config={"ops": {"prune_all": {"config": config}}}, verbose=verbose)
    if not outcome.success:
        raise outcome.error
    numbers = {
        kind.value: {
            name: outcome.said[f"{kind.value}_{name}"] for name in ("deleted", "would_go", "kept", "held_back")
        }
        for kind in BackupType
        if f"{kind.value}_deleted" in outcome.said
    }
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return
    for kind, one in numbers.items():
        if one["held_back"] and not one["deleted"]:
            click.echo(f"{kind}: nothing was deleted: {one['held_back']}. `kanbu-backup prune --accept` goes ahead.")
        else:
            gone = f"{one['would_go']} would go" if dry_run else f"{one['deleted']} deleted"
            click.echo(f"{kind}: {gone}, {one['kept']} kept")

"""`kanbu-backup schedules`: what runs when, and changing it; `kanbu-backup webhook test`."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.errors import KanbuError, SettingsError
from kanbu_backup_dagster.schedule_file import (
    Schedule,
    ScheduleType,
    add_schedule,
    describe_cron,
    edit_schedule,
    next_runs,
    remove_schedule,
)
from kanbu_backup_dagster.settings import load_settings

_NEXT_RUNS = 3


@cli.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--next", "count", default=_NEXT_RUNS, type=click.IntRange(1, 1000), help="How many runs to show ahead.")
@click.pass_context
def schedules(context: click.Context, as_json: bool, count: int) -> None:
    """Show what runs when, with the next runs, and what is wrong in the schedule file."""
    if context.invoked_subcommand is not None:
        return
    facts = _facts(count)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    _print(facts)


def _facts(count: int) -> dict[str, Any]:
    # Imported here: other commands need no Dagster, which takes a second to import.
    from kanbu_backup_dagster.orchestration.configuration import load_configuration
    from kanbu_backup_dagster.orchestration.dagster_home import open_instance
    from kanbu_backup_dagster.orchestration.jobs import JOBS
    from kanbu_backup_dagster.orchestration.schedules import build_schedules, schedule_name, states_set_in_ui

    configuration = load_configuration()
    if configuration.settings is None:
        raise SettingsError("\n".join(configuration.settings_problems))
    with open_instance() as instance:
        set_in_ui = states_set_in_ui(instance)
    now = datetime.now(timezone.utc)
    rows = []
    for row in configuration.file.schedules:
        name = schedule_name(row)
        by_file = row.enabled and configuration.runs_schedules
        rows.append(
            {
                "id": row.id,
                "name": row.name,
                "type": row.type.value,
                "cron": row.cron,
                "when": describe_cron(row.cron),
                "enabled": row.enabled,
                "dagster_name": name,
                "running": set_in_ui.get(name, by_file) and configuration.runs_schedules,
                "set_in_ui": set_in_ui.get(name),
                "differs": set_in_ui.get(name, by_file) is not by_file,
                "policy": str(row.policy) if row.type in (ScheduleType.DATABASE, ScheduleType.SOURCE) else None,
                "catch_up_hours": row.catch_up_hours,
                "next_runs": [time.isoformat() for time in next_runs(row.cron, configuration.zone, now, count)],
            }
        )
    return {
        "file": str(configuration.file.path),
        "exists": configuration.file.exists,
        "time_zone": configuration.settings.cron_timezone,
        "scheduler_mode": configuration.settings.scheduler_mode.value,
        "schedules": rows,
        "problems": [*configuration.problems, *build_schedules(configuration, JOBS).problems],
    }


def _print(facts: dict[str, Any]) -> None:
    console = Console()
    # A time cut short by a narrow terminal, or by a pipe's 80 columns, tells nothing.
    console.width = max(console.width, 160)
    if not facts["exists"]:
        console.print(Text(f"There is no {facts['file']}; `kanbu-backup schedules add` makes it."))
    table = Table("Id", "Name", "Type", "When", "State", "Policy", "Next", box=None, header_style="bold")
    for row in facts["schedules"]:
        upcoming = [datetime.fromisoformat(time) for time in row["next_runs"]]
        table.add_row(
            str(row["id"]),
            Text(row["name"]),
            row["type"],
            Text(f"{row['when']} ({row['cron']})"),
            _state(row, facts["scheduler_mode"]),
            row["policy"] or "",
            Text("\n".join(f"{time:%a %d %b %H:%M} {_offset(time)}" for time in upcoming) if row["running"] else ""),
        )
    if facts["schedules"]:
        console.print(table)
        console.print(Text(f"Times in {facts['time_zone']}."))
    for problem in facts["problems"]:
        console.print(Text(f"problem: {problem}", style="bold red"))


def _state(row: dict[str, Any], mode: str) -> Text:
    if mode == "external":
        return Text("off: mode external", style="yellow")
    if row["differs"]:
        word = "running" if row["set_in_ui"] else "stopped"
        return Text(
            f"{word} (set in the UI; the file says {'enabled' if row['enabled'] else 'disabled'})", style="yellow"
        )
    return Text("running", style="green") if row["running"] else Text("disabled", style="dim")


def _offset(time: datetime) -> str:
    offset = time.strftime("%z")
    return f"{offset[:3]}:{offset[3:]}"


_TYPES = click.Choice([kind.value for kind in ScheduleType])


def _row_options(*, required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    options = [
        click.option("--name", required=required, help="What people call it."),
        click.option("--type", "type", type=_TYPES, required=required, help="What it starts."),
        click.option("--cron", required=required, help='When, e.g. "0 2 * * *", in BACKUP_CRON_TIMEZONE.'),
        click.option("--retention-days", type=int, help="Days after which its backups expire."),
        click.option("--keep-daily", type=int, help="Most recent days kept."),
        click.option("--keep-weekly", type=int, help="Most recent weeks kept (Sundays)."),
        click.option("--keep-monthly", type=int, help="Most recent months kept (the 1st)."),
        click.option("--catch-up-hours", type=float, help="How late a missed run may start; 0: ten minutes."),
    ]

    def apply(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


@schedules.command("add")
@_row_options(required=True)
@click.option("--disabled", is_flag=True, help="Add it without running it.")
def add(disabled: bool, **fields: Any) -> None:
    """Add a schedule to the schedule file."""
    given = {name: value for name, value in fields.items() if value is not None}
    if disabled:
        given["enabled"] = False
    row = add_schedule(_file(), given, used_ids=_used_ids(), cron_check=_cron_check())
    _tell("Added", row)


@schedules.command("edit")
@click.argument("schedule_id", type=int, metavar="ID")
@_row_options(required=False)
def edit(schedule_id: int, **fields: Any) -> None:
    """Change the schedule ID; what is not given stays. Comments in the file stay too."""
    changes = {name: value for name, value in fields.items() if value is not None}
    if not changes:
        raise click.UsageError("Nothing to change: give an option such as --cron.")
    _tell("Changed", edit_schedule(_file(), schedule_id, changes, cron_check=_cron_check()))


@schedules.command("enable")
@click.argument("schedule_id", type=int, metavar="ID")
def enable(schedule_id: int) -> None:
    """Let the schedule ID run."""
    _tell("Enabled", edit_schedule(_file(), schedule_id, {"enabled": True}, cron_check=_cron_check()))


@schedules.command("disable")
@click.argument("schedule_id", type=int, metavar="ID")
def disable(schedule_id: int) -> None:
    """Let the schedule ID rest; its retention policy goes on counting."""
    _tell("Disabled", edit_schedule(_file(), schedule_id, {"enabled": False}, cron_check=_cron_check()))


@schedules.command("remove")
@click.argument("schedule_id", type=int, metavar="ID")
def remove(schedule_id: int) -> None:
    """Take the schedule ID out of the file. Its backups stay, under the policy their manifests hold."""
    path = _file()
    remove_schedule(path, schedule_id, cron_check=_cron_check())
    click.echo(f"Removed schedule {schedule_id} from {path}.")


def _file() -> Path:
    return load_settings().config_file


def _cron_check() -> Callable[[str], str | None]:
    from kanbu_backup_dagster.orchestration.configuration import refusal

    return refusal


def _used_ids() -> set[int]:
    """Ids that backups remember: they are not given to another schedule."""
    from kanbu_backup_dagster.backup.environment import load_environment

    try:
        backups = load_environment().catalog.backups()
    except KanbuError as error:
        click.echo(f"warning: ids of former schedules are not known: {error}", err=True)
        return set()
    numbers = {backup.manifest.schedule_id for backup in backups if backup.manifest is not None}
    return {number for number in numbers if number is not None}


def _tell(done: str, row: Schedule) -> None:
    settings = load_settings()
    upcoming = next_runs(row.cron, ZoneInfo(settings.cron_timezone), datetime.now(timezone.utc), 1)[0]
    click.echo(f"{done} {row} in {settings.config_file}: {row.type.value}, {describe_cron(row.cron)}.")
    if row.enabled:
        click.echo(f"Next run {upcoming:%a %d %b %Y %H:%M} {_offset(upcoming)}.")
    click.echo("A running `kanbu-backup serve` takes it over within seconds; `dagster dev` at Reload in its UI.")


@cli.group()
def webhook() -> None:
    """The receiver of alerts."""


@webhook.command("test")
def webhook_test() -> None:
    """Post an example event, marked X-Kanbu-Test: true, to BACKUP_WEBHOOK_URL."""
    from kanbu_backup_dagster.orchestration.configuration import load_configuration
    from kanbu_backup_dagster.orchestration.webhook_test import try_webhook

    endpoint, receipt = try_webhook(load_configuration())
    click.echo(
        f"{endpoint.url.origin} answered {receipt.status} in {receipt.seconds:.2f} s "
        f"({endpoint.format.value} form, {'signed' if endpoint.secret else 'not signed'})."
    )

"""`kanbu-backup history`: the runs of every job."""

from __future__ import annotations

import json

import click
from rich.table import Table

from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.cli.tables import print_table


@cli.command()
@click.option("--job", help="Only runs of this job.")
@click.option("--limit", "-n", type=click.IntRange(1), default=20, show_default=True, help="How many runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def history(job: str | None, limit: int, as_json: bool) -> None:
    """List the latest runs: when, what, trigger, schedule, status, duration, file, error."""
    from kanbu_backup_dagster.orchestration.dagster_home import open_instance
    from kanbu_backup_dagster.orchestration.history import history as read_history

    with open_instance() as instance:
        rows = list(read_history(instance, limit=limit, job=job))
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not rows:
        click.echo("No runs yet.")
        return
    table = Table("When", "Job", "Trigger", "Schedule", "Status", "Seconds", "File or error", box=None)
    for row in rows:
        table.add_row(
            row["started_at"] or "not started",
            row["job"],
            row["trigger"],
            row["schedule"] or "",
            row["status"],
            "" if row["duration_s"] is None else f"{row['duration_s']:.1f}",
            "\n".join(filter(None, (row["file"], row["error"]))),
        )
    print_table(table)

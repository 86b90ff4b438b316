"""`kanbu-backup restore` and `drill`: what would be replaced by what, asking twice, and running the job here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import SecretStr

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.environment import database_url, load_environment
from kanbu_backup_dagster.cli.arguments import name_and_folder
from kanbu_backup_dagster.cli.bars import byte_bar
from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.errors import RestoreError
from kanbu_backup_dagster.orchestration import job_names
from kanbu_backup_dagster.restore.plan import OVERWRITES, PRE_RESTORE, RestoreRequest, judge_file, look_at
from kanbu_backup_dagster.restore.server import Server, find_databases, open_server
from kanbu_backup_dagster.settings import Settings

if TYPE_CHECKING:
    from kanbu_backup_dagster.orchestration.run_here import Outcome


@cli.command("restore")
@click.argument("file")
@click.option(
    "--database-url",
    "url",
    help="The server and database, in place of DATABASE_URL; others here can see a password in it.",
)
@click.option("--target-database", help="Another database of that server, new or existing.")
@click.option("--into", help="Of a source backup: the empty or new folder it is extracted into.")
@click.option("--yes", is_flag=True, help="Ask nothing; needs --confirm.")
@click.option("--confirm", metavar="NAME", help="With --yes: the name of the database that is replaced.")
@click.option(
    "--force",
    is_flag=True,
    help="Accept a file that failed its last verification; with a key set, one not encrypted or without manifest.",
)
@click.option("--drop-replaced", is_flag=True, help="Drop the replaced database at once.")
@click.option("--create-roles", is_flag=True, help="Create missing roles that the backup needs, without login.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--verbose", is_flag=True, help="Show the run's log.")
def restore(
    file: str,
    url: str | None,
    target_database: str | None,
    into: str | None,
    yes: bool,
    confirm: str | None,
    force: bool,
    drop_replaced: bool,
    create_roles: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Replace the database by the backup FILE, a name in the storage or a path; or extract a source backup.

    A database is loaded and checked aside first; a failure changes nothing.
    """
    if into is None and yes and confirm is None:
        raise click.UsageError("--yes needs --confirm NAME, the name of the database that is replaced.")
    name, folder = name_and_folder(file)
    request = RestoreRequest(
        file=name,
        folder=str(folder) if folder is not None else None,
        target_database=target_database,
        force=force,
    )
    if into is not None:
        if url or target_database or drop_replaced or create_roles:
            raise click.UsageError("--into extracts a source backup; the options of databases do not go with it.")
        _extract(request, str(Path(into).absolute()), as_json=as_json, verbose=verbose)
        return
    with _database(url):
        environment = load_environment()
        backup, _, warnings = judge_file(request, environment.storage, environment.keys)
        server, target = open_server(environment.settings, target=target_database)
        _show(backup, server, environment.settings, target, warnings)
        _confirm(target, yes=yes, confirm=confirm)
        outcome = _run(
            job_names.RESTORE_DATABASE,
            {
                "file": request.file,
                "confirm_overwrite": True,
                "confirm_target": target,
                "force": force,
                "keep_replaced": not drop_replaced,
                "create_missing_roles": create_roles,
                **({"folder": request.folder} if request.folder else {}),
                **({"target_database": target_database} if target_database else {}),
            },
            silent=as_json or verbose,
            verbose=verbose,
        )
    result = outcome.report
    if as_json:
        click.echo(json.dumps({"run_id": outcome.run_id, **_plain(result)}, indent=2, ensure_ascii=False))
        return
    click.echo(
        f"{result['target']} is restored from {result['file']}: {result['rows']:,} rows in {result['tables']:,} tables"
        + (f", away for {result['downtime_ms']:.0f} ms." if "downtime_ms" in result else ".")
    )
    click.echo(f"Pre-restore backup: {result['pre_restore_file']}")
    click.echo(f"Replaced database: {result['replaced_database']}")
    for remark in result["remarks"]:
        click.echo(f"Note: {remark}")


def _extract(request: RestoreRequest, into: str, *, as_json: bool, verbose: bool) -> None:
    # Nothing that exists is ever overwritten, so there is nothing to confirm.
    outcome = _run(
        job_names.RESTORE_SOURCE,
        {
            "file": request.file,
            "into": into,
            "force": request.force,
            **({"folder": request.folder} if request.folder else {}),
        },
        silent=as_json or verbose,
        verbose=verbose,
        op="validate_source",
    )
    result = outcome.report
    if as_json:
        click.echo(json.dumps({"run_id": outcome.run_id, **_plain(result)}, indent=2, ensure_ascii=False))
        return
    click.echo(f"{result['target']}: {result['files']:,} files, {result['bytes'] / 1e6:,.1f} MB, from {result['file']}")
    for remark in result["remarks"]:
        click.echo(f"Note: {remark}")


@contextmanager
def _database(url: str | None) -> Iterator[None]:
    """Within this, `url` stands in for DATABASE_URL."""
    token = database_url.set(SecretStr(url) if url else None)
    try:
        yield
    finally:
        database_url.reset(token)


def _show(backup: Backup, server: Server, settings: Settings, target: str, warnings: list[str]) -> None:
    """What would be replaced by what, on standard error: answers are read beside it, results go elsewhere."""
    live = find_databases(server, settings).get(target)
    now = look_at(server, settings, target) if live else None
    facts = backup.manifest.database if backup.manifest else None
    age = datetime.now(timezone.utc) - backup.created_at
    days, hours = age.days, age.seconds // 3600
    click.echo(f"Server:  {server.access.description}, PostgreSQL {server.version}", err=True)
    click.echo(
        f"Backup:  {backup.filename}, {f'{days} days' if days else f'{hours} hours'} old"
        + (f", {len(facts.rows):,} tables, {sum(facts.rows.values()):,} rows" if facts else ""),
        err=True,
    )
    if now is None:
        click.echo(f"Target:  {target}, which does not exist yet", err=True)
    else:
        click.echo(f"Target:  {target}, now {now.tables:,} tables, about {now.rows:,} rows", err=True)
        click.echo(f"{OVERWRITES}.", err=True)
        click.echo(f"{PRE_RESTORE}.", err=True)
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)


def _confirm(target: str, *, yes: bool, confirm: str | None) -> None:
    if not yes:
        click.confirm(f"Restore {target}?", abort=True, err=True)
        confirm = click.prompt("Confirm Restore: type the database's name", err=True)
    if confirm != target:
        raise RestoreError(
            f"Not confirmed: {confirm!r} is not the database that would be replaced, {target!r}.",
            advice="Nothing was changed.",
        )


def _run(
    job: str, config: dict[str, Any], *, silent: bool, verbose: bool, op: str = "validate", doing: str = "Restoring"
) -> Outcome:
    from kanbu_backup_dagster.orchestration.run_here import run_job

    with byte_bar(doing, silent=silent) as bar:
        outcome = run_job(job, run_config={"ops": {op: {"config": config}}}, verbose=verbose, on_progress=bar)
    if not outcome.success:
        raise outcome.error
    return outcome


def _plain(report: Any) -> dict[str, Any]:
    return {name: value for name, value in report.items() if isinstance(value, str | int | float | list | bool | None)}


@cli.command("drill")
@click.argument("file", required=False)
@click.option("--older", type=click.IntRange(0), help="Drill this many older backups too, drawn at random.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--verbose", is_flag=True, help="Show the run's log.")
def drill(file: str | None, older: int | None, as_json: bool, verbose: bool) -> None:
    """Restore the newest backup, or FILE, aside, and compare it with its manifest."""
    config: dict[str, Any] = {"file": file} if file else {}
    if older is not None:
        config["older_samples"] = older
    outcome = _run(
        job_names.RESTORE_DRILL, config, silent=as_json or verbose, verbose=verbose, op="choose", doing="Drilling"
    )
    result = outcome.report
    if as_json:
        click.echo(json.dumps({"run_id": outcome.run_id, **_plain(result)}, indent=2, ensure_ascii=False))
        return
    click.echo(
        f"{result['file']} is proven: {result['rows']:,} rows in {result['tables']:,} tables, as backed up. A restore "
        f"takes about {result['restore_s']:.1f} s."
    )
    for remark in result["remarks"]:
        click.echo(f"Note: {remark}")

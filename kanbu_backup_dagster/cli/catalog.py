"""`kanbu-backup catalog sync`, `adopt`, `hold`, `release`: what is known of backups, put right."""

from __future__ import annotations

import json

import click

from kanbu_backup_dagster.backup.adoption import adopt as adopt_file
from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.cli.arguments import Found, open_backup
from kanbu_backup_dagster.cli.bars import byte_bar
from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.orchestration import job_names


@cli.group()
def catalog() -> None:
    """What Dagster knows of the backups."""


@catalog.command("sync")
@click.option("--json", "as_json", is_flag=True, help="Print what Dagster did not know as JSON.")
@click.option("--verbose", is_flag=True, help="Show the run's log.")
def sync(as_json: bool, verbose: bool) -> None:
    """Make Dagster know every backup in storage, from the manifests alone; say which it knew and are gone."""
    from kanbu_backup_dagster.orchestration.run_here import run_job

    outcome = run_job(job_names.SYNC_CATALOG, verbose=verbose)
    if not outcome.success:
        raise outcome.error
    difference = {name: outcome.said[name] for name in ("new", "changed", "vanished")}
    if as_json:
        click.echo(json.dumps(difference, indent=2))
        return
    for name, files in difference.items():
        for file in files:
            click.echo(f"{name}: {file}")
    if not any(difference.values()):
        click.echo("Dagster knew everything.")


@cli.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def adopt(file: str, as_json: bool) -> None:
    """Read FILE, which has no manifest, through, and give it one. From then on retention judges it."""
    from kanbu_backup_dagster.orchestration.target_lock import (
        STORAGE_PATIENCE_SECONDS,
        Holder,
        open_locks,
        storage_name,
    )

    found = _in_storage(file)
    # Else its key could be rotated, or the file deleted, while it is read.
    with open_locks().hold(
        storage_name(found.storage),
        Holder.now("kanbu-backup adopt", run_id=""),
        exclusive=False,
        wait_seconds=STORAGE_PATIENCE_SECONDS,
    ):
        backup = found.catalog.get(found.backup.filename)
        with byte_bar("Reading", total=backup.file.size, silent=as_json) as bar:
            manifest = adopt_file(backup, found.storage, found.keys, on_bytes=bar.to)
        _tell_dagster(found, anew=True)
    if as_json:
        click.echo(manifest.model_dump_json(indent=2))
    else:
        click.echo(f"{manifest.filename}: {manifest.verification.status.value}, has a manifest now")


@cli.command()
@click.argument("file")
def hold(file: str) -> None:
    """Keep FILE whatever retention says, until it is released."""
    _hold(file, held=True)


@cli.command()
@click.argument("file")
def release(file: str) -> None:
    """Let retention judge FILE again."""
    _hold(file, held=False)


def _hold(file: str, *, held: bool) -> None:
    found = _in_storage(file)
    name = found.backup.filename
    if found.backup.manifest is not None and found.backup.manifest.held == held:
        click.echo(f"{name} is {'' if held else 'not '}held already.")
        return
    found.catalog.amend(name, lambda manifest: manifest.model_copy(update={"held": held}))
    _tell_dagster(found)
    click.echo(f"{name} is held until it is released." if held else f"{name} is released.")


def _in_storage(file: str) -> Found:
    found = open_backup(file)
    if found.elsewhere:
        raise KanbuError(f"{file} is not in the storage.", advice="Copy it there first.")
    return found


def _tell_dagster(found: Found, *, anew: bool = False) -> None:
    from kanbu_backup_dagster.orchestration.dagster_home import open_instance
    from kanbu_backup_dagster.orchestration.register import Register

    backup: Backup = found.catalog.get(found.backup.filename)
    with open_instance() as instance:
        register = Register.without_run(instance)
        if anew or not register.knows(backup):
            register.add(backup, found.storage.path(backup.filename))
            assert backup.manifest is not None  # it was just written
            register.evaluate(backup, backup.manifest.verification)
        register.observe(backup)

"""`kanbu-backup backup`, `decrypt`, `storage mark`: making backups and working on their files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.reading import content, prove
from kanbu_backup_dagster.cli.arguments import open_backup
from kanbu_backup_dagster.cli.bars import byte_bar
from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.orchestration import job_names
from kanbu_backup_dagster.storage.folder import rename_exclusively


@cli.group()
def backup() -> None:
    """Make a backup now, by running its Dagster job in this process."""


@backup.command("database")
@click.option("--json", "as_json", is_flag=True, help="Print the new backup's manifest as JSON.")
@click.option("--verbose", is_flag=True, help="Show the run's log.")
def backup_database(as_json: bool, verbose: bool) -> None:
    """Back the database up, verified."""
    _run_backup(job_names.DATABASE_BACKUP, as_json=as_json, verbose=verbose)


@backup.command("source")
@click.option("--json", "as_json", is_flag=True, help="Print the new backup's manifest as JSON.")
@click.option("--verbose", is_flag=True, help="Show the run's log.")
def backup_source(as_json: bool, verbose: bool) -> None:
    """Back the source tree up, verified."""
    _run_backup(job_names.SOURCE_BACKUP, as_json=as_json, verbose=verbose)


def _run_backup(job: str, *, as_json: bool, verbose: bool) -> None:
    # Dagster takes seconds to import: only the commands that run a job pay for it.
    from kanbu_backup_dagster.orchestration.run_here import run_job

    environment = load_environment()
    with byte_bar("Backing up", silent=as_json or verbose) as bar:
        outcome = run_job(job, verbose=verbose, on_progress=bar)
    if not outcome.success:
        raise outcome.error
    stored = environment.catalog.get(outcome.materialized[0])
    assert stored.manifest is not None
    if as_json:
        click.echo(stored.manifest.model_dump_json(indent=2))
    else:
        manifest = stored.manifest
        click.echo(
            f"{environment.storage.path(stored.filename)}: {manifest.raw_bytes / 1e6:,.1f} MB in "
            f"{manifest.stored_bytes / 1e6:,.1f} MB, {manifest.verification.status.value}, "
            f"{'encrypted' if manifest.encrypted else 'NOT encrypted'}, {manifest.duration_seconds:.1f} s"
        )


@cli.command()
@click.argument("file")
@click.option(
    "-o", "--output", default=None, help="Where to write; `-` is standard output. [default: FILE without .enc]"
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def decrypt(file: str, output: str | None, as_json: bool) -> None:
    """Decrypt the backup FILE, after its integrity was checked; the content stays compressed."""
    found = open_backup(file)
    if not found.backup.name.encrypted:
        raise KanbuError(f"{found.backup.filename} is not encrypted.", advice="`gunzip` reads it as it is.")
    if as_json and output == "-":
        raise click.UsageError("--json and -o - would both write to standard output.")
    with byte_bar("Checking", total=found.backup.file.size, silent=as_json or output == "-") as bar:
        proven = prove(found.backup, found.storage, found.keys, on_bytes=bar.to)
    chunks = content(found.backup, found.storage, found.keys, proven=proven)
    if output == "-":
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        return
    target = Path(output or Path(found.backup.filename).name.removesuffix(".enc"))
    written = 0
    with _new_file(target) as stream:
        for chunk in chunks:
            written += stream.write(chunk)
    if as_json:
        click.echo(json.dumps({"filename": found.backup.filename, "output": str(target), "bytes": written}, indent=2))
    else:
        click.echo(f"{target}: {written:,} bytes")


@contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is whole, and replaces none."""
    part = target.with_name(target.name + ".part")
    if os.path.lexists(target):
        raise KanbuError(f"{target} exists already.", advice="Choose another name with -o.")
    try:
        handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except OSError as error:
        raise KanbuError(f"{part} cannot be written: {error.strerror}.") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(handle)
        rename_exclusively(part, target)
    except FileExistsError:
        raise KanbuError(f"{target} exists already.", advice="Choose another name with -o.") from None
    except OSError as error:
        raise KanbuError(f"{target} cannot be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)


@cli.group("storage")
def storage_group() -> None:
    """The place backups are kept in."""


@storage_group.command("mark")
def storage_mark() -> None:
    """Accept what is in the configured folder as the storage, although it is not what was there before (a new disk)."""
    from kanbu_backup_dagster.orchestration.dagster_home import open_instance
    from kanbu_backup_dagster.orchestration.known_storage import accept_storage

    storage = load_environment().storage
    with open_instance() as instance:
        click.echo(f"{storage.location} is the storage: {accept_storage(instance, storage)}")

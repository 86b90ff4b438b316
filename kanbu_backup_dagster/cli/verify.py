"""`kanbu-backup verify`: reading backups back and recording what they are worth."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import click

from kanbu_backup_dagster.backup.manifest import VerificationStatus
from kanbu_backup_dagster.backup.verification import verify as verify_file
from kanbu_backup_dagster.cli.arguments import Found, open_backup
from kanbu_backup_dagster.cli.bars import byte_bar
from kanbu_backup_dagster.cli.group import EXIT_FAILED, cli
from kanbu_backup_dagster.orchestration import job_names

_FAILED = VerificationStatus.FAILED.value


@cli.command()
@click.argument("file", required=False)
@click.option("--all-pending", is_flag=True, help="Every backup that is pending, deeply.")
@click.option("--all", "every", is_flag=True, help="Every backup, deeply.")
@click.option("--deep", is_flag=True, help="Read the content of FILE through as well.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
@click.option("--verbose", is_flag=True, help="Show the run's log.")
def verify(file: str | None, all_pending: bool, every: bool, deep: bool, as_json: bool, verbose: bool) -> None:
    """Read the backup FILE back, compare it with its checksums, and record the verdict.

    A deep verification also checks the gzip data's own checksum, a dump's end and its rows per table, and a source
    archive's structure and counts.
    """
    if (file is not None) + all_pending + every != 1:
        raise click.UsageError("Give one of FILE, --all-pending and --all.")
    if file is None:
        _verify_many(every=every, as_json=as_json, verbose=verbose)
        return
    found = open_backup(file)
    if found.elsewhere:
        verdict = _verify_elsewhere(found, deep=deep, silent=as_json)
    else:
        verdict = _verify_here(found, deep=deep, silent=as_json or verbose, verbose=verbose)
    if as_json:
        click.echo(json.dumps(verdict, indent=2))
    else:
        _say(verdict)
    if verdict["status"] == _FAILED:
        sys.exit(EXIT_FAILED)


def _verify_here(found: Found, *, deep: bool, silent: bool, verbose: bool) -> dict[str, Any]:
    """By the job, so that Dagster learns of it too."""
    from kanbu_backup_dagster.orchestration.run_here import run_job

    name = found.backup.filename
    config = {"ops": {"verify_one": {"config": {"file": name, "deep": deep}}}}
    with byte_bar("Verifying", total=found.backup.file.size, silent=silent) as bar:
        outcome = run_job(job_names.VERIFY_BACKUP, run_config=config, verbose=verbose, on_progress=bar)
    states = [state for observed, state in outcome.observed if observed == name]
    if not states:
        raise outcome.error
    return _verdict(name, states[-1])


def _verify_elsewhere(found: Found, *, deep: bool, silent: bool) -> dict[str, Any]:
    """A file that is in no storage of ours is in no history either."""
    with byte_bar("Verifying", total=found.backup.file.size, silent=silent) as bar:
        verdict = verify_file(found.backup, found.storage, found.keys, deep=deep, on_bytes=bar.to)
    found.catalog.record_verdict(found.backup, verdict)
    return {"filename": found.backup.filename, **verdict.model_dump(mode="json")}


def _verify_many(*, every: bool, as_json: bool, verbose: bool) -> None:
    from kanbu_backup_dagster.orchestration.run_here import run_job

    config = {"ops": {"verify_many": {"config": {"all": every}}}}
    with byte_bar("Verifying", silent=as_json or verbose) as bar:
        outcome = run_job(job_names.VERIFY_PENDING_BACKUPS, run_config=config, verbose=verbose, on_progress=bar)
    verdicts = [_verdict(name, state) for name, state in outcome.observed]
    if as_json:
        click.echo(json.dumps(verdicts, indent=2))
    else:
        for verdict in verdicts:
            _say(verdict)
    if not outcome.success:
        raise outcome.error
    if not verdicts and not as_json:
        click.echo("There is nothing to verify.")


def _verdict(filename: str, state: Mapping[str, Any]) -> dict[str, Any]:
    at = state.get("verified_at")
    return {
        "filename": filename,
        "status": state["verification"],
        "at": datetime.fromtimestamp(at, timezone.utc).isoformat() if at is not None else None,
        "detail": f"not judged now: {state['not_judged']}" if "not_judged" in state else state.get("detail", ""),
        "deep": state.get("deep", False),
    }


def _say(verdict: Mapping[str, Any]) -> None:
    detail = f": {verdict['detail']}" if verdict["detail"] else ""
    click.echo(f"{verdict['filename']}: {verdict['status']}{detail}")

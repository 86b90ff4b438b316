"""`kanbu-backup rotate-keys`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.rotation import Action, Planned, plan, require_current
from kanbu_backup_dagster.cli.bars import byte_bar
from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.orchestration import job_names

_WHAT = {
    Action.RE_ENCRYPT: "needs key {key}: to be re-encrypted",
    Action.RE_SEAL: "needs no other key; its manifest is to be sealed anew",
    Action.LEAVE: "left as it is: {reason}",
}


@cli.command("rotate-keys")
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verbose", is_flag=True, help="Show the run's log.")
def rotate_keys(dry_run: bool, as_json: bool, verbose: bool) -> None:
    """Put backups that need a former key under BACKUP_ENCRYPTION_KEY.

    The former keys are read from BACKUP_ENCRYPTION_KEY_PREVIOUS. Ended half-way, it goes on when run again.
    """
    environment = load_environment()
    current = require_current(environment.keys, environment.storage)

    def planned() -> list[Planned]:
        return plan(environment.catalog, environment.storage, environment.keys, current)

    before = planned()
    todo = [item for item in before if item.action in (Action.RE_ENCRYPT, Action.RE_SEAL)]
    if todo and not dry_run:
        # Dagster takes seconds to import: only what runs a job pays for it.
        from kanbu_backup_dagster.orchestration.run_here import run_job

        with byte_bar("Rotating", silent=as_json or verbose) as bar:
            outcome = run_job(job_names.ROTATE_KEYS, verbose=verbose, on_progress=bar)
        if not outcome.success:
            raise outcome.error
    if as_json:
        click.echo(json.dumps({"current_key_id": current.key_id, "dry_run": dry_run, **_facts(before)}, indent=2))
        return
    for item in before:
        if item.action is Action.LEAVE or (dry_run and item.action is not Action.NOTHING):
            click.echo(f"{item.filename}: {_WHAT[item.action].format(key=item.key_id, reason=item.reason)}")
    if not todo:
        click.echo(f"No backup is to be put under key {current.key_id}.")
    elif not dry_run:
        click.echo(f"{len(todo)} of {len(before)} backups put under key {current.key_id}.")


def _facts(planned: list[Planned]) -> Mapping[str, Any]:
    return {
        "backups": len(planned),
        "files": [
            {"filename": item.filename, "action": item.action.value, "key_id": item.key_id, "reason": item.reason}
            for item in planned
            if item.action is not Action.NOTHING
        ],
    }

"""`kanbu-backup list`, `show`, `status`: looking, never changing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from textwrap import indent
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.environment import Environment, load_environment
from kanbu_backup_dagster.backup.keys import Keyring, likely_mistake
from kanbu_backup_dagster.backup.manifest import VerificationStatus
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.cli.arguments import open_backup
from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.cli.tables import print_table
from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.restore.staging import find_staging
from kanbu_backup_dagster.restore.swap import find_replaced
from kanbu_backup_dagster.settings import dagster_home, is_secret, value_origins, variable_names
from kanbu_backup_dagster.sources.postgres import Method, find_method

_STATUS_STYLE = {
    VerificationStatus.VERIFIED: "green",
    VerificationStatus.PENDING: "yellow",
    VerificationStatus.FAILED: "bold red",
    VerificationStatus.NO_CHECKSUM: "dim",
}


@cli.command("list")
@click.option(
    "--type", "backup_type", type=click.Choice([kind.value for kind in BackupType]), help="Only of this type."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_backups(backup_type: str | None, as_json: bool) -> None:
    """List the backups in the storage, oldest first."""
    environment = load_environment()
    backups = environment.catalog.backups(BackupType(backup_type) if backup_type else None)
    if as_json:
        click.echo(json.dumps([_summary(backup) for backup in backups], indent=2, ensure_ascii=False))
        return
    if not backups:
        click.echo(f"No backups in {environment.storage.location}.")
        return
    table = Table("File", "Age", "Size", "Rows", "Encrypted with", "Status", "Proven", box=None, header_style="bold")
    for backup in backups:
        manifest = backup.manifest
        rows = f"{sum(manifest.database.rows.values()):,}" if manifest and manifest.database else ""
        style = _STATUS_STYLE[backup.status]
        table.add_row(
            backup.filename,
            _age(backup.created_at),
            f"{backup.file.size:,}",
            rows,
            _key(backup, environment.keys),
            Text(backup.status.value, style=style),
            _age(manifest.proven_at) if manifest and manifest.proven_at else "",
        )
    print_table(table)


def _key(backup: Backup, keys: Keyring) -> str:
    if not backup.name.encrypted:
        return "not encrypted"
    if backup.manifest is None:
        return "unknown key"
    needed = backup.manifest.key_id
    if keys.current is not None and keys.current.key_id == needed:
        return str(needed)
    return f"{needed} ({'previous' if needed in {key.key_id for key in keys.previous} else 'not set'})"


def _summary(backup: Backup) -> dict[str, Any]:
    manifest = backup.manifest
    return {
        "filename": backup.filename,
        "type": backup.type.value,
        "created_at": backup.created_at.isoformat(),
        "size_bytes": backup.file.size,
        "encrypted": backup.name.encrypted,
        "key_id": manifest.key_id if manifest else None,
        "status": backup.status.value,
        "proven_at": manifest.proven_at.isoformat() if manifest and manifest.proven_at else None,
        "problem": backup.problem,
    }


def _age(moment: datetime) -> str:
    seconds = (datetime.now(timezone.utc) - moment).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if abs(seconds) >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@cli.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def show(file: str, as_json: bool) -> None:
    """Tell everything that is known of the backup FILE."""
    found = open_backup(file)
    manifest = found.backup.manifest
    known = manifest.model_dump(mode="json") if manifest else {}
    facts = {**_summary(found.backup), "path": found.storage.path(found.backup.filename), **known}
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    _print_facts(facts)


def _print_facts(facts: Mapping[str, Any]) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if not _is_empty(value):
            table.add_row(name.replace("_", " "), Text(_shown(value)))
    Console().print(table)


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{name}:{_beside(_shown(inner))}" for name, inner in value.items() if not _is_empty(inner))
    if isinstance(value, list):
        return "\n".join(_in_a_line(item) if isinstance(item, Mapping) else str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _beside(text: str) -> str:
    return "\n" + indent(text, "  ") if "\n" in text else f" {text}"


def _in_a_line(item: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(inner)}" for name, inner in item.items() if not _is_empty(inner))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> None:
    """Tell what is set up, what works, and what is in the storage."""
    environment = load_environment()
    facts = {
        "storage": _storage_status(environment),
        "database": _database_status(environment),
        "encryption": _encryption_status(environment),
        "backups": _counts(environment),
        "schedules": _schedules_status(),
        "alerts": _alerts_status(),
        "dagster_home": str(dagster_home()),
        "settings": _settings(environment),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    _print_facts(facts)


def _storage_status(environment: Environment) -> dict[str, Any]:
    storage = environment.storage
    facts: dict[str, Any] = {"kind": environment.settings.storage.value, "location": storage.location}
    try:
        facts |= {
            "accessible": True,
            **storage.facts,
            "files": len(storage.files()),
            "free_bytes": storage.free_bytes(),
        }
    except KanbuError as error:
        facts |= {"accessible": False, "problem": str(error)}
    return facts


def _database_status(environment: Environment) -> dict[str, Any]:
    facts: dict[str, Any] = {"mode_setting": environment.settings.pg_mode.value}
    try:
        method = find_method(environment.settings)
    except KanbuError as error:
        return {**facts, "mode": None, "problem": str(error)}
    state = method.state
    return {
        **facts,
        "mode": method.access.mode,
        "how": method.access.description,
        "left": list(method.rejected),
        "name": state.name,
        "server_version": state.server_version,
        "size_bytes": state.size_bytes,
        "tables": state.tables,
        "left_by_restores": _left_by_restores(method, environment),
    }


def _left_by_restores(method: Method, environment: Environment) -> list[str]:
    """Databases that restores replaced, or that killed ones were loading, and that are still there."""
    try:
        found = find_replaced(method.access, environment.settings)
        staging = find_staging(method.access, environment.settings)
    except KanbuError as error:
        return [f"cannot be looked for: {error}"]
    return [
        f"{entry.name} was {entry.target} until {entry.at:%Y-%m-%d %H:%M} UTC; goes with the next verified backup"
        for entry in found
    ] + [f"{name} belongs to a restore under way; if there is none, the next restore removes it" for name in staging]


def _encryption_status(environment: Environment) -> dict[str, Any]:
    key = environment.keys.current
    former = [previous.key_id for previous in environment.keys.previous]
    facts: dict[str, Any] = {"previous_key_ids": former} if former else {}
    if key is None:
        return {"on": False, "warning": "BACKUP_ENCRYPTION_KEY is not set: backups are not encrypted.", **facts}
    mistake = likely_mistake(environment.settings.secret("encryption_key") or "")
    return {"on": True, "key_id": key.key_id, **({"warning": mistake} if mistake else {}), **facts}


def _counts(environment: Environment) -> dict[str, Any]:
    try:
        backups = environment.catalog.backups()
    except KanbuError:
        return {}
    counts: dict[str, Any] = dict(_by_status(backups))
    proven = [backup.manifest.proven_at for backup in backups if backup.manifest and backup.manifest.proven_at]
    counts["last_proven_at"] = max(proven).isoformat() if proven else None
    counts["by_type"] = {
        kind.value: _by_status([backup for backup in backups if backup.type is kind]) for kind in BackupType
    }
    return counts


def _by_status(backups: Sequence[Backup]) -> dict[str, int]:
    counts = Counter(backup.status for backup in backups)
    return {"total": len(backups), **{status.value: counts[status] for status in VerificationStatus}}


def _schedules_status() -> dict[str, Any]:
    # Imported here: other commands need no Dagster, which takes a second to import.
    from kanbu_backup_dagster.orchestration.configuration import load_configuration

    configuration = load_configuration()
    enabled = sum(row.enabled for row in configuration.file.schedules)
    return {
        "file": str(configuration.file.path) if configuration.file.exists else None,
        "mode": configuration.settings.scheduler_mode.value if configuration.settings else None,
        "enabled": enabled,
        "problems": list(configuration.problems),
    }


def _alerts_status() -> dict[str, Any]:
    """What waits to be told, what was given up, and what is wrong without a run having failed."""
    if not (dagster_home() / "dagster.yaml").exists():
        return {}  # Nothing has run yet, and looking makes nothing.
    from kanbu_backup_dagster.orchestration.alerts import alerts_report
    from kanbu_backup_dagster.orchestration.dagster_home import open_instance

    with open_instance() as instance:
        report = alerts_report(instance)
    facts: dict[str, Any] = {}
    for name, box in report.alerts.outboxes.items():
        facts[name] = {
            "waiting": len(box.waiting),
            "last_delivered": box.delivered_at.isoformat(timespec="seconds") if box.delivered_at else None,
            "trouble": box.last_error,
            "given_up": [
                f"{lost.at:%Y-%m-%d %H:%M} UTC {lost.event} ({lost.key}): {lost.error}" for lost in box.given_up
            ],
        }
    facts["overdue"] = [
        f"schedule {key} since {gap.expected_by:%Y-%m-%d %H:%M} UTC" for key, gap in report.watch.gaps.items()
    ]
    facts["storage_low"] = report.watch.storage_low
    return facts


def _settings(environment: Environment) -> dict[str, str]:
    """Every variable that is set, its value unless it is a secret, and where it was set."""
    origins = value_origins()
    shown = {}
    for field, variable in variable_names().items():
        if variable in origins:
            value = getattr(environment.settings, field)
            plain = "(secret)" if is_secret(field) else getattr(value, "value", value)
            shown[variable] = f"{plain}  [{origins[variable]}]"
    return shown

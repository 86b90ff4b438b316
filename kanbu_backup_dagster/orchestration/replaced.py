"""Databases that restores replaced, let go of once what took their place has a verified backup.

What belongs here: when that is so, and what a run's log says of it. What does not: finding and dropping them
(`restore.swap`).
"""

from __future__ import annotations

from dagster import OpExecutionContext

from kanbu_backup_dagster.backup.catalog import Backup
from kanbu_backup_dagster.backup.manifest import Trigger
from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.restore.swap import drop_replaced
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.postgres import find_method


def let_go_of_replaced(context: OpExecutionContext, settings: Settings, backup: Backup) -> None:
    """Drop what restores of a database replaced before `backup`, which is verified now, was begun.

    Only on the server it is a backup of. What goes wrong is told in the log: the backup is as good without, and the
    next one tries again.
    """
    facts = backup.manifest.database if backup.manifest is not None else None
    if backup.manifest is None or facts is None:
        return
    # It is made for a restore that may yet fail, which is to change nothing.
    if backup.manifest.trigger is Trigger.PRE_RESTORE:
        return
    try:
        method = find_method(settings, database=facts.name)
        if method.state.server_id != facts.server_id:
            context.log.warning(
                f"[Backup] Replaced databases are left alone: {backup.filename} is of another server than "
                f"{method.access.description}."
            )
            return
        told = drop_replaced(method.access, settings, facts.name, before=backup.manifest.created_at)
    except KanbuError as error:
        context.log.warning(f"[Backup] Replaced databases could not be looked for: {error}")
        return
    for line in told:
        context.log.info(f"[Backup] {line}")

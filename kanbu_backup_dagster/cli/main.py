"""`kanbu-backup`: how errors end it, and with which exit codes.

What belongs here: the program's beginning and end. What does not: commands (a module per family).
"""

from __future__ import annotations

import sys

import click

from kanbu_backup_dagster.cli.group import EXIT_FAILED, EXIT_INTERRUPTED, cli
from kanbu_backup_dagster.errors import (
    BackupNotFoundError,
    BusyError,
    CorruptBackupError,
    EncryptionKeyError,
    InterruptedRunError,
    KanbuError,
    SettingsError,
    StorageError,
)

_EXIT_CODES: tuple[tuple[type[KanbuError], int], ...] = (
    (SettingsError, 3),
    (StorageError, 4),
    (BackupNotFoundError, 5),
    (EncryptionKeyError, 6),
    (CorruptBackupError, 7),
    (BusyError, 8),
    (InterruptedRunError, EXIT_INTERRUPTED),
    (KanbuError, EXIT_FAILED),
)


def main() -> None:
    """Run the command line; a user's mistake ends in a message, not a traceback."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("Aborted.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except KanbuError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(next(code for kind, code in _EXIT_CODES if isinstance(error, kind)))

"""`kanbu-backup`: the group, how errors end it, and its exit codes.

What belongs here: what every command shares. What does not: commands (a module per family).
"""

from __future__ import annotations

import sys

import click

from kanbu_backup_dagster import __version__
from kanbu_backup_dagster.errors import (
    BackupNotFoundError,
    BusyError,
    CorruptBackupError,
    EncryptionKeyError,
    KanbuError,
    SettingsError,
    StorageError,
)

# Documented in docs/command-line.md; scripts depend on them.
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
_EXIT_CODES: tuple[tuple[type[KanbuError], int], ...] = (
    (SettingsError, 3),
    (StorageError, 4),
    (BackupNotFoundError, 5),
    (EncryptionKeyError, 6),
    (CorruptBackupError, 7),
    (BusyError, 8),
    (KanbuError, EXIT_FAILED),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Backups of Kanbu's database and source tree.

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a setting, 4 the storage, 5 no such backup,
    6 the encryption key, 7 a damaged backup, 8 another run holds the target, 130 interrupted.
    """


def main() -> None:
    """Run the command line; a user's mistake ends in a message, not a traceback."""
    from kanbu_backup_dagster.cli import (  # noqa: F401  # commands register on import
        backups,
        catalog,
        history,
        inspect,
        restore,
        retention,
        rotate,
        schedules,
        serve,
        verify,
    )

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

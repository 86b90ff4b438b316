"""The command group, and what every command shares.

What belongs here: the group that commands register with, where each is found, and the exit codes they use themselves.
What does not: commands (a module per family), and how errors end the program (`main`).
"""

from __future__ import annotations

import importlib

import click

from kanbu_backup_dagster import __version__

# Documented in docs/command-line.md; scripts depend on them.
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


# Each command and the module of this room it is in; only the one that is asked for is imported. Dagster takes seconds
# to import, and looking at backups on a machine in trouble should not wait for it.
_MODULES = {
    "adopt": "catalog",
    "backup": "backups",
    "catalog": "catalog",
    "decrypt": "backups",
    "drill": "restore",
    "history": "history",
    "hold": "catalog",
    "list": "inspect",
    "prune": "retention",
    "release": "catalog",
    "restore": "restore",
    "retention": "retention",
    "rotate-keys": "rotate",
    "schedules": "schedules",
    "serve": "serve",
    "show": "inspect",
    "status": "inspect",
    "storage": "backups",
    "verify": "verify",
    "webhook": "schedules",
}


class _LazyGroup(click.Group):
    """Imports a command's module when the command is looked up; it registers itself."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        importlib.import_module(f"kanbu_backup_dagster.cli.{_MODULES[cmd_name]}")
        return super().get_command(ctx, cmd_name)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Backups of Kanbu's database and source tree.

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a setting, 4 the storage, 5 no such backup,
    6 the encryption key, 7 a damaged backup, 8 another run holds the target, 130 interrupted.
    """

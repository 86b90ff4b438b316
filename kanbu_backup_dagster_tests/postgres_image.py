"""A container image of this machine's own PostgreSQL, made without a registry.

What belongs here: gathering the files, and an entrypoint that takes the variables of the official `postgres` image
(https://hub.docker.com/_/postgres): POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB, POSTGRES_INITDB_ARGS, PGDATA. What
does not: running an engine (`docker_engine`).
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

POSTGRES_ROOT = Path("/usr/lib/postgresql")
POSTGRES_UID = 999
# What the entrypoint, the tests and somebody looking around need; the official images have all of these.
_PROGRAMS = (
    *("sh", "bash", "cat", "chmod", "chown", "env", "head", "id", "kill", "mkdir", "mktemp", "mv", "ps", "rm"),
    *("setpriv", "sleep", "timeout"),
)

_ENTRYPOINT = f"""#!/bin/bash
set -e
if [ "$(id -u)" = 0 ]; then
  mkdir -p "$PGDATA" /run/postgresql
  chown -R {POSTGRES_UID}:{POSTGRES_UID} "$PGDATA" /run/postgresql
  chmod 700 "$PGDATA"
  exec setpriv --reuid={POSTGRES_UID} --regid={POSTGRES_UID} --clear-groups "$0" "$@"
fi
user="${{POSTGRES_USER:-postgres}}"
database="${{POSTGRES_DB:-$user}}"
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  password_file="$(mktemp)"
  printf '%s\\n' "$POSTGRES_PASSWORD" >"$password_file"
  initdb -D "$PGDATA" -U "$user" --pwfile="$password_file" --auth-local=trust --auth-host=scram-sha-256 \\
    -E UTF8 --locale=C.UTF-8 --no-sync $POSTGRES_INITDB_ARGS
  rm "$password_file"
  echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
  if [ "$database" != postgres ]; then
    echo "CREATE DATABASE \\"$database\\"" | postgres --single -j -D "$PGDATA" postgres
  fi
fi
exec postgres -D "$PGDATA" -c jit=off -c fsync=off "$@"
"""


def installed_major() -> str | None:
    """The newest PostgreSQL server that Debian's packages installed here, such as `15`."""
    majors = [folder.name for folder in POSTGRES_ROOT.glob("*") if (folder / "bin" / "postgres").exists()]
    return max(majors, key=int, default=None)


def write_root_filesystem(target: Path, major: str) -> None:
    """Write a tar of all that PostgreSQL `major` needs to run, for `docker import`."""
    tar = _RootFilesystem()
    for top in ("/bin", "/sbin", "/lib", "/lib64"):
        tar.add(Path(top))
    trees = [
        POSTGRES_ROOT / major,
        Path("/usr/share/postgresql") / major,
        Path("/usr/share/zoneinfo"),
        Path("/usr/lib/locale/C.utf8"),
    ]
    for tree in trees:
        for path in _below(tree):
            tar.add(path)
    for program in _PROGRAMS:
        found = shutil.which(program, path="/usr/bin:/bin:/usr/sbin:/sbin")
        if found is not None:
            tar.add(Path(found))
    for library in _libraries(path for path in list(tar.paths) if not path.is_symlink() and path.is_file()):
        tar.add(library)
    with tarfile.open(target, "w") as archive:
        tar.write(archive)
        _put_folder(archive, "tmp", 0o1777)
        for folder in ("dev", "etc", "proc", "root", "run", "sys", "usr/local", "usr/local/bin", "var", "var/lib"):
            if Path("/", folder) not in tar.paths:
                _put_folder(archive, folder, 0o755)
        _put_folder(archive, "run/postgresql", 0o1777)
        _put_folder(archive, "var/lib/postgresql", 0o755, POSTGRES_UID)
        _put_link(archive, "var/run", "/run")
        _put_file(
            archive, "etc/passwd", f"root:x:0:0::/root:/bin/sh\npostgres:x:{POSTGRES_UID}:{POSTGRES_UID}::/:/bin/sh\n"
        )
        _put_file(archive, "etc/group", f"root:x:0:\npostgres:x:{POSTGRES_UID}:\n")
        _put_file(archive, "usr/local/bin/docker-entrypoint.sh", _ENTRYPOINT, 0o755)


def image_configuration(major: str) -> list[str]:
    """The Dockerfile instructions that go with the file system."""
    return [
        f"ENV PATH={POSTGRES_ROOT}/{major}/bin:/usr/local/bin:/usr/bin:/bin PGDATA=/var/lib/postgresql/data",
        'ENTRYPOINT ["docker-entrypoint.sh"]',
    ]


class _RootFilesystem:
    """Paths of this machine, every link on the way to them included."""

    def __init__(self) -> None:
        self.paths: dict[Path, None] = {}

    def add(self, path: Path) -> None:
        for part in [*reversed(path.parents), path][1:]:
            self.paths[part] = None
            if part.is_symlink():
                target = Path(os.path.normpath(part.parent / part.readlink()))
                self.add(target / path.relative_to(part))
                return

    def write(self, archive: tarfile.TarFile) -> None:
        for path in self.paths:
            archive.add(path, arcname=str(path).lstrip("/"), recursive=False)


def _below(tree: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(tree):
        # The compiler of queries brings LLVM, larger than all the rest; the server is started without it.
        folders[:] = [name for name in folders if name != "bitcode"]
        yield from (Path(folder, name) for name in (*folders, *files) if not name.startswith("llvmjit"))


def _libraries(files: Iterable[Path]) -> set[Path]:
    programs = []
    for path in files:
        with path.open("rb") as stream:
            if stream.read(4) == b"\x7fELF":
                programs.append(path)
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    return {Path(found) for found in re.findall(r"(/\S+) \(0x", said)}


def _put_file(archive: tarfile.TarFile, name: str, text: str, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    content = text.encode()
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def _put_folder(archive: tarfile.TarFile, name: str, mode: int, owner: int = 0) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
    archive.addfile(entry)


def _put_link(archive: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    archive.addfile(entry)

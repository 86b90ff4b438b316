"""Source trees for tests: what a tree looks like to the last bit, and stock tar."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.manifest import SourceFacts
from kanbu_backup_dagster.backup.stages import compress
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.source_tree import SourceTree

NOBODY = 65534

needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")


def archive(tree: SourceTree) -> tuple[list[bytes], SourceFacts]:
    """The chunks of a whole archive, and what it says it holds."""
    opened = tree.open(Settings())
    return list(opened.chunks()), opened.findings()


def stock_tar(chunks: Iterable[bytes], into: Path, *, locale: str = "C.UTF-8") -> str:
    """Compress, extract with `tar xzf` as a user would, and give its complaints back."""
    into.mkdir(exist_ok=True)
    done = subprocess.run(
        ["tar", "xzf", "-", "-C", str(into)],
        input=b"".join(compress(iter(chunks), 1)),
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": locale},
    )
    return done.stderr.decode(errors="replace")


def picture(top: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything an archive is to carry, by name: type, mode, owner, times, size, room on disk, content, links."""
    seen: dict[bytes, tuple[object, ...]] = {}
    inodes: dict[int, list[bytes]] = {}
    root = os.fsencode(top)
    for folder, folders, files in os.walk(root):
        for name in [b".", *files, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]:
            path = os.path.normpath(os.path.join(folder, name))
            status = os.lstat(path)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                inodes.setdefault(status.st_ino, []).append(path[len(root) :])
                content = (inodes[status.st_ino], status.st_size, status.st_blocks, _digest(path))
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            seen[path[len(root) :]] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                content,
            )
    return seen


def _digest(path: bytes) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run as a user whom file modes bind, which root is not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)

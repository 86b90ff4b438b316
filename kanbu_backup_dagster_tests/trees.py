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
from kanbu_backup_dagster.sources.source_tree import CHUNK, SourceTree

NOBODY = 65534

needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")


def set_time(path: Path | bytes, nanoseconds: int) -> None:
    os.utime(path, ns=(nanoseconds, nanoseconds), follow_symlinks=False)


def grow_everything_a_tree_can_hold(top: Path) -> None:
    (top / "empty").mkdir()
    (top / "empty").chmod(0o1755)
    (top / "a.txt").write_text("two names")
    os.link(top / "a.txt", top / "z.txt")
    (top / "nothing").touch()
    (top / "abs").symlink_to("/etc/passwd")
    (top / "dangling").symlink_to("no/where")
    (top / "loop").symlink_to(".")
    (top / "outward").symlink_to("../../..")
    (top / "long target").symlink_to("x/" * 150)
    long = top / ("n" * 200) / ("m" * 255)
    long.mkdir(parents=True)
    (long / ("o" * 100)).write_text("deep")
    os.link(long / ("o" * 100), top / "deep too")
    for name, content in ((b"caf\xe9", b"latin"), ("naïve ☃".encode(), b"utf"), (b"new\nline", b"nl"), (b"-rf", b"-")):
        with open(os.fsencode(top) + b"/" + name, "wb") as file:
            file.write(content)
    (top / "block").write_bytes(os.urandom(512))
    (top / "chunk").write_bytes(os.urandom(CHUNK))
    (top / "large").write_bytes(os.urandom(3 * CHUNK + 1))
    for mode in (0o000, 0o444, 0o4755, 0o2711):
        file = top / f"mode {mode:o}"
        file.write_text("x")
        file.chmod(mode)
    for name, moment in (("old", -1_500_000_000), ("exact", 10**18), ("fine", 10**18 + 1), ("far", 2**33 * 10**9 + 5)):
        (top / name).touch()
        set_time(top / name, moment)
    set_time(top / "dangling", 981173106_789000001)
    if os.geteuid() == 0:
        os.chown(top / "block", 3_000_000, 3_000_001)
        os.chown(top / "loop", 1000, 1001, follow_symlinks=False)
    set_time(top, 1_234_567_890_123_456_789)


def grow_sparse_files(top: Path) -> None:
    def sparse(name: str, size: int, *data: tuple[int, bytes]) -> None:
        with (top / name).open("wb") as file:
            file.truncate(size)
            for offset, content in data:
                file.seek(offset)
                file.write(content)

    sparse("hole only", 1 << 24)
    sparse("hole at both ends", 1 << 24, (5_000_000, b"middle"))
    sparse("data at both ends", (1 << 24) + 7, (0, b"begin"), ((1 << 24) + 3, b"end!"))
    sparse("many", 1 << 24, *((n << 16, os.urandom(5000)) for n in range(0, 200, 3)))
    sparse("caf\udce9 " + "s" * 150, 1 << 22, (1 << 21, b"x"))
    os.link(top / "many", top / "many again")


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
                digest = _digest(path)
                content = (inodes[status.st_ino], status.st_size, os.lstat(path).st_blocks, digest)
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
        # How many blocks it takes is settled when it has reached the disk, the list of its extents included.
        os.fsync(file.fileno())
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

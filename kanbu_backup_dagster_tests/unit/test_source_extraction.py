"""A source archive is extracted whole, as the tree was, or not at all; nothing in it reaches out of the folder."""

from __future__ import annotations

import copy
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kanbu_backup_dagster.errors import CorruptBackupError, KanbuError, RestoreError
from kanbu_backup_dagster.restore.source_tree import check_target, extract_archive
from kanbu_backup_dagster.sources.source_tree import CHUNK, SourceTree
from kanbu_backup_dagster_tests.trees import (
    NOBODY,
    archive,
    grow_everything_a_tree_can_hold,
    grow_sparse_files,
    needs_tar,
    picture,
    unprivileged,
)

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def top(tmp_path: Path) -> Path:
    folder = tmp_path / "kanbu"
    folder.mkdir()
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of its own, in which the tests see everything that is left."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def test_our_archive_comes_back(top: Path, place: Path) -> None:
    grow_everything_a_tree_can_hold(top)
    grow_sparse_files(top)
    chunks, facts = archive(SourceTree(top))
    tree = extract_archive(iter(chunks), place / "out", facts)
    assert (tree.files, tree.folders, tree.links, tree.bytes) == (facts.files, facts.folders, facts.links, facts.bytes)
    assert tree.warnings == (
        "'kanbu/mode 2711': setuid and setgid bits left off",
        "'kanbu/mode 4755': setuid and setgid bits left off",
    )
    for name, mode in (("mode 2711", 0o711), ("mode 4755", 0o755)):
        (top / name).chmod(mode)
    assert picture(place / "out/kanbu") == picture(top)
    assert os.listdir(place) == ["out"]


def test_chunks_of_any_size_do(top: Path, place: Path) -> None:
    grow_everything_a_tree_can_hold(top)
    chunks, _ = archive(SourceTree(top))
    whole = b"".join(chunks)
    extract_archive((whole[n : n + 777] for n in range(0, len(whole), 777)), place / "odd")
    extract_archive(iter((b"", *chunks, b"")), place / "even")
    assert picture(place / "odd/kanbu") == picture(place / "even/kanbu")


@needs_tar
@pytest.mark.parametrize("form", ["gnu", "pax", "pax --sparse", "gnu --sparse", "pax --sparse-version=0.1 --sparse"])
def test_archives_made_by_stock_tar_come_back(top: Path, place: Path, form: str) -> None:
    grow_everything_a_tree_can_hold(top)
    grow_sparse_files(top)
    for name in ("mode 2711", "mode 4755"):
        (top / name).chmod(0o600)
    os.link(top / "dangling", top / "dangling too", follow_symlinks=False)
    made = subprocess.run(
        ["tar", "cf", "-", f"--format={form.split()[0]}", *form.split()[1:], "."],
        cwd=top,
        check=True,
        capture_output=True,
    )
    extract_archive(iter((made.stdout,)), place / "out")

    def comparable(folder: Path) -> dict[bytes, object]:
        whole_seconds = "gnu" in form
        seen = {}
        for name, (mode, uid, gid, mtime, content) in picture(folder).items():
            size_on_disk = 2 if isinstance(content, tuple) and "sparse" not in form else None
            if isinstance(content, tuple):
                content = tuple(part for n, part in enumerate(content) if n != size_on_disk)
            seen[name] = (mode, uid, gid, mtime // 10**9 if whole_seconds else mtime, content)
        seen.pop(b"")
        return seen

    assert comparable(place / "out") == comparable(top)


@pytest.mark.skipif(not AS_ROOT, reason="needs another user's files to extract")
def test_another_user_owns_what_it_extracts_and_modes_hold(top: Path, open_tmp_path: Path) -> None:
    (top / "fixed").mkdir()
    (top / "fixed/file").write_text("x")
    (top / "fixed/file").chmod(0o466)
    (top / "fixed").chmod(0o555)
    (top / "link").symlink_to("fixed")
    os.chown(top / "fixed/file", 1234, 1234)
    chunks, facts = archive(SourceTree(top))
    os.chown(open_tmp_path, NOBODY, NOBODY)
    with unprivileged():
        extract_archive(iter(chunks), open_tmp_path / "out", facts)
    out = open_tmp_path / "out/kanbu"
    assert {path.lstat().st_uid for path in (out, out / "fixed", out / "fixed/file", out / "link")} == {NOBODY}
    assert [oct((out / name).stat().st_mode & 0o7777) for name in ("fixed", "fixed/file")] == ["0o555", "0o466"]


Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", content: bytes = b"") -> Entry:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, len(content)
    return member, content


def tar_of(*entries: Entry) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as made:
        for member, content in entries:
            made.addfile(member, io.BytesIO(content))
    return raw.getvalue()


GOOD = entry("kanbu/file", content=b"good")
OUTSIDE = "{outside}"
MALICIOUS = {
    "an absolute name": [entry(OUTSIDE + "/new")],
    "a name that climbs": [entry("../outside/new")],
    "a name that climbs later": [entry("kanbu/x/../../../outside/new")],
    "a folder that climbs": [entry("kanbu/../../outside/new", tarfile.DIRTYPE)],
    "a file through a link": [entry("kanbu/x", tarfile.SYMTYPE, OUTSIDE), entry("kanbu/x/new")],
    "a folder through a link": [entry("kanbu/x", tarfile.SYMTYPE, OUTSIDE), entry("kanbu/x/new", tarfile.DIRTYPE)],
    "a link through a link": [
        entry("kanbu/x", tarfile.SYMTYPE, OUTSIDE), entry("kanbu/x/new", tarfile.SYMTYPE, "y"),
    ],
    "a link in a link, backwards": [
        entry("kanbu/x/new", tarfile.SYMTYPE, "y"), entry("kanbu/x", tarfile.SYMTYPE, OUTSIDE),
    ],
    "a hard link through a link": [
        entry("kanbu/x", tarfile.SYMTYPE, OUTSIDE), entry("kanbu/new", tarfile.LNKTYPE, "kanbu/x/victim"),
    ],
    "a hard link to a link, written to": [
        entry("kanbu/x", tarfile.SYMTYPE, OUTSIDE + "/victim"),
        entry("kanbu/y", tarfile.LNKTYPE, "kanbu/x"),
        entry("kanbu/y", content=b"overwritten"),
    ],
    "a file over a link": [
        entry("kanbu/x", tarfile.SYMTYPE, OUTSIDE + "/victim"), entry("kanbu/x", content=b"overwritten"),
    ],
    "a link over a file": [entry("kanbu/x"), entry("kanbu/x", tarfile.SYMTYPE, OUTSIDE)],
    "a link over a folder": [entry("kanbu/x", tarfile.DIRTYPE), entry("kanbu/x", tarfile.SYMTYPE, OUTSIDE)],
    "a link twice": [entry("kanbu/x", tarfile.SYMTYPE, "a"), entry("kanbu/x", tarfile.SYMTYPE, "b")],
    "a link in place of the folder": [entry(".", tarfile.SYMTYPE, OUTSIDE)],
    "a hard link to an absolute name": [entry("kanbu/new", tarfile.LNKTYPE, OUTSIDE + "/victim")],
    "a hard link that climbs": [entry("kanbu/new", tarfile.LNKTYPE, "kanbu/../../outside/victim")],
    "a hard link to a folder": [entry("kanbu/x", tarfile.DIRTYPE), entry("kanbu/new", tarfile.LNKTYPE, "kanbu/x")],
    "a hard link to the folder itself": [entry("kanbu/new", tarfile.LNKTYPE, ".")],
    "a hard link to itself": [entry("kanbu/new", tarfile.LNKTYPE, "kanbu/new")],
    "a hard link to what comes later": [entry("kanbu/new", tarfile.LNKTYPE, "kanbu/later"), entry("kanbu/later")],
    "a hard link over a file": [entry("kanbu/x"), entry("kanbu/x", tarfile.LNKTYPE, "kanbu/file")],
    "a file twice": [entry("kanbu/x"), entry("kanbu/./x")],
    "a file as a folder": [entry("kanbu/x"), entry("kanbu/x/y")],
    "a folder as a file": [entry("kanbu/x/y"), entry("kanbu/x")],
    "a file without a name": [entry(".")],
    "a character device": [entry("kanbu/null", tarfile.CHRTYPE)],
    "a block device": [entry("kanbu/disk", tarfile.BLKTYPE)],
    "a FIFO": [entry("kanbu/pipe", tarfile.FIFOTYPE)],
}  # fmt: skip


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("attack", MALICIOUS)
def test_a_malicious_archive_is_refused_whole(place: Path, attack: str, existing: bool) -> None:
    outside = place / "outside"
    outside.mkdir()
    (outside / "victim").write_text("unharmed")
    entries = [GOOD]
    for member, content in MALICIOUS[attack]:
        changed = copy.copy(member)
        changed.name, changed.linkname = (name.format(outside=outside) for name in (member.name, member.linkname))
        entries.append((changed, content))
    if existing:
        (place / "out").mkdir()
    before = (picture(place), outside.stat().st_mtime_ns)
    with pytest.raises(RestoreError, match="refused"):
        extract_archive(iter((tar_of(*entries),)), place / "out")
    after = picture(place)
    after[b""] = before[0][b""]  # its time moved: the staging folder came and went
    assert (after, outside.stat().st_mtime_ns) == before


def test_links_to_outside_come_back_as_they_were(place: Path) -> None:
    links = {
        "absolute": "/etc/passwd",
        "dangling": "no/where",
        "outward": "../../..",
        "loop": "loop",
        "odd": "a//../ b ",
    }
    raw = tar_of(GOOD, *(entry(f"kanbu/{name}", tarfile.SYMTYPE, target) for name, target in links.items()))
    extract_archive(iter((raw,)), place / "out")
    assert {name: os.readlink(place / "out/kanbu" / name) for name in links} == links


def test_what_another_program_writes_is_read_too(place: Path) -> None:
    members = [
        entry("./", tarfile.DIRTYPE),
        entry("./kanbu/no entry/for/its/folders"),
        entry("./kanbu", tarfile.DIRTYPE),
        entry("./kanbu//double", content=b"slash"),
        entry("kanbu/old style", tarfile.AREGTYPE, content=b"v7"),
        entry("kanbu/contiguous", tarfile.CONTTYPE, content=b"c"),
    ]
    tree = extract_archive(iter((tar_of(*members),)), place / "out")
    assert (tree.files, tree.folders, tree.bytes) == (4, 2, 8)
    assert (place / "out/kanbu/double").read_text() == "slash"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda out: (out.mkdir(), (out / "x").touch()), "not empty"),
        (lambda out: out.touch(), "not a folder"),
        (lambda out: out.symlink_to("nowhere"), "link to nowhere"),
    ],
)
def test_a_folder_that_cannot_be_used(place: Path, make: Callable[[Path], object], why: str) -> None:
    make(place / "out")
    before = picture(place)
    for attempt in (check_target, lambda out: extract_archive(iter((tar_of(GOOD),)), out)):
        with pytest.raises(RestoreError, match=why):
            attempt(place / "out")
    assert picture(place) == before


def test_a_mount_point_or_a_missing_parent_is_refused(place: Path) -> None:
    with pytest.raises(RestoreError, match=f"the folder {place / 'missing'} does not exist"):
        check_target(place / "missing/out")
    empty_mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounts = [mount for mount in map(Path, empty_mounts) if mount.is_dir() and os.access(mount, os.R_OK)]
    empty = [mount for mount in mounts if not any(mount.iterdir())]
    if not empty:
        pytest.skip("no empty mount point on this machine")
    with pytest.raises(RestoreError, match="mount point"):
        check_target(empty[0])


def test_the_folder_is_the_users_own(place: Path) -> None:
    (place / "existing").mkdir(mode=0o750)
    if AS_ROOT:
        os.chown(place / "existing", 1000, 1001)
    (place / "link").symlink_to("existing")
    before = (place / "existing").stat()
    extract_archive(iter((tar_of(GOOD),)), place / "link")
    after = (place / "existing").stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert (place / "link").is_symlink()
    mask = os.umask(0o027)
    try:
        extract_archive(iter((tar_of(GOOD),)), place / "new")
    finally:
        os.umask(mask)
    assert oct((place / "new").stat().st_mode) == "0o40750"


def test_an_archive_cut_anywhere_is_refused(place: Path) -> None:
    whole = tar_of(entry("kanbu", tarfile.DIRTYPE), GOOD, entry("kanbu/" + "n" * 150, content=b"x" * 600))
    end = whole.rindex(b"x") // 512 * 512 + 512
    for length in [*range(0, end, 37), *range(0, end + 1, 512)]:
        with pytest.raises(CorruptBackupError):
            extract_archive(iter((whole[:length],)), place / "out")
        assert os.listdir(place) == []
    extract_archive(iter((whole[: end + 512],)), place / "out")


def test_a_damaged_header_is_no_end(place: Path) -> None:
    whole = bytearray(tar_of(GOOD, entry("kanbu/second"), entry("kanbu/third")))
    second = whole.index(b"kanbu/second")
    for byte in range(second, second + 512):
        damaged = bytearray(whole)
        damaged[byte] ^= 0x41
        try:
            extract_archive(iter((bytes(damaged),)), place / f"{byte}")
        except CorruptBackupError:
            continue
        # The checksum is written in more digits than it needs: some of its bytes say nothing.
        assert second + 148 <= byte < second + 156
        assert sorted(os.listdir(place / f"{byte}/kanbu")) == ["file", "second", "third"]


ARCHIVE = tar_of(
    entry("kanbu", tarfile.DIRTYPE),
    GOOD,
    entry("kanbu/" + "n" * 150, content=b"x" * 600),
    entry("kanbu/link", tarfile.SYMTYPE, "t" * 150),
    entry("kanbu/hard", tarfile.LNKTYPE, "kanbu/file"),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, len(ARCHIVE) - 1), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4),
    st.booleans(),
)
def test_no_damage_reaches_out_or_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, damages: list[tuple[int, bytes]], mend: bool
) -> None:
    place = tmp_path_factory.mktemp("damage")
    damaged = bytearray(ARCHIVE)
    for position, content in damages:
        damaged[position : position + len(content)] = content
    if mend:  # right checksums let the damage reach the parser
        for block in range(0, len(damaged) - 511, 512):
            if damaged[block + 257 : block + 262] == b"ustar":
                damaged[block + 148 : block + 156] = b" " * 8
                damaged[block + 148 : block + 156] = b"%06o\0 " % sum(damaged[block : block + 512])
    try:
        extract_archive(iter((bytes(damaged),)), place / "out")
    except KanbuError:
        assert os.listdir(place) == []
    else:
        assert os.listdir(place) == ["out"]


def test_what_goes_wrong_after_the_archive_leaves_nothing(place: Path) -> None:
    def failing_at_its_end() -> Iterator[bytes]:
        yield tar_of(GOOD)
        raise CorruptBackupError("Checksum mismatch")

    with pytest.raises(CorruptBackupError, match="Checksum mismatch"):
        extract_archive(failing_at_its_end(), place / "out")
    assert os.listdir(place) == []


def test_an_archive_that_contradicts_its_manifest_is_refused(top: Path, place: Path) -> None:
    (top / "one").write_text("1")
    _, facts = archive(SourceTree(top))
    (top / "two").write_text("22")
    chunks, _ = archive(SourceTree(top))
    with pytest.raises(CorruptBackupError) as refused:
        extract_archive(iter(chunks), place / "out", facts)
    assert refused.value.tried == (
        "files: 2 in the archive, 1 in the manifest",
        "bytes: 3 in the archive, 1 in the manifest",
    )
    assert os.listdir(place) == []


def test_a_full_disk_leaves_nothing(place: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RestoreError, match="File too large; nothing was left"):
            extract_archive(iter((tar_of(GOOD, entry("kanbu/large", content=bytes(200_000))),)), place / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(place) == []


def test_somebody_who_writes_into_the_folder_meanwhile_loses_nothing(place: Path) -> None:
    def interfering() -> Iterator[bytes]:
        yield tar_of(GOOD)
        (place / "out/theirs").write_text("theirs")

    with pytest.raises(RestoreError, match="Directory not empty"):
        extract_archive(interfering(), place / "out")
    assert os.listdir(place) == ["out"]
    assert os.listdir(place / "out") == ["theirs"]


def test_killed_midway_the_folder_is_empty(place: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from kanbu_backup_dagster.restore.source_tree import extract_archive\n"
        "extract_archive(iter(lambda: sys.stdin.buffer.read(1 << 16), b''), pathlib.Path(sys.argv[1]))\n"
    )
    raw = tar_of(GOOD, entry("kanbu/large", content=bytes(CHUNK)), entry("kanbu/last", content=bytes(CHUNK)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(place / "out")], stdin=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None
        process.stdin.write(raw[: CHUNK + CHUNK // 2])
        process.stdin.flush()
        deadline = time.monotonic() + 30
        while not list(place.glob(".kanbu-restore-*/kanbu/last")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.stdin.close()
    assert os.listdir(place / "out") == []


def test_memory_stays_flat(place: Path) -> None:
    small = [entry(f"kanbu/{n}", content=b"x" * 600) for n in range(3000)]
    whole = tar_of(*small, entry("kanbu/large", content=bytes(8 * CHUNK)))
    chunks = [whole[n : n + CHUNK] for n in range(0, len(whole), CHUNK)]
    tracemalloc.start()
    try:
        extract_archive(iter(chunks), place / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * CHUNK

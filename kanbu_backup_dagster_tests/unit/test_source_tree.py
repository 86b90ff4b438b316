"""The archive of a source tree comes back with stock tar as the tree was, and says what it left out."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import socket
import stat
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kanbu_backup_dagster.backup.manifest import ExclusionFacts, SourceFacts
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.backup.recipe import Recipe
from kanbu_backup_dagster.errors import SettingsError, SourceError
from kanbu_backup_dagster.settings import OnUnreadable, Settings
from kanbu_backup_dagster.sources import source_tree
from kanbu_backup_dagster.sources.source_tree import CHUNK, SourceTree, prepare_archive
from kanbu_backup_dagster.sources.tree_walk import STORAGE_RULE
from kanbu_backup_dagster_tests.trees import (
    archive,
    grow_everything_a_tree_can_hold,
    grow_sparse_files,
    needs_tar,
    picture,
    set_time,
    stock_tar,
    unprivileged,
)

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def top(tmp_path: Path) -> Path:
    folder = tmp_path / "kanbu"
    folder.mkdir()
    return folder


@needs_tar
@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_stock_tar_brings_everything_back(top: Path, tmp_path: Path, locale: str) -> None:
    grow_everything_a_tree_can_hold(top)
    chunks, facts = archive(SourceTree(top))
    stock_tar(chunks, tmp_path / "out", locale=locale)
    assert picture(tmp_path / "out/kanbu") == picture(top)
    assert (facts.folders, facts.links, facts.warnings) == (4, 7, ())
    regular = {entry[-1][0][0]: entry[-1][1] for entry in picture(top).values() if isinstance(entry[-1], tuple)}
    assert (facts.files, facts.bytes) == (len(regular), sum(regular.values()))


@needs_tar
def test_sparse_files_stay_sparse(top: Path, tmp_path: Path) -> None:
    grow_sparse_files(top)
    if (top / "hole only").stat().st_blocks * 512 >= 1 << 24:
        pytest.skip("no sparse files on this file system")
    chunks, facts = archive(SourceTree(top))
    stock_tar(chunks, tmp_path / "out")
    assert picture(tmp_path / "out/kanbu") == picture(top)
    assert sum(map(len, chunks)) < 2_000_000 < facts.bytes


@needs_tar
def test_a_sparse_file_that_grows_past_a_gap_while_it_is_looked_at(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (top / "a-growing").open("wb") as file:
        file.truncate(1 << 20)
    (top / "b-after").write_bytes(b"what comes after it")
    look = source_tree._data_extents

    def grown(fd: int, status: os.stat_result) -> list[tuple[int, int]]:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("a-growing"):
            with (top / "a-growing").open("r+b") as file:
                file.seek(3 << 20)
                file.write(b"more")
        return look(fd, status)

    monkeypatch.setattr(source_tree, "_data_extents", grown)
    chunks, facts = archive(SourceTree(top))
    stock_tar(chunks, tmp_path / "out")
    assert (tmp_path / "out/kanbu/a-growing").read_bytes() == bytes(1 << 20)
    assert (tmp_path / "out/kanbu/b-after").read_bytes() == b"what comes after it"
    assert any("grew by" in warning for warning in facts.warnings)


@needs_tar
def test_a_sparse_file_beyond_8_gib(top: Path, tmp_path: Path) -> None:
    with (top / "huge").open("wb") as file:
        file.truncate(9 << 30)
        file.seek(8 << 30)
        file.write(b"here")
    chunks, facts = archive(SourceTree(top))
    stock_tar(chunks, tmp_path / "out")
    with (tmp_path / "out/kanbu/huge").open("rb") as file:
        file.seek(8 << 30)
        assert file.read(5) == b"here\0"
        assert file.seek(0, os.SEEK_END) == 9 << 30 == facts.bytes


NAMES = st.binary(min_size=1, max_size=120).filter(
    lambda name: not {0, ord("/")} & set(name) and name not in (b".", b"..")
)
TREES = st.recursive(
    st.binary(max_size=2000) | st.builds(lambda target: ("link", target), st.binary(min_size=1, max_size=200)),
    lambda below: st.dictionaries(NAMES, below, max_size=4),
    max_leaves=12,
)


@needs_tar
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.dictionaries(NAMES, TREES, max_size=5), st.integers(0, 2**32 * 10**9))
def test_any_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: dict[bytes, object], moment: int) -> None:
    place = tmp_path_factory.mktemp("any")
    (place / "top").mkdir()

    def grow(folder: bytes, entries: dict[bytes, object]) -> None:
        for name, entry in entries.items():
            path = folder + b"/" + name
            if isinstance(entry, dict):
                os.mkdir(path)
                grow(path, entry)
            elif isinstance(entry, tuple):
                os.symlink(entry[1].replace(b"\0", b"0"), path)
            else:
                assert isinstance(entry, bytes)
                with open(path, "wb") as file:
                    file.write(entry)
            set_time(path, moment)

    grow(os.fsencode(place / "top"), tree)
    chunks, _ = archive(SourceTree(place / "top", exclusions=()))
    stock_tar(chunks, place / "out")
    assert picture(place / "out/top") == picture(place / "top")


def test_the_same_tree_gives_the_same_bytes_in_chunks_of_a_megabyte(top: Path) -> None:
    grow_everything_a_tree_can_hold(top)
    first, _ = archive(SourceTree(top))
    second, _ = archive(SourceTree(top))
    assert first == second
    assert all(CHUNK <= len(chunk) < 3 * CHUNK for chunk in first[:-1])


@needs_tar
def test_the_top_folder_is_named_by_the_path_even_through_a_link(top: Path, tmp_path: Path) -> None:
    (top / "file").touch()
    (tmp_path / "current").symlink_to(top)
    chunks, facts = archive(SourceTree(tmp_path / "current"))
    stock_tar(chunks, tmp_path / "out")
    assert picture(tmp_path / "out/current") == picture(top)
    assert facts.path == str(tmp_path / "current")


def test_what_is_excluded_is_counted_by_rule(top: Path, tmp_path: Path) -> None:
    for folder in ("node_modules/x/dist", "apps/web/node_modules", "apps/web/dist", "uploads", "apps/uploads"):
        (top / folder).mkdir(parents=True)
        (top / folder / "file").write_bytes(b"12345")
    (top / "apps/a.log").write_bytes(b"123")
    (top / "apps/b.log").symlink_to("a.log")
    (top / "node_modules/link").symlink_to("/")
    rules = ("node_modules/", "dist/", "*.log", "/uploads/", "never")
    chunks, facts = archive(SourceTree(top, exclusions=rules))
    assert facts.excluded == (
        # node_modules, x, dist, file, link; then the other folder and its file
        ExclusionFacts(rule="node_modules/", count=7, bytes=10),
        ExclusionFacts(rule="dist/", count=2, bytes=5),
        ExclusionFacts(rule="*.log", count=2, bytes=3),
        ExclusionFacts(rule="/uploads/", count=2, bytes=5),
        ExclusionFacts(rule="never", count=0, bytes=0),
    )
    stock_tar(chunks, tmp_path / "out")
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")) == [
        "kanbu", "kanbu/apps", "kanbu/apps/uploads", "kanbu/apps/uploads/file", "kanbu/apps/web",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["backups", "elsewhere"])
def test_the_storage_folder_is_not_archived_into_itself(top: Path, tmp_path: Path, name: str) -> None:
    (top / "data/backups").mkdir(parents=True)
    (top / "data/backups/kanbu_source.tar.gz").write_bytes(bytes(1000))
    (top / "data/other").mkdir()
    (tmp_path / "elsewhere").symlink_to(top / "data/backups")
    storage = {"backups": top / "data/backups", "elsewhere": tmp_path / "elsewhere"}[name]
    _, facts = archive(SourceTree(top, storage_folder=storage))
    assert (facts.files, facts.folders) == (0, 3)
    assert facts.excluded[-1] == ExclusionFacts(rule=STORAGE_RULE, count=1, bytes=0)


def test_a_storage_folder_known_by_its_inode_alone(top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a bind mount looks like: the same folder by two paths, neither of them a link.
    (top / "backups").mkdir()
    (tmp_path / "by another path").symlink_to(top / "backups")
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    _, facts = archive(SourceTree(top, storage_folder=tmp_path / "by another path"))
    assert facts.folders == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.touch(), "is not a folder"),
        (lambda path: path.symlink_to("nowhere"), "does not exist"),
    ],
)
def test_a_path_that_cannot_be_archived(tmp_path: Path, make: object, words: str) -> None:
    path = tmp_path / "kanbu"
    assert callable(make)
    make(path)
    for attempt in (lambda: prepare_archive(Settings(source_path=path)), lambda: archive(SourceTree(path))):
        with pytest.raises(SourceError) as refused:
            attempt()
        assert f"{path} (KANBU_SOURCE_PATH) {words}" in refused.value.message


def test_the_root_and_the_storage_itself_are_refused(top: Path) -> None:
    with pytest.raises(SourceError, match="root of the file system"):
        SourceTree(Path("/")).survey()
    with pytest.raises(SourceError, match="where backups are kept"):
        SourceTree(top, storage_folder=top).survey()


def test_what_is_no_file_folder_or_link_is_skipped_and_said_so(top: Path) -> None:
    os.mkfifo(top / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(top)  # a socket's path may only be about 100 bytes long
        listener.bind("socket")
        kinds = {"pipe": "a FIFO", "socket": "a socket"}
        if AS_ROOT:
            os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            kinds["null"] = "a character device"
        _, facts = archive(SourceTree(top))
    assert facts.warnings == tuple(f"kanbu/{name}: {kind}: skipped" for name, kind in sorted(kinds.items()))
    assert (facts.files, facts.folders) == (0, 1)


def interrupted(tree: SourceTree, change: object) -> tuple[list[bytes], SourceFacts]:
    """Archive `tree`, whose first file is larger than a chunk, calling `change` after the first chunk."""
    assert callable(change)
    opened = tree.open(Settings())
    chunks = opened.chunks()
    first = next(chunks)
    change()
    return [first, *chunks], opened.findings()


@pytest.fixture
def busy(top: Path) -> SourceTree:
    (top / "a").write_bytes(b"a" * 4 * CHUNK)
    (top / "b").write_bytes(b"b" * 1000)
    (top / "c").mkdir()
    (top / "c/file").write_bytes(b"c" * 1000)
    (top / "d").symlink_to("a")
    return SourceTree(top)


@needs_tar
def test_a_file_that_shrinks_is_filled_with_zeros(busy: SourceTree, tmp_path: Path) -> None:
    chunks, facts = interrupted(busy, lambda: os.truncate(busy.path / "a", 2 * CHUNK + 5))
    stock_tar(chunks, tmp_path / "out")
    assert (tmp_path / "out/kanbu/a").read_bytes() == b"a" * (2 * CHUNK + 5) + bytes(2 * CHUNK - 5)
    assert (tmp_path / "out/kanbu/c/file").read_bytes() == b"c" * 1000
    assert facts.warnings == (
        f"kanbu/a: shrank while it was read: {2 * CHUNK - 5} bytes at its end are zeros in the archive",
    )


@needs_tar
def test_a_file_that_grows_is_cut(busy: SourceTree, tmp_path: Path) -> None:
    def grow() -> None:
        with (busy.path / "a").open("ab") as file:
            file.write(b"more")

    chunks, facts = interrupted(busy, grow)
    stock_tar(chunks, tmp_path / "out")
    assert (tmp_path / "out/kanbu/a").read_bytes() == b"a" * 4 * CHUNK
    assert facts.warnings == (f"kanbu/a: grew by 4 bytes while it was read: cut at {4 * CHUNK} in the archive",)


def test_a_file_that_is_rewritten_is_said_so(busy: SourceTree) -> None:
    def rewrite() -> None:
        with (busy.path / "a").open("r+b") as file:
            file.write(b"b")

    _, facts = interrupted(busy, rewrite)
    assert facts.warnings == ("kanbu/a: changed while it was read",)


@needs_tar
def test_entries_that_vanish_are_skipped_and_said_so(busy: SourceTree, tmp_path: Path) -> None:
    def vanish() -> None:
        (busy.path / "b").unlink()
        (busy.path / "c/file").unlink()
        (busy.path / "c").rmdir()
        (busy.path / "d").unlink()

    chunks, facts = interrupted(busy, vanish)
    stock_tar(chunks, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/kanbu").iterdir()] == ["a"]
    assert facts.warnings == tuple(f"kanbu/{name}: vanished before it was read: skipped" for name in "bcd")
    assert (facts.files, facts.folders, facts.links) == (1, 1, 0)


def test_an_entry_swapped_for_a_link_leads_nowhere(busy: SourceTree, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("SECRET")

    def swap() -> None:
        (busy.path / "b").unlink()
        (busy.path / "b").symlink_to(tmp_path / "outside/file")
        (busy.path / "c/file").unlink()
        (busy.path / "c").rmdir()
        (busy.path / "c").symlink_to(tmp_path / "outside")
        (busy.path / "d").unlink()
        (busy.path / "d").write_text("a file now")

    chunks, facts = interrupted(busy, swap)
    assert b"SECRET" not in b"".join(chunks)
    assert facts.warnings == tuple(f"kanbu/{name}: was replaced while the tree was read: skipped" for name in "bcd")


@pytest.mark.timeout(20)
def test_an_entry_swapped_for_a_fifo_does_not_hang(busy: SourceTree) -> None:
    def swap() -> None:
        (busy.path / "b").unlink()
        os.mkfifo(busy.path / "b")

    _, facts = interrupted(busy, swap)
    assert facts.warnings == ("kanbu/b: was replaced while the tree was read: skipped",)


@pytest.fixture
def forbidding(open_tmp_path: Path) -> Path:
    top = open_tmp_path / "kanbu"
    (top / "closed").mkdir(parents=True)
    (top / "closed/file").touch()
    (top / "secret").write_text("x")
    (top / "public").write_text("y")
    for path in (top / "closed", top / "secret"):
        path.chmod(0)
    return top


def test_unreadable_entries_fail_the_backup_and_are_all_named(forbidding: Path) -> None:
    with unprivileged():
        with pytest.raises(SourceError) as refused:
            SourceTree(forbidding).survey()
        assert refused.value.message == "2 of the source tree's entries cannot be read."
        assert refused.value.tried == ("kanbu/closed: Permission denied", "kanbu/secret: Permission denied")
        assert "BACKUP_SOURCE_UNREADABLE" in refused.value.advice
        with pytest.raises(SourceError, match="kanbu/closed: Permission denied"):
            archive(SourceTree(forbidding))


@needs_tar
def test_unreadable_entries_are_skipped_if_so_configured(forbidding: Path, open_tmp_path: Path) -> None:
    tree = SourceTree(forbidding, on_unreadable=OnUnreadable.SKIP)
    with unprivileged():
        assert tree.survey().files == 1
        chunks, facts = archive(tree)
    stock_tar(chunks, open_tmp_path / "out")
    assert [path.name for path in (open_tmp_path / "out/kanbu").iterdir()] == ["public"]
    assert facts.warnings == (
        "kanbu/closed: cannot be read (Permission denied): skipped",
        "kanbu/secret: cannot be read (Permission denied): skipped",
    )


@pytest.mark.parametrize("position", [0, 2 * CHUNK])
@pytest.mark.parametrize("policy", list(OnUnreadable))
def test_a_disk_that_fails(
    busy: SourceTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int, policy: OnUnreadable
) -> None:
    real = os.pread

    def failing(fd: int, size: int, offset: int) -> bytes:
        if os.fstat(fd).st_size == 4 * CHUNK and offset == position:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    tree = SourceTree(busy.path, on_unreadable=policy)
    if policy is OnUnreadable.FAIL:
        with pytest.raises(SourceError) as failed:
            archive(tree)
        assert failed.value.tried == ("kanbu/a: Input/output error",)
        return
    chunks, facts = archive(tree)
    stock_tar(chunks, tmp_path / "out")
    assert (tmp_path / "out/kanbu/b").read_bytes() == b"b" * 1000
    if position:
        assert (tmp_path / "out/kanbu/a").read_bytes() == b"a" * position + bytes(4 * CHUNK - position)
        told = f"kanbu/a: cannot be read (Input/output error): zeros in the archive from byte {position} on"
        assert facts.warnings == (told,)
    else:
        assert not (tmp_path / "out/kanbu/a").exists()
        assert facts.warnings == ("kanbu/a: cannot be read (Input/output error): skipped",)


def test_many_warnings_are_counted_not_listed(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_tree, "MAX_WARNINGS", 2)
    for n in range(5):
        os.mkfifo(top / f"{n}")
    _, facts = archive(SourceTree(top))
    assert facts.warnings == ("kanbu/0: a FIFO: skipped", "kanbu/1: a FIFO: skipped", "and 3 more warnings")


def test_facts_are_text_whatever_names_are(tmp_path: Path) -> None:
    top = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n"))
    top.mkdir()
    os.mkfifo(top / "p\udcff\x1b")
    _, facts = archive(SourceTree(top))
    assert facts.path == f"{tmp_path}/caf\\xe9\\n"
    assert facts.warnings == ("caf\\xe9\\n/p\\xff\\x1b: a FIFO: skipped",)
    assert SourceFacts.model_validate_json(facts.model_dump_json().encode()) == facts


def test_the_survey_and_the_source(top: Path, tmp_path: Path) -> None:
    grow_everything_a_tree_can_hold(top)
    (top / ".env").write_text("KEY=1")
    (top / ".env.production").touch()
    (top / ".env.example").touch()
    (top / ".env.local").touch()
    (top / "skip").mkdir()
    settings = Settings(source_path=top, local_path=tmp_path / "backups", source_exclude=" skip/ , *.skipped,")
    tree, survey = prepare_archive(settings)
    chunks, facts = archive(tree)
    assert (survey.files, survey.folders, survey.links, survey.bytes) == (
        facts.files, facts.folders, facts.links, facts.bytes,
    )  # fmt: skip
    assert survey.env_files == ("kanbu/.env", "kanbu/.env.production")
    assert tree.estimated_bytes == pytest.approx(sum(map(len, chunks)), rel=0.05)
    assert [entry.rule for entry in facts.excluded if entry.count] == [".env.local", "skip/"]
    assert tree.storage_folder == tmp_path / "backups"
    assert (tree.name, tree.backup_type) == ("archive", BackupType.SOURCE)
    assert pickle.loads(pickle.dumps(Recipe(tree))) == Recipe(tree)


def test_a_malformed_rule_fails_before_bytes_flow(top: Path) -> None:
    with pytest.raises(SettingsError, match="'!x'"):
        prepare_archive(Settings(source_path=top, source_exclude="a/, !x"))


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_closing_ends_it_all(busy: SourceTree) -> None:
    before = open_descriptors()
    opened = busy.open(Settings())
    assert open_descriptors() == before
    chunks = opened.chunks()
    next(chunks)
    assert open_descriptors() != before
    chunks.close()
    assert open_descriptors() == before
    with pytest.raises(RuntimeError):
        opened.findings()


def test_folders_nested_deeper_than_descriptors_are_said_to_be(top: Path) -> None:
    deepest = top
    for _ in range(60):
        deepest = deepest / "d"
        deepest.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_descriptors()
    limit = next(n for n in range(soft) if n - sum(int(fd) < n for fd in before) == 30)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(SourceError, match="Too many open files"):
            archive(SourceTree(top))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors() == before
    assert archive(SourceTree(top))[1].folders == 61


def test_memory_stays_flat(top: Path) -> None:
    with (top / "large").open("wb") as file:
        for _ in range(48):
            file.write(os.urandom(CHUNK))
    for folder in range(20):
        (top / str(folder)).mkdir()
        for n in range(50):
            (top / str(folder) / f"{n}").write_bytes(bytes(20_000))
    opened = SourceTree(top).open(Settings())
    tracemalloc.start()
    try:
        total = sum(len(chunk) for chunk in opened.chunks())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total > 68 * CHUNK
    assert peak < 6 * CHUNK


def test_a_commit_checked_out_meanwhile_is_said_so(busy: SourceTree) -> None:
    head = busy.path / ".git/HEAD"
    head.parent.mkdir()
    head.write_text("1" * 40)
    _, facts = interrupted(busy, lambda: head.write_text("2" * 40))
    assert facts.git_commit == "1" * 40
    assert facts.warnings == (f"another git commit was checked out meanwhile: {'1' * 40}, then {'2' * 40}",)

"""What every storage promises (`storage.protocol`), asked of each kind: a folder, rclone mounts of each cache mode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from kanbu_backup_dagster.errors import StorageError
from kanbu_backup_dagster.storage.folder import MARK_NAME, FolderStorage
from kanbu_backup_dagster.storage.protocol import Storage
from kanbu_backup_dagster_tests.real_rclone import RcloneMount, missing_for_a_mount, until


@dataclass(frozen=True)
class Place:
    """A place for a storage.

    Attributes:
        open: Opens it anew.
        folder: Its folder, as a stranger sees it.
        held: What is on the medium: for a mount, what the remote itself holds once the cache has uploaded everything.
    """

    open: Callable[[], Storage]
    folder: Path
    held: Callable[[], dict[str, bytes]]


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], RcloneMount]]:
    made: dict[tuple[str, str], RcloneMount] = {}

    def mount(served_by: str, cache_mode: str) -> RcloneMount:
        missing = missing_for_a_mount()
        if missing is not None:
            pytest.skip(missing)
        if (served_by, cache_mode) not in made:
            root = tmp_path_factory.mktemp(f"{served_by}-{cache_mode}")
            made[served_by, cache_mode] = RcloneMount(root, cache_mode, served_by=served_by, tries=10)
        return made[served_by, cache_mode]

    yield mount
    for one in made.values():
        one.close()


@pytest.fixture(
    params=[
        "folder",
        *(
            pytest.param(kind, marks=pytest.mark.real("rclone"))
            for kind in ("webdav off", "sftp off", "webdav writes", "webdav full")
        ),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path, mounts: Callable[[str, str], RcloneMount]) -> Place:
    if request.param == "folder":
        folder = tmp_path / "store"
        return Place(
            lambda: FolderStorage(folder),
            folder,
            lambda: {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name != MARK_NAME},
        )
    mount = mounts(*request.param.split())
    name = tmp_path.name

    def held() -> dict[str, bytes]:
        mount.wait_until_settled()
        return mount.on_remote(name)

    return Place(lambda: mount.storage(name), mount.point / name, held)


@pytest.fixture
def storage(place: Place) -> Storage:
    made = place.open()
    made.prepare()
    return made


def put(storage: Storage, *chunks: bytes, first: int = 0) -> str:
    with storage.receive() as incoming:
        for chunk in chunks or (b"content",):
            incoming.write(chunk)
        return incoming.commit((f"kanbu_{n}" for n in count(first)), lambda name: f"about {name}".encode())


def test_a_file_is_what_was_written_and_so_is_its_sidecar(place: Place, storage: Storage) -> None:
    chunks = [os.urandom(1 << 20), os.urandom(100_001), b"end"]
    name = put(storage, *chunks)
    assert name == "kanbu_0"
    until(lambda: storage.settlement(name).done, "the file has settled")
    assert place.held() == {name: b"".join(chunks), f"{name}.manifest.json": b"about kanbu_0"}
    assert b"".join(storage.read(name, chunk_bytes=70_000)) == b"".join(chunks)
    assert storage.read_sidecar(name) == b"about kanbu_0"
    assert [(file.name, file.size) for file in storage.files()] == [(name, 1148580)]
    assert storage.find(name) == storage.files()[0]
    assert storage.sidecars() == [name]
    assert storage.path(name) == str(place.folder / name)


def test_files_of_any_size_are_read_whole(storage: Storage) -> None:
    """Around the sizes of a page and a chunk, where reading past the page cache could go wrong."""
    sizes = [near + by for near in (0, 4096, 1 << 20, 3 << 20) for by in (-1, 0, 1) if near + by >= 0]
    for number, size in enumerate(sizes):
        content = os.urandom(size)
        name = put(storage, content, first=number)
        for cached in (False, True):
            chunks = list(storage.read(name, cached=cached))
            assert b"".join(chunks) == content, (size, cached)
            assert all(chunks), (size, cached)


def test_it_is_marked_once_and_known_by_its_mark(place: Place, storage: Storage) -> None:
    mark = storage.prepare()
    assert place.open().prepare(known_mark=mark) == mark
    assert place.held() == {}, "preparing leaves nothing"
    (place.folder / MARK_NAME).unlink()
    with pytest.raises(StorageError, match=r"^Storage not accessible: .* bears no mark .*right volume mounted\?"):
        place.open().prepare(known_mark=mark)
    other = place.open().prepare()
    assert other != mark
    with pytest.raises(StorageError, match=r"^Storage not accessible: .* mark of another .*right volume") as refused:
        place.open().prepare(known_mark=mark)
    assert "kanbu-backup storage mark" in refused.value.advice
    assert place.open().prepare(known_mark=other) == other


def test_too_little_room_is_said_before(storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"^Storage not accessible: .* bytes free, .* expected to need"):
        storage.prepare(needed_bytes=1 << 62)
    assert storage.free_bytes() > 0


def test_what_exists_is_never_overwritten(place: Place, storage: Storage) -> None:
    (place.folder / "kanbu_0").write_bytes(b"theirs")
    (place.folder / "kanbu_1.manifest.json").write_bytes(b"claimed")
    assert put(storage) == "kanbu_2"
    held = place.held()
    assert held["kanbu_0"] == b"theirs"
    assert held["kanbu_1.manifest.json"] == b"claimed"


def test_several_writers_at_once_each_get_a_name(place: Place, storage: Storage) -> None:
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda number: put(place.open(), os.urandom(1000)), range(4)))
    assert sorted(names) == [f"kanbu_{n}" for n in range(4)]
    assert all(storage.read_sidecar(name) == f"about {name}".encode() for name in names)


@pytest.mark.parametrize("chunks", [(), (b"half",), (bytes(3 << 20), b"half")], ids=["nothing", "little", "more"])
def test_leaving_without_commit_leaves_nothing(place: Place, storage: Storage, chunks: tuple[bytes, ...]) -> None:
    with storage.receive() as incoming:
        for chunk in chunks:
            incoming.write(chunk)
        assert storage.files() == []
    assert place.held() == {}


def test_a_sidecar_that_cannot_be_made_leaves_nothing(place: Place, storage: Storage) -> None:
    with storage.receive() as incoming:
        incoming.write(b"content")
        with pytest.raises(ZeroDivisionError):
            incoming.commit(iter(["kanbu_0"]), lambda name: bytes(1 // 0))
    assert place.held() == {}


def test_a_sidecar_is_replaced_and_a_file_deleted_with_it(place: Place, storage: Storage) -> None:
    kept, gone = put(storage), put(storage)
    # What is deleted while rclone is uploading it comes back; retention deletes what is old.
    until(lambda: storage.settlement(kept).done and storage.settlement(gone).done, "both have settled")
    storage.replace_sidecar(kept, b"more is known")
    assert storage.read_sidecar(kept) == b"more is known"
    storage.delete(gone)
    assert storage.find(gone) is None
    assert storage.read_sidecar(gone) is None
    assert place.held() == {kept: b"content", f"{kept}.manifest.json": b"more is known"}
    with pytest.raises(StorageError, match=r"^Storage not accessible: cannot delete from .*No such file"):
        storage.delete(gone)


def test_a_sidecar_is_replaced_only_where_it_is_what_was_expected(storage: Storage) -> None:
    name = put(storage)
    assert not storage.replace_sidecar(name, b"mine", expected=b"something else")
    assert storage.replace_sidecar(name, b"mine", expected=b"about kanbu_0")
    assert storage.read_sidecar(name) == b"mine"


def test_a_file_takes_the_place_of_another_where_the_storage_can_do_it_in_one_step(
    place: Place, storage: Storage
) -> None:
    name = put(storage)
    with storage.receive() as incoming:
        for chunk in (b"better ", b"content"):
            incoming.write(chunk)
        assert b"".join(incoming.read_back()) == b"better content"
        if not storage.replaces_in_one_step:
            return
        incoming.replace(name)
    assert place.held() == {name: b"better content", f"{name}.manifest.json": b"about kanbu_0"}


def test_reading_may_end_early(storage: Storage) -> None:
    name = put(storage, bytes(3 << 20))
    reading = storage.read(name, chunk_bytes=1000)
    assert next(reading) == bytes(1000)
    reading.close()  # type: ignore[attr-defined]  # a generator
    assert storage.find(name) is not None
    with pytest.raises(StorageError, match="No such file"):
        next(storage.read("kanbu_9"))


def test_names_with_folders_never_reach_the_file_system(storage: Storage) -> None:
    for name in ("../x", "/etc/passwd", ".kanbu-storage", "", "a\0b", "a/b/c", "a/", "a/.b", "./a", "a/../b"):
        with pytest.raises(ValueError, match="not a plain file name"):
            storage.find(name)


def test_a_folder_is_no_file(place: Place, storage: Storage) -> None:
    (place.folder / "kanbu_0").mkdir()
    assert storage.files() == []
    assert storage.find("kanbu_0") is None
    assert put(storage) == "kanbu_1"


def test_files_that_another_program_left_in_a_folder_within_are_listed_read_and_deleted(
    place: Place, storage: Storage
) -> None:
    (place.folder / "production").mkdir()
    (place.folder / "production" / "kanbu_7").write_bytes(b"theirs")
    name = put(storage)
    theirs = "production/kanbu_7"
    assert [(file.name, file.size) for file in storage.files()] == [(name, 7), (theirs, 6)]
    assert b"".join(storage.read(theirs)) == b"theirs"
    assert storage.read_sidecar(theirs) is None
    storage.replace_sidecar(theirs, b"about theirs")
    assert storage.read_sidecar(theirs) == b"about theirs"
    assert storage.sidecars() == [name, theirs]
    assert Path(storage.path(theirs)) == place.folder / theirs
    storage.delete(theirs)
    assert list((place.folder / "production").iterdir()) == []


def test_what_is_not_a_leftover_stays(place: Place, storage: Storage) -> None:
    name = put(storage)
    (place.folder / "theirs.manifest.json").write_bytes(b"{}")
    with storage.receive() as incoming:
        incoming.write(b"half")
        assert place.open().remove_leftovers() == []
        incoming.commit((f"kanbu_{n}" for n in count(1)), lambda name: b"about")
    assert set(place.held()) == {
        name,
        f"{name}.manifest.json",
        "theirs.manifest.json",
        "kanbu_1",
        "kanbu_1.manifest.json",
    }

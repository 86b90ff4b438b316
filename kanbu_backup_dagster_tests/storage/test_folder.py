"""A folder as storage: its mark, errors in plain words, and clearing what killed writers left."""

from __future__ import annotations

import ctypes
import errno
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from kanbu_backup_dagster.errors import StorageError
from kanbu_backup_dagster.storage import folder as folder_module
from kanbu_backup_dagster.storage.folder import MARK_NAME, FolderStorage
from kanbu_backup_dagster.storage.mounts import Mount


@pytest.fixture
def storage(tmp_path: Path) -> FolderStorage:
    made = FolderStorage(tmp_path / "made" / "store")
    made.prepare()
    return made


def put(storage: FolderStorage, content: bytes = b"content", first: int = 0) -> str:
    with storage.receive() as incoming:
        incoming.write(content)
        return incoming.commit((f"kanbu_{n}" for n in count(first)), lambda name: f"about {name}".encode())


def visible(storage: FolderStorage) -> set[str]:
    return {name for name in os.listdir(storage.location) if name != MARK_NAME}


def test_the_folder_is_made_private_and_marked_once(storage: FolderStorage) -> None:
    assert Path(storage.location).stat().st_mode & 0o777 == 0o700
    assert storage.prepare() == storage.prepare() == FolderStorage(Path(storage.location)).mark()


def test_files_are_private(storage: FolderStorage) -> None:
    name = put(storage)
    assert {Path(storage.location, entry).stat().st_mode & 0o777 for entry in visible(storage)} == {0o600}
    assert visible(storage) == {name, f"{name}.manifest.json"}


def test_a_known_storage_without_its_mark_is_refused(storage: FolderStorage, tmp_path: Path) -> None:
    mark = storage.prepare()
    (Path(storage.location) / MARK_NAME).unlink()
    with pytest.raises(StorageError, match=r"^Storage not accessible: .*Is the right volume mounted\?"):
        storage.prepare(known_mark=mark)
    missing = FolderStorage(tmp_path / "gone")
    with pytest.raises(StorageError, match="Is the right volume mounted"):
        missing.prepare(known_mark=mark)
    assert not (tmp_path / "gone").exists()


def test_a_folder_that_cannot_be_made_or_written_is_said(open_tmp_path: Path) -> None:
    in_the_way = open_tmp_path / "file"
    in_the_way.write_bytes(b"")
    with pytest.raises(StorageError, match=r"^Storage not accessible: .*Not a directory"):
        FolderStorage(in_the_way / "store").prepare()
    with pytest.raises(StorageError, match=r"^Storage not accessible"):
        FolderStorage(Path("/proc/kanbu")).prepare()


def test_a_read_only_folder_is_said(tmp_path: Path) -> None:
    """As root a mode is no obstacle: another user tries."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    # Modules are imported before the user changes: Python's own folder may be closed to others.
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from kanbu_backup_dagster.errors import StorageError\n"
        "from kanbu_backup_dagster.storage.folder import FolderStorage\n"
        "os.setuid(65534)\n"
        "try: FolderStorage(Path('/usr/share')).prepare()\n"
        "except StorageError as error: print(error)\n"
    )
    root = str(Path(folder_module.__file__).parents[2])
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": root}
    ).stdout
    assert said.startswith("Storage not accessible: cannot make /usr/share: Permission denied")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], check=False).returncode
    ):
        pytest.skip("a small file system cannot be mounted here")
    try:
        storage = FolderStorage(mount)
        storage.prepare()
        with (
            pytest.raises(StorageError, match=r"^Storage not accessible: .*No space left"),
            storage.receive() as incoming,
        ):
            incoming.write(bytes(2 << 20))
        assert visible(storage) == set()
        assert put(storage) in visible(storage)
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_page_that_could_not_be_written_is_heard_of(storage: FolderStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports it to the first sync that asks, which may be one of those on the way, and to no other."""
    monkeypatch.setattr(folder_module, "_FLUSH_EVERY_BYTES", 1)
    reports = iter([OSError(errno.EIO, "Input/output error")])

    def once(handle: int) -> None:
        for error in reports:
            raise error

    monkeypatch.setattr(os, "fdatasync", once)
    with pytest.raises(StorageError, match="Input/output error"):
        put_slowly(storage)
    assert visible(storage) == set()


def put_slowly(storage: FolderStorage) -> None:
    with storage.receive() as incoming:
        for _ in range(3):
            incoming.write(b"x")
            time.sleep(0.05)  # until the flush beside has ended, and is followed by another
        incoming.commit(iter(["kanbu_0"]), lambda name: b"about it")


def test_interrupted_when_the_file_has_its_name_it_keeps_its_sidecar(
    storage: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def then_interrupted(*arguments: object) -> None:
        link(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(storage)
    assert visible(storage) == {"kanbu_0", "kanbu_0.manifest.json"}


def test_what_is_deleted_while_it_is_listed_is_not_there(
    storage: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [put(storage, first=number) for number in range(3)]
    entries = storage._entries

    def meanwhile() -> Iterator[tuple[str, os.DirEntry[str]]]:
        found = list(entries())
        storage.delete(names[1])
        yield from found

    monkeypatch.setattr(storage, "_entries", meanwhile)
    assert [file.name for file in storage.files()] == [names[0], names[2]]


def test_without_hard_links_nothing_is_overwritten_either(
    storage: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert [put(storage), put(storage)] == ["kanbu_0", "kanbu_1"]


def test_what_is_being_written_is_no_leftover_and_what_a_killed_writer_left_is(storage: FolderStorage) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from kanbu_backup_dagster.storage.folder import FolderStorage\n"
        "with FolderStorage(Path(sys.argv[1])).receive() as incoming:\n"
        "    incoming.write(b'half'); print('writing', flush=True); time.sleep(60)\n"
    )
    root = str(Path(folder_module.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", code, storage.location], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": root}
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        assert storage.remove_leftovers() == []
        assert len(visible(storage)) == 1
        assert storage.files() == []
        writer.send_signal(signal.SIGKILL)
    assert len(storage.remove_leftovers()) == 1
    assert visible(storage) == set()


def test_a_sidecar_without_its_file_is_a_leftover_and_a_strangers_file_is_none(storage: FolderStorage) -> None:
    name = put(storage)
    folder = Path(storage.location)
    (folder / "kanbu_9.manifest.json").write_bytes(b"{}")
    (folder / "theirs.manifest.json").write_bytes(b"{}")
    (folder / ".hidden.part").write_bytes(b"")
    assert storage.remove_leftovers() == ["kanbu_9.manifest.json"]
    assert visible(storage) == {name, f"{name}.manifest.json", "theirs.manifest.json", ".hidden.part"}


def test_on_a_network_file_system_only_what_is_old_is_a_leftover(
    storage: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another machine's lock on a shared disk cannot be made here.
    monkeypatch.setattr(folder_module, "mount_of", lambda path: Mount(path, "nfs4", "server:/x"))
    part = Path(storage.location) / ".kanbu-incoming-0.part"
    part.write_bytes(b"")
    assert storage.remove_leftovers() == []
    three_days_ago = time.time() - 3 * 86400
    os.utime(part, (three_days_ago, three_days_ago))
    assert storage.remove_leftovers() == [part.name]


def test_deleting_takes_the_file_first(storage: FolderStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    name = put(storage)
    syncs: list[set[str]] = []
    monkeypatch.setattr(folder_module, "_sync_folder", lambda path: syncs.append(visible(storage)))
    storage.delete(name)
    assert syncs == [{f"{name}.manifest.json"}, set()]


def _put_one(path: Path) -> str:
    return put(FolderStorage(path), os.urandom(1000))


def test_no_link_leads_out_of_the_folder(storage: FolderStorage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kanbu_0").write_bytes(b"not a backup of this storage")
    folder = Path(storage.location)
    (folder / "production").symlink_to(outside)
    (folder / "kanbu_0").symlink_to(outside / "kanbu_0")
    assert storage.files() == []
    assert storage.find("kanbu_0") is None
    with pytest.raises(StorageError, match="links are not followed"):
        storage.find("production/kanbu_0")


def test_the_page_cache_is_left_alone_unless_it_is_asked_for(storage: FolderStorage) -> None:
    """A check reads the medium, whatever is remembered; the two passes of a restore fetch a file once."""
    name = put(storage, os.urandom(4 << 20))
    if pages_in_memory(Path(storage.path(name)), forget=True):
        pytest.skip("the file system of the temporary folder is one in memory")
    assert sum(map(len, storage.read(name))) == 4 << 20
    assert pages_in_memory(Path(storage.path(name))) == 0
    assert sum(map(len, storage.read(name, cached=True))) == 4 << 20
    assert pages_in_memory(Path(storage.path(name))) == (4 << 20) // mmap.PAGESIZE


def pages_in_memory(path: Path, *, forget: bool = False) -> int:
    """Of a file, by mincore(2)."""
    with path.open("rb+") as file:
        if forget:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0) as mapped:
            pages = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
            view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
            libc = ctypes.CDLL(None, use_errno=True)
            failed = libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(mapped)), pages)
            del view
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages)


def test_many_writers_at_once_each_get_a_name(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    storage.prepare()
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        names = pool.map(_put_one, [tmp_path] * 24)
    assert sorted(names) == sorted(f"kanbu_{n}" for n in range(24))
    assert all(storage.read_sidecar(name) == f"about {name}".encode() for name in names)

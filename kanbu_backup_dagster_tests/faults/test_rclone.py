"""An rclone mount at its worst, on a real one: each backup ends whole, or in a clear failure within a bounded time, and
nothing is ever written behind the mount point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kanbu_backup_dagster.errors import StorageError
from kanbu_backup_dagster.storage.protocol import Storage
from kanbu_backup_dagster.storage.rclone import RcloneStorage
from kanbu_backup_dagster_tests.real_rclone import RcloneMount, missing_for_a_mount, until

pytestmark = pytest.mark.real("rclone")

MIB = bytes(1 << 20)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., RcloneMount]]:
    missing = missing_for_a_mount()
    if missing is not None:
        pytest.skip(missing)
    made: list[RcloneMount] = []

    def mount(cache_mode: str = "off", **options: Any) -> RcloneMount:
        made.append(RcloneMount(tmp_path / "rclone", cache_mode, **options))
        return made[-1]

    yield mount
    for one in made:
        one.close()


def put(storage: Storage, mebibytes: int = 1, *, half_way: Callable[[], object] = lambda: None) -> str:
    with storage.receive() as incoming:
        for number in range(mebibytes):
            if number == mebibytes // 2:
                half_way()
            incoming.write(MIB)
        return incoming.commit((f"kanbu_{n}" for n in count()), lambda name: b"about it")


def refused(storage: Storage, mebibytes: int = 24, *, within: float, half_way: Callable[[], object]) -> str:
    """The message that a backup ends with."""
    begun = time.monotonic()
    with pytest.raises(StorageError, match=r"^Storage not accessible: ") as failure:
        put(storage, mebibytes, half_way=half_way)
    assert time.monotonic() - begun < within
    return failure.value.message


@pytest.mark.parametrize("served_by", ["webdav", "sftp"])
def test_a_server_killed_in_mid_write_fails_the_backup(mounted: Callable[..., RcloneMount], served_by: str) -> None:
    mount = mounted(served_by=served_by)
    storage = mount.storage()
    storage.prepare()
    assert "rclone could not bring this to remote:" in refused(storage, within=30, half_way=mount.server.kill)
    mount.restart_server()
    until(lambda: storage.files() == [], "the mount has seen that there is no file")
    assert all(name.startswith(".kanbu-incoming-") for name in mount.on_remote())
    assert put(mount.storage()) == "kanbu_0", "the same mount serves the next backup"


@pytest.mark.parametrize("served_by", ["webdav", "sftp"])
def test_a_server_that_stops_answering_fails_the_backup_in_time(
    mounted: Callable[..., RcloneMount], served_by: str
) -> None:
    mount = mounted(served_by=served_by)
    storage = mount.storage(patience=2)
    storage.prepare()
    refused(storage, within=30, half_way=lambda: mount.server.send_signal(signal.SIGSTOP))
    mount.server.send_signal(signal.SIGCONT)
    until(lambda: put(mount.storage()).startswith("kanbu_"), "the mount serves again")
    whole = {name: content for name, content in mount.on_remote().items() if name.startswith("kanbu_")}
    assert whole == {"kanbu_0": MIB, "kanbu_0.manifest.json": b"about it"}


def test_a_full_remote_fails_the_backup(mounted: Callable[..., RcloneMount]) -> None:
    mount = mounted()
    small = mount.backing / "kanbu-backups"
    small.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small], check=False).returncode
    ):
        pytest.skip("a small file system cannot be mounted here")
    try:
        storage = mount.storage()
        storage.prepare()
        assert "rclone could not bring this to remote:" in refused(storage, within=30, half_way=lambda: None)
        assert [name for name in mount.on_remote() if name.startswith("kanbu_")] == []
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.parametrize("cache_mode", ["off", "writes"])
def test_a_killed_rclone_is_said_at_once(mounted: Callable[..., RcloneMount], cache_mode: str) -> None:
    mount = mounted(cache_mode)
    storage = mount.storage()
    storage.prepare()

    def kill() -> None:
        mount.mount.kill()
        mount.mount.wait()

    with pytest.raises(StorageError, match=r"Transport endpoint is not connected|connection abort") as failure:
        put(storage, 8, half_way=kill)
    assert "The mount's process has died" in failure.value.advice
    with pytest.raises(StorageError, match=r"^Storage not accessible: the rclone mount .* cannot be used") as later:
        mount.storage().files()
    assert "fusermount3 -uz" in later.value.advice
    assert [name for name in mount.on_remote() if name.startswith("kanbu_")] == []
    mount.unmount()
    mount.mount = mount.start_mount()
    assert put(mount.storage()) == "kanbu_0"


def test_a_hanging_rclone_holds_nobody_else(mounted: Callable[..., RcloneMount]) -> None:
    mount = mounted()
    mount.storage().prepare()
    mount.mount.send_signal(signal.SIGSTOP)
    for work in (RcloneStorage.files, RcloneStorage.prepare, RcloneStorage.free_bytes, put):
        storage = mount.storage(patience=0.5)
        begun = time.monotonic()
        with pytest.raises(StorageError, match=r"did not answer within (0\.5|2\.5) s"):
            work(storage)
        assert time.monotonic() - begun < 5
    mount.mount.send_signal(signal.SIGCONT)
    assert put(mount.storage()) == "kanbu_0"


def test_a_command_ends_in_time_although_its_call_cannot_be_ended(mounted: Callable[..., RcloneMount]) -> None:
    """rclone has taken the request and waits for its server: not even SIGKILL ends the call."""
    mount = mounted(tries=4)
    mount.storage().prepare()
    time.sleep(1.1)  # until rclone no longer answers from its cache
    mount.server.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    command = subprocess.run(
        [sys.executable, "-m", "kanbu_backup_dagster.cli", "list"],
        env={
            **os.environ,
            **mount.variables,
            "BACKUP_RCLONE_TIMEOUT_SECONDS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    took = time.monotonic() - begun
    held = [process for process in Path("/proc").glob("[0-9]*") if holds(process, mount.point)]
    assert "did not answer within 1 s" in command.stderr
    assert took < 12
    assert held, "the call is still under way, or this test shows nothing"


def holds(process: Path, point: Path) -> bool:
    """Whether `process` is a worker that stands in the mount."""
    try:
        return (process / "cwd").readlink() == point
    except OSError:
        return False


@pytest.mark.parametrize("when", ["before", "in mid-write"])
def test_nothing_is_written_behind_a_mount_that_went_away(mounted: Callable[..., RcloneMount], when: str) -> None:
    mount = mounted()
    storage = mount.storage()
    storage.prepare()
    if when == "before":
        mount.unmount()
        with pytest.raises(StorageError, match="is not on an rclone mount: it is on") as failure:
            mount.storage().prepare()
        assert all(
            command in failure.value.advice for command in ("apt install rclone", "rclone config", "rclone mount")
        )
    else:
        message = refused(storage, 8, within=30, half_way=mount.unmount)
        assert "was unmounted meanwhile" in message
    assert list(mount.point.iterdir()) == [], "the folder behind the mount point stays empty"


def test_a_plain_folder_is_no_mount(tmp_path: Path) -> None:
    for work in (RcloneStorage.prepare, RcloneStorage.files, put):
        with pytest.raises(StorageError, match=r"is not on an rclone mount: it is on .* BACKUP_GDRIVE_PATH"):
            work(RcloneStorage(tmp_path / "store", patience=60))
    assert list(tmp_path.iterdir()) == []


def test_a_cached_backup_is_unsettled_until_the_remote_has_it(mounted: Callable[..., RcloneMount]) -> None:
    """The server is away: everything in the mount looks whole, and nothing has arrived."""
    mount = mounted("writes")
    storage = mount.storage()
    storage.prepare()
    mount.wait_until_settled()
    mount.server.kill()
    name = put(storage, 4)
    assert b"".join(storage.read(name)) == MIB * 4
    for _ in range(5):
        assert not storage.settlement(name).done
        time.sleep(0.1)
    assert not mount.storage(controlled=False).settlement(name).done
    assert mount.on_remote() == {}
    mount.restart_server()
    until(lambda: storage.settlement(name).done, "the upload is tried again and done")
    assert mount.on_remote() == {name: MIB * 4, f"{name}.manifest.json": b"about it"}


def test_asking_often_does_not_postpone_the_upload(mounted: Callable[..., RcloneMount]) -> None:
    """Whenever a file is opened, rclone waits anew until it uploads it."""
    mount = mounted("full", write_back="2s")
    storage = mount.storage()
    storage.prepare()
    name = put(storage)
    assert not storage.settlement(name).done
    until(lambda: storage.settlement(name).done, "the file has settled")
    assert mount.on_remote() == {name: MIB, f"{name}.manifest.json": b"about it"}


def test_another_mounts_remote_control_proves_nothing(mounted: Callable[..., RcloneMount], tmp_path: Path) -> None:
    mount = mounted("writes")
    storage = mount.storage()
    storage.prepare()
    name = put(storage)
    with RcloneMount(tmp_path / "other", "writes") as other:
        mistaken = RcloneStorage(Path(storage.location), control=other.storage()._control, patience=60)
        said = mistaken.settlement(name)
    assert not said.done
    assert "is another rclone's than the mount's" in said.reason
    gone = RcloneStorage(Path(storage.location), control=other.storage()._control, patience=60).settlement(name)
    assert not gone.done
    assert "does not answer" in gone.reason


def test_a_worker_that_is_killed_is_an_error_and_its_part_no_backup(mounted: Callable[..., RcloneMount]) -> None:
    mount = mounted()
    storage = mount.storage()
    storage.prepare()

    def kill_worker() -> None:
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and (process / "stat").exists():
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == str(os.getpid()) and b"mount_worker" in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    assert "the process working on" in refused(storage, 8, within=30, half_way=kill_worker)
    assert mount.storage().files() == []

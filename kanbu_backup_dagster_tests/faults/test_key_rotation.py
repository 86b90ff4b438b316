"""Key rotation: what it does to each kind of file, and that a kill at any moment leaves every file readable."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from datetime import datetime, timezone
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.keys import EncryptionKey, Keyring, derive_key
from kanbu_backup_dagster.backup.manifest import Manifest, Trigger, Verification, VerificationStatus
from kanbu_backup_dagster.backup.names import require_name
from kanbu_backup_dagster.backup.reading import content, key_of, prove
from kanbu_backup_dagster.backup.rotation import Action, plan, rotate
from kanbu_backup_dagster.backup.stages import encrypt
from kanbu_backup_dagster.backup.verification import verify
from kanbu_backup_dagster.errors import CorruptBackupError, EncryptionKeyError, StorageError
from kanbu_backup_dagster.storage.folder import MARK_NAME, FolderStorage
from kanbu_backup_dagster.storage.mounts import Mount

OLDER, OLD, NEW, LOST = (derive_key(name) for name in ("older", "old", "new", "lost"))
RING = Keyring(NEW, (OLD, OLDER))
NAME = "kanbu_backup_2026-01-18T10-30-00.sql.gz.enc"
CONTENT = b"".join(n.to_bytes(4, "big") for n in range(600_000))  # more than two chunks


@pytest.fixture
def storage(tmp_path: Path) -> FolderStorage:
    made = FolderStorage(tmp_path / "store")
    made.prepare()
    return made


def land(
    storage: FolderStorage, key: EncryptionKey | None, name: str = NAME, *, manifest: bool = True, **changes: object
) -> Manifest:
    """A backup of CONTENT, as a run lands it; or as Kanbu does, without a manifest."""
    stored = b"".join(encrypt(iter([CONTENT]), key)) if key else CONTENT
    fields: dict[str, object] = {
        "filename": name,
        "type": require_name(name).type,
        "trigger": Trigger.MANUAL,
        "created_at": datetime(2026, 1, 18, 10, 30, tzinfo=timezone.utc),
        "raw_bytes": 9,
        "compressed_bytes": len(CONTENT),
        "stored_bytes": len(stored),
        "sha256": sha256(CONTENT).hexdigest(),
        "stored_sha256": sha256(stored).hexdigest(),
        "encrypted": key is not None,
        "key_id": key.key_id if key else None,
        "duration_seconds": 1,
        "held": True,
    }
    made = Manifest.model_validate({**fields, **changes})
    with storage.receive() as incoming:
        incoming.write(stored)
        incoming.commit(iter([name]), lambda _: made.to_json(key))
    if not manifest:
        Path(storage.path(name) + ".manifest.json").unlink()
    return made


def readable(storage: FolderStorage, keys: Keyring = RING) -> EncryptionKey:
    """The key that reads the file now, after everything about it was found in order."""
    backup = Catalog(storage, keys).get(NAME)
    assert b"".join(content(backup, storage, keys, proven=prove(backup, storage, keys))) == CONTENT
    if backup.manifest is not None:
        assert verify(backup, storage, keys).status is VerificationStatus.VERIFIED
    key = key_of(backup, storage, keys)
    assert key is not None
    return key


def names(storage: FolderStorage) -> set[str]:
    return set(os.listdir(storage.location)) - {MARK_NAME}


def actions(storage: FolderStorage, keys: Keyring = RING) -> dict[str, Action]:
    assert keys.current is not None
    return {item.filename: item.action for item in plan(Catalog(storage, keys), storage, keys, keys.current)}


def test_only_the_key_changes(storage: FolderStorage) -> None:
    before = land(storage, OLD, verification=Verification(status="verified", deep=True))
    read: list[int] = []
    done = rotate(NAME, Catalog(storage, RING), storage, RING, on_bytes=read.append)
    after = Catalog(storage, Keyring(NEW)).get(NAME).manifest
    assert done is not None
    assert after is not None
    assert (done.old_key_id, done.new_key_id) == (OLD.key_id, NEW.key_id)
    changed = {"key_id", "stored_sha256", "seal", "verification"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert (after.key_id, after.verification.deep, after.held) == (NEW.key_id, True, True)
    assert read[-1] == 2 * before.stored_bytes
    assert readable(storage, Keyring(NEW)) == NEW
    with pytest.raises(EncryptionKeyError):
        readable(storage, Keyring(OLD))
    assert names(storage) == {NAME, f"{NAME}.manifest.json"}
    assert rotate(NAME, Catalog(storage, RING), storage, RING) is None


def test_a_file_without_manifest_is_tried_with_each_key(storage: FolderStorage) -> None:
    land(storage, OLDER, manifest=False)
    assert readable(storage) == OLDER
    rotate(NAME, Catalog(storage, RING), storage, RING)
    assert readable(storage, Keyring(NEW)) == NEW
    assert names(storage) == {NAME}
    land(storage, LOST, manifest=False, name=NAME.replace("10-30", "10-31"))
    with pytest.raises(CorruptBackupError, match="fits none of the 3 keys"):
        rotate(NAME.replace("10-30", "10-31"), Catalog(storage, RING), storage, RING)


def test_each_file_gets_what_it_needs(storage: FolderStorage) -> None:
    hours = (f"kanbu_backup_2026-01-18T{hour:02}-30-00.sql.gz" for hour in count())
    expected = {}
    for key, action in (
        (NEW, Action.NOTHING),
        (OLD, Action.RE_ENCRYPT),
        (OLDER, Action.RE_ENCRYPT),
        (LOST, Action.LEAVE),
    ):
        name = next(hours) + ".enc"
        land(storage, key, name)
        expected[name] = action
    for sealed_by, action in (
        (None, Action.NOTHING),
        (NEW, Action.NOTHING),
        (OLD, Action.RE_SEAL),
        (LOST, Action.LEAVE),
    ):
        name = next(hours)
        made = land(storage, None, name)
        storage.replace_sidecar(name, made.to_json(sealed_by))
        expected[name] = action
    assert actions(storage) == expected
    for name, action in expected.items():
        if action is not Action.LEAVE:
            rotate(name, Catalog(storage, RING), storage, RING)
    assert set(actions(storage, Keyring(NEW)).values()) == {Action.NOTHING, Action.LEAVE}


def test_a_damaged_file_is_left_as_it_is(storage: FolderStorage) -> None:
    land(storage, OLD)
    path = Path(storage.path(NAME))
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    before = {name: (path.parent / name).read_bytes() for name in names(storage)}
    with pytest.raises(CorruptBackupError, match="Checksum mismatch"):
        rotate(NAME, Catalog(storage, RING), storage, RING)
    assert {name: (path.parent / name).read_bytes() for name in names(storage)} == before


def test_it_needs_a_key_to_rotate_to_and_a_storage_that_can_replace(
    storage: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(storage, OLD)
    with pytest.raises(EncryptionKeyError, match="Encryption key not set"):
        rotate(NAME, Catalog(storage, Keyring(None, (OLD,))), storage, Keyring(None, (OLD,)))
    rclone = Mount(Path("/"), "fuse.rclone", "gdrive:")
    monkeypatch.setattr("kanbu_backup_dagster.storage.folder.mount_of", lambda path: rclone)
    with pytest.raises(StorageError, match="rclone mount"):
        rotate(NAME, Catalog(storage, RING), storage, RING)


def test_what_others_record_meanwhile_is_kept(storage: FolderStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold that is let go while the file is swapped is neither lost nor does it bring the old key back."""
    land(storage, OLD)
    other = Catalog(storage, RING)
    replace_sidecar = FolderStorage.replace_sidecar
    beside = iter([lambda: other.amend(NAME, lambda manifest: manifest.model_copy(update={"held": False}))])

    def interrupted(self: FolderStorage, name: str, sidecar: bytes, *, expected: bytes | None = None) -> bool:
        for amend in beside:
            amend()
        return replace_sidecar(self, name, sidecar, expected=expected)

    monkeypatch.setattr(FolderStorage, "replace_sidecar", interrupted)
    rotate(NAME, Catalog(storage, RING), storage, RING)
    manifest = other.get(NAME).manifest
    assert manifest is not None
    assert (manifest.held, manifest.rotation) == (False, None)
    assert readable(storage) == NEW


# What changes files, as Python's audit events name it (https://docs.python.org/3/library/audit_events.html).
_EVENTS = {"open", "os.rename", "os.remove", "os.link"}


def _rotate_until(storage: FolderStorage, moment: int) -> None:
    """Rotate in this process, which kills itself right before the change to the storage of that number."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _EVENTS and str(storage.location) in str(arguments[0]):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    rotate(NAME, Catalog(storage, RING), storage, RING)


@pytest.mark.parametrize("manifest", [True, False], ids=["with manifest", "without"])
def test_a_kill_at_any_moment_leaves_it_readable(tmp_path: Path, manifest: bool) -> None:
    fork = multiprocessing.get_context("fork")
    found = []
    for moment in count(1):
        storage = FolderStorage(tmp_path / f"store-{moment}")
        storage.prepare()
        land(storage, OLD, manifest=manifest)
        child = fork.Process(target=_rotate_until, args=(storage, moment))
        child.start()
        child.join()
        key = readable(storage)
        found.append((key, Catalog(storage, RING).get(NAME).manifest))
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        storage.remove_leftovers()
        assert readable(storage) == key
        # It can be amended by others before it goes on.
        if manifest:
            Catalog(storage, RING).amend(NAME, lambda known: known.model_copy(update={"held": False}))
        assert readable(storage) == key
        rotate(NAME, Catalog(storage, RING), storage, RING)
        assert readable(storage, Keyring(NEW)) == NEW
        assert names(storage) == ({NAME, f"{NAME}.manifest.json"} if manifest else {NAME})
        assert set(actions(storage, Keyring(NEW)).values()) == {Action.NOTHING}
    keys = [key for key, _ in found]
    assert keys == sorted(keys, key=lambda key: key == NEW), "once new, it stays new"
    assert {OLD, NEW} == set(keys)
    if manifest:
        under_way = {key for key, known in found if known is not None and known.rotation is not None}
        assert under_way == {OLD, NEW}, "killed both before and after the file was replaced"

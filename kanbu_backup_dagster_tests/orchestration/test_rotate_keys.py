"""The job `rotate_keys` and `kanbu-backup rotate-keys`: what they do, record and tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from dagster import AssetRecordsFilter

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.cli import inspect, rotate
from kanbu_backup_dagster.errors import BusyError
from kanbu_backup_dagster.orchestration import rotate_ops
from kanbu_backup_dagster.orchestration.assets import DATABASE_BACKUP
from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster.orchestration.target_lock import Holder, open_locks, storage_name
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster_tests.faults.test_key_rotation import LOST, NAME, NEW, OLD, land

SECOND, THIRD = (NAME.replace("10-30", f"10-{minute}") for minute in (31, 32))
DRY = {"ops": {"rotate": {"config": {"dry_run": True}}}}


@pytest.fixture
def storage(configure: Callable[..., Path]) -> FolderStorage:
    store = FolderStorage(configure(BACKUP_ENCRYPTION_KEY="new", BACKUP_ENCRYPTION_KEY_PREVIOUS='["older", "old"]'))
    store.prepare()
    return store


def keys_of(names: tuple[str, ...] = (NAME, SECOND, THIRD)) -> list[str | None]:
    catalog = load_environment().catalog
    return [manifest.key_id if (manifest := catalog.get(name).manifest) else None for name in names]


def test_it_rotates_and_records(storage: FolderStorage) -> None:
    content = land(storage, OLD).sha256
    land(storage, NEW, SECOND)
    land(storage, LOST, THIRD)
    assert run_job("rotate_keys", run_config=DRY).success
    assert keys_of() == [OLD.key_id, NEW.key_id, LOST.key_id]
    assert run_job("rotate_keys").success
    assert keys_of() == [NEW.key_id, NEW.key_id, LOST.key_id]
    with open_instance() as instance:
        (observed,) = instance.fetch_observations(AssetRecordsFilter(DATABASE_BACKUP), limit=10).records
    observation = observed.asset_observation
    assert observation is not None
    assert observation.partition == NAME
    assert (observation.metadata["old_key_id"].value, observation.metadata["new_key_id"].value) == (
        OLD.key_id,
        NEW.key_id,
    )
    assert observation.tags["dagster/data_version"] == content


def test_what_cannot_be_rotated_spares_no_other_and_fails_the_run(storage: FolderStorage) -> None:
    land(storage, OLD)
    land(storage, OLD, SECOND)
    path = Path(storage.path(NAME))
    path.write_bytes(path.read_bytes()[:-1])
    outcome = run_job("rotate_keys")
    assert not outcome.success
    assert "1 of 2 backups could not be rotated" in str(outcome.error)
    assert f"{NAME}: Checksum mismatch" in str(outcome.error)
    assert keys_of((NAME, SECOND)) == [OLD.key_id, NEW.key_id]


def test_it_waits_for_who_reads_the_files(storage: FolderStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    land(storage, OLD)
    monkeypatch.setattr(rotate_ops, "_WAIT_SECONDS", 0)
    holder = Holder.now("restore_database", "run-of-restore")
    with open_locks().hold(storage_name(load_environment().storage), holder, exclusive=False):
        outcome = run_job("rotate_keys")
    assert isinstance(outcome.error, BusyError)
    assert "run-of-restore" in str(outcome.error)
    assert keys_of((NAME,)) == [OLD.key_id]


def test_the_command_tells_and_does(storage: FolderStorage) -> None:
    land(storage, OLD)
    land(storage, LOST, SECOND)
    run = CliRunner()
    listed = run.invoke(inspect.list_backups).output
    assert f"{OLD.key_id} (previous)" in listed
    assert f"{LOST.key_id} (not set)" in listed
    dry = run.invoke(rotate.rotate_keys, ["--dry-run"]).output
    assert f"{NAME}: needs key {OLD.key_id}: to be re-encrypted" in dry
    assert f"{SECOND}: left as it is: The backup was encrypted with key {LOST.key_id}" in dry
    done = run.invoke(rotate.rotate_keys, [])
    assert f"1 of 2 backups put under key {NEW.key_id}." in done.output, done
    again = json.loads(run.invoke(rotate.rotate_keys, ["--json"]).output)
    assert [item["filename"] for item in again["files"]] == [SECOND]
    assert f"{OLD.key_id} (previous)" not in run.invoke(inspect.list_backups).output

"""Pruning in runs: what goes, what is said of it, and what holds it back."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from dagster import AssetKey, AssetRecordsFilter, DagsterInstance

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.manifest import Manifest, Trigger, Verification, VerificationStatus
from kanbu_backup_dagster.backup.names import BackupName, BackupType
from kanbu_backup_dagster.errors import SettingsError, StorageError
from kanbu_backup_dagster.notifications.events import PruneHeld
from kanbu_backup_dagster.orchestration import prune_ops, restore_source_ops
from kanbu_backup_dagster.orchestration.jobs import JOBS
from kanbu_backup_dagster.orchestration.run_here import Outcome, run_job
from kanbu_backup_dagster.orchestration.tags import FILE, SCHEDULE_ID, SCHEDULE_NAME, TRIGGER
from kanbu_backup_dagster.orchestration.target_lock import Holder, open_locks, storage_name
from kanbu_backup_dagster.orchestration.telling import events_in
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster_tests.backups import KEYS, store_backup

Configure = Callable[..., Path]
NOW = datetime.now(timezone.utc).replace(microsecond=0)
SCHEDULES = """\
version: 1
schedules:
  - id: 1
    name: Daily
    type: source
    cron: "0 2 * * *"
    retention_days: {days}
    keep_daily: {daily}
    keep_weekly: 0
    keep_monthly: 0
"""
TAGS = {TRIGGER: "scheduled", SCHEDULE_ID: "1", SCHEDULE_NAME: "Daily"}


def schedule(days: int = 30, daily: int = 3) -> None:
    Path("kanbu_backup.yaml").write_text(SCHEDULES.format(days=days, daily=daily))


def aged(store: Path, days: int, *, raw_bytes: int = 1000, held: bool = False) -> str:
    """A verified source backup that was made days ago: a real one's manifest, under an older name."""
    at = NOW - timedelta(days=days)
    name = str(BackupName(BackupType.SOURCE, at, compressed=True, encrypted=True))
    made = store_backup(store)
    storage = FolderStorage(store)
    manifest: Manifest = made.model_copy(
        update={
            "filename": name,
            "type": BackupType.SOURCE,
            "trigger": Trigger.SCHEDULED,
            "schedule_id": 1,
            "created_at": at,
            "raw_bytes": raw_bytes,
            "database": None,
            "held": held,
            "verification": Verification(status=VerificationStatus.VERIFIED, at=at),
        }
    )
    (store / made.filename).rename(store / name)
    (store / f"{made.filename}.manifest.json").unlink()
    storage.replace_sidecar(name, manifest.to_json(KEYS.current))
    return name


def names() -> set[str]:
    return {backup.filename for backup in load_environment().catalog.backups(BackupType.SOURCE)}


def prune(**config: object) -> Outcome:
    return run_job("prune_backups", run_config={"ops": {"prune_all": {"config": {"type": "source", **config}}}})


def held_events(run_id: str) -> list[PruneHeld]:
    with DagsterInstance.get() as instance:
        outputs = [
            entry.get_dagster_event().step_output_data.metadata
            for entry in instance.all_logs(run_id)
            if entry.is_dagster_event and entry.get_dagster_event().is_successful_output
        ]
    return [event for metadata in outputs for event in events_in(metadata) if isinstance(event, PruneHeld)]


@pytest.fixture
def store(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tree = tmp_path / "app"
    tree.mkdir()
    (tree / "file").write_text("x" * 1000)
    monkeypatch.setenv("KANBU_SOURCE_PATH", str(tree))
    return configure()


def test_a_schedules_backup_prunes_and_another_does_not(store: Path) -> None:
    schedule()
    files = [aged(store, days) for days in (1, 2, 3, 4)]
    assert run_job("sync_catalog").success
    manual = run_job("source_backup")
    assert manual.success
    assert names() >= set(files)
    scheduled = run_job("source_backup", tags=TAGS)
    assert scheduled.errors == ()
    # Three days with backups stay: today's two, and the two before.
    assert names() == {*manual.materialized, *scheduled.materialized, files[0], files[1]}
    manifest = load_environment().catalog.get(scheduled.materialized[0]).manifest
    assert manifest is not None
    assert str(manifest.retention) == "30/3/0/0"
    assert not list(store.glob(f"{files[3]}*"))
    with DagsterInstance.get() as instance:
        assert set(instance.get_dynamic_partitions("source_backup_files")) == names()
        asset = AssetRecordsFilter(AssetKey("source_backup"), asset_partitions=[files[3]])
        gone = instance.fetch_observations(asset, limit=1).records[0].asset_observation
        assert gone is not None
        told = {name: entry.value for name, entry in gone.metadata.items()}
        assert (told["file"], told["status"], told["rule"], told["run"]) == (
            files[3],
            "pruned",
            "thinned",
            scheduled.run_id,
        )
        # Its old events stay under its key.
        assert instance.fetch_materializations(asset, limit=1).records


def test_a_manual_backup_prunes_when_it_is_asked_to(store: Path) -> None:
    schedule()
    files = [aged(store, days) for days in (1, 2, 3, 4)]
    asked = run_job("source_backup", run_config={"ops": {"prune": {"config": {"without_schedule": True}}}})
    assert asked.errors == ()
    assert asked.said["deleted"] == 2
    assert names() == {*asked.materialized, *files[:2]}


def test_a_dry_run_shows_what_the_next_prune_does(store: Path) -> None:
    schedule()
    files = [aged(store, days) for days in (0, 1, 2, 3, 40)]
    shown = prune(dry_run=True)
    assert (shown.said["source_would_go"], shown.said["source_deleted"]) == (2, 0)
    rows = {row.data["file"]: row.data for row in shown.said["source_plan"].records}
    assert [rows[file]["keep"] for file in files] == [True, True, True, False, False]
    assert [rows[file]["rules"] for file in files[3:]] == ["thinned", "expired"]
    assert names() == set(files)
    assert prune().success
    assert names() == set(files[:3])
    assert prune().said["source_deleted"] == 0


def test_a_held_file_stays(store: Path) -> None:
    schedule()
    held = aged(store, 50, held=True)
    aged(store, 51)
    newest = aged(store, 0)
    assert prune().success
    assert names() == {held, newest}


def test_a_mass_deletion_is_held_back_told_and_waits_for_acceptance(store: Path) -> None:
    schedule()
    files = [aged(store, days) for days in (0, *range(40, 46))]
    held = prune()
    assert held.success
    assert names() == set(files)
    (event,) = held_events(held.run_id)
    assert (event.prune.type, event.prune.held) == (BackupType.SOURCE, 6)
    assert "6 of 7 source backups would be deleted at once" in event.prune.reason
    assert prune(accept=True).said["source_deleted"] == 6
    assert names() == {files[0]}


def test_a_shrunk_source_holds_back_until_it_is_accepted(store: Path) -> None:
    schedule(daily=2)
    small = [aged(store, 0, raw_bytes=100)]
    full = [aged(store, days) for days in (1, 2, 3)]
    assert prune().said["source_deleted"] == 0
    # The next day's small backup beside this one's releases nothing.
    with DagsterInstance.get() as instance:
        assert prune_ops.settled_until(instance, BackupType.SOURCE, str(store)) is None
    assert prune(accept=True).said["source_deleted"] == 2
    assert names() >= {*small, full[0]}
    with DagsterInstance.get() as instance:
        assert prune_ops.settled_until(instance, BackupType.SOURCE, str(store)) is not None
    assert prune().said["source_held_back"] == ""


def test_one_that_cannot_be_deleted_does_not_stop_the_others(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule()
    files = [aged(store, days) for days in (0, 40, 41, 42)]
    delete = FolderStorage.delete

    def refuse_one(self: FolderStorage, name: str) -> None:
        if name == files[2]:
            raise StorageError(f"Storage not accessible: cannot delete {name}")
        delete(self, name)

    monkeypatch.setattr(FolderStorage, "delete", refuse_one)
    outcome = prune()
    assert not outcome.success
    assert f"1 backups could not be deleted.\n  - {files[2]}" in str(outcome.error)
    assert names() == {files[0], files[2]}


def test_nothing_goes_while_the_schedule_file_has_problems(store: Path) -> None:
    files = {aged(store, days) for days in (0, 40, 41)}
    Path("kanbu_backup.yaml").write_text(SCHEDULES.format(days=30, daily="many"))
    outcome = prune()
    assert isinstance(outcome.error, SettingsError)
    scheduled = run_job("source_backup", tags=TAGS)
    assert scheduled.errors == ()
    assert names() >= files


def test_what_an_unfinished_run_restores_stays_although_it_holds_no_lock_yet(store: Path) -> None:
    """Such a run may still wait for its start."""
    schedule()
    used, gone, newest = (aged(store, days) for days in (41, 40, 0))
    [restore] = [one for one in JOBS if one.name == "restore_source"]
    config = {"ops": {"validate_source": {"config": {"file": used, "into": "/srv/kanbu"}}}}
    with DagsterInstance.get() as instance:
        run = instance.create_run_for_job(restore, run_config=config, tags={FILE: used})
        shown = prune(dry_run=True)
        rows = {row.data["file"]: row.data for row in shown.said["source_plan"].records}
        assert rows[used]["reason"] == f"in use: restore_source, run {run.run_id}"
        assert prune().success
        assert names() == {used, newest}
        assert gone not in names()
        instance.report_run_failed(run)
    assert prune().success
    assert names() == {newest}


def _hold(name: str, job: str, exclusive: bool, held: Event, release: Event) -> None:
    with open_locks().hold(name, Holder.now(job, "another run"), exclusive=exclusive):
        held.set()
        release.wait(60)


@contextmanager
def holding(store: Path, job: str, *, exclusive: bool) -> Iterator[None]:
    """Meanwhile another process holds the storage's files."""
    spawning = multiprocessing.get_context("fork")
    held, release = spawning.Event(), spawning.Event()
    process = spawning.Process(target=_hold, args=(storage_name(FolderStorage(store)), job, exclusive, held, release))
    process.start()
    assert held.wait(30)
    try:
        yield
    finally:
        release.set()
        process.join(30)


@pytest.fixture
def restoring(store: Path) -> Iterator[None]:
    """Another process holds the storage's files in place, as a restore does."""
    with holding(store, "restore_source", exclusive=False):
        yield


def test_no_restore_begins_while_files_are_deleted(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [file] = run_job("source_backup").materialized
    config = {"file": file, "into": str(tmp_path / "into")}

    def restore() -> Outcome:
        return run_job("restore_source", run_config={"ops": {"validate_source": {"config": config}}})

    with holding(store, "prune_backups", exclusive=True):
        monkeypatch.setattr(restore_source_ops, "STORAGE_PATIENCE_SECONDS", 0.1)
        assert "prune_backups, run another run" in str(restore().error)
        assert not (tmp_path / "into").exists()
    assert restore().success
    assert (tmp_path / "into" / "app" / "file").is_file()


@pytest.mark.usefixtures("restoring")
def test_nothing_goes_while_a_restore_reads(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_ops, "STORAGE_PATIENCE_SECONDS", 0.1)
    schedule()
    files = {aged(store, days) for days in (0, 40, 41)}
    outcome = prune()
    assert "restore_source, run another run" in str(outcome.error)
    scheduled = run_job("source_backup", tags=TAGS)
    assert scheduled.errors == ()  # the backup is made; the next one prunes
    assert names() >= files

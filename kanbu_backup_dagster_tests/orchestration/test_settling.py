"""A backup that waits in rclone's cache: pending until the remote has it, then verified, pruned, and only then told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import time_machine
from dagster import AssetCheckKey, AssetCheckSeverity, AssetKey, DagsterInstance, build_sensor_context
from dagster._core.definitions.run_request import RunRequest

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.manifest import VerificationStatus
from kanbu_backup_dagster.cli import main as command_line
from kanbu_backup_dagster.definitions import build_definitions
from kanbu_backup_dagster.orchestration import alerts, tags
from kanbu_backup_dagster.orchestration.configuration import load_configuration
from kanbu_backup_dagster.orchestration.jobs import JOBS
from kanbu_backup_dagster.orchestration.run_here import Outcome, run_job
from kanbu_backup_dagster.orchestration.settling import settling_sensor
from kanbu_backup_dagster_tests.backups import store_backup
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest
from kanbu_backup_dagster_tests.real_rclone import RcloneMount, missing_for_a_mount, until
from kanbu_backup_dagster_tests.receiver import Receiver

SCHEDULED = {tags.TRIGGER: "scheduled", tags.SCHEDULE_ID: "1", tags.SCHEDULE_NAME: "Nightly"}


def tick() -> list[RunRequest] | str:
    """What the sensor asks for, or says."""
    return next(ticks())


def ticks() -> Iterator[list[RunRequest] | str]:
    """What the sensor asks for, or says, tick by tick."""
    cursor = None
    with DagsterInstance.get() as instance:
        while True:
            with build_sensor_context(instance=instance, cursor=cursor) as context:
                asked = settling_sensor(JOBS).evaluate_tick(context)
            cursor = asked.cursor
            yield list(asked.run_requests or []) or str(asked.skip_message)


def expect(filename: str) -> None:
    """A run whose backup `filename` is on its way."""
    with DagsterInstance.get() as instance:
        instance.create_run_for_job(
            next(job for job in JOBS if job.name == "database_backup"),
            tags={tags.SETTLING: tags.WAITING, tags.SETTLING_FILE: filename},
        )


def start(request: RunRequest) -> bool:
    """Run what the sensor asked for."""
    assert request.job_name is not None
    return run_job(request.job_name, run_config=dict(request.run_config), tags=dict(request.tags)).success


@pytest.fixture
def receiver(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Receiver:
    """The webhook and the ping URL of the environment."""
    monkeypatch.setenv("BACKUP_WEBHOOK_URL", receiver.url)
    monkeypatch.setenv("BACKUP_PING_URL", receiver.url)
    return receiver


def tell() -> None:
    """What the sensor `alerts` does."""
    with DagsterInstance.get() as instance:
        alerts._alerts_tick(instance, load_configuration(), lambda line: None)


def watch() -> None:
    """What the sensor `watch` does."""
    with DagsterInstance.get() as instance:
        alerts._watch_tick(instance, load_configuration(), ())


def verify_one(name: str) -> Outcome:
    return run_job("verify_backup", run_config={"ops": {"verify_one": {"config": {"file": name}}}})


@pytest.mark.real("rclone")
def test_what_waits_in_the_cache_is_verified_once_it_has_arrived_then_pruned_and_told(
    receiver: Receiver,
    configure: Callable[..., Path],
    newest_postgres: PostgresForTest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = missing_for_a_mount()
    if missing is not None:
        pytest.skip(missing)
    Path("kanbu_backup.yaml").write_text(
        "version: 1\nschedules:\n  - {id: 1, name: Nightly, type: database, cron: '0 2 * * *', retention_days: 1}\n"
        "notifications: {on_success: true}\n"
    )
    assert tick() == "No backup is on its way."
    with RcloneMount(tmp_path / "rclone", "writes") as mount:
        configure(newest_postgres.sample_database(), **mount.variables)
        # Nobody to ask: the mount reads back whole, and that proves nothing.
        monkeypatch.delenv("BACKUP_RCLONE_RC_ADDR")
        ran = run_job("database_backup", tags=SCHEDULED)
        assert ran.success
        (backup,) = load_environment().catalog.backups()
        assert backup.status is VerificationStatus.PENDING
        assert backup.manifest is not None
        assert "BACKUP_RCLONE_RC_ADDR is not set" in backup.manifest.verification.detail
        with DagsterInstance.get() as instance:
            outputs = {
                event.step_key: event.step_output_data.metadata
                for record in instance.all_logs(ran.run_id)
                if (event := record.dagster_event) is not None and event.is_successful_output
            }
            shown = {name: outputs["store"][name].value for name in ("mount", "remote", "cache_mode")}
            assert shown == {"mount": str(mount.point), "remote": "remote:", "cache_mode": "writes"}
            assert "database_plan" not in outputs["prune"]
        monkeypatch.setattr("sys.argv", ["kanbu-backup", "status", "--json"])
        command_line.main()
        told = json.loads(capsys.readouterr().out)["storage"]
        assert {name: told[name] for name in ("kind", "accessible", *shown)} == {
            "kind": "gdrive",
            "accessible": True,
            **shown,
        }
        assert "BACKUP_RCLONE_RC_ADDR is not set" in tick()

        # No success is told of it, and the schedule is overdue in the end.
        watch()
        tell()
        assert receiver.events == []
        with time_machine.travel(datetime.now(timezone.utc) + timedelta(hours=33)) as clock:
            for _ in range(3):
                watch()
                clock.shift(timedelta(minutes=3))
            tell()
        assert receiver.events == ["backup.overdue"]
        assert receiver.accepted[0].event["overdue"]["unsettled"] == backup.filename

        monkeypatch.setenv("BACKUP_RCLONE_RC_ADDR", mount.control_address)
        until(lambda: isinstance(tick(), list), "the backup has arrived")
        (verification,) = tick()
        assert verification.job_name == "verify_backup"
        assert start(verification)
        assert load_environment().catalog.get(backup.filename).status is VerificationStatus.VERIFIED
        assert set(mount.on_remote()) >= {backup.filename}

        tell()
        assert receiver.events == ["backup.overdue"]
        (pruning,) = tick()
        assert (pruning.job_name, pruning.tags[tags.SCHEDULE_ID]) == ("prune_backups", "1")
        assert start(pruning)
        assert "retention was started" in str(tick())
        assert tick() == "No backup is on its way."
        tell()
        assert sorted(receiver.events[1:]) == ["backup.completed", "ping"]
        completed = next(one.event for one in receiver.accepted if one.event["event"] == "backup.completed")
        assert completed["schedule"] == {"id": 1, "name": "Nightly"}
        assert completed["backup"]["filename"] == backup.filename
        watch()
        tell()
        tell()
        assert receiver.events[3:] == ["backup.recovered"]
        mount.wait_until_settled()


def test_a_deleted_backup_is_no_longer_waited_for(configure: Callable[..., Path]) -> None:
    configure().mkdir()
    expect("kanbu_backup_2026-01-18T10-30-00.sql.gz")
    assert "it was deleted" in tick()
    assert tick() == "No backup is on its way."


def test_files_that_do_not_move_keep_no_others_from_being_verified(configure: Callable[..., Path]) -> None:
    store = configure()
    stuck = [store_backup(store).filename for _ in range(15)]
    for name in stuck:
        (store / f"{name}.manifest.json").unlink()
        (store / f"{name}.manifest.json").mkdir()  # what cannot be read stays so
    moving = [store_backup(store).filename for _ in range(2)]
    for name in (*stuck, *moving):
        expect(name)
    looking = ticks()
    first = next(looking)
    assert [name for name in stuck if f"{name}: Storage not accessible" in first] == stuck[:10]
    for name in moving:
        requests = next(looking)
        assert [request.run_config["ops"]["verify_one"]["config"]["file"] for request in requests] == moving, name
        # Round it goes, past those that stay.
        assert stuck[0] in next(looking)


@pytest.mark.real("rclone")
def test_once_it_has_arrived_a_restored_databases_backup_lets_go_of_what_was_replaced(
    configure: Callable[..., Path],
    newest_postgres: PostgresForTest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = missing_for_a_mount()
    if missing is not None:
        pytest.skip(missing)
    url = newest_postgres.sample_database()
    database = newest_postgres.database_name(url)

    def databases() -> set[str]:
        found = newest_postgres.server.psql("SELECT datname FROM pg_database").split()
        return {name for name in found if name.startswith(database)}

    with RcloneMount(tmp_path / "rclone", "writes") as mount:
        configure(url, **mount.variables)
        monkeypatch.delenv("BACKUP_RCLONE_RC_ADDR")
        (file,) = run_job("database_backup").materialized
        confirmed = {"file": file, "confirm_overwrite": True, "confirm_target": database}
        restored = run_job("restore_database", run_config={"ops": {"validate": {"config": confirmed}}})
        assert restored.success, restored.errors
        replaced = restored.report["replaced_database"]
        (file,) = run_job("database_backup").materialized
        monkeypatch.setenv("BACKUP_RCLONE_RC_ADDR", mount.control_address)
        until(lambda: len(tick()) == 3, "all three backups have arrived")
        *before, after = tick()
        # Those made before the swap say nothing of what came into its place.
        for verification in before:
            assert isinstance(verification, RunRequest)
            assert start(verification)
        assert databases() == {database, replaced}
        # Nor does one of another server, or with the database out of reach; the file is judged all the same.
        assert isinstance(after, RunRequest)
        with monkeypatch.context() as away:
            away.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nowhere")
            assert start(after)
        assert load_environment().catalog.get(file).status is VerificationStatus.VERIFIED
        assert databases() == {database, replaced}
        honest = load_environment().catalog.get(file).manifest
        assert honest is not None
        assert honest.database is not None
        elsewhere = honest.database.model_copy(update={"server_id": "1"})
        for facts, left in ((elsewhere, {database, replaced}), (honest.database, {database})):
            changed = honest.model_copy(update={"database": facts})
            load_environment().catalog.amend(file, lambda _, changed=changed: changed)  # type: ignore[misc]
            assert start(after)
            assert databases() == left
        mount.wait_until_settled()


@pytest.mark.real("rclone")
def test_a_verdict_stays_while_nobody_can_say_whether_the_file_has_arrived(
    configure: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = missing_for_a_mount()
    if missing is not None:
        pytest.skip(missing)
    with RcloneMount(tmp_path / "rclone", "writes") as mount:
        configure(**mount.variables)
        store = mount.point / "kanbu-backups"
        good, bad = (store_backup(store).filename for _ in range(2))
        (store / bad).write_bytes((store / bad).read_bytes()[:-1] + b"\0")
        storage = load_environment().storage
        for name, passes in ((good, True), (bad, False)):
            # A verdict is an upload too, and an rclone that cannot say of which file keeps the others waiting.
            until(lambda name=name: storage.settlement(name).done, "it has arrived")  # type: ignore[misc]
            assert verify_one(name).success is passes
        new = store_backup(store).filename
        known = {good: "verified", bad: "failed", new: "pending"}
        mount.wait_until_settled()

        # From here on the remote control is away.
        monkeypatch.setenv("BACKUP_RCLONE_RC_ADDR", "http://127.0.0.1:1")
        before = {name: load_environment().catalog.get(name).verification for name in (good, bad)}
        monkeypatch.setattr("sys.argv", ["kanbu-backup", "verify", "--all"])
        command_line.main()
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 3
        for line, (name, status) in zip(said, known.items(), strict=True):
            assert line.startswith(f"{name}: {status}: not judged now: Not known to have arrived: ")
        assert load_environment().catalog.get(new).verification.detail.startswith("Not known to have arrived")
        outcome = run_job("verify_pending_backups", run_config={"ops": {"verify_many": {"config": {"all": True}}}})
        assert (outcome.said["verified"], outcome.said["failed"], outcome.said["waiting"]) == (0, 0, 3)
        alone = verify_one(bad)
        assert alone.success, "that it is damaged was said before"
        assert alone.said["not_judged"].startswith("Not known to have arrived")

        # The check as the UI executes it.
        key = AssetCheckKey(AssetKey("database_backup"), "verified")
        check = build_definitions().resolve_job_def("__ASSET_JOB").get_subset(asset_check_selection={key})
        with DagsterInstance.get() as instance:
            for name, passed in ((good, True), (bad, False)):
                ran = check.execute_in_process(instance=instance, tags={"dagster/partition": name})
                (told,) = ran.get_asset_check_evaluations()
                assert (told.passed, told.severity) == (passed, AssetCheckSeverity.WARN)
                assert f"{name} was not judged, and stays {known[name]}: " in str(told.description)
        assert {name: load_environment().catalog.get(name).verification for name in (good, bad)} == before

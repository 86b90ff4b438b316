"""A backup that waits in rclone's cache: pending until the remote has it, then verified, pruned, and only then told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import time_machine
from dagster import DagsterInstance, build_sensor_context
from dagster._core.definitions.run_request import RunRequest

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.manifest import VerificationStatus
from kanbu_backup_dagster.cli import main as command_line
from kanbu_backup_dagster.orchestration import alerts, tags
from kanbu_backup_dagster.orchestration.configuration import load_configuration
from kanbu_backup_dagster.orchestration.jobs import JOBS
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster.orchestration.settling import settling_sensor
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest
from kanbu_backup_dagster_tests.real_rclone import RcloneMount, missing_for_a_mount, until
from kanbu_backup_dagster_tests.receiver import Receiver

SCHEDULED = {tags.TRIGGER: "scheduled", tags.SCHEDULE_ID: "1", tags.SCHEDULE_NAME: "Nightly"}


def tick() -> list[RunRequest] | str:
    """What the sensor asks for, or says."""
    with DagsterInstance.get() as instance, build_sensor_context(instance=instance) as context:
        asked = settling_sensor(JOBS).evaluate_tick(context)
        return list(asked.run_requests or []) or str(asked.skip_message)


def start(request: RunRequest) -> bool:
    """Run what the sensor asked for."""
    assert request.job_name is not None
    return run_job(request.job_name, run_config=dict(request.run_config), tags=dict(request.tags)).success


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """The webhook and the ping URL of the environment."""
    one = Receiver()
    one.start()
    monkeypatch.setenv("BACKUP_WEBHOOK_URL", one.url)
    monkeypatch.setenv("BACKUP_PING_URL", one.url)
    yield one
    one.stop()


def tell() -> None:
    """What the sensor `alerts` does."""
    with DagsterInstance.get() as instance:
        alerts._alerts_tick(instance, load_configuration(), lambda line: None)


def watch() -> None:
    """What the sensor `watch` does."""
    with DagsterInstance.get() as instance:
        alerts._watch_tick(instance, load_configuration(), ())


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
    with DagsterInstance.get() as instance:
        instance.create_run_for_job(
            next(job for job in JOBS if job.name == "database_backup"),
            tags={tags.SETTLING: tags.WAITING, tags.SETTLING_FILE: "kanbu_backup_2026-01-18T10-30-00.sql.gz"},
        )
    assert "it was deleted" in tick()
    assert tick() == "No backup is on its way."

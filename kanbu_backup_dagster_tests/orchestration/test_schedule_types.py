"""Each type of schedule starts its job, and one that fails is told with its schedule's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dagster import Definitions, build_sensor_context

from kanbu_backup_dagster.definitions import build_definitions
from kanbu_backup_dagster.orchestration import tags
from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster.schedule_file import ScheduleType
from kanbu_backup_dagster_tests.backups import store_backup
from kanbu_backup_dagster_tests.receiver import Receiver

FILE = """
schedules:
  - {id: 1, name: Daily, type: database, cron: "0 2 * * *"}
  - {id: 2, name: Sources, type: source, cron: "0 3 * * 0"}
  - {id: 3, name: Weekly drill, type: drill, cron: "0 5 * * 0"}
  - {id: 4, name: Look again, type: verify_pending, cron: "30 * * * *"}
"""


@pytest.fixture
def receiver(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Receiver:
    monkeypatch.setenv("BACKUP_WEBHOOK_URL", receiver.url)
    Path("kanbu_backup.yaml").write_text(FILE)
    return receiver


def look_for_alerts() -> None:
    """What the daemon does every few seconds."""
    with open_instance() as instance, build_sensor_context(instance=instance) as context:
        build_definitions().get_repository_def().get_sensor_def("alerts").evaluate_tick(context)


def tags_of(number: int, name: str) -> dict[str, str]:
    return {tags.TRIGGER: "scheduled", tags.SCHEDULE_ID: str(number), tags.SCHEDULE_NAME: name}


def test_each_type_starts_its_job() -> None:
    Path("kanbu_backup.yaml").write_text(FILE)
    built = build_definitions()
    Definitions.validate_loadable(built)
    started = {one.name: (one.job_name, one.default_status.value) for one in built.get_repository_def().schedule_defs}
    assert started == {
        "schedule_1_daily": ("database_backup", "RUNNING"),
        "schedule_2_sources": ("source_backup", "RUNNING"),
        "schedule_3_weekly_drill": ("restore_drill", "RUNNING"),
        "schedule_4_look_again": ("verify_pending_backups", "RUNNING"),
    }
    assert len(started) == len(ScheduleType)


def test_a_drill_of_a_schedule_that_fails_is_told(configure: Callable[..., Path], receiver: Receiver) -> None:
    configure().mkdir()
    assert not run_job("restore_drill", tags=tags_of(3, "Weekly drill")).success
    look_for_alerts()
    assert receiver.events == ["drill.failed"]
    event = receiver.accepted[0].event
    assert event["schedule"] == {"id": 3, "name": "Weekly drill"}
    assert event["error"].startswith("Backup file not found")


def test_a_verification_of_a_schedule_that_fails_is_told(configure: Callable[..., Path], receiver: Receiver) -> None:
    store = configure()
    name = store_backup(store).filename
    damaged = bytearray((store / name).read_bytes())
    damaged[20] ^= 1
    (store / name).write_bytes(damaged)
    assert not run_job("verify_pending_backups", tags=tags_of(4, "Look again")).success
    look_for_alerts()
    assert receiver.events == ["verification.failed"]
    event = receiver.accepted[0].event
    assert event["schedule"] == {"id": 4, "name": "Look again"}
    assert event["verification"]["filename"] == name
    assert event["error"].startswith("Checksum verification failed")

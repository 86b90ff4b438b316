"""Alerts on a real Dagster instance with a real receiver: nothing is lost or overtakes; what is given up is seen."""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import time_machine
from click.testing import CliRunner
from dagster import (
    AssetCheckEvaluation,
    AssetCheckSeverity,
    AssetKey,
    AssetMaterialization,
    DagsterInstance,
    Failure,
    MetadataValue,
    OpExecutionContext,
    SensorResult,
    job,
    op,
)

from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.cli import inspect as _inspect  # noqa: F401  # commands register on import
from kanbu_backup_dagster.cli import schedules as _schedules  # noqa: F401
from kanbu_backup_dagster.cli.group import cli
from kanbu_backup_dagster.errors import KanbuError, SourceError
from kanbu_backup_dagster.notifications import delivery
from kanbu_backup_dagster.notifications.delivery import Limits
from kanbu_backup_dagster.notifications.events import PruneHeld, PrunePart
from kanbu_backup_dagster.orchestration import alerts, tags
from kanbu_backup_dagster.orchestration.alerts import WEBHOOK, Alerts, alerts_report
from kanbu_backup_dagster.orchestration.configuration import load_configuration
from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.orchestration.jobs import JOBS
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster.orchestration.telling import told
from kanbu_backup_dagster.orchestration.watch import needed_bytes
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest
from kanbu_backup_dagster_tests.receiver import Receiver

PROJECT = Path(__file__).parents[2]
Configure = Callable[..., Path]
[DATABASE_BACKUP] = [one for one in JOBS if one.name == "database_backup"]
SCHEDULED = {tags.TRIGGER: "scheduled", tags.SCHEDULE_ID: "1", tags.SCHEDULE_NAME: "Daily"}
CONFIG = """
schedules:
  - {id: 1, name: Daily, type: database, cron: "0 2 * * *"}
notifications: {on_success: true}
"""


@pytest.fixture
def instance(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[DagsterInstance]:
    monkeypatch.setenv("BACKUP_WEBHOOK_URL", receiver.url)
    monkeypatch.setenv("BACKUP_WEBHOOK_SECRET", "s3cret")
    monkeypatch.setenv("BACKUP_RETRY_AFTER_SECONDS", "0")
    Path("kanbu_backup.yaml").write_text(CONFIG)
    # The limits of production are tested with the delivery itself.
    monkeypatch.setattr(alerts, "deliver", partial(delivery.deliver, limits=Limits(connect=1, read=0.3, total=0.6)))
    with open_instance() as one:
        yield one


def tick(instance: DagsterInstance) -> SensorResult:
    return alerts._alerts_tick(instance, load_configuration(), lambda line: None)


def watch(instance: DagsterInstance) -> str:
    return alerts._watch_tick(instance, load_configuration(), ())


def failed_run(instance: DagsterInstance, **given: str) -> str:
    run = instance.create_run_for_job(
        DATABASE_BACKUP, tags={key.replace("__", "/"): value for key, value in given.items()}
    )
    instance.report_run_failed(run)
    return run.run_id


def successful_run(instance: DagsterInstance, given: dict[str, str], name: str = "") -> str:
    """A run of the job's name that stores a file and ends well."""
    filename = name or "kanbu_backup_2026-01-18T02-00-00.sql.gz"

    @op(name="store")
    def store(context: OpExecutionContext) -> None:
        context.log_event(
            AssetMaterialization(
                AssetKey("database_backup"), partition=filename, metadata={"size_bytes": 1000, "sha256": "ab" * 32}
            )
        )

    @job(name="database_backup", tags=given)
    def made() -> None:
        store()

    return made.execute_in_process(instance=instance).run_id


def state(instance: DagsterInstance) -> Alerts:
    return alerts_report(instance).alerts


def later(minutes: float) -> time_machine.travel:
    return time_machine.travel(datetime.now(timezone.utc) + timedelta(minutes=minutes))


def test_every_end_is_told_once_signed_and_with_the_schedule(instance: DagsterInstance, receiver: Receiver) -> None:
    before = failed_run(instance)  # before the sensor's first look
    assert tick(instance).skip_reason is not None
    canceled = instance.create_run_for_job(DATABASE_BACKUP)
    instance.report_run_canceled(canceled)
    made = successful_run(instance, SCHEDULED)
    for _ in range(3):
        tick(instance)
    assert receiver.events == ["backup.failed", "backup.failed", "backup.completed"]
    assert receiver.accepted[1].event["error"] == "The run was canceled."
    completed = receiver.accepted[2]
    assert completed.event["schedule"] == {"id": 1, "name": "Daily"}
    assert completed.event["backup"] == {
        "type": "database",
        "filename": "kanbu_backup_2026-01-18T02-00-00.sql.gz",
        "fileSize": 1000,
        "isEncrypted": False,
        "checksum": "ab" * 32,
        "durationMs": completed.event["backup"]["durationMs"],
    }
    expected = hmac.new(b"s3cret", completed.body, hashlib.sha256).hexdigest()
    assert completed.headers["X-Kanbu-Signature"] == expected
    assert len({one.headers["X-Kanbu-Delivery"] for one in receiver.accepted}) == 3
    assert {before, canceled.run_id, made} == {one.dagster_run.run_id for one in instance.get_run_records()}


@pytest.mark.parametrize("how", [tags.SETTLED, tags.ENDED])
def test_a_backup_that_has_not_arrived_is_no_success_until_it_has(
    how: str, instance: DagsterInstance, receiver: Receiver
) -> None:
    run = successful_run(instance, {**SCHEDULED, tags.SETTLING: tags.WAITING})
    for _ in range(2):
        tick(instance)
    assert receiver.events == []
    assert state(instance).successes == {}
    instance.add_run_tags(run, {tags.SETTLING: how})
    with later(180):
        for _ in range(2):
            tick(instance)
    assert receiver.events == (["backup.completed"] if how == tags.SETTLED else [])
    assert list(state(instance).successes) == (["1"] if how == tags.SETTLED else [])
    assert state(instance).unsettled == []


def test_success_is_told_only_to_who_asked(instance: DagsterInstance, receiver: Receiver) -> None:
    Path("kanbu_backup.yaml").write_text("schedules: []")
    successful_run(instance, {})
    failed_run(instance)
    tick(instance)
    assert receiver.events == ["backup.failed"]


def test_a_receiver_in_every_kind_of_trouble_loses_nothing_and_keeps_the_order(
    instance: DagsterInstance, receiver: Receiver
) -> None:
    """Down, then failing, hanging, answering garbage; runs go on ending meanwhile. Each run tells two events."""
    runs = [verification_failing_run(instance, number) for number in range(4)]
    receiver.stop()
    moment = 0.0
    with later(moment):
        tick(instance)
    receiver.start()
    script = iter([500, "hang", "garbage", 302, 404, 503])
    receiver.behave = lambda request: next(script, 204)
    for number in range(4, 12):
        runs.append(verification_failing_run(instance, number))
        moment += 70
        with later(moment):
            tick(instance)
    told_of = [(one.event["event"], one.event["error"]) for one in receiver.accepted]
    assert told_of == [
        (event, error)
        for number in range(12)
        for event, error in (("verification.failed", f"bad {number}"), ("backup.failed", f"bad {number}"))
    ]
    names = [one.event["verification"]["filename"] for one in receiver.accepted[::2]]
    assert names == [f"kanbu_backup_2026-01-18T02-00-{number:02}.sql.gz" for number in range(12)]
    assert not state(instance).outboxes[WEBHOOK].waiting
    assert len(receiver.attempts) == 24 + 6
    assert len({one.headers["X-Kanbu-Delivery"] for one in receiver.accepted}) == 24


def verification_failing_run(instance: DagsterInstance, number: int) -> str:
    filename = f"kanbu_backup_2026-01-18T02-00-{number:02}.sql.gz"

    @op
    def store(context: OpExecutionContext) -> int:
        context.log_event(AssetMaterialization(AssetKey("database_backup"), partition=filename))
        return number

    @op
    def verify(context: OpExecutionContext, stored: int) -> None:
        found = "kanbu_backup_2020-01-01T00-00-00.sql"  # a file that was there before
        context.log_event(AssetMaterialization(AssetKey("database_backup"), partition=found))
        metadata = {"verification": MetadataValue.text("failed")}
        raise Failure(f"bad {stored}", metadata=metadata, allow_retries=False)

    @job(name="database_backup")
    def damaged() -> None:
        verify(store())

    return damaged.execute_in_process(instance=instance, raise_on_error=False).run_id


def test_a_refused_event_waits_alone_but_for_its_own_run(instance: DagsterInstance, receiver: Receiver) -> None:
    receiver.behave = lambda request: 422 if request.event["error"] == "bad 0" and refusing else 204
    refusing = True
    verification_failing_run(instance, 0)
    verification_failing_run(instance, 1)
    tick(instance)
    assert [one.event["error"] for one in receiver.accepted] == ["bad 1", "bad 1"]
    refusing = False
    with later(5):
        tick(instance)
    assert [(one.event["event"], one.event["error"]) for one in receiver.accepted[2:]] == [
        ("verification.failed", "bad 0"),
        ("backup.failed", "bad 0"),
    ]


def test_a_dead_endpoint_holds_nobody_else_up(
    instance: DagsterInstance, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Receiver(behave=lambda request: "hang")
    dead.start()
    monkeypatch.setenv("BACKUP_WEBHOOK_URL", dead.url)
    monkeypatch.setenv("BACKUP_PING_URL", receiver.url)
    for _ in range(3):
        successful_run(instance, {})
    tick(instance)
    dead.stop()
    assert receiver.events == ["ping"]  # three successes, one sign of life: the newest
    waiting = state(instance).outboxes[WEBHOOK].waiting
    assert len(waiting) == 3
    assert len(dead.attempts) == 1


def test_giving_up_takes_days_and_is_seen(instance: DagsterInstance, receiver: Receiver) -> None:
    receiver.behave = lambda request: 500
    run = failed_run(instance)
    hours = 0.0
    seen: KanbuError | None = None
    while seen is None and hours < 24 * 5:
        with later(hours * 60):
            try:
                tick(instance)
            except KanbuError as error:
                seen = error
        hours += 1
    assert "given up" in str(seen)
    assert 71 <= hours <= 74
    assert run in str(seen)
    assert "S3CRET-IN-PATH" not in str(seen)
    [lost] = state(instance).outboxes[WEBHOOK].given_up
    assert (lost.event, lost.key) == ("backup.failed", run)
    shown = CliRunner().invoke(cli, ["status", "--json"])
    assert run in json.loads(shown.output)["alerts"]["webhook"]["given_up"][0]
    receiver.behave = lambda request: 204
    failed_run(instance)
    with later(hours * 60 + 61):
        tick(instance)
    assert receiver.events == ["backup.failed"]


def test_a_crash_between_answer_and_record_repeats_and_loses_nothing(
    instance: DagsterInstance, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed_run(instance)
    failed_run(instance)

    def crash(*arguments: object) -> None:
        if receiver.accepted:
            raise SystemExit("killed")
        remember(*arguments)

    remember: Any = alerts.remember
    monkeypatch.setattr(alerts, "remember", crash)
    with pytest.raises(SystemExit):
        tick(instance)
    monkeypatch.setattr(alerts, "remember", remember)
    tick(instance)
    count = Counter(one.headers["X-Kanbu-Delivery"] for one in receiver.accepted)
    assert sorted(count.values()) == [1, 2]


def test_a_run_told_late_by_the_database_is_not_missed(instance: DagsterInstance, receiver: Receiver) -> None:
    """PostgreSQL may show an event with a lower number after one with a higher."""
    failed_run(instance)
    failed_run(instance)
    tick(instance)
    early, late = state(instance).seen
    changed = state(instance).model_copy(update={"seen": [late]})  # as if the first had not been visible
    alerts.remember(instance, alerts.ALERTS_KEY, changed)
    tick(instance)
    tick(instance)
    assert len(receiver.accepted) == 3
    assert early in state(instance).seen


def test_a_passing_failure_of_a_schedule_is_tried_once_more_before_it_is_told(
    instance: DagsterInstance, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_RETRY_AFTER_SECONDS", "300")
    given = {key.replace("/", "__"): value for key, value in SCHEDULED.items()}
    first = failed_run(instance, **given)  # no failed step: its worker died
    assert not tick(instance).run_requests
    assert receiver.attempts == []
    with later(6):
        [request] = tick(instance).run_requests or []
    assert request.job_name == "database_backup"
    assert request.tags == {**SCHEDULED, tags.SECOND_ATTEMPT_OF: first}
    with later(7):  # Dagster did not start it: asked again, under the same key
        assert [one.run_key for one in tick(instance).run_requests or []] == [request.run_key]
    second = failed_run(instance, **{key.replace("/", "__"): value for key, value in request.tags.items()})
    with later(8):
        assert not tick(instance).run_requests
    assert receiver.events == ["backup.failed"]
    assert second in receiver.accepted[0].event["error"]
    failed_run(instance)  # by hand: told at once
    tick(instance)
    assert receiver.events == ["backup.failed"] * 2


def test_tags_that_say_nothing_hold_nobody_up(instance: DagsterInstance, receiver: Receiver) -> None:
    """Anybody may set them by GraphQL."""
    failed_run(instance, kanbu__schedule_id="9" * 30, kanbu__trigger="scheduled")
    failed_run(instance, kanbu__schedule_id="one")
    failed_run(instance)
    tick(instance)
    assert [one.event["schedule"] for one in receiver.accepted] == [None, None, None]
    assert receiver.events == ["backup.failed"] * 3


def test_a_verification_that_could_not_be_done_names_no_file(instance: DagsterInstance, receiver: Receiver) -> None:
    """Of no file it is known that it is bad."""
    [verify] = [one for one in JOBS if one.name == "verify_backup"]
    name = "kanbu_source_2026-01-18T03-00-00.tar.gz"
    run = instance.create_run_for_job(verify, run_config={"ops": {"verify_one": {"config": {"file": name}}}})
    instance.report_run_failed(run)
    tick(instance)
    [told] = receiver.accepted
    assert told.event["event"] == "verification.failed"
    assert (told.event["verification"]["type"], told.event["verification"]["filename"]) == ("source", None)


def test_a_second_attempt_that_nobody_starts_is_told_instead(
    instance: DagsterInstance, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_RETRY_AFTER_SECONDS", "300")
    failed_run(instance, **{key.replace("/", "__"): value for key, value in SCHEDULED.items()})
    tick(instance)
    with later(40):
        tick(instance)
    assert receiver.events == ["backup.failed"]


@pytest.mark.parametrize(("kind", "again"), [("SourceError", True), ("SettingsError", False), (None, False)])
def test_only_what_may_pass_is_tried_again(
    kind: str | None, again: bool, instance: DagsterInstance, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_RETRY_AFTER_SECONDS", "300")

    @op
    def dump() -> None:
        if kind is None:
            raise ZeroDivisionError("a fault with a p4ssw0rd in it")
        raise Failure("the server is away", metadata={"error": kind}, allow_retries=False)

    @job(name="database_backup", tags=SCHEDULED)
    def failing() -> None:
        dump()

    failing.execute_in_process(instance=instance, raise_on_error=False)
    tick(instance)
    assert bool(state(instance).second_attempts) is again
    assert receiver.events == ([] if again else ["backup.failed"])
    assert b"p4ssw0rd" not in b"".join(one.body for one in receiver.attempts)


def second_attempts(instance: DagsterInstance) -> list[str]:
    """The runs that are asked for once the pause is over, by the run that they repeat."""
    tick(instance)
    with later(6):
        return [request.tags[tags.SECOND_ATTEMPT_OF] for request in tick(instance).run_requests or []]


def test_a_database_that_goes_away_in_mid_dump_is_tried_once_more(
    instance: DagsterInstance,
    receiver: Receiver,
    newest_postgres: PostgresForTest,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BACKUP_RETRY_AFTER_SECONDS", "300")
    other = newest_postgres.database()
    url = newest_postgres.database(
        "CREATE TABLE t AS SELECT md5(i::text) || md5((i * 7)::text) AS a FROM generate_series(1, 600000) i"
    )
    configure(url)
    name = newest_postgres.database_name(url)
    # The server's own work on a new table is a session too.
    dumping = f"FROM pg_stat_activity WHERE datname = '{name}' AND query LIKE 'COPY public.t %'"
    seen: list[int] = []

    def end_the_session(progress: Progress) -> None:
        if progress.done_bytes and not seen:
            seen.append(progress.done_bytes)
            ended = newest_postgres.query(other, f"SELECT pg_terminate_backend(pid) {dumping}")
            assert ended == [["t"]]

    outcome = run_job("database_backup", tags=SCHEDULED, on_progress=end_the_session)
    assert seen
    assert isinstance(outcome.error, SourceError)
    assert "(stage `dump`)" in str(outcome.error)
    assert second_attempts(instance) == [outcome.run_id]
    assert receiver.events == []


def test_a_lock_that_is_not_given_is_tried_once_more(
    instance: DagsterInstance, newest_postgres: PostgresForTest, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_RETRY_AFTER_SECONDS", "300")
    url = newest_postgres.database("CREATE TABLE t (i int)")
    configure(url, BACKUP_LOCK_TIMEOUT_SECONDS="0.2")
    with psycopg2.connect(url) as session, session.cursor() as cursor:
        cursor.execute("LOCK TABLE t")
        ended = run_job("database_backup", tags=SCHEDULED)
    assert "BACKUP_LOCK_TIMEOUT_SECONDS" in str(ended.error)
    assert second_attempts(instance) == [ended.run_id]


@pytest.mark.parametrize("canceled", [False, True])
def test_a_worker_told_to_end_is_tried_once_more_unless_a_user_cancelled(
    canceled: bool,
    instance: DagsterInstance,
    receiver: Receiver,
    newest_postgres: PostgresForTest,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BACKUP_RETRY_AFTER_SECONDS", "300")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    url = newest_postgres.database("CREATE TABLE t (i int)")
    configure(url)
    execute = [sys.executable, "-m", "dagster", "job", "execute", "-m", "kanbu_backup_dagster.definitions"]
    with psycopg2.connect(url) as session, session.cursor() as cursor:
        cursor.execute("LOCK TABLE t")
        worker = subprocess.Popen(
            [*execute, "-j", "database_backup", "--tags", json.dumps(SCHEDULED)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(lambda: _waits_for_a_lock(newest_postgres, url), 30)
        [run] = instance.get_runs()
        if canceled:
            instance.report_run_canceling(run)  # as the UI's button does before it ends the worker
        worker.send_signal(signal.SIGTERM)
        worker.wait(30)
    assert second_attempts(instance) == ([] if canceled else [run.run_id])
    assert receiver.events == (["backup.failed"] if canceled else [])


def test_ops_and_checks_tell_what_the_end_alone_does_not(instance: DagsterInstance, receiver: Receiver) -> None:
    @op
    def prune(context: OpExecutionContext) -> None:
        held = PruneHeld(
            key=context.run_id, timestamp=datetime.now(timezone.utc), prune=PrunePart(reason="the clock leapt", held=3)
        )
        context.add_output_metadata(told(held))
        context.log_event(
            AssetCheckEvaluation(
                asset_key=AssetKey("database_backup"),
                check_name="verified",
                passed=False,
                description="Checksum mismatch",
                partition="kanbu_backup_2026-01-18T02-00-00.sql.gz",
            )
        )
        unjudged = AssetCheckEvaluation(
            asset_key=AssetKey("database_backup"),
            check_name="verified",
            passed=False,
            severity=AssetCheckSeverity.WARN,
            partition="kanbu_backup_2026-01-17T02-00-00.sql",
        )
        context.log_event(unjudged)

    @job(name="verify_pending_backups")
    def checking() -> None:
        prune()

    checking.execute_in_process(instance=instance)
    tick(instance)
    assert receiver.events == ["prune.held", "verification.failed"]
    assert receiver.accepted[0].event["prune"] == {"type": None, "reason": "the clock leapt", "held": 3}
    assert receiver.accepted[1].event["verification"]["filename"] == "kanbu_backup_2026-01-18T02-00-00.sql.gz"


def test_a_restore_and_a_drill_are_told_with_what_they_did(instance: DagsterInstance, receiver: Receiver) -> None:
    filename = "kanbu_backup_2026-01-18T02-00-00.sql.gz.enc"

    @op
    def report(context: OpExecutionContext) -> None:
        context.instance.add_run_tags(context.run_id, {tags.FILE: filename, tags.DATABASE: "kanbu"})
        metadata = {"replaced_database": "kanbu_before", "tables": 42, "rows": 1000}
        context.log_event(AssetMaterialization(AssetKey("restored_database"), metadata={**metadata, "file": filename}))
        context.log_event(
            AssetMaterialization(AssetKey("restored_database"), metadata={"file": "another", "tables": 7})
        )

    @op
    def fail(context: OpExecutionContext) -> None:
        context.instance.add_run_tags(context.run_id, {tags.FILE: filename, tags.DATABASE: "kanbu"})
        if context.job_name == "restore_drill":
            check = AssetCheckEvaluation(
                asset_key=AssetKey("database_backup"), check_name="restorable", passed=False, partition=filename
            )
            context.log_event(check)
        raise Failure("Checksum mismatch", allow_retries=False)

    def execute(name: str, step: Callable[[], None]) -> None:
        @job(name=name)
        def ended() -> None:
            step()

        ended.execute_in_process(instance=instance, raise_on_error=False)

    for name in ("restore_database", "restore_drill"):
        for step in (report, fail):
            execute(name, step)
    tick(instance)
    assert receiver.events == ["restore.completed", "restore.failed", "drill.completed", "drill.failed"]
    done, failed, proven, unproven = [one.event for one in receiver.accepted]
    assert {key: done["restore"][key] for key in ("filename", "target", "previous")} == {
        "filename": filename,
        "target": "kanbu",
        "previous": "kanbu_before",
    }
    assert (failed["restore"]["previous"], failed["error"]) == (None, "Checksum mismatch")
    assert (proven["drill"]["tables"], proven["drill"]["rows"]) == (42, 1000)
    assert unproven["drill"]["filename"] == filename


def test_the_webhook_is_tried_out_by_job_and_by_command(
    instance: DagsterInstance, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_job("test_webhook").success
    shown = CliRunner().invoke(cli, ["webhook", "test"])
    assert shown.exit_code == 0
    assert "answered 204" in shown.output
    assert "signed" in shown.output
    assert [one.headers.get("X-Kanbu-Test") for one in receiver.accepted] == ["true", "true"]
    assert len({one.headers["X-Kanbu-Delivery"] for one in receiver.accepted}) == 2
    for one in receiver.accepted:
        assert one.headers["X-Kanbu-Signature"] == hmac.new(b"s3cret", one.body, hashlib.sha256).hexdigest()
    receiver.behave = lambda request: 410
    failed = run_job("test_webhook")
    assert "410" in str(failed.error)
    refused = CliRunner().invoke(cli, ["webhook", "test"])
    assert "410" in str(refused.exception)
    assert "S3CRET" not in str(failed.error) + str(refused.exception) + shown.output
    monkeypatch.delenv("BACKUP_WEBHOOK_URL")
    assert "BACKUP_WEBHOOK_URL is not set" in str(run_job("test_webhook").error)
    tick(instance)
    assert len(receiver.accepted) == 2  # a trial is no alert


def test_silence_is_told_once_and_its_end_too(instance: DagsterInstance, receiver: Receiver) -> None:
    with time_machine.travel(datetime(2026, 1, 18, 3, 0, tzinfo=timezone.utc), tick=False) as clock:
        watch(instance)

        def pass_time(hours: float) -> None:
            for _ in range(max(1, round(hours * 15))):
                clock.shift(timedelta(minutes=4))
                watch(instance)
            tick(instance)

        clock.shift(timedelta(hours=27))  # the service was down meanwhile; first late starts have their chance
        watch(instance)
        tick(instance)
        assert receiver.events == []
        pass_time(3)  # 09:00 on the 19th: due at 02:00, and six hours of grace
        assert receiver.events == ["backup.overdue"]
        assert receiver.accepted[0].event["overdue"] == {
            "lastSuccessAt": None,
            "expectedBy": "2026-01-19T08:00:00.000Z",
            "unsettled": None,
        }
        pass_time(2)
        assert receiver.events == ["backup.overdue"]
        successful_run(instance, SCHEDULED)
        tick(instance)
        pass_time(0.1)
        assert receiver.events == ["backup.overdue", "backup.completed", "backup.recovered"]
        recovered = receiver.accepted[2].event
        assert recovered["backup"]["filename"] == "kanbu_backup_2026-01-18T02-00-00.sql.gz"
        assert recovered["overdue"]["expectedBy"] == "2026-01-19T08:00:00.000Z"


def test_a_config_that_cannot_be_used_is_told_once(instance: DagsterInstance, receiver: Receiver) -> None:
    Path("kanbu_backup.yaml").write_text('schedules:\n  - {id: 1, name: Bad, type: database, cron: "61 * * * *"}\n')
    assert "line 2" in watch(instance)
    tick(instance)
    assert receiver.events == []
    with later(2):
        watch(instance)
        watch(instance)
        tick(instance)
        tick(instance)
    assert receiver.events == ["config.invalid"]
    [problem] = receiver.accepted[0].event["config"]["problems"]
    assert problem["line"] == 2
    assert "schedule 1 (Bad)" in problem["message"]


def test_a_setting_that_cannot_be_used_silences_nobody(
    instance: DagsterInstance, receiver: Receiver, newest_postgres: PostgresForTest, configure: Configure
) -> None:
    configure(newest_postgres.database())
    Path(".env").write_text("BACKUP_COMPRESSION_LEVEL=9\n")
    watch(instance)
    with later(2):
        watch(instance)
    ended = run_job("database_backup", tags=SCHEDULED)
    assert not ended.success
    tick(instance)
    assert sorted(receiver.events) == ["backup.failed", "config.invalid"]
    told_of = {one.event["event"]: one.event for one in receiver.accepted}
    assert told_of["config.invalid"]["config"]["file"] == "settings"
    [problem] = told_of["config.invalid"]["config"]["problems"]
    assert "BACKUP_COMPRESSION_LEVEL (.env line 1)" in problem["message"]
    assert "BACKUP_COMPRESSION_LEVEL" in told_of["backup.failed"]["error"]
    for one in receiver.accepted:
        expected = hmac.new(b"s3cret", one.body, hashlib.sha256).hexdigest()
        assert one.headers["X-Kanbu-Signature"] == expected


def test_what_ends_while_nobody_knows_whom_to_tell_is_told_later(instance: DagsterInstance, receiver: Receiver) -> None:
    Path(".env").write_bytes(b"BACKUP_WEBHOOK_SECRET=\xff\n")
    watch(instance)
    with later(2):
        watch(instance)
    failed_run(instance)
    assert ".env cannot be read" in str(tick(instance).skip_reason)
    Path(".env").unlink()
    tick(instance)
    assert receiver.events == ["backup.failed", "config.invalid"]


@pytest.mark.parametrize("enabled", [True, False])
def test_storage_that_runs_low_is_told_once(
    enabled: bool, instance: DagsterInstance, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a schedule of ours, or a disabled one that another scheduler triggers."""
    if not enabled:
        Path("kanbu_backup.yaml").write_text(CONFIG.replace("type:", "enabled: false, type:"))
    monkeypatch.setenv("BACKUP_LOCAL_PATH", str(tmp_path))
    successful_run(instance, SCHEDULED)
    tick(instance)
    room = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    current = state(instance)
    backup = current.successes["1"].backup
    current.successes["1"].backup = backup.model_copy(update={"file_size": room // 2})
    alerts.remember(instance, alerts.ALERTS_KEY, current)
    assert "Storage is low" in watch(instance)
    with later(20):
        watch(instance)
        tick(instance)
    assert receiver.events == ["backup.completed", "storage.low"]
    low = receiver.accepted[1].event["storage"]
    assert low["neededBytes"] == room // 2 * 3  # a backup a day, three days
    with later(24 * 60 * 3):
        assert (
            bool(needed_bytes(load_configuration(), state(instance).successes, datetime.now(timezone.utc))) is enabled
        )


def test_no_tick_row_or_state_holds_the_url(instance: DagsterInstance, receiver: Receiver) -> None:
    receiver.behave = lambda request: 500
    failed_run(instance)
    reason = tick(instance).skip_reason
    assert reason is not None
    assert "1 waiting" in str(reason.skip_message)
    assert "127.0.0.1" in str(reason.skip_message)
    assert "S3CRET" not in str(reason.skip_message) + state(instance).model_dump_json()


def eventually(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)


def test_schedule_run_and_alert_with_a_real_daemon(
    newest_postgres: PostgresForTest, configure: Configure, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon fires a schedule, sees a run of `job execute` that failed before it was there, and a killed worker."""
    url = newest_postgres.database("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")
    configure(url)
    monkeypatch.setenv("BACKUP_WEBHOOK_URL", receiver.url)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    Path("kanbu_backup.yaml").write_text(CONFIG.replace("0 2 * * *", "* * * * *"))
    with open_instance():
        pass
    failing = {**os.environ, "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    execute = [sys.executable, "-m", "dagster", "job", "execute", "-m", "kanbu_backup_dagster.definitions"]
    done = subprocess.run([*execute, "-j", "database_backup"], env=failing, check=False, capture_output=True)
    assert done.returncode != 0
    receiver.behave = lambda request: 503 if len(receiver.attempts) == 1 else 204
    daemon = subprocess.Popen(
        [sys.executable, "-m", "dagster._daemon", "run", "-m", "kanbu_backup_dagster.definitions"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        eventually(lambda: receiver.attempts, 60)
        with psycopg2.connect(url) as session, session.cursor() as cursor:
            cursor.execute("LOCK TABLE t")
            worker = subprocess.Popen(
                [*execute, "-j", "database_backup"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            cursor.execute("SELECT 1")
            eventually(lambda: _waits_for_a_lock(newest_postgres, url), 30)
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        eventually(lambda: any("is killed" in str(one.event.get("error")) for one in receiver.accepted), 60)
        eventually(lambda: "backup.completed" in receiver.events, 90)
        eventually(lambda: receiver.events.count("backup.failed") == 2, 60)
    finally:
        os.killpg(daemon.pid, signal.SIGTERM)
        daemon.wait(30)
    completed = next(one for one in receiver.accepted if one.event["event"] == "backup.completed")
    assert completed.event["schedule"] == {"id": 1, "name": "Daily"}
    filename = completed.event["backup"]["filename"]
    assert (Path(os.environ["BACKUP_LOCAL_PATH"]) / filename).is_file()
    early = [json.loads(one.body)["error"] for one in receiver.accepted if one.event["event"] == "backup.failed"]
    assert any("nobody@" in error or "127.0.0.1" in error or "No backup method" in error for error in early)
    with DagsterInstance.get() as instance:
        scheduled = [run for run in instance.get_runs() if run.tags.get(tags.TRIGGER) == "scheduled"]
        assert scheduled
        assert scheduled[-1].tags[tags.TARGET] == "database"


def _waits_for_a_lock(server: PostgresForTest, url: str) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    return server.query(url, waiting) == [["1"]]

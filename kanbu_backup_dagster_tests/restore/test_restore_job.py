"""The job `restore_database` and `kanbu-backup restore`: confirmations, the pre-restore backup, locks, how runs end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import time_machine
from click.testing import CliRunner
from dagster import AssetKey, DagsterInstance, DagsterRunStatus

from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.manifest import Trigger, VerificationStatus
from kanbu_backup_dagster.cli.inspect import status
from kanbu_backup_dagster.cli.restore import restore
from kanbu_backup_dagster.errors import BusyError, KanbuError, RestoreError, StorageError
from kanbu_backup_dagster.orchestration import restore_ops
from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.orchestration.jobs import JOBS
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster.orchestration.tags import TARGET
from kanbu_backup_dagster.orchestration.target_lock import Holder, open_locks, storage_name
from kanbu_backup_dagster.restore.plan import look_at
from kanbu_backup_dagster.restore.server import open_server
from kanbu_backup_dagster.restore.staging import staging_prefix
from kanbu_backup_dagster.storage.folder import MARK_NAME, FolderStorage
from kanbu_backup_dagster.storage.protocol import Settlement
from kanbu_backup_dagster_tests.restore.conftest import Bench, in_each_mode, run_restore

SLEEPING_DUMP = b"""CREATE TABLE t (n integer);
SELECT pg_sleep(60);

--
-- PostgreSQL database dump complete
--

"""


def materialization(instance: DagsterInstance) -> dict[str, Any]:
    event = instance.get_latest_materialization_event(AssetKey("restored_database"))
    assert event is not None
    assert event.asset_materialization is not None
    return {name: value.value for name, value in event.asset_materialization.metadata.items()}


def test_a_restore_saves_loads_checks_swaps_and_tells(sealed_bench: Bench) -> None:
    bench = sealed_bench
    file = bench.backup().filename
    before = bench.dump()
    bench.sql("CREATE TABLE newer (n integer); INSERT INTO newer VALUES (7)")
    outcome = run_restore(bench, file)
    assert outcome.success, outcome.errors
    assert bench.dump() == before
    with open_instance() as instance:
        told = materialization(instance)
        run = instance.get_run_by_id(outcome.run_id)
        assert run is not None
        assert (run.tags["kanbu/file"], run.tags["kanbu/database"]) == (file, bench.name)
        steps = [stats.step_key for stats in instance.get_run_step_stats(outcome.run_id)]
    assert steps == [
        "validate",
        "dump",
        "compress",
        "checksum",
        "encrypt",
        "store",
        "verify",
        "load",
        "check",
        "swap",
        "report",
    ]
    assert (told["file"], told["target"], told["run"]) == (file, bench.name, outcome.run_id)
    assert told["downtime_ms"] < 1000
    assert told["rows"] > 1000
    # What was there before is in the pre-restore backup, and in the replaced database.
    saved = Catalog(bench.storage, bench.keys).get(told["pre_restore_file"]).manifest
    assert saved is not None
    assert (saved.trigger, saved.verification.status) == (Trigger.PRE_RESTORE, VerificationStatus.VERIFIED)
    assert saved.database is not None
    assert saved.database.rows["public.newer"] == 1
    assert bench.sql("SELECT n FROM newer", told["replaced_database"]) == "7\n"
    bench.postgres.server.psql(f"CREATE DATABASE {staging_prefix(bench.name)}00000000")
    left = json.loads(CliRunner().invoke(status, ["--json"]).stdout)["database"]["left_by_restores"]
    assert [line.split()[0] for line in left] == [told["replaced_database"], f"{staging_prefix(bench.name)}00000000"]
    bench.postgres.server.psql(f"DROP DATABASE {staging_prefix(bench.name)}00000000")
    # The restored database's first verified backup lets go of it.
    assert run_job("database_backup").success
    assert bench.databases() == {bench.name}


def test_without_both_confirmations_the_job_refuses_and_saves_nothing(bench: Bench) -> None:
    file = bench.backup().filename
    for missing in ({"confirm_overwrite": False}, {"confirm_target": ""}, {"confirm_target": "postgres"}):
        outcome = run_restore(bench, file, **missing)
        assert not outcome.success
        assert isinstance(outcome.error, RestoreError)
        assert outcome.error.message.startswith("Not confirmed.")
    assert [backup.filename for backup in Catalog(bench.storage, bench.keys).backups()] == [file]
    assert bench.databases() == {bench.name}


def test_a_restore_that_fails_ends_in_failure_and_leaves_all_as_it_was(bench: Bench) -> None:
    file = bench.legacy(b"CREATE TABLE t (n integer);\nINSERT INTO t VALUES ('x');\n")
    before = bench.dump()
    outcome = run_restore(bench, file)
    assert not outcome.success
    assert 'line 2 of the dump: ERROR:  invalid input syntax for type integer: "x"' in outcome.error.message
    assert bench.dump() == before
    assert bench.databases() == {bench.name}
    with open_instance() as instance:
        run = instance.get_run_by_id(outcome.run_id)
        assert run is not None
        assert run.status is DagsterRunStatus.FAILURE
        assert instance.get_latest_materialization_event(AssetKey("restored_database")) is None


def test_once_the_name_is_swapped_a_storage_that_goes_away_fails_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bench.backup().filename
    swap = restore_ops.swap_in

    def then_away(*arguments: Any) -> Any:
        swapped = swap(*arguments)
        bench.storage_folder.rename(bench.storage_folder.with_name("away"))
        return swapped

    monkeypatch.setattr(restore_ops, "swap_in", then_away)
    outcome = run_restore(bench, file)
    assert outcome.success, outcome.errors
    assert outcome.report["path"] == str(bench.storage_folder / file)


def test_a_new_database_needs_no_pre_restore_backup_and_drop_replaced_keeps_none(bench: Bench) -> None:
    file = bench.backup().filename
    other = f"{bench.name}_new"
    for keep, empty in ((True, True), (False, False)):
        outcome = run_restore(bench, file, target_database=other, confirm_target=other, keep_replaced=keep)
        assert outcome.success, outcome.errors
        assert (outcome.report["pre_restore_file"] == "nothing to save") is empty
        assert outcome.report["replaced_database"] == "none is kept"
    assert bench.databases() == {bench.name, other}
    backups = Catalog(bench.storage, bench.keys).backups()
    assert [backup.manifest.database.name for backup in backups if backup.manifest and backup.manifest.database] == [
        bench.name,
        other,  # the pre-restore backup of the second restore: of the database that was replaced
    ]


def log_of(run_id: str) -> str:
    with open_instance() as instance:
        return "\n".join(str(entry.user_message) for entry in instance.all_logs(run_id))


def test_while_the_pre_restore_backup_is_unproven_the_replaced_database_is_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount whose cache still holds the upload: what came back from it proves nothing."""
    file = bench.backup().filename
    bench.sql("CREATE TABLE newer (n integer); INSERT INTO newer VALUES (7)")
    with monkeypatch.context() as on_its_way:
        on_its_way.setattr(FolderStorage, "settlement", lambda self, name: Settlement(False, "it waits in the cache"))
        outcome = run_restore(bench, file, keep_replaced=False)
    assert outcome.success, outcome.errors
    told = outcome.report
    saved = Catalog(bench.storage, bench.keys).get(told["pre_restore_file"])
    assert saved.status is VerificationStatus.PENDING
    assert bench.sql("SELECT n FROM newer", told["replaced_database"]) == "7\n"
    warned = f"The pre-restore backup {saved.filename} is not known to have arrived"
    assert any(remark.startswith(warned) for remark in told["remarks"])
    assert warned in log_of(outcome.run_id)
    # One that is verified lets go of it.
    assert run_job("database_backup").success
    assert bench.databases() == {bench.name}


def test_a_pre_restore_backup_that_fails_ends_the_restore_and_changes_nothing(bench: Bench) -> None:
    [file] = run_job("database_backup").materialized
    before = bench.dump(), bench.postgres.server.psql(f"SELECT oid FROM pg_database WHERE datname = '{bench.name}'")
    (bench.storage_folder / MARK_NAME).unlink()
    outcome = run_restore(bench, file)
    assert isinstance(outcome.error, StorageError)
    assert "bears no mark" in str(outcome.error)
    with open_instance() as instance:
        run = instance.get_run_by_id(outcome.run_id)
        assert run is not None
        assert run.status is DagsterRunStatus.FAILURE
        assert [stats.step_key for stats in instance.get_run_step_stats(outcome.run_id)][-1] == "store"
    assert bench.databases() == {bench.name}
    assert before == (
        bench.dump(),  # which connects: the live name is open
        bench.postgres.server.psql(f"SELECT oid FROM pg_database WHERE datname = '{bench.name}'"),
    )


def test_what_was_dumped_half_done_comes_back_so_and_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.sql("""
        CREATE TABLE numbered (id serial PRIMARY KEY, n integer);
        INSERT INTO numbered (n) SELECT generate_series(1, 10);
        ALTER TABLE numbered ADD CONSTRAINT positive CHECK (n > 0) NOT VALID;
        SELECT setval('numbered_id_seq', 3);
    """)
    remarks = {
        "the constraint positive on numbered was never validated",
        "the sequence numbered_id_seq is behind numbered.id",
    }
    [file] = run_job("database_backup").materialized
    outcome = run_restore(bench, file)
    assert outcome.success, outcome.errors
    assert set(outcome.report["remarks"]) == remarks
    log = log_of(outcome.run_id)
    assert all(f"As in the backup: {remark}" in log for remark in remarks)
    monkeypatch.setenv("BACKUP_DRILL_DATABASE_URL", bench.url)
    assert set(run_job("restore_drill").report["remarks"]) == remarks


def test_dagsters_queue_keeps_backups_and_restores_of_the_database_apart() -> None:
    """By the limit of one run for each value of this tag."""
    targets = {job.name: job.tags.get(TARGET) for job in JOBS}
    assert targets["restore_database"] == targets["database_backup"] != targets["source_backup"]


def test_whoever_comes_second_is_told_who_holds_the_target(bench: Bench) -> None:
    file = bench.backup().filename
    plan = bench.plan(file)
    other = Holder.now("database_backup", "the-other-run")
    with open_locks().hold(plan.lock_name, other, exclusive=False):
        # Backups share the target; a restore does not.
        assert run_job("database_backup").success
        outcome = run_restore(bench, file)
        assert isinstance(outcome.error, BusyError)
        assert "the-other-run" in str(outcome.error)
    with open_locks().hold(plan.lock_name, Holder.now("restore_database", "a-restore"), exclusive=True):
        for outcome in (run_job("database_backup"), run_restore(bench, file)):
            assert isinstance(outcome.error, BusyError)
            assert "restore_database, run a-restore" in str(outcome.error)
    # Whoever deletes from the storage has it alone: a restore reads from it.
    with open_locks().hold(storage_name(bench.storage), Holder.now("prune_backups", "a-prune"), exclusive=True):
        assert "a-prune" in str(run_restore(bench, file).error)
    assert run_restore(bench, file).success


@in_each_mode
def test_a_terminated_restore_drops_its_staging_database(bench: Bench) -> None:
    file = bench.legacy(SLEEPING_DUMP)
    before = bench.dump()
    process = subprocess.Popen(
        [sys.executable, "-m", "kanbu_backup_dagster.cli", "restore", file, "--yes", "--confirm", bench.name],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        loading = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE 'kanbu\\_staging%' AND query LIKE '%pg_sleep%'"
        )
        deadline = time.monotonic() + 60
        while bench.postgres.server.psql(loading) == "0\n":
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in told
    assert bench.databases() == {bench.name}
    assert bench.dump() == before


def invoke(*arguments: str, answers: str = "") -> Any:
    return CliRunner().invoke(restore, arguments, input=answers)


def test_the_command_line_shows_warns_and_asks_twice(bench: Bench) -> None:
    file = bench.backup().filename
    bench.sql("CREATE TABLE newer (n integer)")
    refused = invoke(file, answers="n\n")
    assert refused.exit_code == 1
    for words in (
        "This will overwrite the current database",
        "A pre-restore backup will be created automatically",
        file,
    ):
        assert words in refused.output
    mistyped = invoke(file, answers=f"y\n{bench.name}x\n")
    assert isinstance(mistyped.exception, RestoreError)
    assert "Not confirmed" in str(mistyped.exception)
    assert "--confirm" in invoke(file, "--yes").output
    assert isinstance(invoke(file, "--yes", "--confirm", "postgres").exception, KanbuError)
    assert bench.sql("SELECT count(*) FROM newer") == "0\n"
    done = invoke(file, answers=f"y\n{bench.name}\n")
    assert done.exit_code == 0, done.output
    assert "Pre-restore backup: kanbu_backup_" in done.output
    assert bench.sql("SELECT to_regclass('newer') IS NULL") == "t\n"


def test_the_command_line_shows_what_would_be_replaced_by_what(bench: Bench) -> None:
    bench.sql("CREATE TABLE counted AS SELECT generate_series(1, 500) AS n")
    manifest = bench.backup()
    assert manifest.database is not None
    tables, rows = len(manifest.database.rows), sum(manifest.database.rows.values())
    bench.sql("DELETE FROM counted WHERE n <= 100; CREATE TABLE newer (n integer)")
    bench.sql("ANALYZE")
    with time_machine.travel(datetime.now(timezone.utc) + timedelta(days=3, minutes=1)):
        shown = invoke(manifest.filename, answers="n\n").output
    for line in (
        rf"Server:  .*, PostgreSQL {bench.postgres.version}",
        rf"Backup:  {manifest.filename}, 3 days old, {tables:,} tables, {rows:,} rows",
        rf"Target:  {bench.name}, now {tables + 1:,} tables, about {rows - 100:,} rows",
        rf"Warning: {manifest.filename} was not verified yet; it is now, before it is used\.",
    ):
        assert re.search(f"(?m)^{line}$", shown), (line, shown)
    nowhere = invoke(manifest.filename, "--target-database", f"{bench.name}_new", answers="n\n").output
    assert f"Target:  {bench.name}_new, which does not exist yet\n" in nowhere
    assert "overwrite" not in nowhere


def test_rows_are_known_where_the_servers_counters_begin_anew(bench: Bench) -> None:
    """As after a crash: this database is a copy, and nobody has written to it since."""
    server, _ = open_server(bench.settings)
    facts = bench.backup().database
    assert facts is not None
    assert bench.sql("SELECT sum(n_live_tup) FROM pg_stat_user_tables") == "0\n"
    assert look_at(server, bench.settings, bench.name).rows == sum(facts.rows.values())


def test_after_a_disaster_a_folder_and_the_key_are_enough(sealed_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = sealed_bench
    file = bench.backup().filename
    before = bench.dump()
    bench.postgres.server.psql(f"DROP DATABASE {bench.name} WITH (FORCE)")
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.delenv("BACKUP_LOCAL_PATH")
    path = str(bench.storage_folder / file)
    done = invoke(path, "--database-url", bench.url, "--yes", "--confirm", bench.name, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    told = json.loads(done.stdout)
    assert (told["target"], told["pre_restore_file"]) == (bench.name, "nothing to save")
    assert bench.dump() == before

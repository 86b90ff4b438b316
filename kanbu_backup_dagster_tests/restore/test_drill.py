"""Drills: what proves a backup, what does not, and that nothing is left of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dagster import AssetCheckKey, AssetKey

from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.errors import BackupNotFoundError, NotDrillableError, RestoreError, SettingsError
from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.orchestration.drill_ops import RESTORABLE
from kanbu_backup_dagster.orchestration.run_here import Outcome, run_job
from kanbu_backup_dagster.restore.drill import drill as restore_drill
from kanbu_backup_dagster.restore.drill import drill_server
from kanbu_backup_dagster.schedule_file import Assertion
from kanbu_backup_dagster_tests.restore.conftest import Bench, in_each_mode

CONFIG = """
version: 1
drill:
  assertions:
    - name: there are tasks
      query: SELECT count(*) > {least} FROM tasks;
"""


def drill(file: str | None = None, older: int = 0) -> Outcome:
    config = {"older_samples": older, **({"file": file} if file else {})}
    return run_job("restore_drill", run_config={"ops": {"choose": {"config": config}}})


def backup() -> str:
    outcome = run_job("database_backup")
    assert outcome.success, outcome.errors
    return outcome.materialized[0]


def verdict(file: str) -> bool | None:
    """What Dagster shows for the check `restorable` of this file."""
    key = AssetCheckKey(AssetKey("database_backup"), RESTORABLE)
    with open_instance() as instance:
        records = instance.event_log_storage.get_asset_check_execution_history(key, limit=20)
        evaluations = [record.event.dagster_event.asset_check_evaluation_data for record in records if record.event]
    return next((found.passed for found in evaluations if found.partition == file), None)


def drill_leftovers(bench: Bench) -> str:
    return bench.postgres.server.psql("SELECT datname FROM pg_database WHERE datname LIKE 'kanbu_drill%'")


def test_a_drill_proves_the_newest_backup_on_a_server_of_its_own(sealed_bench: Bench) -> None:
    bench = sealed_bench
    older, newest = backup(), backup()
    before = bench.dump()
    outcome = drill()
    assert outcome.success, outcome.errors
    assert outcome.report["file"] == newest
    assert outcome.report["rows"] > 1000
    assert outcome.report["restore_s"] > 0
    proven = {
        found.filename: found.manifest.proven_at
        for found in Catalog(bench.storage, bench.keys).backups()
        if found.manifest
    }
    assert proven[newest] is not None
    assert proven[older] is None
    assert (verdict(newest), verdict(older)) == (True, None)
    # Dagster knows what the manifest says: there is nothing to catch up on.
    assert run_job("sync_catalog").said["changed"] == []
    assert bench.dump() == before
    # A sample of older ones besides.
    assert drill(older=1).success
    assert verdict(older) is True


@in_each_mode
def test_a_drill_on_a_configured_server_leaves_nothing_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server = bench.postgres.server
    container = os.environ.get("POSTGRES_CONTAINER")
    monkeypatch.setenv(
        *(("BACKUP_DRILL_CONTAINER", container) if container else ("BACKUP_DRILL_DATABASE_URL", bench.url))
    )
    server.psql("CREATE ROLE only_for_a_while; CREATE DATABASE kanbu_drill_00000000")
    bench.sql("CREATE TABLE owned (n integer); ALTER TABLE owned OWNER TO only_for_a_while")
    file = backup()
    bench.sql("DROP TABLE owned")
    server.psql("DROP ROLE only_for_a_while")
    before = bench.dump()
    outcome = drill(file)
    assert outcome.success, outcome.errors
    assert ("docker container" in outcome.report["server"]) is bool(container)
    assert drill_leftovers(bench) == ""
    assert server.psql("SELECT count(*) FROM pg_roles WHERE rolname = 'only_for_a_while'") == "0\n"
    assert bench.dump() == before


def test_what_is_not_proven_fails_and_says_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_DRILL_DATABASE_URL", bench.url)
    bench.storage.prepare()
    assert isinstance(drill().error, BackupNotFoundError)
    first = backup()
    with monkeypatch.context() as both:
        both.setenv("BACKUP_DRILL_CONTAINER", "another")
        assert isinstance(drill(first).error, SettingsError)
    bench.sql("CREATE TABLE IF NOT EXISTS tasks (n integer)")
    file = backup()
    catalog = Catalog(bench.storage, bench.keys)

    # An assertion that does not hold, and one that does.
    Path("kanbu_backup.yaml").write_text(CONFIG.format(least=10_000_000))
    outcome = drill()
    assert isinstance(outcome.error, RestoreError)
    assert "The assertion 'there are tasks' does not hold" in str(outcome.error)
    assert verdict(file) is False
    Path("kanbu_backup.yaml").write_text(CONFIG.format(least=-1))
    outcome = drill()
    assert outcome.success, outcome.errors
    assert outcome.report["assertions"] == ["there are tasks"]
    assert verdict(file) is True

    # Another number of rows than the manifest's.
    honest = catalog.get(file).manifest
    assert honest is not None
    assert honest.database is not None
    facts = honest.database
    edited = facts.model_copy(update={"rows": {**facts.rows, next(iter(facts.rows)): 3}})
    catalog.amend(file, lambda manifest: manifest.model_copy(update={"database": edited}))
    assert "not what was backed up" in str(drill().error)
    assert verdict(file) is False

    # An extension that is not to be had says nothing of the backup, and is no pass.
    wanting = facts.model_copy(update={"extensions": {"no_such_extension": "1.0"}})
    catalog.amend(file, lambda manifest: manifest.model_copy(update={"database": wanting}))
    outcome = drill()
    assert isinstance(outcome.error, NotDrillableError)
    assert "Not drillable" in str(outcome.error)
    assert verdict(file) is False
    assert drill_leftovers(bench) == ""


@pytest.mark.parametrize(
    ("query", "holds"),
    [
        ("SELECT count(*) > 0 FROM users -- everybody", True),
        ("SELECT count(*) > 0 FROM users;", True),
        ("SELECT 1", False),
        ("SELECT 't'", False),
        ("SELECT NULL::boolean", False),
        ("SELECT true, true", False),
        ("SELECT false AS it, true AS it", False),
        ("SELECT true FROM generate_series(1, 2)", False),
        ("SELECT true WHERE false", False),
    ],
)
def test_an_assertion_holds_when_its_one_answer_is_true(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, query: str, holds: bool
) -> None:
    monkeypatch.setenv("BACKUP_DRILL_DATABASE_URL", bench.url)
    file = bench.backup().filename
    here = load_environment()
    backup = here.catalog.get(file)
    with drill_server(here.settings, backup) as (server, settings):
        arguments = (backup, here.storage, here.keys, server, settings, [Assertion(name="it", query=query)])
        if holds:
            assert restore_drill(*arguments).assertions == ("it",)
        else:
            with pytest.raises(RestoreError, match="The assertion 'it'"):
                restore_drill(*arguments)

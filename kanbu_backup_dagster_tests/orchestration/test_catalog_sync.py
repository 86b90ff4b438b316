"""Storage is the truth: a Dagster that knows nothing learns everything from the manifests, once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dagster import AssetCheckKey, AssetKey, AssetRecordsFilter, DagsterEventType, DagsterInstance

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.orchestration.run_here import Outcome, run_job
from kanbu_backup_dagster_tests.backups import DUMP, Bytes, store_backup

Configure = Callable[..., Path]
ASSET = AssetKey("database_backup")
LEGACY = "kanbu_backup_2020-01-01T00-00-00.sql"
NOTHING: dict[str, list[str]] = {"new": [], "changed": [], "vanished": []}


def sync() -> Outcome:
    outcome = run_job("sync_catalog")
    assert outcome.errors == ()
    return outcome


def difference(outcome: Outcome) -> dict[str, list[str]]:
    return {name: outcome.said[name] for name in NOTHING}


def asset_events(run_id: str) -> int:
    kinds = {
        DagsterEventType.ASSET_MATERIALIZATION,
        DagsterEventType.ASSET_OBSERVATION,
        DagsterEventType.ASSET_CHECK_EVALUATION,
    }
    with DagsterInstance.get() as instance:
        return len(instance.all_logs(run_id, of_type=kinds))


def verdicts() -> dict[str | None, str]:
    with DagsterInstance.get() as instance:
        infos = instance.event_log_storage.get_asset_check_partition_info([AssetCheckKey(ASSET, "verified")])
        return {info.partition_key: info.latest_execution_status.value for info in infos if info.is_current}


def last_state(name: str) -> dict[str, object]:
    with DagsterInstance.get() as instance:
        asset = AssetRecordsFilter(ASSET, asset_partitions=[name])
        seen = instance.fetch_observations(asset, limit=1).records[0].asset_observation
    assert seen is not None
    return {key: entry.value for key, entry in seen.metadata.items()}


def test_a_fresh_instance_learns_everything_and_then_nothing_more(
    configure: Configure, forget: Callable[[], None]
) -> None:
    store = configure()
    good, bad = store_backup(store).filename, store_backup(store, Bytes(DUMP.replace(b"1\n", b"9\n"))).filename
    (store / bad).write_bytes(b"damaged")
    run_job("verify_pending_backups")
    pending = store_backup(store).filename
    (store / LEGACY).write_bytes(DUMP)
    expected = {good, bad, pending, LEGACY}
    forget()
    first = sync()
    assert set(difference(first)["new"]) == expected
    with DagsterInstance.get() as instance:
        assert set(instance.get_dynamic_partitions("database_backup_files")) == expected
    assert verdicts() == {good: "SUCCEEDED", bad: "FAILED"}
    assert last_state(pending)["verification"] == "pending"
    assert last_state(LEGACY)["verification"] == "no_checksum"
    again = sync()
    assert (difference(again), asset_events(again.run_id)) == (NOTHING, 0)

    # What is changed behind its back is noticed: a manifest edited by us, by somebody else, and a file taken away.
    catalog = load_environment().catalog
    catalog.amend(pending, lambda manifest: manifest.model_copy(update={"held": True}))
    sidecar = store / f"{good}.manifest.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "raw_bytes": 1}))
    (store / bad).unlink()
    changed = sync()
    assert {name: set(files) for name, files in difference(changed).items()} == {
        "new": set(),
        "changed": {good, pending},
        "vanished": {bad},
    }
    assert last_state(pending)["held"] is True
    assert last_state(good)["verification"] == "failed"
    assert verdicts()[good] == "FAILED"
    assert last_state(bad)["status"] == "vanished"
    with DagsterInstance.get() as instance:
        assert set(instance.get_dynamic_partitions("database_backup_files")) == expected - {bad}
    assert difference(sync()) == NOTHING


def test_what_a_run_recorded_is_nothing_new(configure: Configure) -> None:
    name = store_backup(configure()).filename
    assert run_job("verify_pending_backups").success
    assert difference(sync()) == NOTHING
    assert verdicts() == {name: "SUCCEEDED"}


def test_an_empty_folder_in_place_of_a_volume_loses_nothing(configure: Configure) -> None:
    store = configure()
    name = store_backup(store).filename
    sync()
    store.rename(store.with_name("unmounted"))
    store.mkdir()
    outcome = run_job("sync_catalog")
    assert "bears no mark" in str(outcome.error)
    with DagsterInstance.get() as instance:
        assert instance.get_dynamic_partitions("database_backup_files") == [name]


@pytest.fixture
def forget(_dagster_home_template: Path) -> Callable[[], None]:
    """Throw Dagster's home away, as if it had never been."""

    def throw_away() -> None:
        home = Path(os.environ["DAGSTER_HOME"])
        shutil.rmtree(home)
        shutil.copytree(_dagster_home_template, home)

    return throw_away

"""The check `verified` and the jobs that verify: what storage and Dagster know afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dagster import AssetCheckKey, AssetKey, DagsterInstance

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.manifest import Verification, VerificationStatus
from kanbu_backup_dagster.backup.verification import verify
from kanbu_backup_dagster.definitions import build_definitions
from kanbu_backup_dagster.errors import EncryptionKeyError
from kanbu_backup_dagster.orchestration import verify_ops
from kanbu_backup_dagster.orchestration.run_here import Outcome, run_job
from kanbu_backup_dagster_tests.backups import DUMP, Bytes, store_backup

Configure = Callable[..., Path]
ASSET = AssetKey("database_backup")
CHECK = AssetCheckKey(ASSET, "verified")


def verify_one(name: str, *, deep: bool = False) -> Outcome:
    return run_job("verify_backup", run_config={"ops": {"verify_one": {"config": {"file": name, "deep": deep}}}})


def status(name: str) -> VerificationStatus:
    return load_environment().catalog.get(name).status


def known_verdicts() -> dict[str | None, str]:
    """What Dagster shows of each partition: only verdicts about the latest materialization count."""
    with DagsterInstance.get() as instance:
        return {
            info.partition_key: info.latest_execution_status.value
            for info in instance.event_log_storage.get_asset_check_partition_info([CHECK])
            if info.partition_key is not None and info.latest_target_materialization_storage_id is not None
            if info.is_current
        }


def test_verdicts_reach_the_manifest_and_dagster(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    store = configure()
    good = store_backup(store).filename
    bad = store_backup(store, Bytes(DUMP.replace(b"1\n2", b"3\n4"))).filename
    (store / bad).write_bytes((store / bad).read_bytes()[:-1] + b"\0")
    # The batch goes on past a bad file, and fails at its end.
    outcome = run_job("verify_pending_backups")
    assert not outcome.success
    assert f"1 of 2 backups are not verified.\n  - {bad}" in str(outcome.error)
    assert (status(good), status(bad)) == (VerificationStatus.VERIFIED, VerificationStatus.FAILED)
    assert load_environment().catalog.get(good).manifest.verification.deep  # type: ignore[union-attr]
    assert known_verdicts() == {good: "SUCCEEDED", bad: "FAILED"}
    with DagsterInstance.get() as instance:
        assert set(instance.get_dynamic_partitions("database_backup_files")) == {good, bad}
        counts = next(
            seen.metadata
            for record in instance.fetch_observations(ASSET, limit=10).records
            for seen in [record.asset_observation]
            if seen is not None and seen.partition is None
        )
    numbers = {name: counts[name].value for name in ("backups", "verified", "failed", "pending", "no_checksum")}
    assert numbers == {"backups": 2, "verified": 1, "failed": 1, "pending": 0, "no_checksum": 0}
    assert run_job("verify_pending_backups").success  # nothing is pending now

    # The check, as the UI executes it for one file: no tags of ours, the partition in Dagster's own.
    definitions = build_definitions()
    job = definitions.resolve_job_def("__ASSET_JOB").get_subset(asset_check_selection={CHECK})
    with DagsterInstance.get() as instance:
        (store / good).write_bytes(b"")
        ran = job.execute_in_process(instance=instance, tags={"dagster/partition": good})
        (evaluation,) = ran.get_asset_check_evaluations()
        assert (evaluation.passed, evaluation.partition) == (False, good)
        assert "the stored file is not what was written" in str(evaluation.description)
    assert status(good) is VerificationStatus.FAILED
    assert known_verdicts() == {good: "FAILED", bad: "FAILED"}

    # Without the key nothing is judged, and nothing changes.
    other = store_backup(store).filename
    assert verify_one(other).success
    monkeypatch.setenv("BACKUP_ENCRYPTION_KEY", "")
    refused = verify_one(other)
    assert isinstance(refused.error, EncryptionKeyError)
    assert known_verdicts()[other] == "SUCCEEDED"


def test_a_file_that_is_pruned_meanwhile_is_not_bad(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    store = configure()
    first, second = (store_backup(store).filename for _ in range(2))

    def verify_while_the_other_goes(*arguments: Any, **options: Any) -> Verification:
        """The moment between the listing and a file's turn cannot be met by chance."""
        load_environment().storage.delete(second)
        return verify(*arguments, **options)

    monkeypatch.setattr(verify_ops, "verify", verify_while_the_other_goes)
    outcome = run_job("verify_pending_backups")
    assert outcome.success, outcome.errors
    assert (outcome.said["verified"], outcome.said["failed"], outcome.said["waiting"]) == (1, 0, 0)
    assert status(first) is VerificationStatus.VERIFIED

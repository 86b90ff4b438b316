"""The job `source_backup`: the tree comes back with stock tools, and Dagster knows it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from dagster import AssetKey, AssetRecordsFilter, DagsterInstance

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.manifest import VerificationStatus
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster_tests.trees import needs_tar

Configure = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tree = tmp_path / "app"
    (tree / "node_modules").mkdir(parents=True)
    (tree / "src").mkdir()
    for name in ("src/main.ts", ".env", "server.log", "notes.tmp", "node_modules/big.js"):
        (tree / name).write_text(name)
    monkeypatch.setenv("KANBU_SOURCE_PATH", str(tree))
    return tree


@needs_tar
def test_a_source_backup_is_whole_known_and_comes_back(configure: Configure, tree: Path, tmp_path: Path) -> None:
    # The storage is inside the tree, and must not be archived into itself.
    store = tree / "store"
    configure(BACKUP_ENCRYPTION_KEY="", BACKUP_LOCAL_PATH=str(store), BACKUP_SOURCE_EXCLUDE="*.tmp")
    outcome = run_job("source_backup")
    assert outcome.errors == ()
    (name,) = outcome.materialized
    manifest = load_environment().catalog.get(name).manifest
    assert manifest is not None
    facts = manifest.source
    assert facts is not None
    assert (facts.files, facts.links) == (2, 0)
    kept_out = {one.rule for one in facts.excluded if one.count}
    assert kept_out == {"node_modules/", "*.log", "*.tmp", "(storage folder)"}
    assert manifest.verification.status is VerificationStatus.VERIFIED
    with DagsterInstance.get() as instance:
        said = "\n".join(entry.message for entry in instance.all_logs(outcome.run_id))
        assert instance.get_dynamic_partitions("source_backup_files") == [name]
        asset = AssetRecordsFilter(AssetKey("source_backup"), asset_partitions=[name])
        (made,) = instance.fetch_materializations(asset, limit=2).records
        assert made.asset_materialization is not None
        assert made.asset_materialization.metadata["files"].value == 2
        (seen,) = instance.fetch_observations(AssetKey("kanbu_source"), limit=2).records
        assert seen.asset_observation is not None
        assert seen.asset_observation.metadata["files_bytes"].value == facts.bytes
    assert "may hold secrets" in said
    assert "app/.env" in said
    back = tmp_path / "back"
    back.mkdir()
    subprocess.run(["tar", "xzf", store / name, "-C", back], check=True)
    assert sorted(path.name for path in (back / "app").iterdir()) == [".env", "src"]
    assert (back / "app/src/main.ts").read_text() == "src/main.ts"


def test_with_a_key_no_secret_is_warned_of(configure: Configure, tree: Path) -> None:
    configure()
    outcome = run_job("source_backup")
    assert outcome.success
    with DagsterInstance.get() as instance:
        said = "\n".join(entry.message for entry in instance.all_logs(outcome.run_id))
    assert "may hold secrets" not in said


def test_a_missing_tree_names_its_variable(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    store = configure()
    monkeypatch.setenv("KANBU_SOURCE_PATH", "/no/such/tree")
    outcome = run_job("source_backup")
    assert not outcome.success
    assert "KANBU_SOURCE_PATH" in str(outcome.error)
    assert not store.exists()

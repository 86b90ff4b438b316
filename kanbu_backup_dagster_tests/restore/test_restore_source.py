"""Extracting a source backup through the job and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.landing import Origin, make_backup
from kanbu_backup_dagster.backup.recipe import Recipe
from kanbu_backup_dagster.cli.restore import restore
from kanbu_backup_dagster.errors import CorruptBackupError, RestoreError
from kanbu_backup_dagster.orchestration.run_here import Outcome, run_job
from kanbu_backup_dagster.sources.source_tree import prepare_archive


@pytest.fixture
def backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encrypted backup of a small source tree."""
    tree = tmp_path / "kanbu"
    (tree / "src").mkdir(parents=True)
    (tree / "src" / "index.ts").write_text("export {};\n")
    (tree / "link").symlink_to("src/index.ts")
    monkeypatch.setenv("KANBU_SOURCE_PATH", str(tree))
    monkeypatch.setenv("BACKUP_LOCAL_PATH", str(tmp_path / "storage"))
    monkeypatch.setenv("BACKUP_ENCRYPTION_KEY", "a key for tests")
    here = load_environment()
    here.storage.prepare()
    source, _ = prepare_archive(here.settings)
    assert here.keys.current is not None
    recipe = Recipe(source).with_compression(2).with_checksum().with_encryption(here.keys.current.key_id)
    manifest = make_backup(recipe, settings=here.settings, keys=here.keys, storage=here.storage, origin=Origin())
    return tmp_path / "storage" / manifest.filename


def extract(file: str, into: Path, **options: Any) -> Outcome:
    config = {"file": file, "into": str(into), **options}
    return run_job("restore_source", run_config={"ops": {"validate_source": {"config": config}}})


def test_the_tree_comes_back_in_a_new_folder(backup: Path, tmp_path: Path) -> None:
    outcome = extract(backup.name, tmp_path / "new")
    assert outcome.success, outcome.errors
    assert outcome.report["files"] == 1
    [found] = (tmp_path / "new").rglob("index.ts")
    assert found.read_text() == "export {};\n"
    [link] = (tmp_path / "new").rglob("link")
    assert link.is_symlink()


def test_a_folder_that_is_not_empty_is_refused_and_kept(backup: Path, tmp_path: Path) -> None:
    kept = tmp_path / "full" / "mine"
    kept.parent.mkdir()
    kept.write_text("mine")
    outcome = extract(backup.name, kept.parent)
    assert isinstance(outcome.error, RestoreError)
    assert "not empty" in str(outcome.error)
    assert [path.name for path in kept.parent.iterdir()] == ["mine"]


def test_a_damaged_archive_leaves_nothing(backup: Path, tmp_path: Path) -> None:
    content = bytearray(backup.read_bytes())
    content[len(content) // 2] ^= 1
    backup.write_bytes(content)
    outcome = extract(backup.name, tmp_path / "new")
    assert isinstance(outcome.error, CorruptBackupError)
    assert outcome.error.message.startswith("Checksum mismatch")
    assert not (tmp_path / "new").exists()


def test_a_database_backup_is_told_apart(backup: Path, tmp_path: Path) -> None:
    database = backup.with_name("kanbu_backup_2026-01-01T00-00-00.sql.gz")
    database.write_bytes(b"x")
    assert "is a database backup" in str(extract(database.name, tmp_path / "new").error)


def test_the_command_line_extracts_a_path(backup: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(restore, [str(backup), "--into", str(tmp_path / "new")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "1 files" in done.output

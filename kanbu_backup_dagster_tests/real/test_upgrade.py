"""Backups that Kanbu's own Node service left behind: listed, read through, decrypted and restored, where they are."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance

from kanbu_backup_dagster.cli import main as command_line
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster_tests.conftest import TEST_KEY
from kanbu_backup_dagster_tests.real.test_encryption_node import NODE_SCRIPT
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

AT = "2026-01-0{}T02-00-00"
FILES = {
    f"kanbu_backup_{AT.format(1)}.sql": "plain",
    f"kanbu_backup_{AT.format(2)}.sql.enc": "plain",
    f"production/kanbu_backup_{AT.format(3)}.sql.gz": "packed",
    f"production/kanbu_backup_{AT.format(4)}.sql.gz.enc": "packed",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def kanbu_backup(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["kanbu-backup", *arguments])
        command_line.main()
        return capsys.readouterr().out

    return kanbu_backup


@pytest.fixture
def left_behind(
    configure: Callable[..., Path], newest_postgres: PostgresForTest, node: str, tmp_path: Path
) -> dict[str, Any]:
    """A database, and its backups in every form that the Node service wrote."""
    url = newest_postgres.sample_database()
    store = configure(url)
    (store / "production").mkdir(parents=True)
    script = tmp_path / "kanbu.js"
    script.write_text(NODE_SCRIPT)
    dump = subprocess.run([newest_postgres.bin_folder / "pg_dump", "-d", url], check=True, capture_output=True).stdout
    for name, form in FILES.items():
        content = dump if form == "plain" else gzip.compress(dump)
        if not name.endswith(".enc"):
            (store / name).write_bytes(content)
            continue
        source = tmp_path / "content"
        source.write_bytes(content)
        subprocess.run(
            [node, script, "encrypt", source, store / name], check=True, env={"KEY_UNDER_TEST": TEST_KEY}, timeout=60
        )
    return {"url": url, "store": store, "dump": dump}


def test_they_are_listed_verified_decrypted_and_restored(
    left_behind: dict[str, Any], newest_postgres: PostgresForTest, run: Callable[..., str], tmp_path: Path
) -> None:
    url, store, dump = left_behind["url"], left_behind["store"], left_behind["dump"]
    before = newest_postgres.dump(url)
    listed = json.loads(run("list", "--json"))
    assert [(one["filename"], one["status"]) for one in listed] == [(name, "no_checksum") for name in FILES]
    assert [one["encrypted"] for one in listed] == [name.endswith(".enc") for name in FILES]

    for name in FILES:
        assert f"{name}: no_checksum" in run("verify", name)
        target = tmp_path / "decrypted" / name.replace("/", "-").removesuffix(".enc")
        target.parent.mkdir(exist_ok=True)
        if name.endswith(".enc"):
            run("decrypt", name, "--output", str(target))
            content = target.read_bytes()
            assert (gzip.decompress(content) if name.endswith(".gz.enc") else content) == dump

    newest_postgres.execute(url, "CREATE TABLE written_since (n integer)")
    newest = list(FILES)[-1]
    run("restore", newest, "--yes", "--confirm", newest_postgres.database_name(url), "--force")
    assert newest_postgres.dump(url) == before

    assert run_job("sync_catalog").success
    with DagsterInstance.get() as instance:
        assert set(FILES) < set(instance.get_dynamic_partitions("database_backup_files"))
    (store / newest).write_bytes((store / newest).read_bytes()[:-20] + bytes(20))
    damaged = run_job("verify_backup", run_config={"ops": {"verify_one": {"config": {"file": newest}}}})
    assert not damaged.success, "as far as can be: the encryption's own tag tells"

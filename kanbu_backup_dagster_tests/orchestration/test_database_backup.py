"""The job `database_backup` on real servers: what is stored, what Dagster knows, and what no one may see."""

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest
from click.testing import CliRunner
from dagster import AssetKey, AssetRecordsFilter, DagsterInstance, DagsterRunStatus

from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.keys import Keyring, derive_key
from kanbu_backup_dagster.backup.landing import Origin, make_backup
from kanbu_backup_dagster.backup.manifest import DatabaseProperties, Locale, Manifest, VerificationStatus
from kanbu_backup_dagster.backup.reading import content, prove
from kanbu_backup_dagster.backup.recipe import Recipe
from kanbu_backup_dagster.cli.backups import storage_mark
from kanbu_backup_dagster.errors import KanbuError, SourceError, StorageError
from kanbu_backup_dagster.orchestration import backup_ops
from kanbu_backup_dagster.orchestration.run_here import Outcome, run_job
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster.sources.commands import DirectAccess
from kanbu_backup_dagster.sources.postgres import DatabaseState, PostgresDump, prepare_dump
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster_tests.conftest import TEST_KEY
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

Configure = Callable[..., Path]
PROJECT = Path(__file__).parents[2]


def run_backup() -> tuple[Outcome, Manifest]:
    outcome = run_job("database_backup")
    assert outcome.errors == ()
    manifest = load_environment().catalog.get(outcome.materialized[0]).manifest
    assert manifest is not None
    return outcome, manifest


def events_text(run_id: str) -> str:
    with DagsterInstance.get() as instance:
        return "\n".join(str(entry) for entry in instance.all_logs(run_id))


def test_a_backup_is_whole_and_known(each_mode: PostgresForTest, configure: Configure) -> None:
    postgres = each_mode
    url = postgres.sample_database()
    store = configure(url + "&schema=public&connection_limit=5")
    outcome, manifest = run_backup()
    assert "do not know these parameters of DATABASE_URL: connection_limit, schema" in events_text(outcome.run_id)
    facts = manifest.database
    assert facts is not None
    assert facts.server_version == postgres.version
    assert facts.pg_dump_version.split(".")[0] == str(postgres.major)
    assert len(facts.rows) > 5
    for table, rows in facts.rows.items():
        assert postgres.query(url, f"SELECT count(*) FROM ONLY {table}") == [[str(rows)]], table
    assert manifest.verification.status is VerificationStatus.VERIFIED
    assert manifest.stored_bytes == (store / manifest.filename).stat().st_size
    assert [stage.name for stage in manifest.stages] == ["dump", "compress", "checksum", "encrypt"]
    assert manifest.stages[0].bytes_out == manifest.raw_bytes
    environment = load_environment()
    stored = (environment.catalog.get(manifest.filename), environment.storage, environment.keys)
    plain = gzip.decompress(b"".join(content(*stored, proven=prove(*stored))))
    assert len(plain) == manifest.raw_bytes
    with DagsterInstance.get() as instance:
        assert instance.get_dynamic_partitions("database_backup_files") == [manifest.filename]
        asset = AssetRecordsFilter(AssetKey("database_backup"), asset_partitions=[manifest.filename])
        (record,) = instance.fetch_materializations(asset, limit=2).records
        event = record.asset_materialization
        assert event is not None
        assert event.tags is not None
        assert event.tags["dagster/data_version"] == manifest.sha256
        numbers = {"size_bytes", "raw_bytes", "compression_ratio", "duration_s", "rate_mb_s", "rows", "tables"}
        assert all(isinstance(event.metadata[name].value, int | float) for name in numbers)
        assert {"path", "mode", "server_version", "summary", "stages", "rows_per_table"} <= event.metadata.keys()
        (observed,) = instance.fetch_observations(AssetKey("kanbu_database"), limit=2).records
        assert observed.asset_observation is not None
        assert observed.asset_observation.metadata["rows"].value == sum(facts.rows.values())
        assert instance.get_run_by_id(outcome.run_id).status is DagsterRunStatus.SUCCESS  # type: ignore[union-attr]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_a_password_reaches_the_server_and_nobody_else(
    newest_postgres: PostgresForTest, configure: Configure, host: str
) -> None:
    url = newest_postgres.tcp_url(newest_postgres.database("CREATE TABLE t (i int)"), host)
    configure(url)
    outcome, manifest = run_backup()
    assert manifest.database is not None
    assert manifest.database.rows == {"public.t": 0}
    said = events_text(outcome.run_id)
    kept = b"".join(path.read_bytes() for path in Path(os.environ["DAGSTER_HOME"]).rglob("*") if path.is_file())
    for secret in (newest_postgres.password, url, TEST_KEY, derive_key(TEST_KEY).secret.hex()):
        assert secret not in said
        assert secret.encode() not in kept


def test_a_wrong_password_is_said_without_it(newest_postgres: PostgresForTest, configure: Configure) -> None:
    url = newest_postgres.tcp_url(newest_postgres.database())
    configure(url.replace(":p%40", ":wr0ng%40"))
    outcome = run_job("database_backup")
    assert not outcome.success
    assert "password authentication failed" in str(outcome.error)
    assert "wr0ng" not in events_text(outcome.run_id)


def test_no_key_means_no_encryption_and_a_warning(newest_postgres: PostgresForTest, configure: Configure) -> None:
    store = configure(newest_postgres.database("CREATE TABLE t AS SELECT 1"), BACKUP_ENCRYPTION_KEY="")
    outcome, manifest = run_backup()
    assert not manifest.encrypted
    assert manifest.filename.endswith(".sql.gz")
    assert b"dump complete" in gzip.decompress((store / manifest.filename).read_bytes())
    assert "will NOT be encrypted" in events_text(outcome.run_id)


def test_a_backup_that_comes_near_the_limit_of_gcm_is_warned_of_and_made(
    newest_postgres: PostgresForTest, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(newest_postgres.sample_database())
    first, manifest = run_backup()
    warning = "AES-GCM protects no more than"
    assert warning not in events_text(first.run_id)
    for limit, near in ((manifest.stored_bytes * 4, False), (manifest.stored_bytes // 4, True)):
        # 64 GiB of test data is too much; the stage itself keeps to the real limit.
        monkeypatch.setattr(backup_ops, "GCM_LIMIT_BYTES", limit)
        outcome, made = run_backup()
        assert made.encrypted
        assert (warning in events_text(outcome.run_id)) is near
    monkeypatch.setenv("BACKUP_ENCRYPTION_KEY", "")
    outcome, _ = run_backup()
    assert warning not in events_text(outcome.run_id)


def test_a_recipe_pickles_and_holds_no_secret(newest_postgres: PostgresForTest, configure: Configure) -> None:
    configure(newest_postgres.tcp_url(newest_postgres.database()))
    source, _ = prepare_dump(load_settings())
    recipe = Recipe(source).with_compression(2).with_checksum().with_encryption(derive_key(TEST_KEY).key_id)
    pickled = pickle.dumps(recipe)
    assert pickle.loads(pickled) == recipe
    for secret in (newest_postgres.password.encode(), TEST_KEY.encode(), derive_key(TEST_KEY).secret):
        assert secret not in pickled


def test_waiting_for_a_lock_ends_with_a_clear_error_and_shows_no_password(
    newest_postgres: PostgresForTest, configure: Configure
) -> None:
    url = newest_postgres.tcp_url(newest_postgres.database("CREATE TABLE t (i int)"))
    store = configure(url, BACKUP_LOCK_TIMEOUT_SECONDS="2")
    argv: list[str] = []

    def watch() -> None:
        while not argv:
            argv.extend(commands_running("pg_dump"))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch, daemon=True)
    with psycopg2.connect(url) as session, session.cursor() as cursor:
        cursor.execute("LOCK TABLE t")
        watcher.start()
        outcome = run_job("database_backup")
    watcher.join(5)
    assert "A table stayed locked by another session for 2 seconds" in str(outcome.error)
    assert "BACKUP_LOCK_TIMEOUT_SECONDS" in str(outcome.error)
    assert "stage `dump`" in str(outcome.error)
    assert argv
    assert newest_postgres.password not in "".join(argv)
    assert [name for name in os.listdir(store) if not name.startswith(".kanbu-storage")] == []


def commands_running(program: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if Path(command.split("\0")[0]).name == program:
                found.append(command)
    return found


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("cat dump; echo broken >&2; exit 3", "pg_dump failed with exit status 3: broken"),
        ("cat dump; kill -9 $$", "pg_dump was ended by signal 9"),
        ("head -c 500 dump", "not whole"),
        ("cat dump; echo 'SELECT 1;'", "not whole"),
        ("true", "not whole"),
    ],
)
def test_a_dump_that_is_not_whole_is_no_backup(tmp_path: Path, configure: Configure, script: str, said: str) -> None:
    """A pg_dump that ends badly in each way cannot be had from a real one at will: a script stands in for it."""
    store = configure("postgresql://u@nowhere/db")
    (tmp_path / "dump").write_text(
        "--\n-- PostgreSQL database dump\n--\n\n"
        + "SELECT 1;\n" * 100
        + "--\n-- PostgreSQL database dump complete\n--\n\n"
    )
    program = tmp_path / "pg_dump"
    program.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
    program.chmod(0o755)
    state = DatabaseState(
        name="db",
        server_version="16.1",
        server_id="1",
        size_bytes=0,
        tables=1,
        estimated_bytes=0,
        roles=(),
        extensions=(),
        properties=DatabaseProperties("owner", Locale("UTF8", "C", "C", "libc")),
    )
    recipe = Recipe(PostgresDump(DirectAccess(str(tmp_path), "16.1", "nowhere"), state, 1)).with_compression(1)
    storage = FolderStorage(store)
    storage.prepare()
    with pytest.raises(KanbuError, match=said):
        make_backup(recipe, settings=load_settings(), keys=Keyring(), storage=storage, origin=Origin())
    assert Catalog(storage, Keyring()).backups() == []
    assert os.listdir(store) == [".kanbu-storage"]


def test_a_storage_whose_mark_is_gone_is_refused_and_marked_again_only_on_purpose(
    newest_postgres: PostgresForTest, configure: Configure
) -> None:
    store = configure(newest_postgres.database())
    run_backup()
    for path in store.iterdir():
        path.unlink()
    outcome = run_job("database_backup")
    assert isinstance(outcome.error, StorageError)
    assert str(outcome.error).startswith("Storage not accessible")
    assert "Is the right volume mounted?" in str(outcome.error)
    assert list(store.iterdir()) == []
    # Another storage in its place is no better, until somebody says that it is meant.
    FolderStorage(store).mark()
    for job in ("database_backup", "sync_catalog"):
        outcome = run_job(job)
        assert isinstance(outcome.error, StorageError)
        assert "bears the mark of another storage" in str(outcome.error)
    accepted = CliRunner().invoke(storage_mark)
    assert accepted.exit_code == 0, accepted.output
    run_backup()


def test_no_way_to_the_database_is_said_with_reasons(configure: Configure) -> None:
    configure("", BACKUP_PG_MODE="auto")
    outcome = run_job("database_backup")
    assert isinstance(outcome.error, SourceError)
    assert str(outcome.error).startswith("No backup method available")
    assert "DATABASE_URL is not set" in str(outcome.error)


def test_dagsters_own_command_keeps_its_records_where_ours_does(
    newest_postgres: PostgresForTest, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(newest_postgres.database("CREATE TABLE t AS SELECT 1 AS i"))
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = set(PROJECT.iterdir())
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "dagster",
            "job",
            "execute",
            "-m",
            "kanbu_backup_dagster.definitions",
            "-j",
            "database_backup",
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert {path for path in set(PROJECT.iterdir()) - before if path.name.startswith(".tmp_dagster_home")} == set()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "state" / "kanbu-backup" / "dagster"))
    with DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        assert run.status is DagsterRunStatus.SUCCESS
    (backup,) = load_environment().catalog.backups()
    assert backup.manifest is not None
    assert backup.manifest.run_id == run.run_id


def test_stock_tools_bring_the_database_back(
    postgres: PostgresForTest, configure: Configure, node: str, tmp_path: Path
) -> None:
    """Node decrypts, gunzip decompresses, psql loads into an empty database, and it dumps to the same SQL."""
    url, empty = postgres.sample_database(), postgres.database()
    store = configure(url)
    _, manifest = run_backup()
    script = """
    const crypto = require('crypto'), fs = require('fs');
    const data = fs.readFileSync(process.argv[1]);
    const key = crypto.pbkdf2Sync(process.env.KEY_UNDER_TEST, 'kanbu-backup-encryption-salt-v1', 100000, 32, 'sha256');
    const decipher = crypto.createDecipheriv('aes-256-gcm', key, data.subarray(0, 16));
    decipher.setAuthTag(data.subarray(-16));
    process.stdout.write(Buffer.concat([decipher.update(data.subarray(16, -16)), decipher.final()]));
    """
    compressed = tmp_path / "backup.sql.gz"
    with compressed.open("wb") as target:
        subprocess.run(
            [node, "-e", script, store / manifest.filename], stdout=target, check=True, env={"KEY_UNDER_TEST": TEST_KEY}
        )
    subprocess.run(["gunzip", compressed], check=True)
    subprocess.run(
        [postgres.bin_folder / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", empty, "-f", tmp_path / "backup.sql"],
        check=True,
        capture_output=True,
    )
    assert postgres.dump(empty) == postgres.dump(url)

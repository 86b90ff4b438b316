"""`kanbu-backup` as a user runs it: what is printed, and how it ends."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from kanbu_backup_dagster.cli import group
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

Configure = Callable[..., Path]
PROJECT = Path(__file__).parents[2]


def kanbu(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    ran = subprocess.run(
        [sys.executable, "-m", "kanbu_backup_dagster.cli", *arguments],
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **variables},
    )
    assert b"Traceback" not in ran.stderr, ran.stderr.decode()
    return ran


def answer(*arguments: str | Path, **variables: str) -> object:
    ran = kanbu(*arguments, "--json", **variables)
    assert ran.returncode == 0, ran.stderr.decode()
    return json.loads(ran.stdout)


def refused(code: int, *arguments: str | Path, **variables: str) -> str:
    ran = kanbu(*arguments, **variables)
    assert (ran.returncode, ran.stdout) == (code, b"")
    return ran.stderr.decode()


@pytest.fixture
def backed_up(newest_postgres: PostgresForTest, configure: Configure) -> tuple[Path, str]:
    """A storage with one encrypted backup, and its name."""
    store = configure(newest_postgres.database("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i"))
    made = answer("backup", "database")
    assert isinstance(made, dict)
    assert made["database"]["rows"] == {"public.t": 1000}
    return store, made["filename"]


def test_looking(backed_up: tuple[Path, str]) -> None:
    store, name = backed_up
    (listed,) = answer("list")  # type: ignore[misc]
    assert (listed["filename"], listed["status"], listed["encrypted"]) == (name, "verified", True)
    assert name.encode() in kanbu("list").stdout
    shown = answer("show", name)
    assert isinstance(shown, dict)
    assert (shown["path"], shown["database"]["rows"]) == (str(store / name), {"public.t": 1000})
    assert answer("show", store / name) == shown
    status = answer("status")
    assert isinstance(status, dict)
    assert status["storage"]["accessible"]
    assert status["database"]["mode"] == "direct"
    assert status["encryption"]["key_id"] == shown["key_id"]
    assert (status["backups"]["total"], status["backups"]["verified"]) == (1, 1)
    assert status["settings"]["DATABASE_URL"] == "(secret)  [environment]"
    assert name in kanbu("show", name).stdout.decode()


def test_verifying(backed_up: tuple[Path, str]) -> None:
    store, name = backed_up
    assert answer("verify", name)["status"] == "verified"  # type: ignore[index]
    assert "BACKUP_ENCRYPTION_KEY is not set" in refused(6, "verify", name, BACKUP_ENCRYPTION_KEY="")
    assert "encrypted with key" in refused(6, "verify", name, BACKUP_ENCRYPTION_KEY="another")
    assert answer("show", name)["status"] == "verified"  # type: ignore[index]
    damaged = bytearray((store / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (store / name).write_bytes(damaged)
    ran = kanbu("verify", name)
    assert (ran.returncode, b"failed" in ran.stdout) == (1, True)
    assert answer("show", name)["status"] == "failed"  # type: ignore[index]


def test_decrypting(backed_up: tuple[Path, str], tmp_path: Path) -> None:
    store, name = backed_up
    plain = tmp_path / "out.sql.gz"
    assert answer("decrypt", name, "-o", plain)["bytes"] == plain.stat().st_size  # type: ignore[index]
    assert b"COPY public.t" in gzip.decompress(plain.read_bytes())
    assert kanbu("decrypt", name, "-o", "-").stdout == plain.read_bytes()
    assert "exists already" in refused(1, "decrypt", name, "-o", plain)
    # A disk that fills up, or here a file that may not grow, within the last chunk.
    room = plain.stat().st_size - 100
    full = subprocess.run(
        [sys.executable, "-m", "kanbu_backup_dagster.cli", "decrypt", name, "-o", tmp_path / "never"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert (full.returncode, full.stdout) == (1, "")
    assert full.stderr == f"error: {tmp_path / 'never'} cannot be written: File too large.\n"
    cut = (store / name).read_bytes()[:-1]
    (store / name).write_bytes(cut)
    assert "Checksum mismatch" in refused(7, "decrypt", name, "-o", "-")
    assert "Checksum mismatch" in refused(7, "decrypt", name, "-o", tmp_path / "never")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.sql.gz", "store"]


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "kanbu_backup_2026-01-01T00-00-00.sql.gz", "x"])
def test_what_is_no_backup_is_refused(configure: Configure, file: str) -> None:
    configure().mkdir()
    for command in ("show", "verify", "decrypt"):
        assert "Backup file not found" in refused(5, command, file)


def test_mistakes_end_in_a_message_and_a_code_of_their_own(configure: Configure, tmp_path: Path) -> None:
    configure("postgresql://u@127.0.0.1:1/db")
    assert "BACKUP_STORAGE (environment)" in refused(3, "list", BACKUP_STORAGE="s3")
    assert "Storage not accessible" in refused(4, "list")
    assert "DAGSTER_HOME must be an absolute path" in refused(3, "backup", "database", DAGSTER_HOME="relative")
    assert "Connection refused" in refused(1, "backup", "database")
    (tmp_path / "store").mkdir()
    assert kanbu("list").stdout.decode().startswith("No backups in")
    assert kanbu("frobnicate").returncode == 2


def test_every_command_is_found_and_explained() -> None:
    """The group names each command's module; a command it does not name could not be called."""
    folder = Path(group.__file__).parent
    for module in folder.glob("[a-z]*.py"):
        if module.stem != "main":
            importlib.import_module(f"kanbu_backup_dagster.cli.{module.stem}")
    assert sorted(group.cli.commands) == group.cli.list_commands(click.Context(group.cli))
    helped = kanbu("--help").stdout.decode()
    assert all(f"  {name} " in helped for name in group.cli.commands)

"""`kanbu-backup` as a user runs it: what is printed, and how it ends."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from kanbu_backup_dagster.cli import group
from kanbu_backup_dagster.orchestration.target_lock import Holder, open_locks
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster.sources.postgres import prepare_dump
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
    printed = kanbu("show", name).stdout.decode()
    assert name in printed
    assert re.search(r"properties: +\n +owner: \w+ +\n +locale: +\n +encoding: UTF8", printed)


def proven_by_file() -> dict[str, Any]:
    return {one["filename"]: one["proven_at"] for one in answer("list")}  # type: ignore[attr-defined]


def test_a_drill_is_told_everywhere(backed_up: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = backed_up
    monkeypatch.setenv("BACKUP_DRILL_DATABASE_URL", os.environ["DATABASE_URL"])
    second = answer("backup", "database")["filename"]  # type: ignore[index]
    assert answer("status")["backups"]["last_proven_at"] is None  # type: ignore[index]
    told = kanbu("drill", first)
    assert (told.returncode, told.stdout.decode().partition(" A restore takes about ")[0]) == (
        0,
        f"{first} is proven: 1,000 rows in 1 tables, as backed up.",
    )
    proven = proven_by_file()
    assert proven[first] is not None
    assert proven[second] is None
    lines = {line.split()[0]: line.rstrip() for line in kanbu("list").stdout.decode().splitlines() if line.strip()}
    assert lines["File"].endswith("Proven")
    assert re.search(r" verified +\d+ (s|min)$", lines[first]), lines[first]
    assert lines[second].endswith(" verified")
    assert answer("show", first)["proven_at"][:19] == proven[first][:19]  # type: ignore[index]
    assert "proven at" in kanbu("show", first).stdout.decode()
    assert answer("status")["backups"]["last_proven_at"] == proven[first]  # type: ignore[index]
    assert f"last_proven_at: {proven[first]}" in kanbu("status").stdout.decode()
    # Without a file the newest, and older ones drawn at random beside it.
    assert answer("drill", "--older", "5")["rows"] == 1000  # type: ignore[index]
    assert proven_by_file()[second] > proven[first]
    assert proven_by_file()[first] > proven[first]


def test_a_terminal_shows_a_bar_of_bytes(newest_postgres: PostgresForTest, configure: Configure) -> None:
    configure(newest_postgres.sample_database())
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "kanbu_backup_dagster.cli", "backup", "database"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(theirs)
        drawn = b""
        try:
            while part := os.read(ours, 65536):
                drawn += part
        except OSError:  # so a terminal ends whose other side is closed
            pass
        os.close(ours)
        assert process.stdout is not None
        assert b"verified, encrypted" in process.stdout.read()
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    bars = re.findall(r"Backing up \S+ +\d+% ([\d.]+)/([\d.]+) ([kM]B)", text)
    assert any(float(done) > 0 for done, _, _ in bars), text


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


def test_schedules_and_settings_that_cannot_be_used(configure: Configure) -> None:
    configure().mkdir()
    assert "BACKUP_CRON_TIMEZONE" in refused(3, "schedules", BACKUP_CRON_TIMEZONE="Mars/Olympus")
    Path("kanbu_backup.yaml").write_text(
        "schedules:\n"
        '  - {id: 1, name: Daily, type: database, cron: "0 2 * * *"}\n'
        '  - {id: 2, name: Never, type: database, cron: "61 * * * *"}\n'
    )
    [problem] = answer("status")["schedules"]["problems"]  # type: ignore[index]
    assert "line 3" in problem
    assert "Never" in problem
    plain = " ".join(kanbu("status").stdout.decode().split())
    assert "enabled: 1" in plain
    assert "line 3" in plain


def test_a_target_that_another_run_holds(backed_up: tuple[Path, str]) -> None:
    target = prepare_dump(load_settings())[0].state.target
    with open_locks().hold(target, Holder.now("restore_database", "a-restore"), exclusive=True):
        assert "held by restore_database, run a-restore" in refused(8, "backup", "database")


def test_every_command_is_found_and_explained() -> None:
    """The group names each command's module; a command it does not name could not be called."""
    folder = Path(group.__file__).parent
    for module in folder.glob("[a-z]*.py"):
        if module.stem != "main":
            importlib.import_module(f"kanbu_backup_dagster.cli.{module.stem}")
    assert sorted(group.cli.commands) == group.cli.list_commands(click.Context(group.cli))
    helped = kanbu("--help").stdout.decode()
    assert all(f"  {name} " in helped for name in group.cli.commands)


def test_help_does_not_wait_for_dagster() -> None:
    imported = kanbu("restore", "--help", PYTHONPROFILEIMPORTTIME="1").stderr.decode()
    assert "click.core" in imported
    assert not re.search(r"\| +dagster$", imported, re.MULTILINE)

"""The demo, from its first run to its end, and every command it prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kanbu_backup_dagster.sources.embedded_postgres import EmbeddedPostgres
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest, available_majors

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.real("postgresql")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the demo needs of a clone, in a folder only we can enter, as a home would be."""
    if not available_majors():
        pytest.skip("no PostgreSQL server is installed")
    folder = tmp_path / "a clone"
    folder.mkdir()
    shutil.copytree(ROOT / "demo", folder / "demo")
    for name in ("kanbu_backup.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, folder)
    # The printed commands find the programs of .venv; this stands in where the tests run without an installation.
    program = folder / "bin" / "kanbu-backup"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m kanbu_backup_dagster.cli "$@"\n')
    program.chmod(0o755)
    return folder


def surroundings(clone: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{clone / 'bin'}:{os.environ['PATH']}"}


def demo(clone: Path, *arguments: str, **environment: str) -> str:
    answer = subprocess.run(
        [sys.executable, clone / "demo" / "run.py", *arguments],
        env={**surroundings(clone), **environment},
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def test_demo_twice_then_its_own_commands(clone: Path) -> None:
    try:
        first = demo(clone)
        assert "verified" in first
        second = demo(clone)
        printed = re.findall(r"(?m)^  ([^# ].*)$", second.partition("What to type next")[2])
        enter, serve, show, decrypt, execute, restore, end = printed

        def paste(command: str) -> str:
            script = f"set -euo pipefail; {enter}\n{command}"
            return subprocess.run(
                ["bash", "-c", script],
                env=surroundings(clone),
                check=True,
                capture_output=True,
                text=True,
                cwd="/",
            ).stdout

        paste(execute)
        backups = json.loads(paste("kanbu-backup list --json"))
        assert [(b["type"], b["encrypted"], b["status"]) for b in backups] == [("database", True, "verified")] * 3
        assert 'public."Task": 2,400' in paste(show)
        assert "-- PostgreSQL database dump complete" in paste(decrypt.replace("less", "tail -n 5"))
        # Every way of running it kept its records in the demo's own home.
        runs = json.loads(paste(f'python -c "{_COUNT_RUNS}"'))
        assert runs == 3
        server = EmbeddedPostgres.start(clone / ".demo" / "postgres")
        server.psql("DELETE FROM comments; DROP TABLE projects CASCADE;", "kanbu")
        paste(f"{restore} --yes --confirm kanbu")
        assert (
            server.psql("SELECT (SELECT count(*) FROM comments), (SELECT count(*) FROM projects)", "kanbu")
            == "6011|12\n"
        )
        assert serve == "kanbu-backup serve"
        assert end.startswith("make -C")
        assert stat.S_IMODE((clone / ".demo" / ".env").stat().st_mode) == 0o600
    finally:
        demo(clone, "--stop")
    assert not (clone / ".demo").exists()
    assert "There is no demo" in demo(clone, "--stop")


_COUNT_RUNS = (
    "from kanbu_backup_dagster.orchestration.dagster_home import open_instance as o; print(o().get_runs_count())"
)


def test_demo_of_a_database_of_ones_own(clone: Path, newest_postgres: PostgresForTest) -> None:
    url = newest_postgres.database("CREATE TABLE mine AS SELECT 1 AS one")
    output = demo(clone, DATABASE_URL=newest_postgres.tcp_url(url))
    try:
        assert "Backing up the database in DATABASE_URL" in output
        assert not (clone / ".demo" / "postgres").exists()
        settings = (clone / ".demo" / ".env").read_text()
        assert "DATABASE_URL" not in settings
        assert newest_postgres.password not in output + settings
        (manifest,) = [json.loads(path.read_text()) for path in (clone / ".demo" / "backups").glob("*.manifest.json")]
        assert manifest["database"]["rows"] == {"public.mine": 1}
    finally:
        demo(clone, "--stop")

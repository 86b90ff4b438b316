"""What drills leave behind: nothing that runs when they are killed, and nothing on disk once the next one has begun."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.errors import RestoreError
from kanbu_backup_dagster.restore.drill import DrillResult, drill, drill_server
from kanbu_backup_dagster.sources.embedded_postgres import EmbeddedPostgres
from kanbu_backup_dagster_tests.backups import DUMP, FACTS, Bytes, store_backup
from kanbu_backup_dagster_tests.real_postgres import available_majors

pytestmark = [
    pytest.mark.real("postgresql"),
    pytest.mark.skipif(not available_majors(), reason="no PostgreSQL server is installed"),
]

LOADABLE = DUMP.replace(b"COPY", b"CREATE TABLE public.t (i integer);\nCOPY")
SLEEPING = LOADABLE.replace(b"COPY", b"SELECT pg_sleep(600);\nCOPY")


@pytest.fixture(params=["that the server's user can enter", "that it cannot"])
def temporary_folder(request: pytest.FixtureRequest, open_tmp_path: Path, tmp_path: Path) -> Path:
    """Where temporary folders are made; under root, data whose folder cannot be entered are elsewhere."""
    return open_tmp_path if request.param == "that the server's user can enter" else tmp_path


def run_drill(file: str, tell: Callable[[str], None]) -> DrillResult:
    here = load_environment()
    backup = here.catalog.get(file)
    with drill_server(here.settings, backup, tell=tell) as (server, settings):
        return drill(backup, here.storage, here.keys, server, settings, tell=tell)


def processes_of(home: Path) -> list[bytes]:
    """What the processes of the server in `home` call themselves: all of them stand in its data."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == home / "data":
                found.append((process / "cmdline").read_bytes())
        except OSError:  # it ended, or is another user's
            continue
    return found


def wait_until(is_so: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_drill_takes_its_server_with_it_and_the_next_one_removes_its_data(
    temporary_folder: Path, configure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = configure()
    process = subprocess.Popen(
        [sys.executable, "-m", "kanbu_backup_dagster.cli", "drill", store_backup(store, Bytes(SLEEPING)).filename],
        env={**os.environ, "TMPDIR": str(temporary_folder), "PYTHONPATH": str(Path(__file__).parents[2])},
    )

    def homes() -> dict[Path, Path]:
        """Each temporary server's folder, and where its data are."""
        return {
            folder: (folder / "home").readlink() if (folder / "home").is_symlink() else folder
            for folder in temporary_folder.glob("kanbu-postgres-*")
        }

    def is_loading() -> bool:
        assert process.poll() is None, "it ended before it was killed"
        return any(
            b"kanbu_drill_" in one and b"SELECT" in one for home in homes().values() for one in processes_of(home)
        )

    try:
        wait_until(is_loading, seconds=60)
        ((folder, home),) = homes().items()
        # While its owner lives, nobody takes it for a leftover.
        monkeypatch.setattr(tempfile, "tempdir", str(temporary_folder))
        assert EmbeddedPostgres.remove_leftovers() == []
        assert processes_of(home)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not processes_of(home), seconds=10)
    assert (home / "data" / "PG_VERSION").exists(), "there is something to remove"
    told: list[str] = []
    assert run_drill(store_backup(store, Bytes(LOADABLE)).filename, told.append).rows == 2
    assert told == [f"Removed what a killed drill left: {folder}"]
    assert not home.exists()
    assert homes() == {}


def test_a_server_that_outlived_its_owner_all_the_same_is_ended(temporary_folder: Path) -> None:
    """As where the system does not tell a process that its parent has died."""
    folder = temporary_folder / "kanbu-postgres-outlived"
    server = EmbeddedPostgres.start(folder, durable=False)
    assert EmbeddedPostgres.remove_leftovers(temporary_folder) == [], "it never had an owner"
    (folder / ".owner").touch()
    assert EmbeddedPostgres.remove_leftovers(temporary_folder) == [folder]
    assert processes_of(server.home) == []
    assert (folder.exists(), server.home.exists()) == (False, False)


def test_a_folder_that_is_not_ours_alone_is_left_alone(open_tmp_path: Path) -> None:
    kept = open_tmp_path / "kept"
    kept.mkdir()
    for name, mode in (("kanbu-postgres-open", 0o777), ("kanbu-postgres-without-owner", 0o700)):
        planted = open_tmp_path / name
        planted.mkdir()
        (planted / "home").symlink_to(kept)
        planted.chmod(mode)
    (open_tmp_path / "kanbu-postgres-open" / ".owner").touch()
    (open_tmp_path / "kanbu-postgres-link").symlink_to(kept)
    (kept / ".owner").touch()
    before = sorted(open_tmp_path.rglob("*"))
    assert EmbeddedPostgres.remove_leftovers(open_tmp_path) == []
    assert sorted(open_tmp_path.rglob("*")) == before


def test_what_a_drill_came_to_is_told_although_it_cannot_clear_up(
    configure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = configure()
    # A database with a prepared transaction cannot be dropped, not even by force.
    in_the_way = b"BEGIN;\nCREATE TABLE other (n integer);\nPREPARE TRANSACTION 'in the way';\n"
    facts = FACTS.model_copy(update={"roles": ("only_for_a_while",)})
    good, bad = (
        store_backup(store, Bytes(LOADABLE.replace(b"CREATE", in_the_way + more + b"CREATE"), facts)).filename
        for more in (b"", b"SELECT 1/0;\n")
    )
    with EmbeddedPostgres.temporary(settings={"max_prepared_transactions": "3"}) as server:
        monkeypatch.setenv("BACKUP_DRILL_DATABASE_URL", server.url)

        def clear_up_by_hand() -> None:
            (name,) = server.psql("SELECT datname FROM pg_database WHERE datname LIKE 'kanbu_drill%'").split()
            server.psql("ROLLBACK PREPARED 'in the way'", name)
            server.psql(f"DROP DATABASE {name}")

        told: list[str] = []
        with pytest.raises(RestoreError, match="division by zero"):
            run_drill(bad, told.append)
        assert any(line.startswith("The database kanbu_drill_") and "prepared transaction" in line for line in told)
        roles = "SELECT count(*) FROM pg_roles WHERE rolname = 'only_for_a_while'"
        assert server.psql(roles) == "0\n"
        clear_up_by_hand()
        # One that proves the backup still does, and says what it left.
        assert any("cannot be dropped" in remark for remark in run_drill(good, told.append).remarks)
        assert server.psql(roles) == "0\n"
        clear_up_by_hand()


def test_roles_of_a_killed_drill_go_with_the_next_and_those_of_others_stay(
    configure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = configure()
    facts = FACTS.model_copy(update={"roles": ("only_for_a_while",)})
    sleeping, good = (store_backup(store, Bytes(dump, facts)).filename for dump in (SLEEPING, LOADABLE))
    with EmbeddedPostgres.temporary() as server:
        server.psql("CREATE ROLE of_somebody; COMMENT ON ROLE of_somebody IS 'for reports'")
        monkeypatch.setenv("BACKUP_DRILL_DATABASE_URL", server.url)
        process = subprocess.Popen(
            [sys.executable, "-m", "kanbu_backup_dagster.cli", "drill", sleeping],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            sleeps = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(600)%'"
            wait_until(lambda: server.psql(sleeps) == "1\n", seconds=60)
        finally:
            process.kill()
            process.wait()
        roles = "SELECT rolname FROM pg_roles"
        assert "only_for_a_while" in server.psql(roles), "there is something to remove"
        assert run_drill(good, lambda line: None).remarks == ()
        assert "only_for_a_while" not in server.psql(roles)
        assert "of_somebody" in server.psql(roles)

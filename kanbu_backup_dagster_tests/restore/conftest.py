"""A database to back up and restore: one `Bench` a test, on a real server."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kanbu_backup_dagster.backup.keys import Keyring, load_keyring
from kanbu_backup_dagster.backup.landing import Origin, make_backup
from kanbu_backup_dagster.backup.manifest import Manifest
from kanbu_backup_dagster.backup.recipe import Recipe
from kanbu_backup_dagster.orchestration.run_here import Outcome, run_job
from kanbu_backup_dagster.restore.database import abandon, check_staging, load_staging, swap_in
from kanbu_backup_dagster.restore.plan import RestorePlan, RestoreRequest, plan_restore
from kanbu_backup_dagster.restore.swap import Swapped
from kanbu_backup_dagster.settings import Settings, load_settings
from kanbu_backup_dagster.sources.postgres import prepare_dump
from kanbu_backup_dagster.storage.open import open_storage
from kanbu_backup_dagster.storage.protocol import Storage
from kanbu_backup_dagster_tests.conftest import EACH_MODE
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

EVERYTHING = Path(__file__).with_name("everything.sql")

# What belongs to the database itself, which the restored one must have too.
PROPERTIES = """
ALTER DATABASE {0} SET search_path TO "$user", 'has space', public;
ALTER DATABASE {0} SET work_mem TO '7MB';
ALTER DATABASE {0} SET "my.setting" TO 'it''s \\ odd';
ALTER DATABASE {0} SET default_transaction_read_only TO off;
ALTER ROLE kanbu_owner IN DATABASE {0} SET statement_timeout TO '1min';
ALTER DATABASE {0} CONNECTION LIMIT 77;
COMMENT ON DATABASE {0} IS 'the ''live'' \\ one';
GRANT CREATE ON DATABASE {0} TO kanbu_owner WITH GRANT OPTION;
SET ROLE kanbu_owner; GRANT CREATE ON DATABASE {0} TO "kanbu reader"; RESET ROLE;
REVOKE TEMPORARY ON DATABASE {0} FROM PUBLIC;
ALTER DATABASE {0} OWNER TO kanbu_owner;
"""


@dataclass(frozen=True)
class Bench:
    """A server, a database on it, a storage; and what tests do with them."""

    postgres: PostgresForTest
    url: str
    storage_folder: Path
    settings: Settings
    keys: Keyring
    storage: Storage

    @property
    def name(self) -> str:
        return self.postgres.database_name(self.url)

    def backup(self) -> Manifest:
        """A backup of the database, as the job makes it."""
        source, _ = prepare_dump(self.settings)
        recipe = Recipe(source).with_compression(2).with_checksum()
        if self.keys.current is not None:
            recipe = recipe.with_encryption(self.keys.current.key_id)
        self.storage.prepare()
        return make_backup(recipe, settings=self.settings, keys=self.keys, storage=self.storage, origin=Origin())

    def legacy(self, content: bytes, name: str = "kanbu_backup_2026-01-01T00-00-00.sql") -> str:
        """A file without manifest, as Kanbu's older releases left them."""
        self.storage.prepare()
        (self.storage_folder / name).write_bytes(content)
        return name

    def plan(self, file: str, **options: object) -> RestorePlan:
        request = RestoreRequest(file, confirm_overwrite=True, confirm_target=self.name)
        return plan_restore(replace(request, **options), self.settings, self.storage, self.keys)  # type: ignore[arg-type]

    def restore(self, file: str, **options: object) -> Swapped:
        """The steps of a restore in order; the staging database is gone afterwards, as after the job."""
        plan = self.plan(file, **options)
        try:
            loaded = load_staging(plan, self.settings, self.storage, self.keys)
            check_staging(plan, self.settings, self.storage, self.keys, loaded)
            return swap_in(plan, self.settings)
        finally:
            abandon(plan, self.settings)

    def sql(self, script: str, database: str | None = None) -> str:
        return self.postgres.server.psql(script, database or self.name)

    def databases(self) -> set[str]:
        """All databases of this test: its own, and what restores made beside it."""
        names = set(self.postgres.server.psql("SELECT datname FROM pg_database").splitlines())
        return {name for name in names if name.startswith((self.name, "kanbu_staging_"))}

    def dump(self, *, pg_dump: Path | None = None) -> bytes:
        """Everything pg_dump tells of the database, its own properties too; the same for the same database."""
        program = pg_dump or self.postgres.bin_folder / "pg_dump"
        return subprocess.run(
            [program, "--create", "--restrict-key=fixed", "-d", self.url], check=True, capture_output=True
        ).stdout


def make_bench(
    postgres: PostgresForTest, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, key: str | None = None
) -> Bench:
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("BACKUP_LOCAL_PATH", str(folder))
    if key is not None:
        monkeypatch.setenv("BACKUP_ENCRYPTION_KEY", key)
    settings = load_settings()
    return Bench(postgres, url, folder, settings, load_keyring(settings), open_storage(settings))


def restore_config(bench: Bench, file: str, **options: Any) -> dict[str, Any]:
    """The run configuration of a restore of `bench`'s database, with both confirmations."""
    config = {"file": file, "confirm_overwrite": True, "confirm_target": bench.name, **options}
    return {"ops": {"validate": {"config": config}}}


def run_restore(bench: Bench, file: str, **options: Any) -> Outcome:
    return run_job("restore_database", run_config=restore_config(bench, file, **options))


def drop_what_restores_left(bench: Bench) -> None:
    for name in bench.databases():
        # A database with a subscription cannot be dropped.
        if (
            bench.postgres.server.psql(
                f"SELECT count(*) FROM pg_subscription JOIN pg_database d ON d.oid = subdbid WHERE datname = '{name}'"
            )
            != "0\n"
        ):
            bench.sql("DROP SUBSCRIPTION idle", name)
    for name in bench.databases() - {bench.name}:
        bench.postgres.server.psql(f'DROP DATABASE "{name}" WITH (FORCE)')


in_each_mode = pytest.mark.parametrize("bench", EACH_MODE, indirect=True)
"""Decorates a test so that its `bench` is reached directly, then through a container."""


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """The sample project board on the newest server, no key set."""
    postgres = request.getfixturevalue(getattr(request, "param", "newest_postgres"))
    made = make_bench(postgres, postgres.sample_database(), tmp_path / "storage", monkeypatch)
    yield made
    drop_what_restores_left(made)


@pytest.fixture
def sealed_bench(newest_postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """The same with a key set."""
    made = make_bench(
        newest_postgres,
        newest_postgres.sample_database(),
        tmp_path / "storage",
        monkeypatch,
        key="a key for tests",
    )
    yield made
    drop_what_restores_left(made)


@pytest.fixture
def full_bench(postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A database of everything PostgreSQL can hold, on each server."""
    made = make_bench(
        postgres,
        postgres.database(EVERYTHING),
        tmp_path / "storage",
        monkeypatch,
        key="a key for tests",
    )
    made.sql(PROPERTIES.format(made.name))
    yield made
    drop_what_restores_left(made)

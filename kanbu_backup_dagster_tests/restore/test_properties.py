"""A database that is gone comes back with what belongs to the database itself, as far as the server can."""

from __future__ import annotations

from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.manifest import DatabaseProperties, Manifest
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster.restore.database import check_staging, load_staging, swap_in
from kanbu_backup_dagster.restore.plan import RestoreRequest, plan_restore
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest
from kanbu_backup_dagster_tests.restore.conftest import (
    Bench,
    drop_what_restores_left,
    in_each_mode,
    make_bench,
    run_restore,
)


def properties_of(manifest: Manifest) -> DatabaseProperties:
    assert manifest.database is not None
    assert manifest.database.properties is not None
    return manifest.database.properties


def test_a_database_that_is_gone_comes_back_as_it_was(full_bench: Bench) -> None:
    before = full_bench.dump()
    manifest = full_bench.backup()
    sidecar = full_bench.storage.read_sidecar(manifest.filename)
    assert sidecar is not None
    assert b"work_mem=7MB" in sidecar
    assert b"is odd" not in sidecar, "a parameter of the application's, which may be a secret"
    drop(full_bench)
    plan = full_bench.plan(manifest.filename)
    assert plan.live is None
    assert not any("Not" in warning for warning in plan.warnings)
    loaded = load_staging(plan, full_bench.settings, full_bench.storage, full_bench.keys)
    check_staging(plan, full_bench.settings, full_bench.storage, full_bench.keys, loaded)
    swapped = swap_in(plan, full_bench.settings)
    assert (loaded.remarks, swapped.remarks) == ((), ())
    assert full_bench.dump() == b"".join(line for line in before.splitlines(True) if b"my.setting" not in line)


def drop(bench: Bench) -> None:
    bench.postgres.server.psql("DROP SUBSCRIPTION IF EXISTS idle", bench.name)
    bench.postgres.server.psql(f"DROP DATABASE {bench.name} WITH (FORCE)")


@pytest.fixture
def of_a_lost_role(bench: Bench) -> str:
    """A backup of a database that belongs to a role that is gone, and the database is gone too."""
    server, name = bench.postgres.server, bench.name
    server.psql(
        f"""
        DROP ROLE IF EXISTS lost_owner; DROP ROLE IF EXISTS lost_guest;
        CREATE ROLE lost_owner; CREATE ROLE lost_guest;
        ALTER DATABASE {name} OWNER TO lost_owner;
        ALTER DATABASE {name} SET work_mem = '9MB';
        ALTER ROLE lost_guest IN DATABASE {name} SET work_mem = '8MB';
        REVOKE ALL ON DATABASE {name} FROM PUBLIC;
        GRANT CONNECT ON DATABASE {name} TO lost_guest;
        """
    )
    file = bench.backup().filename
    server.psql(f"DROP DATABASE {name}; DROP ROLE lost_owner; DROP ROLE lost_guest")
    return file


def test_roles_that_are_gone_hold_nothing_up_and_are_told_before_anything_is_done(
    bench: Bench, of_a_lost_role: str
) -> None:
    plan = bench.plan(of_a_lost_role)
    told = [
        "The owner was lost_owner, and will be kanbu: there is no such role here.",
        "Not granted again: CONNECT to lost_guest, by lost_owner.",
        "Not set again: work_mem, of the role lost_guest.",
    ]
    assert list(plan.warnings[-3:]) == told
    bench.restore(of_a_lost_role)
    assert bench.sql(OWNER_AND_GRANTS) == "kanbu|{kanbu=CTc/kanbu}\n"
    assert bench.sql("SHOW work_mem") == "9MB\n"


OWNER_AND_GRANTS = """
SELECT pg_get_userbyid(datdba), datacl FROM pg_database WHERE datname = current_database()
"""


def test_roles_that_are_gone_are_created_where_that_is_asked_for(bench: Bench, of_a_lost_role: str) -> None:
    bench.restore(of_a_lost_role, create_missing_roles=True)
    assert bench.sql(OWNER_AND_GRANTS) == "lost_owner|{lost_owner=CTc/lost_owner,lost_guest=c/lost_owner}\n"
    assert bench.sql("SELECT count(*) FROM pg_db_role_setting WHERE setrole = 'lost_guest'::regrole") == "1\n"
    bench.postgres.server.psql(f"DROP DATABASE {bench.name}; DROP ROLE lost_owner; DROP ROLE lost_guest")


@in_each_mode
def test_what_the_server_does_not_take_is_told_and_the_rest_is_restored(bench: Bench) -> None:
    before = bench.sql("SELECT count(*) FROM users")
    bench.sql(f"ALTER DATABASE {bench.name} SET work_mem = '9MB'")
    bench.sql(f"ALTER DATABASE {bench.name} SET no_longer_known.x = '9MB'")
    file = bench.backup().filename
    sidecar = Path(bench.storage.path(file) + ".manifest.json")
    text = sidecar.read_text()
    for was, becomes in (
        ('"collate": "', '"collate": "xx_XX.nowhere'),
        ('"work_mem=9MB"', '"work_mem=9 elephants", "parameter_of_the_future=1", "timezone=Asia/Tokyo"'),
        ('"comment": null', '"comment": "mine"'),
    ):
        assert was in text
        text = text.replace(was, becomes)
    sidecar.write_text(text)
    bench.postgres.server.psql(f"DROP DATABASE {bench.name}")
    outcome = run_restore(bench, file)
    assert outcome.success, outcome.errors
    future, locale, elephants = outcome.report["remarks"][-3:]
    assert future == "Not set again: parameter_of_the_future."
    assert "Made without the locale xx_XX.nowhere" in locale
    assert "invalid" in locale
    assert "9 elephants" in elephants
    assert bench.sql("SELECT count(*) FROM users") == before
    assert bench.sql("SHOW timezone") == "Asia/Tokyo\n"
    assert bench.sql(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()"
    ) == ("mine\n")


def test_a_role_that_is_no_superuser_gets_its_own_database_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server, name = bench.postgres.server, f"{bench.name}_of_maker"
    server.psql("DROP ROLE IF EXISTS maker; CREATE ROLE maker LOGIN CREATEDB")
    server.psql(f"CREATE DATABASE {name} OWNER kanbu")
    server.psql(f"ALTER DATABASE {name} SET track_functions = 'all'; GRANT ALL ON DATABASE {name} TO maker")
    server.psql("CREATE SCHEMA mine AUTHORIZATION maker; SET ROLE maker; CREATE TABLE mine.t AS SELECT 42 AS n", name)
    server.psql("DROP SCHEMA public", name)
    url = bench.url.replace(bench.name, name)
    file = make_bench(bench.postgres, url, bench.storage_folder, monkeypatch).backup().filename
    server.psql(f"DROP DATABASE {name}")
    own = make_bench(bench.postgres, url.replace("kanbu@", "maker@"), bench.storage_folder, monkeypatch)
    request = RestoreRequest(file, confirm_overwrite=True, confirm_target=name)
    plan = plan_restore(request, own.settings, own.storage, own.keys)
    assert "The owner was kanbu, and will be maker: maker may not act as that role." in plan.warnings
    loaded = load_staging(plan, own.settings, own.storage, own.keys)
    assert any("permission denied" in remark and "track_functions" in remark for remark in loaded.remarks)
    swap_in(plan, own.settings)
    assert server.psql("SELECT n FROM mine.t", name) == "42\n"
    server.psql(f"DROP DATABASE {name}; DROP ROLE maker")


def test_what_is_no_text_does_not_keep_a_backup_from_being_made(
    newest_postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = newest_postgres.database()
    name = newest_postgres.database_name(url)
    server = newest_postgres.server
    server.psql(f"DROP DATABASE {name}; CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    bench = make_bench(newest_postgres, url, tmp_path / "storage", monkeypatch)
    bench.sql(f"COMMENT ON DATABASE {name} IS E'caf\\xe9'; CREATE TABLE t AS SELECT 1 AS n")
    bench.sql("DO $$ BEGIN EXECUTE format('CREATE ROLE %I', E'caf\\xe9'); END $$")
    bench.sql("DO $$ BEGIN EXECUTE format('GRANT SELECT ON t TO %I', E'caf\\xe9'); END $$")
    manifest = bench.backup()
    bench.sql("DO $$ BEGIN EXECUTE format('DROP OWNED BY %1$I; DROP ROLE %1$I', E'caf\\xe9'); END $$")
    assert manifest.database is not None
    assert manifest.database.roles == ("kanbu",)
    assert properties_of(manifest).comment is None
    assert properties_of(manifest).locale.encoding == "SQL_ASCII"
    bench.restore(bench.backup().filename)
    assert bench.sql("SELECT n FROM t") == "1\n"
    drop_what_restores_left(bench)


def test_text_is_ordered_as_it_was_in_a_drill_too(
    icu_postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a row belongs may depend on it: from 'a' to 'B' there is something in English, and nothing in C."""
    postgres = icu_postgres
    url = postgres.database()
    name = postgres.database_name(url)
    postgres.server.psql(
        f"DROP DATABASE {name}; "
        f"CREATE DATABASE {name} TEMPLATE template0 LOCALE 'C' ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
    )
    monkeypatch.setenv("BACKUP_PG_MODE", "direct")
    bench = make_bench(postgres, url, tmp_path / "storage", monkeypatch)
    bench.sql(
        "CREATE TABLE words (word text) PARTITION BY RANGE (word); "
        "CREATE TABLE a_to_b PARTITION OF words FOR VALUES FROM ('a') TO ('B'); INSERT INTO words VALUES ('apple')"
    )
    before = bench.dump()
    file = bench.backup().filename
    outcome = run_job("restore_drill", run_config={"ops": {"choose": {"config": {"file": file}}}})
    assert outcome.success, outcome.errors
    assert outcome.report["rows"] == 1
    bench.postgres.server.psql(f"DROP DATABASE {name}")
    bench.restore(file)
    assert bench.dump() == before
    drop_what_restores_left(bench)


def test_a_manifest_of_before_says_nothing_of_it_and_is_restored(bench: Bench) -> None:
    file = bench.backup().filename

    def forget(manifest: Manifest) -> Manifest:
        assert manifest.database is not None
        return manifest.model_copy(update={"database": manifest.database.model_copy(update={"properties": None})})

    Catalog(bench.storage, bench.keys).amend(file, forget)
    bench.postgres.server.psql(f"DROP DATABASE {bench.name}")
    plan = bench.plan(file)
    assert plan.recorded is None
    bench.restore(file)
    assert bench.sql("SELECT count(*) > 0 FROM users") == "t\n"

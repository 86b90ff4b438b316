"""What a database, a role or a moment may be like, and a restore must get along with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dagster import ReexecutionOptions, execute_job
from dagster._core.definitions.reconstruct import ReconstructableRepository

from kanbu_backup_dagster.errors import RestoreError
from kanbu_backup_dagster.orchestration import restore_ops
from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster.orchestration.run_here import run_job
from kanbu_backup_dagster.restore.database import check_staging, load_staging, swap_in
from kanbu_backup_dagster.restore.plan import RestoreRequest, plan_restore
from kanbu_backup_dagster.restore.staging import staging_prefix
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster.sources.commands import LocalProcess, query
from kanbu_backup_dagster.sources.postgres import find_method
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest
from kanbu_backup_dagster_tests.restore.conftest import (
    Bench,
    drop_what_restores_left,
    make_bench,
    restore_config,
    run_restore,
)

SET_FOR_REQUESTS = """
ALTER DATABASE {0} SET role TO only_reading;
ALTER DATABASE {0} SET statement_timeout TO '50ms';
ALTER DATABASE {0} SET idle_session_timeout TO '50ms';
ALTER DATABASE {0} SET lock_timeout TO '1ms';
ALTER DATABASE {0} SET array_nulls TO off;
ALTER DATABASE {0} SET transform_null_equals TO on;
"""


def test_what_a_database_is_set_to_changes_and_hinders_nothing(
    postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(postgres, postgres.database(), tmp_path / "storage", monkeypatch)
    server = postgres.server
    bench.sql(
        "CREATE TABLE tagged (names text[]); INSERT INTO tagged VALUES ('{NULL,b}'); "
        "CREATE VIEW odd AS SELECT names = NULL AS never FROM tagged; "
        "CREATE TABLE many AS SELECT n FROM generate_series(1, 300000) n; "
        "CREATE ROLE only_reading; GRANT SELECT ON ALL TABLES IN SCHEMA public TO only_reading"
    )
    server.psql(SET_FOR_REQUESTS.format(bench.name))
    if postgres.major >= 17:
        server.psql(f"ALTER DATABASE {bench.name} SET transaction_timeout TO '50ms'")
    before = dump_as_login_role(bench)
    file = bench.backup().filename
    bench.restore(file)
    assert dump_as_login_role(bench) == before
    server.psql(f"DROP DATABASE {bench.name} WITH (FORCE)")
    bench.restore(file)
    assert dump_as_login_role(bench) == before
    assert "only_reading" in server.psql("SELECT setconfig FROM pg_db_role_setting")
    drop_what_restores_left(bench)
    server.psql(f"DROP DATABASE {bench.name}; DROP ROLE only_reading")


def dump_as_login_role(bench: Bench) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        options = "-c role=none -c idle_session_timeout=0 -c transaction_timeout=0"
        patch.setenv("PGOPTIONS", options if bench.postgres.major >= 17 else options.rpartition(" -c ")[0])
        return bench.dump()


@pytest.mark.parametrize("obstacle", ["session_preload_libraries = 'nowhere_to_be_found'", "datconnlimit"])
def test_a_staging_database_that_nobody_can_connect_to_is_removed(bench: Bench, obstacle: str) -> None:
    file = bench.backup().filename
    left, server = f"{staging_prefix(bench.name)}00000000", bench.postgres.server
    server.psql(f"CREATE DATABASE {left}")
    if obstacle == "datconnlimit":  # as an interrupted DROP DATABASE leaves it
        server.psql(f"UPDATE pg_database SET datconnlimit = -2 WHERE datname = '{left}'")
    else:
        server.psql(f"ALTER DATABASE {left} SET {obstacle}")
    swapped = bench.restore(file)
    assert bench.databases() == {bench.name, swapped.replaced}


def test_a_library_that_is_not_here_does_not_keep_a_database_from_coming_back(bench: Bench) -> None:
    bench.sql(f"ALTER DATABASE {bench.name} SET work_mem = '9MB'")
    file = bench.backup().filename
    sidecar = Path(bench.storage.path(file) + ".manifest.json")
    known = '"work_mem=9MB"'
    edited = sidecar.read_text().replace(known, f'{known}, "session_preload_libraries=nowhere_to_be_found"')
    sidecar.write_text(edited)
    bench.postgres.server.psql(f"DROP DATABASE {bench.name}")
    plan = bench.plan(file)
    loaded = load_staging(plan, bench.settings, bench.storage, bench.keys)
    assert any("nobody could connect" in remark and "nowhere_to_be_found" in remark for remark in loaded.remarks)
    swap_in(plan, bench.settings)
    assert bench.sql("SELECT count(*) > 0 FROM users") == "t\n"


LOG_OF_LOGINS = """
CREATE TABLE logins (who text);
CREATE FUNCTION note_login() RETURNS event_trigger LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO public.logins VALUES (session_user); END $$;
CREATE EVENT TRIGGER on_login ON login EXECUTE FUNCTION note_login();
ALTER EVENT TRIGGER on_login ENABLE ALWAYS;
"""


@pytest.mark.parametrize("fate", ["replaced", "gone"])
def test_a_trigger_that_logs_logins_is_silent_until_the_swap(
    newest_postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    if newest_postgres.major < 17:
        pytest.skip("there are no login triggers before PostgreSQL 17")
    bench = make_bench(newest_postgres, newest_postgres.database(LOG_OF_LOGINS), tmp_path / "storage", monkeypatch)
    manifest = bench.backup()
    assert manifest.database is not None
    if fate == "gone":
        bench.postgres.server.psql(f"DROP DATABASE {bench.name} WITH (FORCE)")
    plan = bench.plan(manifest.filename)
    loaded = load_staging(plan, bench.settings, bench.storage, bench.keys)
    checked = check_staging(plan, bench.settings, bench.storage, bench.keys, loaded)
    assert checked.rows == manifest.database.rows
    swap_in(plan, bench.settings)
    assert bench.sql("SHOW event_triggers") == "on\n"
    assert int(bench.sql("SELECT count(*) FROM logins")) > manifest.database.rows["public.logins"]
    drop_what_restores_left(bench)


@pytest.mark.parametrize("keep_replaced", [True, False])
def test_what_is_written_to_an_empty_target_meanwhile_is_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, keep_replaced: bool
) -> None:
    file = bench.backup().filename
    bench.postgres.server.psql(f"DROP DATABASE {bench.name}; CREATE DATABASE {bench.name}")
    load = restore_ops.load_staging

    def load_while_orders_come_in(*arguments: Any, **options: Any) -> Any:
        bench.sql("CREATE TABLE orders AS SELECT 42 AS n")
        return load(*arguments, **options)

    monkeypatch.setattr(restore_ops, "load_staging", load_while_orders_come_in)
    outcome = run_restore(bench, file, keep_replaced=keep_replaced)
    assert outcome.success, outcome.errors
    assert bench.sql("SELECT n FROM orders", outcome.report["replaced_database"]) == "42\n"


def test_a_restore_is_not_continued_without_a_new_pre_restore_backup(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bench.backup().filename
    repository = ReconstructableRepository.for_module("kanbu_backup_dagster.definitions", "defs")
    job = repository.get_reconstructable_job("restore_database")

    def fail(*arguments: Any, **options: Any) -> None:
        raise RestoreError("The server went away.")

    with open_instance() as instance:
        with monkeypatch.context() as patch:
            patch.setattr(restore_ops, "load_staging", fail)
            failed = execute_job(job, instance, run_config=restore_config(bench, file))
        assert [event.step_key for event in failed.all_events if event.is_step_failure] == ["load"]
        bench.sql("CREATE TABLE written_since AS SELECT 42 AS n")
        continued = execute_job(
            job,
            instance,
            run_config=restore_config(bench, file),
            reexecution_options=ReexecutionOptions.from_failure(failed.run_id, instance),
        )
        (refused,) = [event for event in continued.all_events if event.is_step_failure]
        again = execute_job(
            job,
            instance,
            run_config=restore_config(bench, file),
            reexecution_options=ReexecutionOptions(failed.run_id),
        )
    assert "A restore is not continued" in str(refused.step_failure_data.error)
    assert bench.sql("SELECT n FROM written_since", next(iter(bench.databases() - {bench.name}))) == "42\n"
    assert again.success


def test_a_restore_that_fails_lets_go_of_nothing_an_earlier_one_replaced(bench: Bench) -> None:
    file = bench.backup().filename
    bench.sql("CREATE TABLE written_meanwhile AS SELECT 42 AS n")
    first = run_restore(bench, file)
    assert first.success, first.errors
    replaced = first.report["replaced_database"]
    broken = bench.legacy(b"CREATE TABLE t (n integer);\nINSERT INTO t VALUES ('x');\n")
    assert not run_restore(bench, broken).success
    assert bench.sql("SELECT n FROM written_meanwhile", replaced) == "42\n"
    assert run_job("database_backup").success
    assert replaced not in bench.databases()


def test_what_is_changed_about_the_live_database_meanwhile_stays_changed(bench: Bench) -> None:
    server, name = bench.postgres.server, bench.name
    server.psql(f"ALTER DATABASE {name} SET work_mem = '9MB'; ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'")
    server.psql("DROP ROLE IF EXISTS new_owner; CREATE ROLE new_owner")
    plan = bench.plan(bench.backup().filename)
    load_staging(plan, bench.settings, bench.storage, bench.keys)
    server.psql(
        f"ALTER DATABASE {name} SET work_mem = '8MB'; ALTER DATABASE {name} RESET timezone; "
        f"REVOKE ALL ON DATABASE {name} FROM PUBLIC; COMMENT ON DATABASE {name} IS 'new'; "
        f"ALTER DATABASE {name} OWNER TO new_owner"
    )
    before = properties_of(bench)
    swap_in(plan, bench.settings)
    assert properties_of(bench) == before
    assert "new_owner" in before
    assert "work_mem=8MB" in before
    drop_what_restores_left(bench)
    server.psql(f"DROP DATABASE {name}; DROP ROLE new_owner")


def properties_of(bench: Bench) -> str:
    return bench.postgres.server.psql(
        "SELECT pg_get_userbyid(datdba), datacl, shobj_description(oid, 'pg_database'), setconfig "
        f"FROM pg_database LEFT JOIN pg_db_role_setting ON setdatabase = oid WHERE datname = '{bench.name}'"
    )


def grants(bench: Bench) -> list[str]:
    return sorted(
        bench.postgres.server.psql(
            "SELECT grantor::regrole, grantee, privilege_type, is_grantable "
            f"FROM pg_database, aclexplode(datacl) WHERE datname = '{bench.name}'"
        ).splitlines()
    )


@pytest.mark.parametrize("fate", ["replaced", "gone"])
def test_who_was_granted_something_by_whom_comes_back(bench: Bench, fate: str) -> None:
    """A chain of grants, which the catalog does not hold in the order in which they can be given."""
    server, name, roles = bench.postgres.server, bench.name, ("grants_a", "grants_b", "grants_c")
    server.psql("".join(f"DROP ROLE IF EXISTS {role}; CREATE ROLE {role};" for role in roles))
    a, b, c = roles
    server.psql(f"GRANT CREATE ON DATABASE {name} TO {a}, {b} WITH GRANT OPTION")
    server.psql(f"SET ROLE {b}; GRANT CREATE ON DATABASE {name} TO {c} WITH GRANT OPTION")
    server.psql(f"SET ROLE {c}; GRANT CREATE ON DATABASE {name} TO pg_monitor")
    server.psql(f"SET ROLE {a}; GRANT CREATE ON DATABASE {name} TO {b} WITH GRANT OPTION")
    server.psql(f"REVOKE CREATE ON DATABASE {name} FROM {b}")
    before = grants(bench)
    assert len(before) > 6
    file = bench.backup().filename
    if fate == "gone":
        server.psql(f"DROP DATABASE {name}")
    bench.restore(file)
    assert grants(bench) == before
    drop_what_restores_left(bench)
    server.psql(f"DROP DATABASE {name}; " + "".join(f"DROP ROLE {role};" for role in roles))


def test_a_grant_that_our_role_cannot_give_again_is_told_and_ends_no_restore(
    newest_postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = newest_postgres.server, newest_postgres.database()
    name = newest_postgres.database_name(url)
    server.psql(
        f"""
        DROP ROLE IF EXISTS giver; DROP ROLE IF EXISTS getter; DROP ROLE IF EXISTS plain_one;
        CREATE ROLE giver; CREATE ROLE getter; CREATE ROLE plain_one LOGIN CREATEDB;
        ALTER DATABASE {name} OWNER TO plain_one;
        GRANT CREATE ON DATABASE {name} TO giver WITH GRANT OPTION;
        SET ROLE giver; GRANT CREATE ON DATABASE {name} TO getter;
        """
    )
    server.psql("SET ROLE plain_one; CREATE TABLE t AS SELECT 42 AS n", name)
    bench = make_bench(newest_postgres, url, tmp_path / "storage", monkeypatch)
    file = bench.backup().filename
    monkeypatch.setenv("DATABASE_URL", url.replace("kanbu@", "plain_one@"))
    bench = replace(bench, settings=load_settings())
    assert "Not granted again: CREATE to getter, by giver." in bench.plan(file).warnings
    bench.restore(file)
    assert bench.sql("SELECT n FROM t") == "42\n"
    drop_what_restores_left(bench)
    server.psql(f"DROP DATABASE {name}; DROP ROLE giver; DROP ROLE getter; DROP ROLE plain_one")


@pytest.mark.parametrize("membership", ["WITH SET FALSE", "WITH INHERIT FALSE"])
def test_a_membership_that_gives_too_little_is_known_beforehand(
    newest_postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str
) -> None:
    """Since PostgreSQL 16, who creates a role is its member, and can neither act as it nor has its rights."""
    if newest_postgres.major < 16:
        pytest.skip("memberships have no such options before PostgreSQL 16")
    server, url = newest_postgres.server, newest_postgres.database()
    name = newest_postgres.database_name(url)
    server.psql("DROP ROLE IF EXISTS little; DROP ROLE IF EXISTS whole")
    server.psql(f"CREATE ROLE whole; CREATE ROLE little LOGIN CREATEDB; GRANT whole TO little {membership}")
    server.psql(f"ALTER DATABASE {name} OWNER TO whole; DROP SCHEMA public", name)
    server.psql("CREATE SCHEMA mine AUTHORIZATION little; SET ROLE little; CREATE TABLE mine.t AS SELECT 42 AS n", name)
    file = make_bench(newest_postgres, url, tmp_path / "storage", monkeypatch).backup().filename
    bench = make_bench(newest_postgres, url.replace("kanbu@", "little@"), tmp_path / "storage", monkeypatch)
    request = RestoreRequest(file, confirm_overwrite=True, confirm_target=name)
    with pytest.raises(RestoreError) as refused:
        plan_restore(request, bench.settings, bench.storage, bench.keys)
    assert refused.value.tried == (f"the role little does not own {name}, which whole does",)
    server.psql(f"DROP DATABASE {name}")
    plan = plan_restore(request, bench.settings, bench.storage, bench.keys)
    assert "The owner was whole, and will be little: little may not act as that role." in plan.warnings
    load_staging(plan, bench.settings, bench.storage, bench.keys)
    swap_in(plan, bench.settings)
    assert server.psql("SELECT n FROM mine.t", name) == "42\n"
    server.psql(f"DROP DATABASE {name}; DROP ROLE little; DROP ROLE whole")


def test_roles_that_only_another_version_has_are_not_created(bench: Bench) -> None:
    bench.postgres.server.psql(f"GRANT CONNECT ON DATABASE {bench.name} TO pg_monitor")
    file = bench.backup().filename
    sidecar = Path(bench.storage.path(file) + ".manifest.json")
    sidecar.write_text(sidecar.read_text().replace("pg_monitor", "pg_of_the_future"))
    bench.postgres.server.psql(f"DROP DATABASE {bench.name}")
    plan = bench.plan(file, create_missing_roles=True)
    assert plan.missing_roles == ()
    assert "Not granted again: CONNECT to pg_of_the_future, by kanbu." in plan.warnings


def test_a_name_that_would_be_cut_off_is_refused(bench: Bench) -> None:
    file = bench.backup().filename
    long = "n" * 64
    with pytest.raises(RestoreError, match="longer than a database's name can be, 63 bytes"):
        bench.plan(file, target_database=long, confirm_target=long)


def test_a_question_is_unhindered_and_leaves_nothing_behind_in_its_session(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a pooler, the session is the next one's."""
    bench.sql(f"ALTER DATABASE {bench.name} SET statement_timeout TO '7s'")
    bench.sql(f"ALTER DATABASE {bench.name} SET role TO pg_monitor")
    access = find_method(bench.settings).access
    sql = "SELECT current_setting('statement_timeout') AS timeout, current_user::text AS who"
    assert query(access, bench.settings, sql) == [{"timeout": "0", "who": "kanbu"}]
    # What a session that goes on finds: psql's next command, after the one transaction of the question.
    process = LocalProcess.__init__

    def go_on(self: LocalProcess, command: Any, environment: Any, **options: Any) -> None:
        process(self, [word for word in command if word != "--single-transaction"], environment, **options)

    monkeypatch.setattr(LocalProcess, "__init__", go_on)
    assert query(access, bench.settings, sql) == [{"timeout": "7s", "who": "pg_monitor"}]

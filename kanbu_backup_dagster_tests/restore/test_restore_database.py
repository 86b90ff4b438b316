"""Restores on real servers: what comes back, what is refused, and that a failure changes nothing."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.keys import derive_key
from kanbu_backup_dagster.backup.manifest import Verification, VerificationStatus
from kanbu_backup_dagster.backup.stages import encrypt
from kanbu_backup_dagster.errors import (
    BackupNotFoundError,
    CorruptBackupError,
    EncryptionKeyError,
    KanbuError,
    RestoreError,
)
from kanbu_backup_dagster.restore.database import abandon, check_staging, load_staging, swap_in
from kanbu_backup_dagster.restore.plan import RestoreRequest, plan_restore
from kanbu_backup_dagster.restore.server import knows_restrict, open_server
from kanbu_backup_dagster.restore.staging import drop_leftovers, staging_prefix
from kanbu_backup_dagster.restore.swap import drop_replaced, find_replaced
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster.sources.clients import find_clients
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest
from kanbu_backup_dagster_tests.restore.conftest import Bench, drop_what_restores_left, in_each_mode, make_bench


def test_everything_comes_back_to_the_byte(full_bench: Bench) -> None:
    before = full_bench.dump()
    file = full_bench.backup().filename
    full_bench.sql('DROP SCHEMA board CASCADE; DROP SCHEMA "Schema with ""quotes"" and spaces" CASCADE')
    assert full_bench.dump() != before
    full_bench.restore(file)
    assert full_bench.dump() == before
    # Statistics, which no dump carries, were gathered too.
    assert full_bench.sql("SELECT count(*) > 0 FROM pg_stats WHERE schemaname = 'board'") == "t\n"
    # And once more, from a backup of what was restored.
    full_bench.restore(full_bench.backup().filename)
    assert full_bench.dump() == before


def test_sql_ascii_with_bytes_that_are_no_utf8_comes_back(
    postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.database()
    name = postgres.database_name(url)
    postgres.server.psql(
        f"DROP DATABASE {name}; CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'"
    )
    bench = make_bench(postgres, url, tmp_path / "storage", monkeypatch)
    bench.sql("CREATE TABLE t (x text); INSERT INTO t VALUES (E'caf\\xe9 \\xff\\xfe'), ('plain')")
    before = bench.dump()
    assert b"caf\xe9 \xff\xfe" in before
    bench.restore(bench.backup().filename)
    assert bench.dump() == before
    # A new database has the dump's encoding, though the server's default is another.
    other = f"{name}_new"
    bench.restore(bench.backup().filename, target_database=other, confirm_target=other)
    assert bench.sql("SHOW server_encoding", other) == "SQL_ASCII\n"
    drop_what_restores_left(bench)


def test_names_of_another_encoding_and_a_database_set_read_only_are_no_hindrance(
    newest_postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = newest_postgres.database()
    name = newest_postgres.database_name(url)
    newest_postgres.server.psql(
        f"DROP DATABASE {name}; CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"
    )
    bench = make_bench(newest_postgres, url, tmp_path / "storage", monkeypatch)
    bench.sql('CREATE TABLE "Gerät" (n serial); INSERT INTO "Gerät" DEFAULT VALUES; CREATE TABLE plain (x text)')
    bench.sql("INSERT INTO plain VALUES ('Größe')")
    bench.sql(f"ALTER DATABASE {name} SET default_transaction_read_only TO on")
    before = bench.dump()
    bench.restore(bench.backup().filename)
    assert bench.dump() == before
    drop_what_restores_left(bench)


def test_a_dump_by_the_newest_client_restores_to_every_server(
    postgres: PostgresForTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = max(find_clients(), key=lambda clients: clients.major)
    bench = make_bench(postgres, postgres.sample_database(), tmp_path / "storage", monkeypatch)
    before = bench.dump()
    # The newest client only, as on a machine that has no other.
    monkeypatch.setattr("kanbu_backup_dagster.sources.clients.find_clients", lambda: [newest])
    monkeypatch.setattr("kanbu_backup_dagster.sources.postgres.find_clients", lambda: [newest])
    manifest = bench.backup()
    assert manifest.database is not None
    assert manifest.database.pg_dump_version == newest.version
    plan = bench.plan(manifest.filename)
    loaded = load_staging(plan, bench.settings, bench.storage, bench.keys)
    check_staging(plan, bench.settings, bench.storage, bench.keys, loaded)
    swap_in(plan, bench.settings)
    assert bench.dump() == before
    if newest.major >= 17 > postgres.major:
        assert any("transaction_timeout" in statement for statement in loaded.left_out)
    drop_what_restores_left(bench)


@in_each_mode
def test_the_replaced_database_is_kept_until_a_later_backup_is_verified(bench: Bench) -> None:
    manifest = bench.backup()
    bench.sql("CREATE TABLE written_after_the_backup (n integer); INSERT INTO written_after_the_backup VALUES (42)")
    swapped = bench.restore(manifest.filename)
    assert swapped.replaced is not None
    assert bench.sql("SELECT n FROM written_after_the_backup", swapped.replaced) == "42\n"
    server, _ = open_server(bench.settings)
    [entry] = [entry for entry in find_replaced(server.access, bench.settings) if entry.target == bench.name]
    assert (entry.name, entry.by) == (swapped.replaced, manifest.filename)
    # A backup from before the swap says nothing of what is there now.
    assert drop_replaced(server.access, bench.settings, bench.name, before=manifest.created_at) == []
    later = bench.backup()
    assert drop_replaced(server.access, bench.settings, bench.name, before=later.created_at)
    assert bench.databases() == {bench.name}


def test_a_replaced_database_that_was_given_another_name_is_left_alone(bench: Bench) -> None:
    swapped = bench.restore(bench.backup().filename)
    rescued = f"{bench.name}_rescued"
    bench.postgres.server.psql(f"ALTER DATABASE {swapped.replaced} RENAME TO {rescued}")
    server, _ = open_server(bench.settings)
    assert drop_replaced(server.access, bench.settings, bench.name, before=bench.backup().created_at) == []
    assert rescued in bench.databases()


BAD_DUMPS = (
    (b"CREATE TABLE t (n integer);\n\\! touch {planted}\n", "commands are restricted"),
    (b"CREATE TABLE t (n integer);\n\\o |touch {planted}\n", "commands are restricted"),
    (b"\\unrestrict x\n\\! touch {planted}\n", "commands are restricted"),
    (b"CREATE TABLE t (n integer);\n\\copy t from program 'touch {planted}'\n", "commands are restricted"),
    (b"\\connect postgres\n", "commands are restricted"),
    (b"DROP DATABASE kanbu;\n", "by itself"),
    (b"SELECT 1;\nSELECT 1;\n\nSELEKT 1;\n", 'line 4 of the dump: ERROR:  syntax error at or near "SELEKT"'),
    (b"CREATE TABLE t (n integer);\nCOPY t (n) FROM stdin;\n1\nx\n\\.\n", "COPY t, line 2"),
    (b"CREATE TABLE t (n integer);\nCOPY t (n) FROM stdin;\n1\n", "not whole"),
    (b"CREATE TABLE t (n integer);\n", "its last line is not"),
    (b"\n--\n-- PostgreSQL database dump complete\n--\n", "holds no table"),
)


def test_a_bad_dump_runs_nothing_and_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    before = bench.dump()
    for content, says in BAD_DUMPS:
        with pytest.raises(KanbuError) as refused:
            bench.restore(bench.legacy(content.replace(b"{planted}", bytes(planted))))
        assert says in str(refused.value)
        assert not planted.exists()
        assert bench.databases() == {bench.name}
    assert bench.dump() == before


@pytest.mark.parametrize("name", ["kanbu_backup_2026-01-01T00-00-00.sql", "kanbu_backup_2026-01-01T00-00-00.sql.gz"])
def test_older_files_without_manifest_are_restored_with_a_warning(bench: Bench, name: str) -> None:
    dump = subprocess.run(
        [bench.postgres.bin_folder / "pg_dump", "-d", bench.url], check=True, capture_output=True
    ).stdout
    before = bench.dump()
    file = bench.legacy(gzip.compress(dump) if name.endswith(".gz") else dump, name)
    plan = bench.plan(file)
    assert any("no manifest" in warning for warning in plan.warnings)
    bench.restore(file)
    assert bench.dump() == before


def test_older_encrypted_files_need_force_and_their_key(sealed_bench: Bench) -> None:
    dump = b"CREATE TABLE t (n integer);\n\n--\n-- PostgreSQL database dump complete\n--\n\n"
    key = derive_key("a key for tests")
    file = sealed_bench.legacy(b"".join(encrypt(iter([dump]), key)), "kanbu_backup_2026-01-01T00-00-00.sql.enc")
    with pytest.raises(RestoreError, match="without force"):
        sealed_bench.plan(file)
    sealed_bench.restore(file, force=True)
    assert sealed_bench.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == "t\n"


def test_with_a_key_set_an_unencrypted_backup_needs_force(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = bench.backup().filename
    monkeypatch.setenv("BACKUP_ENCRYPTION_KEY", "set later")
    later = make_bench(bench.postgres, bench.url, bench.storage_folder, monkeypatch)
    with pytest.raises(RestoreError, match="not encrypted, although a key is set"):
        later.plan(file)
    later.restore(file, force=True)


def test_without_the_key_or_with_another_nothing_begins(sealed_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sealed_bench.backup().filename
    for key, says in (("another key", "was encrypted with key"), ("", "^Encryption key not set")):
        monkeypatch.setenv("BACKUP_ENCRYPTION_KEY", key)
        other = make_bench(sealed_bench.postgres, sealed_bench.url, sealed_bench.storage_folder, monkeypatch)
        with pytest.raises(EncryptionKeyError, match=says):
            other.plan(file)


def test_a_flipped_byte_is_a_checksum_mismatch(bench: Bench, sealed_bench: Bench) -> None:
    for made in (bench, sealed_bench):
        file = made.backup().filename
        path = made.storage_folder / file
        whole = path.read_bytes()
        for place in (20, len(whole) // 2, len(whole) - 3):
            flipped = bytearray(whole)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            with pytest.raises(CorruptBackupError, match=r"^Checksum mismatch"):
                made.restore(file)
        assert not any(name.startswith("kanbu_staging_") for name in made.databases())


def test_a_file_cut_short_is_refused_at_once(bench: Bench) -> None:
    file = bench.backup().filename
    path = bench.storage_folder / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptBackupError, match=r"^Checksum mismatch"):
        bench.plan(file)


def test_what_changes_between_the_passes_is_never_swapped_in(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = b"CREATE TABLE t (n integer);\n\n--\n-- PostgreSQL database dump complete\n--\n\n"
    file = bench.legacy(dump)
    before = bench.dump()
    from kanbu_backup_dagster.restore import database as steps

    proven = steps.prove

    def then_replaced(*arguments: object, **options: object) -> str:
        found = proven(*arguments, **options)  # type: ignore[arg-type]
        bench.legacy(dump.replace(b"integer", b"text"))
        return found

    monkeypatch.setattr(steps, "prove", then_replaced)
    with pytest.raises(CorruptBackupError, match="changed while it was being read"):
        bench.restore(file)
    assert bench.databases() == {bench.name}
    assert bench.dump() == before


@in_each_mode
def test_a_missing_row_is_found_before_the_swap(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bench.backup().filename
    before = bench.dump()
    plan = bench.plan(file)
    loaded = load_staging(plan, bench.settings, bench.storage, bench.keys)
    table = bench.sql(
        "SELECT format('%I', relname) FROM pg_stat_user_tables WHERE n_live_tup > 50 ORDER BY 1 LIMIT 1", plan.staging
    ).strip()
    bench.sql(f"DELETE FROM {table} WHERE ctid = (SELECT min(ctid) FROM {table})", plan.staging)
    with pytest.raises(RestoreError, match="not what was backed up") as failed:
        check_staging(plan, bench.settings, bench.storage, bench.keys, loaded)
    assert any("rows, and the backup" in problem for problem in failed.value.tried)
    abandon(plan, bench.settings)
    assert bench.dump() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'by_n'::regclass",
            r"the index by_n is not valid",
        ),
        ("DROP TABLE numbered", r"public\.numbered is missing\n  - there are \d+ tables, and the backup has \d+"),
        ("INSERT INTO numbered VALUES (11)", r"public\.numbered has 11 rows, and the backup 10"),
    ],
)
def test_what_is_not_as_it_was_backed_up_fails_the_restore(bench: Bench, change: str, told: str) -> None:
    bench.sql("CREATE TABLE numbered AS SELECT generate_series(1, 10) AS n; CREATE INDEX by_n ON numbered (n)")
    file = bench.backup().filename
    plan = bench.plan(file)
    loaded = load_staging(plan, bench.settings, bench.storage, bench.keys)
    bench.sql(change, plan.staging)
    with pytest.raises(RestoreError, match=rf"^What was restored is not what was backed up\.\n  - {told}$"):
        check_staging(plan, bench.settings, bench.storage, bench.keys, loaded)
    abandon(plan, bench.settings)


def test_a_file_that_failed_its_last_verification_needs_force(bench: Bench) -> None:
    file = bench.backup().filename
    before = bench.dump()
    catalog = Catalog(bench.storage, bench.keys)
    failed = Verification(status=VerificationStatus.FAILED, at=datetime.now(timezone.utc), detail="a bad cable")
    assert catalog.record_verdict(catalog.get(file), failed)
    with pytest.raises(RestoreError, match="is not restored without force: it failed its last verification"):
        bench.restore(file)
    bench.sql("CREATE TABLE newer (n integer)")
    # The file itself is as it was written, which loading proves.
    bench.restore(file, force=True)
    assert bench.dump() == before


def test_what_a_user_should_know_of_the_file_is_told_first(bench: Bench) -> None:
    now = datetime.now(timezone.utc)
    older = [
        bench.legacy(b"SELECT 1;\n", f"kanbu_backup_{now - timedelta(days=days):%Y-%m-%dT%H-%M-%S}.sql")
        for days in (40, 30)
    ]
    newest = bench.backup().filename
    assert bench.plan(newest).warnings == (f"{newest} was not verified yet; it is now, before it is used.",)
    catalog = Catalog(bench.storage, bench.keys)
    catalog.record_verdict(catalog.get(newest), Verification(status=VerificationStatus.VERIFIED, at=now))
    assert bench.plan(newest).warnings == ()
    for file, age in zip(older, ([f"{older[0]} is 40 days old."], []), strict=True):
        _, *warnings = bench.plan(file).warnings
        assert warnings == [f"There is a newer backup: {newest}.", *age]


def test_names_that_are_no_backup_and_backups_of_sources_are_refused(bench: Bench) -> None:
    bench.storage.prepare()
    for name in ("kanbu_backup_2026-01-01T00-00-00.sql.gz", "../../etc/passwd"):
        with pytest.raises(BackupNotFoundError, match=r"^Backup file not found"):
            bench.plan(name)
    source = bench.legacy(b"x", "kanbu_source_2026-01-01T00-00-00.tar.gz")
    with pytest.raises(RestoreError, match="source backup"):
        bench.plan(source)


def test_both_confirmations_are_needed(bench: Bench) -> None:
    file = bench.backup().filename
    with pytest.raises(RestoreError, match="This will overwrite the current database"):
        bench.plan(file, confirm_overwrite=False)
    for wrong in ("", "kanbu", bench.name.upper()):
        with pytest.raises(RestoreError, match="Not confirmed"):
            bench.plan(file, confirm_target=wrong)


@in_each_mode
def test_missing_roles_are_named_and_can_be_created(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server = bench.postgres.server
    server.psql("CREATE ROLE gone_tomorrow")
    bench.sql("CREATE TABLE owned (n integer); ALTER TABLE owned OWNER TO gone_tomorrow")
    file = bench.backup().filename
    bench.sql("DROP TABLE owned")
    server.psql("DROP ROLE gone_tomorrow")
    with pytest.raises(RestoreError, match="cannot be restored") as refused:
        bench.plan(file)
    assert any("gone_tomorrow" in problem for problem in refused.value.tried)
    bench.restore(file, create_missing_roles=True)
    assert server.psql("SELECT rolcanlogin FROM pg_roles WHERE rolname = 'gone_tomorrow'") == "f\n"
    bench.sql("DROP TABLE owned")
    for name in bench.databases():
        server.psql("DROP OWNED BY gone_tomorrow", name)
    server.psql("DROP ROLE gone_tomorrow")


def test_too_little_room_and_an_extension_that_is_not_to_be_had_are_told_before_anything_is_done(bench: Bench) -> None:
    manifest = bench.backup()
    assert manifest.database is not None
    extensions = {"plpgsql": "1.0", "no_such_extension": "2.3"}
    needs = manifest.database.model_copy(update={"size_bytes": 1 << 60, "extensions": extensions})
    told = manifest.model_copy(update={"database": needs}).to_json(None)
    assert bench.storage.replace_sidecar(manifest.filename, told)
    before = bench.databases()
    with pytest.raises(RestoreError, match="cannot be restored") as refused:
        bench.plan(manifest.filename)
    extension, room = refused.value.tried
    assert extension == "extensions that the backup needs are not installed: no_such_extension"
    assert "bytes free in" in room
    assert f"needs about {1 << 60:,}" in room
    assert bench.databases() == before


def test_a_role_that_may_not_do_it_is_told_before_anything_is_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bench.backup().filename
    bench.postgres.server.psql("DROP ROLE IF EXISTS weak; CREATE ROLE weak LOGIN")
    monkeypatch.setenv("DATABASE_URL", bench.url.replace("kanbu@", "weak@"))
    request = RestoreRequest(file, confirm_overwrite=True, confirm_target=bench.name)
    with pytest.raises(RestoreError) as refused:
        plan_restore(request, load_settings(), bench.storage, bench.keys)
    assert any("may not create databases" in problem for problem in refused.value.tried)
    assert any("does not own" in problem for problem in refused.value.tried)


@in_each_mode
def test_an_owner_without_superuser_restores_its_own_database(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server = bench.postgres.server
    server.psql("DROP ROLE IF EXISTS plain_owner; CREATE ROLE plain_owner LOGIN CREATEDB")
    name = f"{bench.name}_of_plain_owner"
    server.psql(f"CREATE DATABASE {name} OWNER plain_owner")
    url = bench.url.replace("kanbu@", "plain_owner@").replace(bench.name, name)
    own = make_bench(bench.postgres, url, bench.storage_folder, monkeypatch)
    server.psql("SET ROLE plain_owner; CREATE TABLE mine (n integer); INSERT INTO mine VALUES (1), (2)", name)
    file = own.backup().filename
    server.psql("DELETE FROM mine", name)
    plan = plan_restore(
        RestoreRequest(file, confirm_overwrite=True, confirm_target=name), own.settings, own.storage, own.keys
    )
    loaded = load_staging(plan, own.settings, own.storage, own.keys)
    check_staging(plan, own.settings, own.storage, own.keys, loaded)
    swapped = swap_in(plan, own.settings)
    assert server.psql("SELECT count(*) FROM mine", name) == "2\n"
    assert swapped.replaced is not None
    server.psql(f"DROP DATABASE {name}; DROP DATABASE {swapped.replaced}; DROP ROLE plain_owner")


@in_each_mode
def test_what_a_killed_restore_left_is_removed_by_the_next(bench: Bench) -> None:
    file = bench.backup().filename
    left = staging_prefix(bench.name) + "00000000"
    others = staging_prefix("some other database") + "00000000"
    for name in (left, others):
        bench.postgres.server.psql(f"CREATE DATABASE {name}")
    told: list[str] = []
    plan = bench.plan(file)
    load_staging(plan, bench.settings, bench.storage, bench.keys, tell=told.append)
    assert any(left in line for line in told)
    assert others in bench.databases()
    abandon(plan, bench.settings)
    bench.postgres.server.psql(f"DROP DATABASE {others}")
    assert drop_leftovers(plan.server, bench.settings, bench.name) == []


@pytest.mark.parametrize(
    ("version", "knows"),
    {
        "13.21": False,
        "14.19": True,
        "15.13": False,
        "15.14": True,
        "16.10": True,
        "17.5": False,
        "17.6": True,
        "18beta3": True,
        "18.0": True,
        "19.1": True,
        "12.22": False,
        "": False,
    }.items(),
)
def test_a_psql_that_cannot_be_restricted_is_known_by_its_version(version: str, knows: bool) -> None:
    assert knows_restrict(version) is knows


def test_a_psql_too_old_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bench.backup().filename
    monkeypatch.setattr("kanbu_backup_dagster.restore.plan.knows_restrict", lambda version: False)
    with pytest.raises(RestoreError) as refused:
        bench.plan(file)
    assert any("too old" in problem for problem in refused.value.tried)


def test_a_folder_elsewhere_is_read_in_place_of_the_storage(bench: Bench, tmp_path: Path) -> None:
    file = bench.backup().filename
    rescued = tmp_path / "rescued"
    shutil.move(bench.storage_folder, rescued)
    other = f"{bench.name}_elsewhere"
    bench.restore(file, folder=str(rescued), target_database=other, confirm_target=other)
    assert other in bench.databases()

"""Direct and docker mode differ in one thing only: the same tests on both."""

from __future__ import annotations

import os
import pickle

import pytest

from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster.sources.commands import execute, query
from kanbu_backup_dagster.sources.postgres import find_method, inspect_database, prepare_dump
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

ODD_ROWS = """
CREATE TABLE odd (id int, "Größe; --" text);
INSERT INTO odd VALUES (1, E'line\\nbreak'), (2, E'\\\\.'), (3, NULL), (4, 'ünïcødé ''quoted''');
"""


@pytest.fixture
def database(each_mode: PostgresForTest, monkeypatch: pytest.MonkeyPatch) -> str:
    url = each_mode.database(ODD_ROWS)
    monkeypatch.setenv("DATABASE_URL", url)
    return url


def test_the_dump_is_the_servers_own(each_mode: PostgresForTest, database: str) -> None:
    settings = load_settings()
    dump, method = prepare_dump(settings)
    assert method.rejected == ()
    opened = pickle.loads(pickle.dumps(dump)).open(settings)
    text = b"".join(opened.chunks()).decode()
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith(("\\restrict", "\\unrestrict"))]
    assert "".join(lines) == each_mode.dump(database)
    facts = opened.findings()
    assert facts.rows == {"public.odd": 4}
    assert facts.name == each_mode.database_name(database)
    assert facts.mode == method.access.mode == os.environ["BACKUP_PG_MODE"]
    assert facts.server_version == each_mode.version


def test_the_server_is_asked(each_mode: PostgresForTest, database: str) -> None:
    settings = load_settings()
    access = find_method(settings).access
    rows = query(access, settings, 'SELECT id, "Größe; --" AS size FROM odd ORDER BY id')
    assert [row["size"] for row in rows] == ["line\nbreak", "\\.", None, "ünïcødé 'quoted'"]
    with pytest.raises(SourceError, match="no_such_table"):
        query(access, settings, "SELECT 1 FROM no_such_table")
    assert inspect_database(access, settings, database="postgres").name == "postgres"


def test_input_is_fed_and_ended(each_mode: PostgresForTest, database: str) -> None:
    """More than any buffer on the way holds, in both directions at once."""
    settings = load_settings()
    access = find_method(settings).access
    count = 60_000
    data = "".join(f"{number}\t{'x' * 50}\n" for number in range(count))
    script = f"CREATE TABLE fed (id int, t text);\nCOPY fed FROM stdin;\n{data}\\.\n"
    noise = "".join(f"SELECT repeat('y', 1000) || {number};\n" for number in range(3000))
    printed = execute(access, settings, script + noise + "SELECT count(*) FROM fed;\n")
    lines = printed.splitlines()
    assert lines[-1] == str(count)
    assert len(lines) == 3001
    assert each_mode.query(database, "SELECT count(*), min(length(t)) FROM fed") == [[str(count), "50"]]


def test_a_refused_statement_ends_the_script(each_mode: PostgresForTest, database: str) -> None:
    settings = load_settings()
    access = find_method(settings).access
    filler = f"-- {'z' * 1000}\n" * 10_000
    with pytest.raises(SourceError, match="no_such_table"):
        execute(access, settings, "DROP TABLE no_such_table;\n" + filler + "CREATE TABLE afterwards (id int);\n")
    assert each_mode.query(database, "SELECT count(*) FROM pg_tables WHERE tablename = 'afterwards'") == [["0"]]


def test_a_wrong_database_is_a_clear_error(each_mode: PostgresForTest, monkeypatch: pytest.MonkeyPatch) -> None:
    url = each_mode.database().replace("/test_", "/no_such_", 1)
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(SourceError, match=r'database "no_such_\w+" does not exist'):
        find_method(load_settings())

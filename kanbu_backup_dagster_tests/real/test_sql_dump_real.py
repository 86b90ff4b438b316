"""The dump reader on what real pg_dumps write, against what the server counts and what real psqls accept."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.sql_dump import DumpScanner, PsqlInputFilter
from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.sources.server_binaries import find_server_binaries
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

TRICKY = r"""
CREATE TABLE "Task" (id serial PRIMARY KEY, title text DEFAULT 'it''s; \', "from stdin;" text DEFAULT E'\\''"');
INSERT INTO "Task" (title) SELECT 'row ' || i FROM generate_series(1, 1234) i;
CREATE TABLE empty_one (a int);
CREATE TABLE no_columns ();
INSERT INTO no_columns SELECT FROM generate_series(1, 3);
CREATE TABLE "select" ("copy" text);
INSERT INTO "select" VALUES ('x'), (NULL);
CREATE TABLE "a""b;
\.
-- PostgreSQL database dump complete
" ("b
""c;" text, "(" text, ")" text);
INSERT INTO "a""b;
\.
-- PostgreSQL database dump complete
" SELECT 'x', '(', ')' FROM generate_series(1, 7);
CREATE TABLE "'$$
COPY x (a) FROM stdin;
/*" ();
CREATE TABLE lines (body text);
INSERT INTO lines VALUES ('-- PostgreSQL database dump complete'), ('COPY public.lines (body) FROM stdin;'), ('\.'),
    (E'\n\\.\n'), (E'\\\\.'), ('\restrict x'), (''), (NULL), (E'a\tb\r\n'), ('$$'), (''''), ('"'), ('/*'), ('ü€漢');
INSERT INTO lines SELECT repeat('long \. ', 400000);
CREATE TABLE parted (k int, v text) PARTITION BY LIST (k);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1);
CREATE TABLE parted_2 PARTITION OF parted FOR VALUES IN (2);
INSERT INTO parted SELECT 1 + (i > 10)::int, 'v' FROM generate_series(1, 50) i;
CREATE TABLE parent (a int);
CREATE TABLE child (b int) INHERITS (parent);
INSERT INTO parent VALUES (1);
INSERT INTO child VALUES (1, 2), (3, 4);
CREATE TABLE generated (a int, b int GENERATED ALWAYS AS (a * 2) STORED);
INSERT INTO generated VALUES (1), (2);
CREATE FUNCTION fake() RETURNS text LANGUAGE plpgsql AS $_$
BEGIN
    -- it's a quote; $$ and "
    RETURN '
COPY public.lines (body) FROM stdin;
not data
\.
-- PostgreSQL database dump complete
' || E'\'' || $$ ; $$;
END $_$;
CREATE FUNCTION atomic(a int) RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT a; SELECT a + 1; END;
CREATE RULE two AS ON INSERT TO empty_one DO ALSO (SELECT ';'; SELECT '''');
COMMENT ON TABLE lines IS 'it''s
COPY public.lines (body) FROM stdin;
\.
/* "
';
COMMENT ON FUNCTION fake() IS E'\\';
CREATE VIEW busy AS SELECT '$a$' AS a, 2 - -1 AS b, 'x' || E'\\' AS c, jsonb '{"a": 1}' -> 'a' AS d FROM lines;
CREATE MATERIALIZED VIEW stored AS SELECT count(*) FROM lines;
SELECT lo_from_bytea(0, decode(repeat('27225c24', 20000), 'hex'));
SELECT lo_from_bytea(0, '');
"""

TABLES = """
SELECT encode(convert_to(quote_ident(n.nspname) || '.' || quote_ident(c.relname), 'UTF8'), 'hex')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND n.nspname = 'public'
"""


def pg_dump(folder: Path, url: str, *arguments: str, options: str = "") -> bytes:
    environment = os.environ | ({"PGOPTIONS": options} if options else {})
    return subprocess.run(
        [folder / "pg_dump", *arguments, "-d", url], check=True, capture_output=True, env=environment
    ).stdout


def without_what_is_anew_each_time(dump: bytes) -> bytes:
    dump = re.sub(rb"pg_attver=\d+", b"", dump)
    return b"".join(
        line for line in dump.splitlines(keepends=True) if not line.startswith((b"\\restrict ", b"\\unrestrict "))
    )


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        pytest.param([], "", id="plain"),
        pytest.param(["--create", "--clean", "--if-exists", "--verbose"], "", id="create"),
        pytest.param(["--disable-dollar-quoting"], "", id="no dollar quotes"),
        pytest.param([], "-c standard_conforming_strings=off", id="old strings"),
        pytest.param(["--disable-dollar-quoting"], "-c standard_conforming_strings=off", id="old strings only"),
    ],
)
def test_the_dump_holds_the_rows_that_the_server_counts(
    postgres: PostgresForTest, arguments: list[str], options: str
) -> None:
    url = postgres.database(TRICKY)
    tables = [bytes.fromhex(row[0]).decode() for row in postgres.query(url, TABLES)]
    counted = {table: int(postgres.query(url, f"SELECT count(*) FROM ONLY {table}")[0][0]) for table in tables}
    assert len(counted) == 12
    dump = pg_dump(postgres.bin_folder, url, *arguments, options=options)

    for size in (len(dump), 1 << 20, 8192, 4093):
        scanner = DumpScanner()
        for start in range(0, len(dump), size):
            scanner.feed(dump[start : start + size])
        found = scanner.finish()
        assert found.rows == counted
        assert found.server_version is not None
        assert found.server_version.split()[0] == postgres.version
        assert found.pg_dump_version is not None
        assert found.pg_dump_version.split()[0] == postgres.version

    for end in (len(dump) // 3, dump.index(b"\n\\.\n"), dump.rindex(b"-- PostgreSQL database dump complete")):
        scanner = DumpScanner()
        scanner.feed(dump[:end])
        with pytest.raises(SourceError, match="not whole"):
            scanner.finish()


def through_filter(dump: bytes, psql_input: PsqlInputFilter) -> bytes:
    return b"".join(psql_input(dump[start : start + 10_000] for start in range(0, len(dump), 10_000)))


def test_a_filtered_dump_of_the_newest_pg_dump_restores_and_errors_keep_their_line(postgres: PostgresForTest) -> None:
    newest = find_server_binaries()[0].bin_folder
    url, target, other_target = postgres.database(TRICKY), postgres.database(), postgres.database()
    known = frozenset(row[0] for row in postgres.query(url, "SELECT name FROM pg_settings"))
    dump = pg_dump(newest, url)
    psql_input = PsqlInputFilter(known)
    passed = through_filter(dump, psql_input)
    if b"SET transaction_timeout = 0;" in dump and postgres.major < 17:
        assert psql_input.left_out == ["SET transaction_timeout = 0;"]
    else:
        assert psql_input.left_out == []
    assert b"\n\\restrict " in dump
    assert passed.count(b"\n\\restrict ") == dump.count(b"\n\\restrict ") - 1

    psql = [
        postgres.bin_folder / "psql",
        "--no-psqlrc",
        "--quiet",
        "--set=ON_ERROR_STOP=1",
        "--file=-",
        f"--output={os.devnull}",
    ]
    subprocess.run([*psql, "-d", target], input=passed, check=True, capture_output=True)
    # Not one comparison of the whole: pytest would take minutes to explain a difference.
    again, first = (without_what_is_anew_each_time(text).splitlines() for text in (pg_dump(newest, target), dump))
    assert [(new, old) for new, old in zip(again, first, strict=True) if new != old] == []

    broken = through_filter(dump + b"SELECT no_such_thing;\n", PsqlInputFilter(known))
    failed = subprocess.run([*psql, "-d", other_target], input=broken, capture_output=True)
    assert failed.returncode == 3
    last_line = dump.count(b"\n") + 1
    assert f":{last_line}: ERROR:" in failed.stderr.decode()

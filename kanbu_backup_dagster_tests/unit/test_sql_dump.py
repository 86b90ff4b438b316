"""The dump reader on dumps written to fool it. What real pg_dumps write is in real/test_sql_dump_real.py."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, field
from itertools import pairwise
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanbu_backup_dagster.backup.sql_dump import DumpFindings, DumpScanner, PsqlInputFilter
from kanbu_backup_dagster.errors import SourceError

HEADER = b"""--
-- PostgreSQL database dump
--

\\restrict 0aZ9

-- Dumped from database version 18.1 (Debian 18.1-1)
-- Dumped by pg_dump version 18.2

SET statement_timeout = 0;
SET transaction_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET row_security = off;

"""
OLD_HEADER = HEADER.replace(b"\\restrict 0aZ9\n\n", b"").replace(b"SET transaction_timeout = 0;\n", b"")
TRAILER = b"""
--
-- PostgreSQL database dump complete
--

\\unrestrict 0aZ9

"""
OLD_TRAILER = TRAILER.replace(b"\\unrestrict 0aZ9\n\n", b"")
TRAILER_LINE = b"-- PostgreSQL database dump complete"
COPY_LINE = b"COPY public.fake (a) FROM stdin;"


def scan(dump: bytes, size: int | None = None) -> DumpFindings:
    scanner = DumpScanner()
    for start in range(0, len(dump), size or len(dump) or 1):
        scanner.feed(dump[start : start + (size or len(dump))])
    return scanner.finish()


def rows(body: bytes, size: int | None = None) -> dict[str, int]:
    return scan(HEADER + body + TRAILER, size).rows


def filtered(dump: bytes, known: frozenset[str], size: int | None = None) -> tuple[bytes, list[str]]:
    psql_input = PsqlInputFilter(known)
    step = size or len(dump) or 1
    out = b"".join(psql_input(dump[start : start + step] for start in range(0, len(dump), step)))
    return out, psql_input.left_out


# Generated dumps, with what they hold

TRICKS = [
    TRAILER_LINE,
    b"\n" + TRAILER_LINE + b"\n",
    COPY_LINE,
    b"\n" + COPY_LINE + b"\n",
    b"\n\\.\n",
    b"\\.",
    b";",
    b";\n",
    b" FROM stdin;",
    b"--",
    b"/*",
    b"*/",
    b"'",
    b"''",
    b'"',
    b"$$",
    b"$_$",
    b"$a$",
    b"$",
    b"E'",
    b"\\",
    b"\\\\",
    b"\n\\restrict abc\n",
    b"\n\\! touch /tmp/x\n",
    b"\n",
    b"\t",
    b"(",
    b")",
    b"x",
    "ü€".encode(),
    b"SET a = 1;",
    b"\nSET standard_conforming_strings = off;\n",
]
nasty = st.lists(st.sampled_from(TRICKS), max_size=6).map(b"".join)


@dataclass
class Generated:
    """A dump and what it holds."""

    standard_strings: bool
    parts: list[bytes] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)

    @property
    def dump(self) -> bytes:
        header = HEADER if self.standard_strings else HEADER.replace(b"strings = on", b"strings = off")
        return header + b"".join(self.parts) + TRAILER


def string(text: bytes, standard: bool, escape: bool = False) -> bytes:
    """A literal as pg_dump's appendStringLiteral writes it."""
    quoted = text.replace(b"'", b"''")
    if escape or not standard:
        quoted = quoted.replace(b"\\", b"\\\\")
    return (b"E'" if escape else b"'") + quoted + b"'"


def identifier(text: bytes) -> bytes:
    return b'"' + text.replace(b'"', b'""') + b'"'


def dollar_quoted(text: bytes) -> bytes:
    """A body as pg_dump's appendStringLiteralDQ writes it: the first delimiter that the text does not hold."""
    delimiter = b"$"
    suffixes = b"_XXXXXXX"
    next_suffix = 0
    while delimiter in text:
        delimiter += suffixes[next_suffix : next_suffix + 1]
        next_suffix = (next_suffix + 1) % len(suffixes)
    return delimiter + b"$" + text + delimiter + b"$"


def copy_field(text: bytes) -> bytes:
    for raw, escaped in ((b"\\", b"\\\\"), (b"\n", b"\\n"), (b"\t", b"\\t"), (b"\r", b"\\r")):
        text = text.replace(raw, escaped)
    return text


@st.composite
def generated_dumps(draw: st.DrawFn) -> Generated:
    made = Generated(standard_strings=draw(st.booleans()))
    literal = nasty.map(lambda text: string(text, made.standard_strings))
    expression = st.one_of(
        literal,
        nasty.map(lambda text: string(text, made.standard_strings, escape=True)),
        nasty.map(identifier),
        nasty.map(dollar_quoted),
        nasty.map(lambda text: b"/* " + text.replace(b"/*", b"").replace(b"*/", b"") + b" /* ' */ */"),
        st.sampled_from([b"a-1", b"a->'x'", b"a/b", b"a$b$c", b"(1)", b"x::text", b"-- it's; \"\n", b"name", b"$1"]),
    )
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["copy", "copy", "statement", "comment", "blob", "function"]))
        if kind == "copy":
            name = draw(st.sampled_from([b"public.t", b"public.u", b'public."T"', None]))
            if name is None:
                name = b"s." + identifier(draw(nasty) + b"n")
            columns = draw(st.sampled_from([b" (id, body) ", b"  "]))
            if columns.strip():
                columns = b" (id, " + identifier(draw(nasty) + b"c") + b") "
            data = draw(st.lists(nasty.map(copy_field), max_size=5))
            made.parts.append(b"COPY " + name + columns + b"FROM stdin;\n" + b"".join(row + b"\n" for row in data))
            made.parts.append(b"\\.\n\n\n")
            key = name.decode()
            made.rows[key] = made.rows.get(key, 0) + len(data)
        elif kind == "statement":
            values = b" ".join(draw(st.lists(expression, max_size=4)))
            made.parts.append(b"ALTER TABLE x " + values + b";\n\n")
        elif kind == "comment":
            name = draw(nasty).replace(b"\n", b" ")
            made.parts.append(b"\n--\n-- Name: " + name + b"; Type: TABLE; Schema: public; Owner: -\n--\n\n")
        elif kind == "blob":
            size = draw(st.sampled_from([0, 1, 100]))
            data = string(b"\\x" + b"61" * size, made.standard_strings)
            made.parts.append(b"SELECT pg_catalog.lowrite(0, " + data + b");\n")
        else:
            body = dollar_quoted(draw(nasty))
            made.parts.append(b"CREATE FUNCTION f() RETURNS text\n    LANGUAGE sql\n    AS " + body + b";\n\n")
    return made


@settings(max_examples=400, deadline=None)
@given(made=generated_dumps(), cuts=st.lists(st.integers(0, 5000), max_size=12))
def test_rows_are_found_whatever_surrounds_them_and_wherever_chunks_end(made: Generated, cuts: list[int]) -> None:
    whole = scan(made.dump)
    assert whole.rows == made.rows
    assert list(whole.rows) == list(made.rows)
    assert scan(made.dump, 1) == whole

    places = sorted({cut % len(made.dump) for cut in cuts} | {0, len(made.dump)})
    scanner = DumpScanner()
    for start, end in pairwise(places):
        scanner.feed(made.dump[start:end])
    assert scanner.finish() == whole


@settings(max_examples=200, deadline=None)
@given(made=generated_dumps(), place=st.integers(0, 10_000))
def test_a_dump_cut_anywhere_before_its_trailer_is_not_whole(made: Generated, place: int) -> None:
    end = made.dump.rindex(TRAILER_LINE) + len(TRAILER_LINE)
    with pytest.raises(SourceError, match="not whole"):
        scan(made.dump[: place % end])


@settings(max_examples=300, deadline=None)
@given(made=generated_dumps(), size=st.integers(1, 300))
def test_the_filter_takes_out_only_its_own_lines_wherever_chunks_end(made: Generated, size: int) -> None:
    known = frozenset({"statement_timeout", "client_encoding", "standard_conforming_strings", "row_security"})
    expected = made.dump.replace(b"\\restrict 0aZ9\n", b"\n", 1).replace(b"SET transaction_timeout = 0;", b"", 1)
    before, after = expected[: -len(TRAILER)], expected[-len(TRAILER) :]
    expected = before + after.replace(b"\\unrestrict 0aZ9\n", b"\n")
    for step in (None, 1, size):
        out, left_out = filtered(made.dump, known, step)
        assert out == expected
        assert left_out == ["SET transaction_timeout = 0;"]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from([*TRICKS, b"COPY t (a) FROM stdin;\n", b"SET a = ", b"SELECT "]), max_size=30))
def test_any_bytes_at_all_are_read_the_same_in_one_chunk_and_in_many(text: list[bytes]) -> None:
    def outcome(dump: bytes, size: int | None) -> object:
        try:
            return scan(dump, size)
        except SourceError as error:
            return error.message

    for dump in (b"".join(text), HEADER + b"SELECT 1;\n" + b"".join(text) + TRAILER):
        assert outcome(dump, 1) == outcome(dump, 7) == outcome(dump, None)
        assert filtered(dump, frozenset(), 1) == filtered(dump, frozenset(), 7) == filtered(dump, frozenset())
        assert filtered(dump, frozenset())[0].count(b"\n") == dump.count(b"\n")


# Particular dumps


@pytest.mark.parametrize("size", [None, 1, 2, 3, 5, 64])
@pytest.mark.parametrize(
    ("header", "trailer", "server"),
    [(HEADER, TRAILER, "18.1 (Debian 18.1-1)"), (OLD_HEADER, OLD_TRAILER, "18.1 (Debian 18.1-1)")],
)
def test_findings_of_new_and_old_formats(header: bytes, trailer: bytes, server: str, size: int | None) -> None:
    body = b"COPY public.b (id) FROM stdin;\n1\n2\n\\.\n\n\nCOPY public.a (id) FROM stdin;\n\\.\n\n"
    found = scan(header + body + trailer, size)
    assert found == DumpFindings({"public.b": 2, "public.a": 0}, server, "18.2")
    assert list(found.rows) == ["public.b", "public.a"]


@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(b"COPY public.t  FROM stdin;\n\n\n\\.\n", {"public.t": 2}, id="no columns"),
        pytest.param(
            b'COPY public."a; ""b\n FROM stdin;" ("(", c) FROM stdin;\n1\t2\n\\.\n',
            {'public."a; ""b\n FROM stdin;"': 1},
            id="name with everything",
        ),
        pytest.param(b"COPY t (a) FROM stdin;\n\\\\.\n\\\\\n\\\\.x\n.\n\\.\n", {"t": 4}, id="rows like the end"),
        pytest.param(
            b"COPY t (a) FROM stdin;\n" + TRAILER_LINE + b"\n" + COPY_LINE + b"\n\\.\n", {"t": 2}, id="rows like lines"
        ),
        pytest.param(b"COPY t (a) FROM stdin;\n1\n\\.\nCOPY t (a) FROM stdin;\n2\n\\.\n", {"t": 2}, id="twice"),
        pytest.param(b"COPY (SELECT 1) TO stdout;\nCOPY t TO stdout;\n", {}, id="not from stdin"),
        pytest.param(b"SELECT $1, a$b$, 'x';\nCOPY t (a) FROM stdin;\n1\n\\.\n", {"t": 1}, id="dollars in names"),
        pytest.param(b"SELECT '\\';\nCOPY t (a) FROM stdin;\n1\n\\.\n", {"t": 1}, id="backslash ends no literal"),
        pytest.param(b"SELECT E'\\'';\nCOPY t (a) FROM stdin;\n1\n\\.\n", {"t": 1}, id="escaped quote"),
        pytest.param(b"SELECT E'a''b\\'" + COPY_LINE + b"';\nCOPY t (a) FROM stdin;\n\\.\n", {"t": 0}, id="both"),
        pytest.param(b"SELECT nameE'\\';\nCOPY t (a) FROM stdin;\n\\.\n", {"t": 0}, id="E at a name's end"),
        pytest.param(b"/* /* ' */ " + COPY_LINE + b" */ COPY t (a) FROM stdin;\n\\.\n", {"t": 0}, id="block comment"),
        pytest.param(b"CREATE TABLE a (\n-- it's\n);\nCOPY t (a) FROM stdin;\n\\.\n", {"t": 0}, id="comment within"),
        pytest.param(b'\\connect "it\'s"\nCOPY t (a) FROM stdin;\n\\.\n', {"t": 0}, id="quote in a meta-command"),
        pytest.param(b"COPY \xe9\xff (a) FROM stdin;\n1\n\\.\n", {"\\xe9\\xff": 1}, id="name not in UTF-8"),
    ],
)
def test_rows(body: bytes, expected: dict[str, int], size: int | None) -> None:
    assert rows(body, size) == expected


def test_a_comment_line_of_any_length_hides_what_it_holds() -> None:
    for length in (4090, 4096, 5000, 3 << 20):
        body = b"-- " + b"x" * length + b"'\nCOPY t (a) FROM stdin;\n1\n\\.\n"
        assert rows(body) == rows(body, 4096) == {"t": 1}


@pytest.mark.parametrize("before", [b"", b"SELECT 1;\n"], ids=["header", "body"])
def test_strings_of_the_old_kind(before: bytes) -> None:
    body = (
        before + b"SET standard_conforming_strings = off;\nSELECT 'it\\'s', '\\\\';\nCOPY t (a) FROM stdin;\n1\n\\.\n"
    )
    assert rows(body) == rows(body, 1) == {"t": 1}


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize(
    ("dump", "place"),
    [
        pytest.param(b"", "last line", id="nothing"),
        pytest.param(HEADER, "last line", id="header only"),
        pytest.param(HEADER + b"COPY t (a) FROM stdin;\n1\n2\n3", "rows of t, after 2", id="in data"),
        pytest.param(HEADER + b"COPY t (a) FROM stdin;\n1\n" + TRAILER, "rows of t", id="trailer in data"),
        pytest.param(HEADER + b"COPY t (a) FROM stdin;", "rows of t, after 0", id="before data"),
        pytest.param(HEADER + b"SELECT $a$" + TRAILER, "a statement", id="trailer in a body"),
        pytest.param(HEADER + b"SELECT '" + TRAILER, "a statement", id="trailer in a literal"),
        pytest.param(HEADER + b'SELECT "' + TRAILER, "a statement", id="trailer in a name"),
        pytest.param(HEADER + b"CREATE TABLE t (" + TRAILER, "a statement", id="trailer in a statement"),
        pytest.param(HEADER + b"/*" + TRAILER, "a comment", id="trailer in a comment"),
        pytest.param(HEADER + TRAILER + b"SELECT 1;\n", "last line", id="statement after it"),
        pytest.param(HEADER + TRAILER + b"-- Name: x\n", "last line", id="comment after it"),
        pytest.param(HEADER + TRAILER + b"\\! ls\n", "last line", id="meta-command after it"),
        pytest.param(HEADER + TRAILER + b"COPY t (a) FROM stdin;\n\\.\n", "last line", id="data after it"),
        pytest.param(HEADER + TRAILER_LINE + b"d\n", "last line", id="a line that begins like it"),
    ],
)
def test_a_dump_that_is_not_whole_says_where_it_ends(dump: bytes, place: str, size: int | None) -> None:
    with pytest.raises(SourceError, match=place) as caught:
        scan(dump, size)
    assert caught.value.advice


def test_a_trimmed_dump_is_whole() -> None:
    assert rows(b"") == scan((HEADER + TRAILER).strip()).rows == scan((OLD_HEADER + OLD_TRAILER).strip()).rows == {}


def test_memory_does_not_grow_with_a_row_or_a_literal() -> None:
    block = b"x" * (1 << 18)
    openings = (
        b"COPY t (a) FROM stdin;\n",
        b"SELECT '",
        b"SELECT E'",
        b"SELECT $$",
        b"SET a = '",
        b"--",
        b"/*",
        b"\\x ",
    )
    for opening in openings:
        scanner = DumpScanner()
        scanner.feed(HEADER + opening)
        tracemalloc.start()
        try:
            for _ in range(80):
                scanner.feed(block)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 3 << 20, opening


@pytest.mark.parametrize("token", [b"''", b'""', b"'' ", b"\\\\", b"- ", b"x"])
@pytest.mark.parametrize("opening", [b"'", b"E'", b'"', b"$$", b"/*", b"--", b""])
def test_time_grows_with_length_only(opening: bytes, token: bytes) -> None:
    dump = HEADER + b"CREATE " + opening + token * ((1 << 20) // len(token))
    started = process_time()
    with pytest.raises(SourceError):
        scan(dump, 1 << 18)
    # Each takes a small part of a second; were the time to grow with the square, minutes.
    assert process_time() - started < 10


# The filter

ALL_KNOWN = frozenset(
    {"statement_timeout", "transaction_timeout", "client_encoding", "standard_conforming_strings", "row_security"}
)


@pytest.mark.parametrize("size", [None, 1, 10])
@pytest.mark.parametrize(
    ("header", "expected", "left_out"),
    [
        (b"SET new_thing = 'a;b';\nSET x TO on;\n", b"\n\n", ["SET new_thing = 'a;b';", "SET x TO on;"]),
        (b"SET new_thing =\n 1;\nSELECT 1;\n", b"\n\nSELECT 1;\n", ["SET new_thing =\n 1;"]),
        (b'set SESSION "New" to 1;\n', b"\n", ['set SESSION "New" to 1;']),
        (b"SET my.thing = 1;\n", b"SET my.thing = 1;\n", []),
        (b"SET Row_Security = off;\n", b"SET Row_Security = off;\n", []),
        (b"SET SESSION AUTHORIZATION 'me';\n", b"SET SESSION AUTHORIZATION 'me';\n", []),
        (b"CREATE TABLE t ();\nSET later = 1;\n", b"CREATE TABLE t ();\nSET later = 1;\n", []),
        (b"SELECT 1;\nSET later = 1;\n", b"SELECT 1;\nSET later = 1;\n", []),
        (b"COPY t FROM stdin;\nSET a = 1;\n\\.\n", b"COPY t FROM stdin;\nSET a = 1;\n\\.\n", []),
        (
            b"SELECT pg_catalog.set_config('a', '');SET b = 1;",
            b"SELECT pg_catalog.set_config('a', '');",
            ["SET b = 1;"],
        ),
        (b"-- SET a = 1;\n/* SET a = 1; */\n", b"-- SET a = 1;\n/* SET a = 1; */\n", []),
    ],
)
def test_settings_that_the_target_lacks_are_left_out_of_the_header(
    header: bytes, expected: bytes, left_out: list[str], size: int | None
) -> None:
    assert filtered(OLD_HEADER + header + OLD_TRAILER, ALL_KNOWN, size) == (
        OLD_HEADER + expected + OLD_TRAILER,
        left_out,
    )


@pytest.mark.parametrize("size", [None, 1, 10])
@pytest.mark.parametrize(
    ("dump", "expected"),
    [
        (b"\\restrict a\n\\unrestrict b\n", b"\n\n"),
        (b"\\unrestrict b", b""),
        (b"COPY t FROM stdin;\n\\\\restrict a\n\\.\n\\restrict a\n", b"COPY t FROM stdin;\n\\\\restrict a\n\\.\n\n"),
        (b"SELECT '\n\\restrict a\n';\n", None),
        (b"SELECT $$\n\\restrict a\n$$;\n", None),
        (b"/*\n\\restrict a\n*/", None),
        (b"\\! touch /tmp/planted\n\\restrict a b\n\\restrict a \\! ls\n\\restrict\n", None),
        (b"SELECT 1 \\restrict a\n", None),
        (b"SELECT 1; \\restrict a\n", None),
        (b"", None),
        (b"no dump at all", None),
        (b"\n\n", None),
    ],
)
def test_only_the_dumps_own_restrict_lines_are_taken_out(dump: bytes, expected: bytes | None, size: int | None) -> None:
    assert filtered(dump, frozenset(), size) == (dump if expected is None else expected, [])


@pytest.mark.parametrize("size", [1, 7, 100, None])
def test_what_a_server_keeps_for_itself_in_column_options_is_taken_out(size: int | None) -> None:
    kept = b"""
CREATE TABLE public.t (a text DEFAULT 'ALTER TABLE ONLY public.t ALTER COLUMN a SET (pg_attver=1);');
ALTER TABLE ONLY public.t ALTER COLUMN a SET STATISTICS 100;
ALTER TABLE ONLY public.t ALTER COLUMN a SET (n_distinct=7);
COPY public.t (a) FROM stdin;
ALTER TABLE ONLY public.t ALTER COLUMN a SET (pg_attver=1);
\\.
"""
    versions = b"""
ALTER TABLE ONLY public.t ALTER COLUMN a SET (pg_attver=26492304);
ALTER FOREIGN TABLE ONLY public."x;y"" (z)" ALTER COLUMN "SET (" SET (pg_attver=1);
ALTER TABLE ONLY public."Task" ALTER COLUMN "a b" SET (n_distinct=7, pg_attver=2);
ALTER TABLE ONLY public.t ALTER COLUMN a SET (pg_attver=3, n_distinct=-0.5);
"""
    passed = b"""


ALTER TABLE ONLY public."Task" ALTER COLUMN "a b" SET (n_distinct=7);
ALTER TABLE ONLY public.t ALTER COLUMN a SET (n_distinct=-0.5);
"""
    dump = OLD_HEADER + kept + versions + kept + OLD_TRAILER
    assert filtered(dump, ALL_KNOWN, size) == (OLD_HEADER + kept + passed + kept + OLD_TRAILER, [])
    assert scan(dump, size).rows == {"public.t": 2}


def test_data_pass_the_filter_without_being_copied() -> None:
    block = b"row\n" * 1000 + b"x"
    stream = PsqlInputFilter(ALL_KNOWN)([OLD_HEADER + b"COPY t FROM stdin;\nx", block, b"\n\\.\n"])
    next(stream)
    assert next(stream) is block

"""Reading a plain-format pg_dump stream as it passes by.

What belongs here: telling SQL, string literals, comments and COPY data of a dump apart, and the two uses of that:
`DumpScanner` counts rows per table and proves that the dump is whole, `PsqlInputFilter` takes out what psql must not be
given. What does not: running pg_dump or psql, and any I/O.

Sources of the rules: what pg_dump writes is in PostgreSQL's src/bin/pg_dump (pg_backup_archiver.c for header, trailer
and `\\restrict`, pg_dump.c for `COPY ... FROM stdin;`); what psql makes of it in src/fe_utils/psqlscan.l and, for COPY
data, src/bin/psql/copy.c: the data start on the line after the statement and end with a line that is exactly `\\.`.
A backslash in data is always written doubled, so no row is that line. Left out because a dump has no use for them:
string literals continued on the next line, and semicolons within parentheses or `BEGIN ATOMIC`, which end a statement
here and not in psql (no COPY can follow them there). Encodings in which a byte of a longer character can be ASCII
(SJIS, BIG5, GBK, UHC, GB18030, JOHAB) exist only as client encodings; a dump made with `pg_dump -E` of one is not
understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kanbu_backup_dagster.errors import SourceError

_TRAILER = b"-- PostgreSQL database dump complete"
_END_OF_DATA = b"\n\\.\n"

# A COPY statement has at most 1,600 columns of at most 63 bytes, each doubled at worst: 208 kB.
_LONGEST_STATEMENT = 1 << 20
# Comments and meta-commands that mean something here are far shorter.
_LONGEST_LINE = 4096


def _any_but(excluded: bytes) -> bytes:
    """A character class. Spelt out, the regex engine matches it by a table: twice as fast as a negated one."""
    return b"[%b]" % b"".join(rb"\x%02x" % byte for byte in range(256) if byte not in excluded)


_SPACE = rb"[\x20\t\n\r\f\v]*"
_WORD_BYTE = rb"[A-Za-z0-9_\x80-\xff]"
_IDENTIFIER_BYTE = rb"[A-Za-z0-9_$\x80-\xff]"
# Within a statement: bytes that begin nothing, and things that can be stepped over without a second look (something in
# quotes with nothing escaped; a dash or slash that begins no comment). None of them can match in two ways, so what is
# built of them fails in linear time. Repetitions are bounded because the regex engine keeps a record of each.
_NOTHING = _any_but(b"'\"$;\\/-") + b"*"
_UNESCAPED = _any_but(b"'\\") + b"*"
_SIMPLE = rb"""(?:"[^"]*"|'%b(?:''%b){0,1000}'(?=[^'])|-(?=[^-])|/(?=[^*]))""" % (_UNESCAPED, _UNESCAPED)
_PLAIN = re.compile(rb"%b(?:%b%b){0,1000}" % (_NOTHING, _SIMPLE, _NOTHING))

# Space and comment lines between two statements, and the word that begins the next one if its end is in sight.
_BETWEEN = re.compile(rb"%b((?:--[^\n]*\n%b){0,1000})(?:(%b+)(?!%b|\Z))?" % (_SPACE, _SPACE, _WORD_BYTE, _WORD_BYTE))
_WORD_BEGUN = re.compile(rb"%b{1,31}\Z" % _WORD_BYTE)
# Whole statements of no interest with the comments before them, many at a time; a trailer before a statement is none.
# All it does is save time: what it does not match is read by the states of `_Lexer`.
_DULL_STATEMENTS = re.compile(
    rb"""(?:
        %(space)b (?: --[^\n]*\n %(space)b ){0,1000}
        (?=[A-Za-z]) (?!(?i:COPY|SET)\b | ALTER\ (?:FOREIGN\ )?TABLE\ ONLY\ [^\n]{1,1000}\ SET\ \()
        %(nothing)b
        (?: (?: %(simple)b | (?<!%(identifier_byte)b) \$([A-Za-z_]*)\$ [^$]* \$\1\$ ) %(nothing)b ){0,1000}
        ;
    ){1,1000}"""
    % {b"space": _SPACE, b"nothing": _NOTHING, b"simple": _SIMPLE, b"identifier_byte": _IDENTIFIER_BYTE},
    re.VERBOSE,
)
_ESCAPE_STRING = re.compile(rb"%b(?:(?:\\[\x00-\xff]|'')%b){0,1000}" % (_UNESCAPED, _UNESCAPED))
_E_PREFIX = re.compile(rb"(?<!%b)[Ee]" % _IDENTIFIER_BYTE)
_IN_IDENTIFIER = re.compile(_IDENTIFIER_BYTE)
_DOLLAR_QUOTE = re.compile(rb"\$(?:[A-Za-z_\x80-\xff]%b{0,255})?(\$|\Z)" % _WORD_BYTE)
_COMMENT_EDGE = re.compile(rb"/\*|\*/")

_NAME = rb'(?:(?:"[^"]*")+|[A-Za-z_\x80-\xff][A-Za-z0-9_$\x80-\xff]*)'
_COPY = re.compile(
    rb'COPY\s+(%b(?:\.%b)*)(?:\s*\([^"()]*(?:"[^"]*"[^"()]*)*\))?\s+FROM\s+STDIN\b' % (_NAME, _NAME), re.IGNORECASE
)
_SET = re.compile(rb'SET\s+(?:(?:SESSION|LOCAL)\s+)?("?)([A-Za-z_][\w.$]*)\1\s*(?:=|TO\b)\s*([^\s;]*)', re.IGNORECASE)
_COLUMN_OPTIONS = re.compile(
    rb"ALTER (?:FOREIGN )?TABLE ONLY %b(?:\.%b)* ALTER COLUMN %b SET \(([^()]*)\);" % (_NAME, _NAME, _NAME)
)
_COLUMN_VERSION = re.compile(rb"pg_attver=\d+, |(?:, )?pg_attver=\d+")
_SET_CONFIG = re.compile(rb"SELECT\s+pg_catalog\.set_config\s*\(", re.IGNORECASE)
_RESTRICT = re.compile(rb"\\(un)?restrict [A-Za-z0-9]+")
_VERSION = re.compile(rb"-- Dumped (from database|by pg_dump) version (.+)")


@dataclass(frozen=True)
class DumpFindings:
    """What a whole dump was found to hold.

    Attributes:
        rows: Rows per table, in the dump's order, for every table with a COPY block. The name is as the dump writes it
            (`public.tasks`, `public."Task"`); bytes that are not UTF-8 are written `\\xNN`.
        server_version: The server's version as the dump's header has it, such as `15.18 (Debian 15.18-0+deb12u1)`.
        pg_dump_version: The version of the pg_dump that wrote it, likewise.
    """

    rows: dict[str, int]
    server_version: str | None
    pg_dump_version: str | None


class DumpScanner:
    """Counts rows and watches for the end of a dump, at a small part of the cost of making it.

    Memory is that of a chunk or two, whatever the length of rows and literals.
    """

    def __init__(self) -> None:
        self._lexer = _Lexer()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the dump, any number of them."""
        self._lexer.feed(chunk)

    def finish(self) -> DumpFindings:
        """Say what was found, after the last chunk.

        Raises:
            SourceError: The dump is not whole: it ends within COPY data, a literal, a comment or a statement, or its
                trailer did not come as the last thing.
        """
        self._lexer.feed(b"\n")
        place = self._lexer.place
        if place or not self._lexer.trailer_is_last:
            raise SourceError(
                "The dump is not whole: "
                + (f"it ends within {place}" if place else f'its last line is not "{_TRAILER.decode()}"'),
                advice="pg_dump, or the connection to it, ended before its time; its own messages say more.",
            )
        return DumpFindings(
            rows=dict(self._lexer.rows),
            server_version=self._lexer.versions.get(b"from database"),
            pg_dump_version=self._lexer.versions.get(b"by pg_dump"),
        )


class PsqlInputFilter:
    """Takes out of a dump what the psql of a restore must not be given; the rest passes byte for byte.

    Taken out are the dump's own `\\restrict KEY` and `\\unrestrict KEY` lines (the restore runs psql restricted under a
    key of its own), and, in the header, a `SET` of a parameter that the target server does not have, as a newer pg_dump
    writes it. The header ends with the first statement that is neither a SET nor a call of `pg_catalog.set_config`.
    And everywhere the column option `pg_attver`, which servers of the minor releases of November 2026 (15.20 and its
    sisters) keep for themselves, which an older pg_dump copies, and which any older server refuses.
    A parameter with a dot in its name passes: every server takes it. So does any other meta-command: psql in
    restricted mode refuses it. An emptied line stays as an empty line, so psql's line numbers are the dump's.

    Args:
        known_settings: Names of the parameters that the target server has, in either case (`pg_settings.name`).

    Attributes:
        left_out: The SET statements that were taken out, in the dump's order; complete when the stream has ended.
    """

    def __init__(self, known_settings: frozenset[str]) -> None:
        self.left_out: list[str] = []
        self._known = frozenset(name.lower() for name in known_settings)
        self._lexer = _Lexer()
        self._held = b""
        self._base = 0  # offset of what is held in the whole stream

    def __call__(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Filter one stream, of chunks of any size. An instance is good for one stream."""
        for chunk in chunks:
            if passed := self._pass(chunk):
                yield passed
        # A line feed settles what the last line is, if it had none.
        yield (self._pass(b"\n") + self._held)[:-1]

    def _pass(self, chunk: bytes) -> bytes:
        spans = self._lexer.feed(chunk)
        data = self._held + chunk if self._held else chunk
        parts = []
        pos = 0
        for span in spans:
            if span.setting is not None:
                if span.setting in self._known or "." in span.setting:
                    continue
                self.left_out.append(_decode(span.text))
            parts += [data[pos : span.start - self._base], b"\n" * span.text.count(b"\n")]
            pos = span.end - self._base
        settled = self._lexer.settled - self._base
        parts.append(data[pos:settled])
        self._held = data[settled:]
        self._base += settled
        return b"".join(parts)


class _Span(NamedTuple):
    """A part of the dump that `PsqlInputFilter` may want to take out.

    Attributes:
        start: Offset of its first byte in the whole stream.
        end: Offset after its last byte.
        text: Its bytes.
        setting: The parameter's name, for a SET in the header; None for what always goes.
    """

    start: int
    end: int
    text: bytes
    setting: str | None


class _Lexer:
    """Splits a dump into what psql would: statements, comments, meta-commands, COPY data.

    A state is a method that takes the buffer and a position in it and gives the position it came to. It stops where the
    state changes, or where it needs bytes that are not there yet: no way made and no change of state means "wait".

    Attributes:
        rows: Rows per table so far.
        versions: The versions in the header's comments.
        trailer_is_last: The trailer came by, and nothing of weight after it.
        settled: Offset in the whole stream up to which no later `_Span` will reach back.
    """

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.versions: dict[bytes, str] = {}
        self.trailer_is_last = False
        self.settled = 0

        self._state: Callable[[bytes, int], int] = self._between
        self._held = b""  # bytes of earlier chunks that are still needed...
        self._lead = 0  # ...of which so many are consumed and only looked back at
        self._base = 0  # offset of the buffer in the whole stream
        self._spans: list[_Span] = []

        self._in_header = True
        self._escapes_in_strings = False  # standard_conforming_strings = off
        self._resume = self._between  # the state that a comment goes back to
        self._depth = 0  # of nested block comments
        self._quote = b""  # what ends the literal or identifier being read
        self._statement_at: int | None = None  # offset in the whole stream, while the statement's text is kept
        self._statement_text: list[bytes] = []  # what earlier buffers held of it
        self._table = ""
        self._table_rows = 0
        self._last_end_of_data: int | None = None  # in this buffer; -1: none

    def feed(self, chunk: bytes) -> list[_Span]:
        """Take the next bytes; give the spans that ended in them."""
        buf = self._held + chunk if self._held else chunk
        pos = self._lead
        self._last_end_of_data = None
        while pos < len(buf):
            before, state = pos, self._state
            pos = state(buf, pos)
            if pos == before and self._state == state:
                break
        self._keep_statement(buf, pos)
        self.settled = self._base + pos if self._statement_at is None else self._statement_at
        # Two bytes back tell whether a quote has an E before it, and whether that E is a word of its own.
        self._lead = 0 if self._state == self._data else min(pos, 2)
        self._held = buf[pos - self._lead :]
        self._base += pos - self._lead
        spans, self._spans = self._spans, []
        return spans

    @property
    def place(self) -> str:
        """What the bytes so far end within; empty between two statements."""
        if self._state in (self._data, self._rest_of_copy_line):
            return f"the rows of {self._table}, after {max(self._table_rows, 0)} of them"
        if self._state == self._between:
            return ""
        return "a comment" if self._state in (self._block_comment, self._line_comment) else "a statement"

    # States

    def _between(self, buf: bytes, pos: int) -> int:
        if not self._in_header and (dull := _DULL_STATEMENTS.match(buf, pos)):
            self.trailer_is_last = False
            return dull.end()
        match = _BETWEEN.match(buf, pos)
        assert match is not None
        comments, word = match.groups()
        pos = match.end()
        if comments:
            self._read_comments(comments)
        if word:
            self._begin_statement(word, match.start(2))
            return pos
        if comments or pos == len(buf) or _WORD_BEGUN.match(buf, pos):
            return pos
        first = buf[pos : pos + 2]
        if first in (b"-", b"/"):
            return pos
        if first == b"--" or first[:1] == b"\\":
            return self._line(buf, pos)
        self.trailer_is_last = False
        if first[:1] == b";":
            return pos + 1
        if first == b"/*":
            return self._open_block_comment(pos)
        self._begin_statement(b"", pos)
        return pos

    def _line(self, buf: bytes, pos: int) -> int:
        """A meta-command, which goes to the end of its line, or a comment whose end is not in sight."""
        end = buf.find(b"\n", pos)
        if (end if end >= 0 else len(buf)) - pos >= _LONGEST_LINE:
            self.trailer_is_last = False
            self._state, self._resume = self._line_comment, self._between
            return pos
        if end < 0:
            return pos
        text = buf[pos:end]
        restrict = _RESTRICT.fullmatch(text)
        if restrict and (self._base + pos == 0 or buf[pos - 1 : pos] == b"\n"):
            self._spans.append(_Span(self._base + pos, self._base + end, text, None))
        self.trailer_is_last = self.trailer_is_last and restrict is not None and restrict[1] is not None
        return end

    def _statement(self, buf: bytes, pos: int) -> int:
        match = _PLAIN.match(buf, pos)
        assert match is not None
        pos = match.end()
        first = buf[pos : pos + 1]
        if first == b";":
            self._end_statement(buf, pos + 1)
            return pos + 1
        if first == b"'":
            if self._escapes_in_strings or _E_PREFIX.match(buf, pos - 1, pos):
                self._state = self._escape_string
            else:
                self._state, self._quote = self._quoted, first
            return pos + 1
        if first == b'"':
            self._state, self._quote = self._quoted, first
            return pos + 1
        if first == b"$":
            dollar = None if _IN_IDENTIFIER.match(buf, pos - 1, pos) else _DOLLAR_QUOTE.match(buf, pos)
            if dollar is None:
                return pos + 1
            if dollar[1]:
                self._state, self._quote = self._dollar_quoted, dollar[0]
                return dollar.end()
            return pos
        if first == b"\\" or buf.startswith(b"--", pos):
            self._state, self._resume = self._line_comment, self._statement
            return pos
        if buf.startswith(b"/*", pos):
            return self._open_block_comment(pos)
        return pos

    def _quoted(self, buf: bytes, pos: int) -> int:
        end = buf.find(self._quote, pos)
        while end >= 0 and buf.startswith(self._quote, end + 1):
            end = buf.find(self._quote, end + 2)
        if end < 0:
            return len(buf)
        # Should the next buffer begin with the same quote, it was doubled: then another literal is read to begin there,
        # which comes to the same.
        self._state = self._statement
        return end + 1

    def _escape_string(self, buf: bytes, pos: int) -> int:
        match = _ESCAPE_STRING.match(buf, pos)
        assert match is not None
        pos = match.end()
        if buf.startswith(b"'", pos) and pos + 1 < len(buf) and not buf.startswith(b"''", pos):
            self._state = self._statement
            return pos + 1
        return pos

    def _dollar_quoted(self, buf: bytes, pos: int) -> int:
        end = buf.find(self._quote, pos)
        if end < 0:
            return max(pos, len(buf) - len(self._quote) + 1)
        self._state = self._statement
        return end + len(self._quote)

    def _open_block_comment(self, pos: int) -> int:
        self._depth = 1
        self._state, self._resume = self._block_comment, self._state
        return pos + 2

    def _block_comment(self, buf: bytes, pos: int) -> int:
        edge = _COMMENT_EDGE.search(buf, pos)
        if edge is None:
            return max(pos, len(buf) - 1) if buf.endswith((b"/", b"*")) else len(buf)
        self._depth += 1 if edge[0] == b"/*" else -1
        if self._depth == 0:
            self._state = self._resume
        return edge.end()

    def _line_comment(self, buf: bytes, pos: int) -> int:
        end = buf.find(b"\n", pos)
        if end < 0:
            return len(buf)
        self._state = self._resume
        return end

    def _rest_of_copy_line(self, buf: bytes, pos: int) -> int:
        end = buf.find(b"\n", pos)
        if end < 0:
            return len(buf)
        self._state = self._data
        return end

    def _data(self, buf: bytes, pos: int) -> int:
        # The position is at the line feed before a row. Most chunks hold no end of data, which is quickly known.
        if self._last_end_of_data is None:
            self._last_end_of_data = _last_end_of_data(buf)
        if self._last_end_of_data >= pos:
            end = buf.find(_END_OF_DATA, pos)
            self.rows[self._table] += self._table_rows + _count_line_feeds(buf, pos, end + 1)
            self._state = self._between
            return end + len(_END_OF_DATA)
        end = len(buf)
        if buf.endswith((b"\n", b"\n\\", b"\n\\."), pos):
            end = buf.rfind(b"\n", pos)
        self._table_rows += _count_line_feeds(buf, pos, end)
        return end

    # What the states found

    def _read_comments(self, comments: bytes) -> None:
        if not (self._in_header or self.trailer_is_last or _TRAILER in comments):
            return
        for line in comments.split(b"\n"):
            text = line.lstrip()
            if text in (b"", b"--"):
                continue
            self.trailer_is_last = text == _TRAILER
            version = _VERSION.fullmatch(text) if self._in_header and len(text) < _LONGEST_LINE else None
            if version:
                self.versions.setdefault(version[1], _decode(version[2]))

    def _begin_statement(self, word: bytes, pos: int) -> None:
        self._state = self._statement
        self.trailer_is_last = False
        kind = word.upper()
        if kind in (b"COPY", b"SET", b"ALTER") or (kind == b"SELECT" and self._in_header):
            self._statement_at = self._base + pos
        else:
            self._in_header = False

    def _keep_statement(self, buf: bytes, pos: int) -> None:
        """Keep what this buffer holds of a statement whose text is wanted, up to a position."""
        if self._statement_at is None:
            return
        if self._base + pos - self._statement_at > _LONGEST_STATEMENT:
            self._statement_at = None
            self._in_header = False
            self._statement_text.clear()
            return
        self._statement_text.append(buf[max(self._statement_at - self._base, self._lead) : pos])

    def _end_statement(self, buf: bytes, end: int) -> None:
        self._state = self._between
        self._keep_statement(buf, end)
        if self._statement_at is None:
            return
        text = b"".join(self._statement_text)
        start, self._statement_at = self._statement_at, None
        self._statement_text.clear()
        if copy := _COPY.match(text):
            self._in_header = False
            self._table = _decode(copy[1])
            self.rows.setdefault(self._table, 0)
            # The line feed that ends the COPY line is counted like those that end rows.
            self._table_rows = -1
            self._state = self._rest_of_copy_line
        elif setting := _SET.match(text):
            name = _decode(setting[2]).lower()
            if name == "standard_conforming_strings":
                self._escapes_in_strings = setting[3].strip(b"'\"").lower() in (b"off", b"false", b"no", b"0")
            if self._in_header:
                self._spans.append(_Span(start, self._base + end, text, name))
        elif options := _COLUMN_OPTIONS.fullmatch(text):
            self._in_header = False
            if version := _COLUMN_VERSION.search(options[1]):
                alone = version[0] == options[1]
                first, last = (0, len(text)) if alone else (options.start(1) + at for at in version.span())
                self._spans.append(_Span(start + first, start + last, text[first:last], None))
        elif text[:3].upper() != b"SET" and not _SET_CONFIG.match(text):
            self._in_header = False


# Rows are most of a dump, and every byte of them passes here: with numpy at several times the rate of the methods of
# bytes, which look at one at a time.


def _count_line_feeds(buf: bytes, begin: int, end: int) -> int:
    return int(np.count_nonzero(np.frombuffer(buf, np.uint8)[begin:end] == ord("\n")))


def _last_end_of_data(buf: bytes) -> int:
    """Where the last end of COPY data in the buffer begins, with the line feed before it; -1 if there is none."""
    data = np.frombuffer(buf, np.uint8)
    at = np.flatnonzero(data[1:-2] == ord("\\")) + 1
    at = at[(data[at - 1] == ord("\n")) & (data[at + 1] == ord(".")) & (data[at + 2] == ord("\n"))]
    return int(at[-1]) - 1 if at.size else -1


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")

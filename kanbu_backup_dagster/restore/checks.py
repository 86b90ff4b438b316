"""Looking at a restored database before anybody relies on it.

What belongs here: comparing it with what the manifest says (or with what came by while a file without one was loaded),
and its indexes, constraints and sequences. What does not: what follows from a finding (`orchestration`, `drill`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from kanbu_backup_dagster.errors import RestoreError
from kanbu_backup_dagster.restore.server import Server, run_in
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.commands import query, quote_identifier, quote_literal

_Item = TypeVar("_Item")

# psql is fed and read in turns, so a batch's answers must fit into a pipe.
_BATCH = 500

_SHAPE_SQL = """
SELECT (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema') AS tables,
       (SELECT coalesce(json_agg(indexrelid::regclass::text), '[]')
          FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
         WHERE NOT indisvalid AND relkind = 'i') AS invalid_indexes,
       (SELECT coalesce(json_agg(format('%s on %s', quote_ident(conname), conrelid::regclass)), '[]')
          FROM pg_constraint WHERE NOT convalidated) AS unvalidated
"""

# Sequences that belong to a column (serial, identity) and count upwards.
_SEQUENCES_SQL = """
SELECT s.seqrelid::regclass::text AS sequence, n.nspname AS schema, c.relname AS table, a.attname AS column
  FROM pg_sequence s
  JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = s.seqrelid
                  AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0
  JOIN pg_class c ON c.oid = d.refobjid AND c.relkind IN ('r', 'p')
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
 WHERE s.seqincrement > 0 AND a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)
"""


@dataclass(frozen=True)
class Checked:
    """What a restored database was found to hold.

    Attributes:
        tables: Tables in it.
        rows: Rows per table that was compared.
        remarks: What is as it was dumped, and yet worth knowing.
    """

    tables: int
    rows: dict[str, int]
    remarks: tuple[str, ...]


def check_database(server: Server, settings: Settings, database: str, expected: Mapping[str, int]) -> Checked:
    """Compare `database` with what the dump held, and gather the planner's statistics, which no dump carries.

    Args:
        expected: Rows per table, by the dump's own qualified names.

    Raises:
        RestoreError: A table is missing, has another number of rows, or an index is not valid.
        SourceError: The server could not be asked.
    """
    # The dump's names are bytes of its own encoding: those that are not UTF-8 cannot be asked for.
    comparable = {table: rows for table, rows in expected.items() if "\\x" not in table}
    found = _count_rows(server, settings, database, list(comparable))
    problems = []
    for table, rows in comparable.items():
        count = found.get(table)
        if count is None:
            problems.append(f"{table} is missing")
        elif count.rows != rows and not (count.of_extension and count.rows > rows):
            # An extension fills its own tables when it is created; the dump adds to them.
            problems.append(f"{table} has {count.rows:,} rows, and the backup {rows:,}")
    shape = query(server.access, settings, _SHAPE_SQL, database=database)[0]
    problems += [f"the index {index} is not valid" for index in shape["invalid_indexes"]]
    if shape["tables"] < len(expected):
        problems.append(f"there are {shape['tables']} tables, and the backup has {len(expected)}")
    if problems:
        raise RestoreError("What was restored is not what was backed up.", tried=tuple(problems[:20]))
    remarks = [f"the constraint {constraint} was never validated" for constraint in shape["unvalidated"]]
    remarks += [f"the rows of {table} could not be compared" for table in expected if table not in comparable]
    remarks += _sequences_behind(server, settings, database)
    run_in(server, settings, database, ["ANALYZE;"])
    return Checked(shape["tables"], {table: count.rows for table, count in found.items()}, tuple(remarks))


@dataclass(frozen=True)
class _Count:
    rows: int
    of_extension: bool


def _count_rows(server: Server, settings: Settings, database: str, tables: list[str]) -> dict[str, _Count]:
    """Rows per table; tables that are not there are left out."""
    counts: dict[str, _Count] = {}
    for batch in _batches(tables):
        # The names come from a file: the server reads them as data, and gives back names it has itself.
        values = ", ".join(f"({index}, {quote_literal(table)})" for index, table in enumerate(batch))
        resolved = query(
            server.access,
            settings,
            f"""
            SELECT v.i, n.nspname AS schema, c.relname AS name,
                   EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                                                     AND d.deptype = 'e') AS of_extension
              FROM (VALUES {values}) v(i, name)
              JOIN pg_class c ON c.oid = to_regclass(v.name)
              JOIN pg_namespace n ON n.oid = c.relnamespace
            """,
            database=database,
        )
        script = "".join(
            f"SELECT count(*) FROM ONLY {quote_identifier(row['schema'])}.{quote_identifier(row['name'])};\n"
            for row in resolved
        )
        answers = run_in(server, settings, database, [script]).split()
        for row, answer in zip(resolved, answers, strict=True):
            counts[batch[row["i"]]] = _Count(int(answer), row["of_extension"])
    return counts


def _sequences_behind(server: Server, settings: Settings, database: str) -> list[str]:
    behind = []
    rows = query(server.access, settings, _SEQUENCES_SQL, database=database)
    for batch in _batches(rows):
        script = "".join(
            f"SELECT coalesce(max({quote_identifier(row['column'])}), 0) > (SELECT last_value FROM {row['sequence']}) "
            f"FROM {quote_identifier(row['schema'])}.{quote_identifier(row['table'])};\n"
            for row in batch
        )
        answers = run_in(server, settings, database, [script]).split()
        behind += [
            f"the sequence {row['sequence']} is behind {row['table']}.{row['column']}"
            for row, answer in zip(batch, answers, strict=True)
            if answer == "t"
        ]
    return behind


def _batches(items: list[_Item]) -> Iterator[list[_Item]]:
    remaining = iter(items)
    while batch := list(islice(remaining, _BATCH)):
        yield batch

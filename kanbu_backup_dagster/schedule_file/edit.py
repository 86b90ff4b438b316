"""Changing `kanbu_backup.yaml` without touching what a person wrote around the change.

What belongs here: adding, changing and removing a row. What does not: telling Dagster of it.

Only the characters of the change are replaced in the text, found by the nodes' places; comments, order, quotes and
blank lines elsewhere stay to the byte. The new text is then read as any file is, and written only when it says what was
meant.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path

from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.schedule_file.load import CronCheck, ScheduleFile, load_schedule_file, parse_schedule_file
from kanbu_backup_dagster.schedule_file.model import FORMAT_VERSION, RetentionPolicy, Schedule
from kanbu_backup_dagster.schedule_file.nodes import compose, construct, is_empty, value_of

Value = str | int | float | bool

_BYTE_ORDER_MARK = "\ufeff"
_NEW_FILE = f"# yaml-language-server: $schema=kanbu_backup.schema.json\nversion: {FORMAT_VERSION}\n"
_ORDER = ("id", "name", "type", "cron", "enabled", *RetentionPolicy.model_fields, "catch_up_hours")
_PLAIN = re.compile(r"[A-Za-z](?:[\w .()-]*[\w.()-])?", re.ASCII)


def add_schedule(
    path: Path, fields: Mapping[str, Value], *, used_ids: Collection[int] = (), cron_check: CronCheck | None = None
) -> Schedule:
    """Add a row after the last one; make the file if there is none.

    Args:
        path: The schedule file.
        fields: The row's fields. Without `id` it gets one above all there are.
        used_ids: Ids of schedules that are no longer in the file but in the manifests of backups they made. They are
            not given again: those backups would fall under the new schedule's policy.
        cron_check: As for `load_schedule_file`.

    Raises:
        SettingsError: The row would not be good, its id is taken, or the file cannot be understood or written.
            The file is then as it was.
    """
    if fields.get("id") in used_ids:
        raise SettingsError(
            f"Schedule id {fields['id']} was another schedule's, and backups still refer to it.",
            advice="Leave the id out to get a free one.",
        )

    def add(text: _Text) -> tuple[int, str]:
        schedule_id = fields.get("id", max([0, *text.ids(), *used_ids]) + 1)
        # An id of another kind is refused with the row, which then is no schedule's.
        return schedule_id if isinstance(schedule_id, int) else 0, text.with_row({**fields, "id": schedule_id})

    return _changed(path, add, fields, cron_check, may_create=True)


def edit_schedule(
    path: Path, schedule_id: int, changes: Mapping[str, Value], *, cron_check: CronCheck | None = None
) -> Schedule:
    """Set fields of a row, e.g. `{"enabled": False}`.

    Args:
        path: The schedule file.
        schedule_id: Which row. It may be a bad one, if the changes make it good.
        changes: The new values, by field. `id` stays as it is.
        cron_check: As for `load_schedule_file`.

    Raises:
        SettingsError: No such row, the row would not be good, or the file cannot be understood or written. The file is
            then as it was.
    """
    if "id" in changes:
        raise SettingsError(
            "A schedule's id cannot be changed: its backups refer to it.", advice="Add a new schedule, remove the old."
        )
    return _changed(path, lambda text: (schedule_id, text.with_changes(schedule_id, changes)), changes, cron_check)


def remove_schedule(path: Path, schedule_id: int, *, cron_check: CronCheck | None = None) -> None:
    """Remove a row with the comments inside it. Comments above it stay.

    Raises:
        SettingsError: No such row, or the file cannot be understood or written. The file is then as it was.
    """
    _change(path, lambda text: (schedule_id, text.without_row(schedule_id)), None, cron_check)


Change = Callable[["_Text"], "tuple[int, str]"]
"""Gives the id of the row that changes, and the new text."""


def _changed(
    path: Path,
    change: Change,
    wanted: Mapping[str, Value],
    cron_check: CronCheck | None,
    *,
    may_create: bool = False,
) -> Schedule:
    schedule = _change(path, change, wanted, cron_check, may_create=may_create)
    assert schedule is not None
    return schedule


def _change(
    path: Path,
    change: Change,
    wanted: Mapping[str, Value] | None,
    cron_check: CronCheck | None,
    *,
    may_create: bool = False,
) -> Schedule | None:
    """Put the text that `change` makes in the place of the file's, if it is sound; give the changed row.

    Args:
        wanted: What the row has to say then; None: there is to be no row.
    """
    path = path.resolve()
    with _writing(path), _alone_in(path.parent):
        before = load_schedule_file(path, cron_check=cron_check)
        if not before.exists and not may_create:
            raise SettingsError(f"There are no schedules yet: {path} does not exist.")
        content = path.read_bytes() if before.exists else _NEW_FILE.encode()
        try:
            old = content.decode("utf-8")
            schedule_id, new = change(_Text(path, old))
        except (UnicodeDecodeError, YAMLError, RecursionError):
            raise SettingsError(
                f"{path} cannot be edited until it can be read.",
                tried=tuple(map(str, before.problems)),
                advice="Correct it by hand first.",
            ) from None
        after = parse_schedule_file(new.removeprefix(_BYTE_ORDER_MARK), path, cron_check=cron_check)
        _require_sound(before, after, schedule_id, wanted)
        if new != old:
            _replace(path, new.encode())
    return after.schedule(schedule_id)


def _require_sound(
    before: ScheduleFile, after: ScheduleFile, schedule_id: int, wanted: Mapping[str, Value] | None
) -> None:
    schedule = after.schedule(schedule_id)
    if (schedule is None) is not (wanted is None) or len(after.problems) > len(before.problems):
        known = {(problem.schedule_id, problem.message) for problem in before.problems}
        own = [problem for problem in after.problems if problem.schedule_id == schedule_id]
        new = [problem for problem in after.problems if (problem.schedule_id, problem.message) not in known]
        reasons = dict.fromkeys(
            f"{problem.schedule}: {problem.message}" if problem.schedule else problem.message
            for problem in (own or new or after.problems)
        )
        raise SettingsError(f"{after.path} was not changed: it would not be good.", tried=tuple(reasons))
    rest = [
        ([row for row in file.schedules if row.id != schedule_id], file.notifications, file.drill, file.prune)
        for file in (before, after)
    ]
    as_wanted = schedule is None or all(getattr(schedule, name) == value for name, value in (wanted or {}).items())
    if rest[0] != rest[1] or not as_wanted:
        raise SettingsError(
            f"{after.path} was not changed: other parts of the file depend on that row's text.",
            advice="Change it by hand.",
        )


class _Text:
    """The file's text, and where its rows stand in it.

    Raises:
        YAMLError, RecursionError: It is not YAML.
    """

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._mark = _BYTE_ORDER_MARK if text.startswith(_BYTE_ORDER_MARK) else ""
        self._text = text.removeprefix(_BYTE_ORDER_MARK)
        self._newline = "\r\n" if "\r\n" in self._text else "\n"
        self._root = compose(self._text)
        self._rows = value_of(self._root, "schedules") if self._root else None

    def ids(self) -> list[int]:
        """The ids of all rows, good or bad."""
        return [found for found, _ in self._rows_by_id()]

    def with_changes(self, schedule_id: int, changes: Mapping[str, Value]) -> str:
        """The text with fields of a row set."""
        row = self._row(schedule_id)
        own = {key.value: (key, value) for key, value in row.value if isinstance(key, ScalarNode)}
        splices = [
            self._set(*own[name], value, in_flow=bool(row.flow_style)) for name, value in changes.items() if name in own
        ]
        missing = {name: value for name, value in changes.items() if name not in own}
        if missing and row.flow_style:
            end = row.end_mark.index - 1
            end -= len(self._text[:end]) - len(self._text[:end].rstrip())
            comma = "" if self._text[end - 1] == "," else ","
            fields = ", ".join(f"{name}: {_scalar(value, in_flow=True)}" for name, value in missing.items())
            splices.append((end, end, f"{comma} {fields}"))
        elif missing:
            indent = self._newline + " " * row.value[0][0].start_mark.column
            end = self._end_of_line(self._end_of(row))
            lines = "".join(f"{indent}{name}: {_scalar(value)}" for name, value in missing.items())
            splices.append((end, end, lines))
        return self._spliced(splices)

    def with_row(self, fields: Mapping[str, Value]) -> str:
        """The text with a row more, after the last."""
        ordered = sorted(fields, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
        lines = [f"{name}: {_scalar(fields[name])}" for name in ordered]
        rows = self._rows
        if rows is None or is_empty(rows) or (isinstance(rows, SequenceNode) and not rows.value):
            return self._with_first_row(lines)
        if not isinstance(rows, SequenceNode) or rows.flow_style:
            raise self._by_hand("its schedules are not a list of rows with a dash each")
        dash = self._dash(rows.value[-1])
        column = dash - self._start_of_line(dash)
        end = self._end_of_line(max(self._end_of(rows.value[-1]), dash))
        spaced = len(rows.value) > 1 and self._newline * 2 in self._text[self._end_of(rows.value[-2]) : dash]
        return self._spliced([(end, end, (self._newline if spaced else "") + self._row_text(lines, column))])

    def without_row(self, schedule_id: int) -> str:
        """The text without a row."""
        row = self._row(schedule_id)
        rows = self._rows
        if not isinstance(rows, SequenceNode) or rows.flow_style:
            raise self._by_hand("its schedules are not a list of rows with a dash each")
        start = self._start_of_line(self._dash(row))
        end = min(self._end_of_line(self._end_of(row)) + len(self._newline), len(self._text))
        splices = [(start, end, "")]
        if len(rows.value) == 1:
            colon = self._text.index(":", self._schedules_key().end_mark.index) + 1
            splices.append((colon, colon, " []"))
        return self._spliced(splices)

    def _with_first_row(self, lines: list[str]) -> str:
        rows = self._rows
        if rows is None:
            if self._root is not None and (not isinstance(self._root, MappingNode) or self._root.flow_style):
                raise self._by_hand("it is not a block of keys and values")
            line_ended = not self._text or self._text.endswith("\n")
            gap = ("" if line_ended else self._newline) + (self._newline if self._text.strip() else "")
            return self._mark + self._text + gap + "schedules:" + self._row_text(lines, 2) + self._newline
        start = end = self._text.index(":", self._schedules_key().end_mark.index) + 1
        if self._text[rows.start_mark.index : rows.end_mark.index].strip():
            end = rows.end_mark.index
        line_end = self._end_of_line(end)
        return self._spliced([(start, end, ""), (line_end, line_end, self._row_text(lines, 2))])

    def _row_text(self, lines: list[str], column: int) -> str:
        first = f"{self._newline}{' ' * column}- "
        return first + f"{self._newline}{' ' * (column + 2)}".join(lines)

    def _rows_by_id(self) -> Iterator[tuple[int, MappingNode]]:
        for row in self._rows.value if isinstance(self._rows, SequenceNode) else []:
            id_node = value_of(row, "id")
            found = construct(id_node)[0] if id_node is not None else None
            if type(found) is int:
                yield found, row

    def _row(self, schedule_id: int) -> MappingNode:
        rows = [row for found, row in self._rows_by_id() if found == schedule_id]
        if not rows:
            raise SettingsError(
                f"There is no schedule {schedule_id} in {self._path}.",
                advice=f"There are: {', '.join(map(str, self.ids())) or 'none'}.",
            )
        if len(rows) > 1:
            raise self._by_hand(f"there are {len(rows)} schedules {schedule_id}")
        return rows[0]

    def _set(self, key: Node, node: Node, value: Value, *, in_flow: bool) -> tuple[int, int, str]:
        start, end = node.start_mark.index, node.end_mark.index
        if is_empty(node) and node.value == "":
            colon = self._text.index(":", key.end_mark.index) + 1
            return colon, colon, " " + _scalar(value, in_flow=in_flow)
        if start < key.end_mark.index or node.anchor:
            raise self._by_hand(f"its {key.value} is shared by a YAML anchor")
        end = start + len(self._text[start:end].rstrip())
        return start, end, _scalar(value, style=getattr(node, "style", None), in_flow=in_flow)

    def _schedules_key(self) -> Node:
        assert isinstance(self._root, MappingNode)
        key: Node = next(key for key, _ in self._root.value if key.value == "schedules")
        return key

    def _dash(self, row: Node) -> int:
        """Where the `-` before a row of a block list is: only blanks, line ends and comments lie between."""
        lines = self._text[: row.start_mark.index].split("\n")
        while lines and not re.match(r"\s*-(\s|$)", lines[-1]):
            lines.pop()
        if not lines:
            raise self._by_hand("a row of it is a YAML alias")
        return len("\n".join(lines)) - len(lines[-1]) + lines[-1].index("-")

    def _end_of(self, node: Node, after: int = 0) -> int:
        """The end of the last thing written in `node`, behind `after`; a block's own end lies behind its comments."""
        children: list[Node] = []
        if isinstance(node, (MappingNode, SequenceNode)) and not node.flow_style:
            children = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        if not children:
            start, end = node.start_mark.index, node.end_mark.index
            # What an alias stands for is written elsewhere.
            return max(after, start + len(self._text[start:end].rstrip())) if start >= after else after
        for child in children:
            after = self._end_of(child, after)
        return after

    def _start_of_line(self, index: int) -> int:
        return self._text.rfind("\n", 0, index) + 1

    def _end_of_line(self, index: int) -> int:
        end = self._text.find(self._newline, index)
        return end if end >= 0 else len(self._text)

    def _spliced(self, splices: list[tuple[int, int, str]]) -> str:
        text = self._text
        for start, end, new in sorted(splices, reverse=True):
            text = text[:start] + new + text[end:]
        return self._mark + text

    def _by_hand(self, why: str) -> SettingsError:
        return SettingsError(f"{self._path} cannot be edited this way: {why}.", advice="Change it by hand.")


def _scalar(value: Value, *, style: str | None = None, in_flow: bool = False) -> str:
    """`value` as YAML, quoted as the value it replaces was, else only where it has to be."""
    if isinstance(value, Enum):
        value = value.value
    if not isinstance(value, str):
        return json.dumps(value)
    if style == "'" and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    if not style and _PLAIN.fullmatch(value) and not in_flow:
        node = compose(value)
        if isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:str":
            return value
    return json.dumps(value, ensure_ascii=False)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "The service's user needs to be able to write the file and its folder."
        if error.errno == errno.EBUSY:
            advice = "A file that is mounted by itself cannot be replaced: mount its folder."
        raise SettingsError(f"{path} cannot be written: {error.strerror}.", advice=advice) from None


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two edits at the same time follow one another; the lock goes with its process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, content: bytes) -> None:
    """Put `content` in the file's place, whole or not at all, with its mode and, where allowed, its owner."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            try:
                status = path.stat()
            except FileNotFoundError:
                os.fchmod(file.fileno(), 0o644)
            else:
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), status.st_mode & 0o7777)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

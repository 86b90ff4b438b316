"""Reading `kanbu_backup.yaml`: what in it is good, and each problem by line and column.

What belongs here: from text to models, row by row, so that one bad row takes no other down. What does not: models
themselves, and changing the file.

The text is composed to nodes, which know where they stand, and each row is built and validated by itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from kanbu_backup_dagster.schedule_file.model import (
    FORMAT_VERSION,
    Document,
    Drill,
    Notifications,
    Prune,
    RetentionPolicy,
    Schedule,
)

CronCheck = Callable[[str], "str | None"]
"""A scheduler's own verdict on a cron expression: why it cannot be used, or None."""

Section = TypeVar("Section", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """Something in the file that cannot be used.

    Attributes:
        path: The file.
        line: Counted from 1.
        column: Counted from 1.
        message: What is wrong and what to do, without values that may be secret.
        schedule: The row it is in, as people call it (`schedule 3 (Weekly)`), or "" outside the rows.
        schedule_id: That row's id, where it has a usable one.
    """

    path: Path
    line: int
    column: int
    message: str
    schedule: str = ""
    schedule_id: int | None = None

    def __str__(self) -> str:
        row = f"{self.schedule}: " if self.schedule else ""
        return f"{self.path}, line {self.line}, column {self.column}: {row}{self.message}"


@dataclass(frozen=True)
class ScheduleFile:
    """What a schedule file says.

    Attributes:
        path: The file.
        exists: Whether there is one. A missing file is a valid configuration without schedules.
        schedules: The good rows, in the file's order.
        problems: What is wrong with the rest, in the file's order.
        notifications: Its section; a field that has a problem has its default. Likewise `drill` and `prune`.
    """

    path: Path
    exists: bool = True
    schedules: tuple[Schedule, ...] = ()
    problems: tuple[Problem, ...] = ()
    notifications: Notifications = field(default_factory=Notifications)
    drill: Drill = field(default_factory=Drill)
    prune: Prune = field(default_factory=Prune)

    @property
    def parsed_whole(self) -> bool:
        """Whether all of the file is in here. If not, a policy may be missing, and nothing may be pruned."""
        return not self.problems

    def schedule(self, schedule_id: int) -> Schedule | None:
        """The good row with this id."""
        return next((row for row in self.schedules if row.id == schedule_id), None)

    def policies(self, backup_type: str) -> dict[int, RetentionPolicy]:
        """The retention policies of all schedules of `backup_type`, enabled or not, by schedule id."""
        return {row.id: row.policy for row in self.schedules if row.type.value == backup_type}


def load_schedule_file(path: Path, *, cron_check: CronCheck | None = None) -> ScheduleFile:
    """Read the file at `path`. Never raises for what is in it: see `ScheduleFile.problems`.

    Args:
        path: The file. It need not exist.
        cron_check: The scheduler's own verdict on a cron expression, asked beside croniter's.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return ScheduleFile(path, exists=False)
    except OSError as error:
        return ScheduleFile(path, problems=(Problem(path, 1, 1, f"cannot be read: {error.strerror}"),))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode(errors="replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        return ScheduleFile(path, problems=(Problem(path, line, column, "is not UTF-8 text"),))
    return parse_schedule_file(text, path, cron_check=cron_check)


def parse_schedule_file(text: str, path: Path, *, cron_check: CronCheck | None = None) -> ScheduleFile:
    """Read `text` as the content of the file at `path`, as `load_schedule_file` does."""
    return _Reader(path, cron_check).read(text)


def compose(text: str) -> Node | None:
    """The nodes of a YAML document, each knowing where it stands; None for an empty one.

    Raises:
        YAMLError, RecursionError: `text` is not one YAML document.
    """
    root: Node | None = _yaml().compose(text)
    return root


def unreadable(error: Exception, text: str) -> tuple[int, int, str]:
    """Line, column (from 1) and words for an error of `compose`."""
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        lines = text.split("\n")
        culprit = lines[mark.line].strip(" -") if mark.line < len(lines) else ""
        hint = ". A cron expression that begins with * or @ has to be quoted" if culprit.startswith("cron:") else ""
        words = ", ".join(part for part in (error.context, error.problem) if part)
        return mark.line + 1, mark.column + 1, f"is not YAML: {words}{hint}"
    if isinstance(error, ReaderError):
        before = text[: error.position]
        return before.count("\n") + 1, len(before) - before.rfind("\n"), "is not YAML: a control character"
    return 1, 1, "is not YAML that can be followed: nested too deeply"


def _yaml() -> Any:
    return YAML(typ="safe", pure=True)


class _Reader:
    def __init__(self, path: Path, cron_check: CronCheck | None) -> None:
        self._path = path
        self._cron_check = cron_check
        self._problems: list[Problem] = []
        self._row_of_id: dict[int, tuple[int, int]] = {}

    def read(self, text: str) -> ScheduleFile:
        try:
            root = compose(text)
        except (YAMLError, RecursionError) as error:
            return ScheduleFile(self._path, problems=(Problem(self._path, *unreadable(error, text)),))
        if root is None or _is_empty(root):
            return ScheduleFile(self._path)
        if not isinstance(root, MappingNode):
            self._report(root, "has to be keys and values, such as `schedules:`")
            return ScheduleFile(self._path, problems=tuple(self._problems))
        sections, foreign = self._sections(root)
        if self._problems or not self._readable_version(sections.get("version")):
            return ScheduleFile(self._path, problems=tuple(self._problems))
        for key in foreign:
            self._report(key, _unknown_key(key.value if isinstance(key, ScalarNode) else "...", Document))
        schedules = tuple(self._schedules(sections.get("schedules")))
        notifications = self._section(sections.get("notifications"), Notifications)
        drill = self._section(sections.get("drill"), Drill)
        prune = self._section(sections.get("prune"), Prune)
        problems = tuple(sorted(self._problems, key=lambda problem: (problem.line, problem.column)))
        return ScheduleFile(
            self._path,
            schedules=schedules,
            problems=problems,
            notifications=notifications,
            drill=drill,
            prune=prune,
        )

    def _report(self, node: Node, message: str, schedule: str = "", schedule_id: int | None = None) -> None:
        mark = node.start_mark
        self._problems.append(Problem(self._path, mark.line + 1, mark.column + 1, message, schedule, schedule_id))

    def _sections(self, root: MappingNode) -> tuple[dict[str, Node], list[Node]]:
        sections: dict[str, Node] = {}
        foreign: list[Node] = []
        for key, value in root.value:
            if not isinstance(key, ScalarNode) or key.value not in Document.model_fields:
                foreign.append(key)
            elif key.value in sections:
                # Which of the two was meant cannot be known, so the file is not followed.
                self._report(key, f'has the key "{key.value}" twice')
            else:
                sections[key.value] = value
        return sections, foreign

    def _readable_version(self, node: Node | None) -> bool:
        if node is None:
            return True
        version = self._build(node)
        if type(version) is not int or version < 1:
            self._report(node, "version has to be a whole number; this is the format's version, 1")
        elif version > FORMAT_VERSION:
            self._report(
                node,
                f"has format version {version}; this release reads up to {FORMAT_VERSION}. "
                "Upgrade kanbu-backup-dagster to read it",
            )
        else:
            return True
        return False

    def _schedules(self, node: Node | None) -> Iterator[Schedule]:
        if node is None or _is_empty(node):
            return
        if not isinstance(node, SequenceNode):
            self._report(node, "schedules has to be a list: one row a schedule, each beginning with `- `")
            return
        for number, row in enumerate(node.value, start=1):
            schedule = self._row(row, number)
            if schedule is not None:
                yield schedule

    def _row(self, node: Node, number: int) -> Schedule | None:
        id_node = _value(node, "id")
        given_id = self._build(id_node) if id_node else None
        schedule_id = given_id if type(given_id) is int else None
        name = _value(node, "name")
        called = f" ({name.value})" if isinstance(name, ScalarNode) and name.value else ""
        label = f"schedule {schedule_id}{called}" if schedule_id is not None else f"row {number} of schedules{called}"
        before = len(self._problems)

        def report(where: Node, message: str) -> None:
            self._report(where, message, label, schedule_id)

        if schedule_id is not None and id_node is not None:
            first, line = self._row_of_id.setdefault(schedule_id, (number, node.start_mark.line + 1))
            if first != number:
                report(id_node, f"id {schedule_id} is taken already, by row {first} on line {line}")
        fields = self._build(node, report)
        if isinstance(fields, dict):
            try:
                schedule = Schedule.model_validate(fields)
            except ValidationError as error:
                for where, message in _explain(error, node, Schedule):
                    report(where, message)
            else:
                refusal = self._cron_check(schedule.cron) if self._cron_check else None
                if refusal:
                    report(_locate(node, ("cron",)), f"cron {schedule.cron!r} is refused by the scheduler: {refusal}")
                elif len(self._problems) == before:
                    return schedule
        elif len(self._problems) == before:
            report(node, "has to be keys and values, such as `id: 1`")
        return None

    def _section(self, node: Node | None, model: type[Section]) -> Section:
        if node is None or _is_empty(node):
            return model()
        fields = self._build(node, self._report)
        if not isinstance(fields, dict):
            if fields is not None:
                self._report(node, "has to be keys and values")
            return model()
        try:
            return model.model_validate(fields)
        except ValidationError as error:
            for where, message in _explain(error, node, model):
                self._report(where, message)
            # What has no problem still counts: an alert that was asked for is not lost to a typing error beside it.
            return model.model_validate(_without(fields, {detail["loc"][:2] for detail in error.errors()}))

    def _build(self, node: Node, report: Callable[[Node, str], None] | None = None) -> Any:
        """The plain value of `node`; None, reported, when it has none."""
        value, error = _construct(node)
        if error is not None and report:
            report(_culprit(node), f"cannot be read: {_first_words(error)}")
        return value


def _construct(node: Node) -> tuple[Any, Exception | None]:
    try:
        return _yaml().constructor.construct_document(node), None
    except (YAMLError, ValueError, RecursionError) as error:
        return None, error


def _culprit(node: Node) -> Node:
    """The innermost node below `node` that has no value, or the second of two equal keys."""
    children: list[Node] = []
    if isinstance(node, MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, ScalarNode):
                if key.value in seen:
                    return key
                seen.add(key.value)
            children.append(value)
    elif isinstance(node, SequenceNode):
        children = node.value
    for child in children:
        _, error = _construct(child)
        if error is not None:
            return child if isinstance(error, RecursionError) else _culprit(child)
    return node


def _first_words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    problem = str(error.problem or error.context) if isinstance(error, MarkedYAMLError) else str(error)
    # The library's words for a repeated key go on to quote both values.
    return problem.partition(" with value ")[0]


def _without(fields: dict[str, Any], bad: set[tuple[int | str, ...]]) -> dict[str, Any]:
    """`fields` without the keys, and the items of lists, that `bad` names."""
    kept = {}
    for key, value in fields.items():
        if isinstance(value, list) and (key,) not in bad:
            kept[key] = [item for index, item in enumerate(value) if (key, index) not in bad]
        elif not any(path[0] == key for path in bad):
            kept[key] = value
    return kept


def _is_empty(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _value(node: Node, key: str) -> Node | None:
    pair = _pair(node, key)
    return pair[1] if pair else None


def _pair(node: Node, key: str | int) -> tuple[Node, Node] | None:
    if not isinstance(node, MappingNode):
        return None
    # The last of equal keys is the row's own: merged ones stand before it.
    for key_node, value_node in reversed(node.value):
        if key_node.value == str(key):
            return key_node, value_node
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            sources = value_node.value if isinstance(value_node, SequenceNode) else [value_node]
            for source in sources:
                if found := _pair(source, key):
                    return found
    return None


def _locate(node: Node, path: tuple[int | str, ...], *, at_key: bool = False) -> Node:
    """The node at `path` below `node`, or the last one on the way that exists."""
    for position, step in enumerate(path):
        if isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            continue
        pair = _pair(node, step)
        if pair is None:
            break
        key, value = pair
        # A value that is not there is marked where the next token begins.
        node = key if (at_key and position == len(path) - 1) or (_is_empty(value) and value.value == "") else value
    return node


def _explain(error: ValidationError, node: Node, model: type[BaseModel]) -> Iterator[tuple[Node, str]]:
    for detail in error.errors(include_url=False):
        path = tuple(detail["loc"])
        kind = detail["type"]
        key = str(path[-1]) if path else ""
        if kind == "extra_forbidden":
            owner = _model_at(model, path[:-1])
            yield _locate(node, path, at_key=True), _unknown_key(key, owner)
        elif kind == "missing":
            yield _locate(node, path), f'needs "{key}"'
        else:
            dotted = ".".join(str(step + 1) if isinstance(step, int) else step for step in path) or "it"
            yield _locate(node, path), f"{dotted} {_words(kind, detail)}"


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    for step in path:
        if isinstance(step, str):
            arguments = getattr(model.model_fields[step].annotation, "__args__", ())
            model = next(argument for argument in arguments if isinstance(argument, type))
    return model


def _unknown_key(key: str, model: type[BaseModel]) -> str:
    if model is Notifications and any(word in key.lower() for word in ("url", "secret", "webhook")):
        return f'unknown key "{key}": the URL and its secret belong in BACKUP_WEBHOOK_URL and BACKUP_WEBHOOK_SECRET'
    close = difflib.get_close_matches(key, model.model_fields, n=1)
    guess = f'did you mean "{close[0]}"?' if close else f"known are {', '.join(model.model_fields)}"
    return f'unknown key "{key}": {guess}'


def _words(kind: str, detail: Any) -> str:
    context = detail.get("ctx", {})
    if detail["input"] is None:
        return "is empty"
    if kind == "value_error":
        return str(context["error"])
    if kind == "enum":
        return f"has to be one of {context['expected']}"
    bounds = {
        "greater_than_equal": ("ge", "at least"),
        "greater_than": ("gt", "more than"),
        "less_than_equal": ("le", "at most"),
    }
    if kind in bounds:
        name, words = bounds[kind]
        return f"has to be {words} {context[name]}, not {detail['input']}"
    kinds = {
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text (in quotes, if it looks like something else)",
        "tuple_type": "a list",
        "model_type": "keys and values",
        "string_too_short": "some text",
        "string_too_long": f"at most {context.get('max_length')} characters",
    }
    return f"has to be {kinds[kind]}" if kind in kinds else f"cannot be used: {detail['msg']}"

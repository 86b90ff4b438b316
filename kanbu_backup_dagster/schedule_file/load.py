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
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from kanbu_backup_dagster.schedule_file.model import (
    FORMAT_VERSION,
    Document,
    Drill,
    Notifications,
    Prune,
    RetentionPolicy,
    Schedule,
)
from kanbu_backup_dagster.schedule_file.nodes import (
    compose,
    construct,
    culprit,
    first_words,
    is_empty,
    locate,
    unreadable,
    value_of,
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
        if root is None or is_empty(root):
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
        if node is None or is_empty(node):
            return
        if not isinstance(node, SequenceNode):
            self._report(node, "schedules has to be a list: one row a schedule, each beginning with `- `")
            return
        for number, row in enumerate(node.value, start=1):
            schedule = self._row(row, number)
            if schedule is not None:
                yield schedule

    def _row(self, node: Node, number: int) -> Schedule | None:
        id_node = value_of(node, "id")
        given_id = self._build(id_node) if id_node else None
        schedule_id = given_id if type(given_id) is int else None
        name = value_of(node, "name")
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
                    report(locate(node, ("cron",)), f"cron {schedule.cron!r} is refused by the scheduler: {refusal}")
                elif len(self._problems) == before:
                    return schedule
        elif len(self._problems) == before:
            report(node, "has to be keys and values, such as `id: 1`")
        return None

    def _section(self, node: Node | None, model: type[Section]) -> Section:
        if node is None or is_empty(node):
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
        value, error = construct(node)
        if error is not None and report:
            report(culprit(node), f"cannot be read: {first_words(error)}")
        return value


def _without(fields: dict[str, Any], bad: set[tuple[int | str, ...]]) -> dict[str, Any]:
    """`fields` without the keys, and the items of lists, that `bad` names."""
    kept = {}
    for key, value in fields.items():
        if isinstance(value, list) and (key,) not in bad:
            kept[key] = [item for index, item in enumerate(value) if (key, index) not in bad]
        elif not any(path[0] == key for path in bad):
            kept[key] = value
    return kept


def _explain(error: ValidationError, node: Node, model: type[BaseModel]) -> Iterator[tuple[Node, str]]:
    for detail in error.errors(include_url=False):
        path = tuple(detail["loc"])
        kind = detail["type"]
        key = str(path[-1]) if path else ""
        if kind == "extra_forbidden":
            owner = _model_at(model, path[:-1])
            yield locate(node, path, at_key=True), _unknown_key(key, owner)
        elif kind == "missing":
            yield locate(node, path), f'needs "{key}"'
        else:
            dotted = ".".join(str(step + 1) if isinstance(step, int) else step for step in path) or "it"
            yield locate(node, path), f"{dotted} {_words(kind, detail)}"


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
        "bool_type": "true or false",
        "string_type": "text (in quotes, if it looks like something else)",
        "tuple_type": "a list",
        "model_type": "keys and values",
        "string_too_short": "some text",
        "string_too_long": f"at most {context.get('max_length')} characters",
    }
    return f"has to be {kinds[kind]}" if kind in kinds else f"cannot be used: {detail['msg']}"

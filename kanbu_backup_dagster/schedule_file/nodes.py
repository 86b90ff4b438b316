"""YAML as nodes that know where they stand.

What belongs here: from text to nodes, from a node to its plain value, finding a node by path, and words for what YAML
refuses. What does not: what the values mean.
"""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError


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
        line = lines[mark.line].strip(" -") if mark.line < len(lines) else ""
        hint = ". A cron expression that begins with * or @ has to be quoted" if line.startswith("cron:") else ""
        words = ", ".join(part for part in (error.context, error.problem) if part)
        return mark.line + 1, mark.column + 1, f"is not YAML: {words}{hint}"
    if isinstance(error, ReaderError):
        before = text[: error.position]
        return before.count("\n") + 1, len(before) - before.rfind("\n"), "is not YAML: a control character"
    return 1, 1, "is not YAML that can be followed: nested too deeply"


def _yaml() -> Any:
    return YAML(typ="safe", pure=True)


def construct(node: Node) -> tuple[Any, Exception | None]:
    """The plain value of `node`, or why it has none. Merges (`<<`) below `node` are resolved in place."""
    try:
        return _yaml().constructor.construct_document(node), None
    except (YAMLError, ValueError, RecursionError) as error:
        return None, error


def culprit(node: Node) -> Node:
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
        _, error = construct(child)
        if error is not None:
            return child if isinstance(error, RecursionError) else culprit(child)
    return node


def first_words(error: Exception) -> str:
    """What an error of `construct` says, without the values it goes on to quote."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    problem = str(error.problem or error.context) if isinstance(error, MarkedYAMLError) else str(error)
    # The library's words for a repeated key go on to quote both values.
    return problem.partition(" with value ")[0]


def is_empty(node: Node) -> bool:
    """Whether `node` is null, written out or not."""
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def value_of(node: Node, key: str) -> Node | None:
    """The value of `key` in a mapping, its own or merged."""
    pair = pair_of(node, key)
    return pair[1] if pair else None


def pair_of(node: Node, key: str | int) -> tuple[Node, Node] | None:
    """Key and value of `key` in a mapping, its own or merged."""
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
                if found := pair_of(source, key):
                    return found
    return None


def locate(node: Node, path: tuple[int | str, ...], *, at_key: bool = False) -> Node:
    """The node at `path` below `node`, or the last one on the way that exists."""
    for position, step in enumerate(path):
        if isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            continue
        pair = pair_of(node, step)
        if pair is None:
            break
        key, value = pair
        # A value that is not there is marked where the next token begins.
        node = key if (at_key and position == len(path) - 1) or (is_empty(value) and value.value == "") else value
    return node

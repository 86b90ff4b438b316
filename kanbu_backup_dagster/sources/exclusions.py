"""Exclusion rules: which names of a source tree stay out of its archive.

What belongs here: the rules' little language, the default rules, and matching. What does not: walking a tree.

A rule is one line:

- `node_modules/`: a trailing slash means folders (with all that is in them), otherwise everything but folders;
- `*.log`: `*`, `?`, `[abc]` and `[!abc]` as in a shell, upper and lower case told apart, matched against the base name
  at any depth;
- `/uploads/`, `apps/*/tmp/`, `apps/web/.cache`: a slash before the end anchors the rule at the source folder, and each
  part matches one part of the path.

There is no negation and no `**`. A symbolic link is never a folder here, whatever it points to. Rules besides the
default ones are set in BACKUP_SOURCE_EXCLUDE, with commas between them (a comma in a name is written `?`).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from kanbu_backup_dagster.errors import SettingsError

DEFAULT_EXCLUSIONS = (
    "node_modules/",
    ".git/",
    "dist/",
    ".next/",
    ".turbo/",
    "coverage/",
    "*.log",
    ".env.local",
)


class Exclusions:
    """Compiled rules.

    Raises:
        SettingsError: A rule that means nothing, or would mean less than its writer thinks.
    """

    def __init__(self, rules: Iterable[str]) -> None:
        self.rules = tuple(dict.fromkeys(rules))
        # Indexed by "is it a folder": rules for a base name, and rules for a whole path.
        self._names: tuple[dict[str, re.Pattern[str]], ...] = ({}, {})
        self._paths: tuple[dict[str, tuple[re.Pattern[str], ...]], ...] = ({}, {})
        for rule in self.rules:
            parts = _parts(rule)
            patterns = tuple(re.compile(fnmatch.translate(part)) for part in parts)
            folders = rule.endswith("/")
            if len(parts) == 1 and not rule.startswith("/"):
                self._names[folders][rule] = patterns[0]
            else:
                self._paths[folders][rule] = patterns
        # One regular expression answers for most names at once; which rule it was is asked only after a hit.
        self._any_name = tuple(
            re.compile("|".join(f"(?:{pattern.pattern})" for pattern in names.values()) or r"(?!)")
            for names in self._names
        )

    def match(self, parents: tuple[str, ...], name: str, *, folder: bool) -> str | None:
        """The first rule that keeps `name` out, or None.

        Args:
            parents: The folders between the source folder and the entry, outermost first.
            name: The entry's base name.
            folder: Whether the entry is a folder itself.
        """
        if self._any_name[folder].match(name):
            return next(rule for rule, pattern in self._names[folder].items() if pattern.match(name))
        for rule, patterns in self._paths[folder].items():
            if len(patterns) == len(parents) + 1 and all(
                pattern.match(part) for pattern, part in zip(patterns, (*parents, name), strict=True)
            ):
                return rule
        return None


def _parts(rule: str) -> list[str]:
    parts = rule.removeprefix("/").removesuffix("/").split("/")
    if rule != rule.strip():
        problem = "has spaces around it"
    elif not all(parts):
        problem = "has an empty part"
    elif "." in parts or ".." in parts:
        problem = "has a part . or .., which no entry is called"
    elif rule.startswith("!"):
        problem = "begins with !, but rules cannot let something back in"
    elif "**" in rule:
        problem = "holds **; a rule without a slash before its end matches at any depth already"
    elif "\0" in rule:
        problem = "holds a NUL character"
    else:
        return parts
    raise SettingsError(
        f"The exclusion rule {rule!r} {problem}.",
        advice="Correct BACKUP_SOURCE_EXCLUDE. Examples: node_modules/ (folders of that name), *.log (files), "
        "/uploads/ (that folder at the top).",
    )

"""The exclusion rules' language."""

from __future__ import annotations

import pytest

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.sources.exclusions import DEFAULT_EXCLUSIONS, Exclusions


def excluded(rules: list[str], path: str) -> bool:
    """Whether a path is kept out; a trailing slash makes it a folder."""
    *parents, name = path.removesuffix("/").split("/")
    return Exclusions(rules).match(tuple(parents), name, folder=path.endswith("/")) is not None


@pytest.mark.parametrize(
    ("rule", "path", "out"),
    [
        ("node_modules/", "node_modules/", True),
        ("node_modules/", "apps/web/node_modules/", True),
        ("node_modules/", "node_modules", False),
        ("node_modules/", "my_node_modules/", False),
        ("*.log", "a.log", True),
        ("*.log", "deep/er/.log", True),
        ("*.log", "a.log/", False),
        ("*.log", "a.log.txt", False),
        ("*.log", "a.LOG", False),
        (".env.local", "apps/.env.local", True),
        (".env.local", ".env", False),
        ("[ab]?.tmp", "bx.tmp", True),
        ("[!ab]?.tmp", "bx.tmp", False),
        ("/uploads/", "uploads/", True),
        ("/uploads/", "apps/uploads/", False),
        ("uploads/cache/", "uploads/cache/", True),
        ("uploads/cache/", "x/uploads/cache/", False),
        ("apps/*/tmp/", "apps/web/tmp/", True),
        ("apps/*/tmp/", "apps/web/api/tmp/", False),
        ("apps/web/.cache", "apps/web/.cache", True),
        ("apps/web/.cache", "apps/web/.cache/", False),
        ("*\n*", "new\nline", True),
        ("*.log", "caf\udce9.log", True),
    ],
)
def test_a_rule_matches(rule: str, path: str, out: bool) -> None:
    assert excluded([rule], path) is out


def test_the_default_rules_are_the_promised_ones() -> None:
    for folder in ("node_modules", ".git", "dist", ".next", ".turbo", "coverage"):
        assert excluded(list(DEFAULT_EXCLUSIONS), f"a/b/{folder}/")
        assert not excluded(list(DEFAULT_EXCLUSIONS), f"a/b/{folder}")
    for file in ("npm-debug.log", ".env.local"):
        assert excluded(list(DEFAULT_EXCLUSIONS), f"a/b/{file}")
    for kept in (".env", ".env.production", "src/", "index.ts", "logs/", ".gitignore", "distribution/"):
        assert not excluded(list(DEFAULT_EXCLUSIONS), kept)


def test_the_first_rule_that_matches_is_named() -> None:
    rules = Exclusions(["*.tmp", "a*", "/a.tmp"])
    assert rules.match((), "a.tmp", folder=False) == "*.tmp"
    assert rules.match((), "ab", folder=False) == "a*"
    assert rules.match((), "b", folder=False) is None


@pytest.mark.parametrize("rule", ["", "/", "//", "a//b", "../x", "a/./b", "!keep", "**/x", " *.log", "a/**/b", "a\0"])
def test_a_rule_that_means_nothing_is_refused(rule: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Exclusions([rule])
    assert repr(rule) in refused.value.message
    assert "BACKUP_SOURCE_EXCLUDE" in refused.value.advice

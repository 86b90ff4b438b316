"""What README and docs/ say of variables, fields and exit codes is what the code has."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.manifest import Manifest
from kanbu_backup_dagster.cli.main import _EXIT_CODES
from kanbu_backup_dagster.settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def table_rows(document: str) -> list[list[str]]:
    """The cells of all rows of all tables."""
    lines = (ROOT / document).read_text("utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_readme_has_every_variable_with_its_default() -> None:
    rows = [row for row in table_rows("README.md") if re.fullmatch("`[A-Z_]+`", row[0])]
    documented = {row[0].strip("`"): row[1].strip("`") for row in rows}
    actual = {}
    for field in Settings.model_fields.values():
        default = field.default.value if isinstance(field.default, Enum) else field.default
        actual[field.alias] = "" if default is None else str(default)
    assert documented == actual


def test_every_field_of_the_manifest_is_documented() -> None:
    named = {name for row in table_rows("docs/files.md") for name in re.findall(r"`(\w+)`", row[0])}
    assert set(Manifest.model_fields) - {"format_version"} <= named


def test_exit_codes_are_documented() -> None:
    documented = {int(row[0]) for row in table_rows("docs/command-line.md") if row[0].isdigit()}
    assert {code for _, code in _EXIT_CODES} | {0, 1, 2} == documented


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target

"""Where real components are required, a test that skips for want of one fails; elsewhere it skips."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kanbu_backup_dagster_tests

TESTS = """
import pytest

@pytest.mark.real("moon")
def test_marked():
    pytest.skip("no moon tonight")

@pytest.mark.real("moon")
@pytest.mark.skipif(True, reason="no moon on weekdays")
def test_marked_by_condition():
    raise AssertionError

def test_through_a_fixture(node):
    raise AssertionError

@pytest.mark.real("moon")
@pytest.mark.xfail(reason="expected")
def test_known_to_fail():
    raise AssertionError

def test_of_no_component():
    pytest.skip("not for this platform")
"""


@pytest.mark.parametrize(
    ("environment", "failed", "skipped"),
    [
        ({}, 0, 4),
        ({"CI": "true"}, 3, 1),
        ({"KANBU_REQUIRE_REAL": "1"}, 3, 1),
        ({"CI": "true", "KANBU_REQUIRE_REAL": "0"}, 0, 4),
    ],
)
def test_skips(tmp_path: Path, environment: dict[str, str], failed: int, skipped: int) -> None:
    conftest = Path(kanbu_backup_dagster_tests.__file__).with_name("conftest.py")
    (tmp_path / "conftest.py").write_text(conftest.read_text())
    (tmp_path / "test_moon.py").write_text(TESTS)
    result = _pytest(tmp_path, environment)
    lines = result.stdout.splitlines()
    # What fails before the test's own body, pytest calls an error.
    assert sum(line.startswith(("FAILED ", "ERROR ")) for line in lines) == failed
    assert sum(line.startswith("SKIPPED ") for line in lines) == skipped
    assert sum(line.startswith("XFAIL ") for line in lines) == 1
    assert sum("A real component is required here" in line for line in lines) >= failed
    assert "no moon tonight" in result.stdout
    assert result.returncode == (1 if failed else 0)


def test_a_module_that_skips_itself(tmp_path: Path) -> None:
    conftest = Path(kanbu_backup_dagster_tests.__file__).with_name("conftest.py")
    (tmp_path / "conftest.py").write_text(conftest.read_text())
    (tmp_path / "test_moon.py").write_text("import pytest\nmoon = pytest.importorskip('no_such_moon')\n")
    assert "1 error" in _pytest(tmp_path, {"CI": "true"}).stdout.splitlines()[-1]
    assert "1 skipped" in _pytest(tmp_path, {}).stdout.splitlines()[-1]


def _pytest(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "KANBU_REQUIRE_REAL")}
    (folder / "bin").mkdir(exist_ok=True)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-ra",
            "-p",
            "no:cacheprovider",
            "-o",
            "markers=real(component): x",
            "--rootdir",
            folder,
            folder,
        ],
        # No node on PATH.
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), "PATH": str(folder / "bin"), **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )

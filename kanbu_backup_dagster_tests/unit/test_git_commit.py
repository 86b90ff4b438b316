"""The commit read from git's files is the one git names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kanbu_backup_dagster.sources.git_commit import read_commit

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git")


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", "-C", str(folder), *settings, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "kanbu"
    folder.mkdir()
    git(folder, "init", "-q")
    for message in ("one", "two"):
        git(folder, "commit", "-q", "--allow-empty", "-m", message)
    return folder


def test_a_branch(checkout: Path) -> None:
    assert read_commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_packed_refs_among_similar_names(checkout: Path) -> None:
    git(checkout, "branch", "other/main", "HEAD~1")
    git(checkout, "tag", "-a", "main", "-m", "a tag, packed with the commit it peels to")
    git(checkout, "pack-refs", "--all", "--prune")
    assert not (checkout / ".git/refs/heads/main").exists()
    assert read_commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_loose_ref_goes_before_a_packed_one(checkout: Path) -> None:
    git(checkout, "pack-refs", "--all")
    git(checkout, "commit", "-q", "--allow-empty", "-m", "three")
    assert read_commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_detached_head_and_a_folder_within(checkout: Path) -> None:
    git(checkout, "checkout", "-q", "--detach", "HEAD~1")
    (checkout / "apps/web").mkdir(parents=True)
    assert read_commit(checkout / "apps/web") == git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize("packed", [False, True])
def test_a_worktree(checkout: Path, packed: bool) -> None:
    worktree = checkout.parent / "worktree"
    git(checkout, "worktree", "add", "-q", "-b", "feature", str(worktree), "HEAD~1")
    if packed:
        git(checkout, "pack-refs", "--all", "--prune")
    assert read_commit(worktree) == git(worktree, "rev-parse", "HEAD") != read_commit(checkout)


def test_no_commit_to_name(tmp_path: Path) -> None:
    assert read_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert read_commit(tmp_path) is None
    (tmp_path / ".git/HEAD").write_bytes(b"\xff\xfe")
    assert read_commit(tmp_path) is None
    (tmp_path / ".git/HEAD").unlink()
    assert read_commit(tmp_path) is None

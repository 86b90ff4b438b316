"""Which git commit is checked out in a folder, read from git's own files.

What belongs here: `HEAD`, loose refs, `packed-refs`, and the pointers of worktrees and submodules, as in
gitrepository-layout(5). What does not: anything that needs git's objects. The `git` program is not asked: it is often
missing in a container, and refuses a checkout that belongs to another user.
"""

from __future__ import annotations

import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)


def read_commit(folder: Path) -> str | None:
    """The commit checked out at `folder` or, as git looks for it, in the nearest folder above that is a checkout.

    None when there is no checkout, no commit yet, or its files cannot be read: a backup never fails for this.
    """
    try:
        git_dir = _git_dir(folder.absolute())
        head = _text(git_dir / "HEAD") if git_dir else ""
        commit = _resolve(git_dir, head.removeprefix("ref:").strip()) if git_dir and head.startswith("ref:") else head
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _git_dir(folder: Path) -> Path | None:
    for candidate in (folder, *folder.parents):
        dot_git = candidate / ".git"
        if dot_git.is_dir():
            return dot_git
        if dot_git.is_file():  # a worktree or a submodule: `gitdir: <path>`
            return candidate / _text(dot_git).removeprefix("gitdir:").strip()
    return None


def _resolve(git_dir: Path, ref: str) -> str:
    shared = git_dir / "commondir"  # a worktree's branches are kept in the main repository
    common = git_dir / _text(shared) if shared.is_file() else git_dir
    for loose in (git_dir / ref, common / ref):
        if loose.is_file():
            return _text(loose)
    packed = common / "packed-refs"
    lines = _text(packed).splitlines() if packed.is_file() else []
    return next((line.split(" ")[0] for line in lines if line.endswith(f" {ref}")), "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape").strip()

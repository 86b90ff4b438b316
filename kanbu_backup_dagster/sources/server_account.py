"""Whom an embedded PostgreSQL server runs as: it refuses root, so under root an ordinary user.

What belongs here: choosing that user and running programs as it. What does not: which programs.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.sources.server_binaries import ENVIRONMENT


@dataclass(frozen=True)
class ServerAccount:
    """Whom the server runs as: ourselves (no ids), or under root an ordinary user."""

    uid: int | None = None
    gid: int | None = None
    name: str = ""

    def popen(self, command: list[str | Path], **options: object) -> subprocess.Popen[str]:
        """`subprocess.Popen` as this user, in "/", with nothing of our own environment."""
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            command,
            text=True,
            cwd="/",
            env=ENVIRONMENT,
            user=self.uid,
            group=self.gid,
            extra_groups=None if self.uid is None else [],
            **options,
        )

    def run(self, command: list[str | Path]) -> tuple[int, str]:
        """The exit status of `command` as this user, and what it printed; 126 when this user may not run it."""
        try:
            process = self.popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
            )
        except OSError as error:
            return 126, str(error)
        output, _ = process.communicate()
        return process.returncode, output

    def can_enter(self, folder: Path) -> bool:
        """Whether this user passes every folder on the way to `folder`, and that one."""
        return self.uid is None or self.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", folder])[0] == 0

    def own(self, folder: Path) -> None:
        """Make `folder`, new and empty, for this user alone."""
        folder.mkdir(mode=0o700)
        if self.uid is not None and self.gid is not None:
            os.chown(folder, self.uid, self.gid)


def server_account() -> ServerAccount:
    """Ourselves, or under root `postgres` where there is such a user, else `nobody`.

    Raises:
        SourceError: We are root, and cannot become an ordinary user.
    """
    if os.geteuid() != 0:
        return ServerAccount()
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        account = ServerAccount(entry.pw_uid, entry.pw_gid, name)
        status, said = account.run(["/bin/sh", "-c", ":"])
        if status != 0:
            raise SourceError(
                f"PostgreSQL refuses to run as root, and root may not become {name!r} here: {said}.",
                advice="Run this as an ordinary user.",
            )
        return account
    raise SourceError(
        "PostgreSQL refuses to run as root, and there is no user 'postgres' or 'nobody' to run it as.",
        advice="Run this as an ordinary user.",
    )

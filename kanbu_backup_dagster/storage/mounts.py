"""Which file system a path is on, read from Linux's mount table.

What belongs here: reading `/proc/self/mountinfo` (format: proc_pid_mountinfo(5)). What does not: judging a mount.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

RCLONE = "fuse.rclone"
MOUNT_TABLE = Path("/proc/self/mountinfo")
_NETWORK_TYPES = ("nfs", "cifs", "smb", "fuse.", "9p", "ceph", "gluster", "lustre", "afs", "davfs")


@dataclass(frozen=True)
class Mount:
    """A mount: where it is, its file system type (`ext4`, `fuse.rclone`), its source (`gdrive:`) and its device number
    (`st_dev` of what is on it)."""

    point: Path
    fstype: str
    source: str
    device: int = 0

    @property
    def is_network(self) -> bool:
        """Whether other machines may write to it: locks and open files seen here are then not the whole truth."""
        return self.fstype.startswith(_NETWORK_TYPES)


def mount_of(path: Path) -> Mount | None:
    """The mount that `path` (which need not exist) is on; None where there is no mount table (macOS).

    `os.path.ismount` is not asked: it is False for a mount whose FUSE process has died, which the table still lists.
    """
    try:
        table = MOUNT_TABLE.read_text()
    except FileNotFoundError:
        return None
    absolute = path.absolute()
    found: Mount | None = None
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        point = Path(_unescape(fields[4]))
        # Later lines are mounted over earlier ones, so the last of the longest wins.
        if absolute.is_relative_to(point) and (found is None or len(point.parts) >= len(found.point.parts)):
            major, _, minor = fields[2].partition(":")
            found = Mount(point, tail[0], _unescape(tail[1]), os.makedev(int(major), int(minor)))
    return found


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)

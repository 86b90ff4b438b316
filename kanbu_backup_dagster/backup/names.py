"""Names of backup files, and what a name says.

What belongs here: making, parsing and refusing file names. What does not: whether such a file exists.

The forms are the users' guide's: `kanbu_backup_2026-01-18T10-30-00.sql.gz[.enc]` and
`kanbu_source_2026-01-18T10-30-00.tar.gz[.enc]`, times in UTC; Kanbu's older `.sql` and `.sql.enc` are
read, never written, as are backups that it left in a folder within the storage (`production/kanbu_backup_...`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum
from functools import lru_cache

from kanbu_backup_dagster.errors import BackupNotFoundError
from kanbu_backup_dagster.storage.protocol import SIDECAR_SUFFIX

MANIFEST_SUFFIX = SIDECAR_SUFFIX

_TIME_FORMAT = "%Y-%m-%dT%H-%M-%S"
_NAME = re.compile(
    r"(?:(?P<folder>\w[\w.-]*)/)?kanbu_(?P<kind>backup|source)_(?P<time>\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2})"
    r"\.(?P<format>sql|tar)(?P<gzip>\.gz)?(?P<enc>\.enc)?",
    re.ASCII,
)


class BackupType(str, Enum):
    """What a backup holds."""

    DATABASE = "database"
    SOURCE = "source"


_STEM = {BackupType.DATABASE: ("backup", "sql"), BackupType.SOURCE: ("source", "tar")}


@dataclass(frozen=True)
class BackupName:
    """A file name taken apart. `str()` gives the name back.

    Attributes:
        type: What the backup holds.
        created_at: When it was begun, UTC, whole seconds.
        compressed: Whether it is a gzip stream (inside any encryption).
        encrypted: Whether it is in Kanbu's AES-256-GCM format.
        folder: The folder it is in within the storage; empty for none, as all of ours are.
    """

    type: BackupType
    created_at: datetime
    compressed: bool
    encrypted: bool
    folder: str = ""

    def __str__(self) -> str:
        stem, extension = _STEM[self.type]
        return (
            f"{self.folder and self.folder + '/'}kanbu_{stem}_{self.created_at.strftime(_TIME_FORMAT)}.{extension}"
            f"{'.gz' if self.compressed else ''}{'.enc' if self.encrypted else ''}"
        )


@lru_cache(maxsize=64)  # a file's name is asked again when its manifest is read
def parse_name(filename: str) -> BackupName | None:
    """What `filename` says, or None when it is not a backup's name."""
    match = _NAME.fullmatch(filename)
    if match is None:
        return None
    backup_type = BackupType.DATABASE if match["kind"] == "backup" else BackupType.SOURCE
    if match["format"] != _STEM[backup_type][1] or (backup_type is BackupType.SOURCE and not match["gzip"]):
        return None
    try:
        # Ten times as fast as strptime, which counts where a hundred thousand names are read.
        year, month, day, hour, minute, second = map(int, re.split("[-T]", match["time"]))
        created_at = datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)
    except ValueError:
        return None
    return BackupName(
        backup_type,
        created_at,
        compressed=bool(match["gzip"]),
        encrypted=bool(match["enc"]),
        folder=match["folder"] or "",
    )


def require_name(filename: str) -> BackupName:
    """What `filename` says.

    Raises:
        BackupNotFoundError: It is not a backup's name; paths such as `../../etc/passwd` end here.
    """
    name = parse_name(filename)
    if name is None:
        raise BackupNotFoundError(
            f"Backup file not found: {filename!r} is not the name of a backup.",
            advice="Names look like kanbu_backup_2026-01-18T10-30-00.sql.gz.enc; `kanbu-backup list` shows them.",
        )
    return name


def candidate_names(backup_type: BackupType, started_at: datetime, *, encrypted: bool) -> Iterator[str]:
    """File names for a backup begun at `started_at` (aware): its own second first, then each second after it."""
    second = started_at.astimezone(timezone.utc).replace(microsecond=0)
    while True:
        yield str(BackupName(backup_type, second, compressed=True, encrypted=encrypted))
        second += timedelta(seconds=1)

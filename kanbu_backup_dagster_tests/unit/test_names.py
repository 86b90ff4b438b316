"""Names of backup files."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanbu_backup_dagster.backup.names import BackupType, candidate_names, parse_name, require_name
from kanbu_backup_dagster.errors import BackupNotFoundError

_MOMENTS = st.integers(1, 250_000_000_000).map(lambda seconds: datetime.fromtimestamp(seconds, timezone.utc))


@given(st.sampled_from(BackupType), _MOMENTS, st.booleans())
def test_a_name_says_what_it_was_made_from(backup_type: BackupType, moment: datetime, encrypted: bool) -> None:
    first, second = islice(candidate_names(backup_type, moment, encrypted=encrypted), 2)
    name, next_name = parse_name(first), parse_name(second)
    assert name is not None
    assert next_name is not None
    assert str(name) == first
    assert (name.type, name.encrypted, name.compressed) == (backup_type, encrypted, True)
    assert name.created_at == moment.replace(microsecond=0)
    assert next_name.created_at - name.created_at == timedelta(seconds=1)


@pytest.mark.parametrize(
    ("filename", "compressed", "encrypted"),
    [
        ("kanbu_backup_2026-01-18T10-30-00.sql.gz", True, False),
        ("kanbu_backup_2026-01-18T10-30-00.sql.gz.enc", True, True),
        ("kanbu_backup_2026-01-18T10-30-00.sql", False, False),
        ("kanbu_backup_2026-01-18T10-30-00.sql.enc", False, True),
        ("kanbu_source_2026-01-18T10-30-00.tar.gz.enc", True, True),
    ],
)
def test_the_guides_names_and_the_older_ones_are_read(filename: str, compressed: bool, encrypted: bool) -> None:
    name = require_name(filename)
    assert (name.compressed, name.encrypted) == (compressed, encrypted)
    assert name.created_at == datetime(2026, 1, 18, 10, 30, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    "filename",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "kanbu_backup_2026-01-18T10-30-00.sql.gz/../x",
        "kanbu_backup_2026-01-18T10-30-00.tar.gz",
        "kanbu_source_2026-01-18T10-30-00.tar",
        "kanbu_backup_2026-02-30T10-30-00.sql.gz",
        "kanbu_backup_2026-01-18T10-30-00.sql.gz\n",
        "kanbu_backup_\uff12026-01-18T10-30-00.sql.gz",
        ".kanbu-incoming-0.part",
        "",
    ],
)
def test_anything_else_is_refused(filename: str) -> None:
    assert parse_name(filename) is None
    with pytest.raises(BackupNotFoundError, match="Backup file not found"):
        require_name(filename)

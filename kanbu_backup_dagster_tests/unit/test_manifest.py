"""The manifest: its JSON, its version, and its seal."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import pytest

from kanbu_backup_dagster.backup.keys import Keyring, derive_key
from kanbu_backup_dagster.backup.manifest import FORMAT_VERSION, DatabaseFacts, Manifest, Trigger, parse_manifest
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.errors import CorruptBackupError

NAME = "kanbu_backup_2026-01-18T10-30-00.sql.gz.enc"
KEY, OTHER = derive_key("one"), derive_key("two")


def a_manifest(filename: str = NAME, **changes: object) -> Manifest:
    fields: dict[str, object] = {
        "filename": filename,
        "type": BackupType.DATABASE,
        "trigger": Trigger.MANUAL,
        "created_at": datetime(2026, 1, 18, 10, 30, 0, 123000, tzinfo=timezone.utc),
        "raw_bytes": 100,
        "compressed_bytes": 10,
        "stored_bytes": 42,
        "sha256": "a" * 64,
        "stored_sha256": "b" * 64,
        "encrypted": filename.endswith(".enc"),
        "key_id": KEY.key_id if filename.endswith(".enc") else None,
        "duration_seconds": 1.5,
        "database": DatabaseFacts(
            name="kanbu",
            server_version="16.4",
            pg_dump_version="16.4",
            mode="direct",
            size_bytes=7,
            rows={"public.ü": 3},
        ),
    }
    return Manifest.model_validate({**fields, **changes})


def test_it_comes_back_as_it_was() -> None:
    manifest = a_manifest()
    read = parse_manifest(NAME, manifest.to_json(KEY), Keyring(KEY))
    assert read.model_copy(update={"seal": None}) == manifest


def test_every_edited_field_is_found() -> None:
    sealed = a_manifest().to_json(KEY)
    fields = json.loads(sealed)
    edits = {
        "raw_bytes": 101,
        "sha256": "c" * 64,
        "held": True,
        "trigger": "scheduled",
        "schedule_id": 3,
        "created_at": "2027-01-18T10:30:00.123000Z",
        "verification": {**fields["verification"], "status": "verified"},
        "database": {**fields["database"], "rows": {"public.ü": 4}},
    }
    for field, value in edits.items():
        edited = json.dumps({**fields, field: value}).encode()
        with pytest.raises(CorruptBackupError, match="edited"):
            parse_manifest(NAME, edited, Keyring(KEY))
    with pytest.raises(CorruptBackupError, match="lost its seal"):
        parse_manifest(NAME, json.dumps({**fields, "seal": None}).encode(), Keyring(KEY))


def test_a_seal_of_a_previous_key_is_judged_and_one_of_an_unknown_key_is_not() -> None:
    sealed = a_manifest().to_json(KEY)
    assert parse_manifest(NAME, sealed, Keyring(OTHER, (KEY,))).sha256 == "a" * 64
    assert parse_manifest(NAME, sealed, Keyring(OTHER)).key_id == KEY.key_id
    assert parse_manifest(NAME, sealed, Keyring()).key_id == KEY.key_id


def test_a_backup_made_before_a_key_was_set_needs_no_seal() -> None:
    plain = NAME.removesuffix(".enc")
    assert parse_manifest(plain, a_manifest(plain).to_json(None), Keyring(KEY)).seal is None


def test_a_manifest_of_another_file_is_refused() -> None:
    other = NAME.replace("10-30", "11-30")
    with pytest.raises(CorruptBackupError, match="about another file"):
        parse_manifest(other, a_manifest().to_json(None), Keyring())
    with pytest.raises(CorruptBackupError, match="contradicts"):
        parse_manifest(NAME, a_manifest(NAME, encrypted=False).to_json(None), Keyring())


def test_a_newer_format_is_refused_politely() -> None:
    fields = json.loads(a_manifest().to_json(None))
    newer = json.dumps({**fields, "format_version": FORMAT_VERSION + 1, "unheard_of": 1}).encode()
    with pytest.raises(CorruptBackupError, match=r"format version 2.*reads up to 1(.|\n)*Upgrade"):
        parse_manifest(NAME, newer, Keyring())


def test_half_a_surrogate_pair_is_no_text() -> None:
    edited = a_manifest().to_json(None).replace(b'"run_id": "', b'"run_id": "\\ud800')
    assert edited != a_manifest().to_json(None)
    with pytest.raises(CorruptBackupError, match=r"manifest\.json is not text"):
        parse_manifest(NAME, edited, Keyring())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format_version": 1}', b'"x"', b"[" * 100_000]
)
def test_what_is_no_manifest_is_refused_with_its_place(content: bytes) -> None:
    with pytest.raises(CorruptBackupError, match=r"manifest\.json"):
        parse_manifest(NAME, content, Keyring())


def test_every_cut_of_a_sealed_manifest_is_found() -> None:
    sealed = a_manifest().to_json(KEY).rstrip()
    for length in range(len(sealed)):
        with pytest.raises(CorruptBackupError):
            parse_manifest(NAME, sealed[:length], Keyring(KEY))

"""Keys: Kanbu's derivation, ids, and what looks like a mistake."""

from __future__ import annotations

import hashlib
import pickle

import pytest

from kanbu_backup_dagster.backup.keys import Keyring, derive_key, likely_mistake, load_keyring
from kanbu_backup_dagster.errors import EncryptionKeyError
from kanbu_backup_dagster.settings import Settings, is_secret

HEX = "0123456789abcdef" * 4


def test_64_hex_characters_are_the_key_in_either_case() -> None:
    assert derive_key(HEX).secret == bytes.fromhex(HEX)
    assert derive_key(HEX.upper()).secret == bytes.fromhex(HEX)


@pytest.mark.parametrize("text", ["my-super-secure-passphrase-2026", "Schlüssel ✓", HEX[:-1], HEX + "0", " padded "])
def test_anything_else_is_a_passphrase(text: str) -> None:
    salt = b"kanbu-backup-encryption-salt-v1"
    assert derive_key(text).secret == hashlib.pbkdf2_hmac("sha256", text.encode(), salt, 100_000, 32)


@pytest.mark.parametrize("text", ["   ", "\udcff"])
def test_what_cannot_be_a_key_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(EncryptionKeyError, match="BACKUP_ENCRYPTION_KEY"):
        derive_key(text)


def test_a_key_shows_its_id_and_nothing_else() -> None:
    key = derive_key(HEX)
    assert repr(key) == f"EncryptionKey(key_id='{key.key_id}')"
    assert len(key.key_id) == 16
    assert key.key_id != derive_key(HEX[::-1]).key_id
    assert key.secret.hex() not in repr(Keyring(key))


def test_reading_chooses_by_id() -> None:
    new, old = derive_key("new"), derive_key("old")
    ring = Keyring(new, (old,))
    assert ring.reading(old.key_id) is old
    assert ring.reading(None) is new
    with pytest.raises(EncryptionKeyError, match="feed"):
        ring.reading("feed")
    with pytest.raises(EncryptionKeyError, match=r"^Backup is encrypted but BACKUP_ENCRYPTION_KEY is not set"):
        Keyring().reading(None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one, with a comma", ["one, with a comma"]),
        ('["one", "two \\" three"]', ["one", 'two " three']),
        (f'["{HEX}"]', [HEX]),
        ('["current", "one", "one"]', ["one"]),
        ("[]", []),
    ],
)
def test_former_keys_are_one_as_it_is_or_several_as_json(text: str, expected: list[str]) -> None:
    ring = load_keyring(Settings.model_validate({"encryption_key": "current", "encryption_key_previous": text}))
    assert ring == Keyring(derive_key("current"), tuple(derive_key(key) for key in expected))
    assert is_secret("encryption_key_previous")


@pytest.mark.parametrize("text", ['["s3cret"', '["s3cret", 1]', "[s3cret]", '["s3cret", " "]', "  "])
def test_former_keys_that_cannot_be_used_are_refused_without_repeating_them(text: str) -> None:
    with pytest.raises(EncryptionKeyError, match="BACKUP_ENCRYPTION_KEY_PREVIOUS") as caught:
        load_keyring(Settings.model_validate({"encryption_key_previous": text}))
    assert "s3cret" not in str(caught.value)


def test_an_error_survives_pickling() -> None:
    error = EncryptionKeyError("what", tried=("a", "b"), advice="do")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "what\n  - a\n  - b\ndo"


def test_likely_mistakes_are_said() -> None:
    assert likely_mistake(HEX) is None
    assert likely_mistake("passphrase") is None
    assert "white space" in str(likely_mistake(HEX + "\n"))
    assert "63 hex" in str(likely_mistake(HEX[:-1]))

"""Encryption keys: from what a user types to the bytes a cipher takes.

What belongs here: derivation, key ids and choosing a key by its id. What does not: ciphers (`stages`).

The derivation is Kanbu's own: 64 hex characters are the key; anything else is a passphrase for PBKDF2-HMAC-SHA256 with
100,000 iterations and a fixed salt. What we add (key id, seal key) is derived by HKDF (RFC 5869): neither tells the
key.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kanbu_backup_dagster.errors import EncryptionKeyError
from kanbu_backup_dagster.settings import Settings

PASSPHRASE_SALT = b"kanbu-backup-encryption-salt-v1"
PASSPHRASE_ITERATIONS = 100_000
KEY_BYTES = 32

PREVIOUS = "BACKUP_ENCRYPTION_KEY_PREVIOUS"
NO_KEY = "Backup is encrypted but BACKUP_ENCRYPTION_KEY is not set"


@dataclass(frozen=True)
class EncryptionKey:
    """A key ready for use.

    Attributes:
        key_id: 16 hex characters that name the key and tell nothing of it.
        secret: The 32 bytes of AES-256.
        seal_key: The 32 bytes that seal manifests.
    """

    key_id: str
    secret: bytes = field(repr=False)
    seal_key: bytes = field(repr=False)


@lru_cache(maxsize=16)
def derive_key(text: str, variable: str = "BACKUP_ENCRYPTION_KEY") -> EncryptionKey:
    """The key that `text` stands for.

    Args:
        variable: Where it comes from, for the message.

    Raises:
        EncryptionKeyError: `text` cannot be a key.
    """
    if re.fullmatch(r"[0-9a-fA-F]{64}", text):
        secret = bytes.fromhex(text)
    else:
        try:
            passphrase = text.encode()
        except UnicodeEncodeError:
            raise EncryptionKeyError(f"{variable} is not valid UTF-8.") from None
        if not text.strip():
            raise EncryptionKeyError(
                f"{variable} holds only white space.",
                advice="Set it to 64 hex characters (`openssl rand -hex 32`) or a passphrase, or remove it.",
            )
        secret = hashlib.pbkdf2_hmac("sha256", passphrase, PASSPHRASE_SALT, PASSPHRASE_ITERATIONS, KEY_BYTES)
    return EncryptionKey(
        _expand(secret, b"kanbu-backup key id v1", 8).hex(),
        secret,
        _expand(secret, b"kanbu-backup manifest seal v1", 32),
    )


def _expand(secret: bytes, purpose: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=purpose).derive(secret)


def likely_mistake(text: str) -> str | None:
    """What looks wrong with a valid key: worth a warning, since it may differ from what was meant."""
    if text != text.strip():
        return "BACKUP_ENCRYPTION_KEY begins or ends with white space; it is taken as part of the passphrase."
    if re.fullmatch(r"[0-9a-fA-F]{32,}", text) and len(text) != 64:
        return f"BACKUP_ENCRYPTION_KEY has {len(text)} hex characters, not 64; it is taken as a passphrase."
    return None


@dataclass(frozen=True)
class Keyring:
    """The keys that are set: the current one writes and reads, the previous ones read."""

    current: EncryptionKey | None = None
    previous: tuple[EncryptionKey, ...] = ()

    @property
    def all(self) -> tuple[EncryptionKey, ...]:
        """Every key, the current one first."""
        return ((self.current,) if self.current else ()) + self.previous

    @property
    def ids(self) -> frozenset[str]:
        """The ids of all keys."""
        return frozenset(key.key_id for key in self.all)

    def reading(self, key_id: str | None) -> EncryptionKey:
        """The key to read a file with; `key_id` is None where the file does not say (no manifest).

        Raises:
            EncryptionKeyError: No key is set, or none of that id.
        """
        if not self.all:
            raise EncryptionKeyError(
                NO_KEY + ".",
                advice="Find the key the backup was made with and set BACKUP_ENCRYPTION_KEY in .env.",
            )
        if key_id is None:
            return self.all[0]
        for key in self.all:
            if key.key_id == key_id:
                return key
        raise EncryptionKeyError(
            f"The backup was encrypted with key {key_id}; set {'are' if self.previous else 'is'} "
            f"{', '.join(key.key_id for key in self.all)}.",
            advice=f"Set BACKUP_ENCRYPTION_KEY, or {PREVIOUS} beside it, to the key the backup was made with.",
        )


def load_keyring(settings: Settings) -> Keyring:
    """The keys of the environment.

    Raises:
        EncryptionKeyError: A key is malformed.
    """
    text, previous = settings.secret("encryption_key"), settings.secret("encryption_key_previous")
    current = derive_key(text) if text else None
    older = dict.fromkeys(derive_key(one, PREVIOUS) for one in _previous_keys(previous or ""))
    return Keyring(current, tuple(key for key in older if key != current))


def _previous_keys(text: str) -> list[str]:
    """One key as it is; several as JSON, since a passphrase may hold any character that could stand between two."""
    if not text.startswith("["):
        return [text] if text else []
    try:
        keys = json.loads(text)
    except ValueError:
        keys = None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise EncryptionKeyError(
            f"{PREVIOUS} begins with `[` and is not a JSON list of texts.",
            advice='Several keys are written ["one","another"], with " and \\ in a key as \\" and \\\\.',
        )
    return keys

"""Backups for tests without a server: made by the real pipeline, from bytes that a test names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kanbu_backup_dagster.backup.keys import Keyring, derive_key
from kanbu_backup_dagster.backup.landing import Origin, make_backup
from kanbu_backup_dagster.backup.manifest import DatabaseFacts, Manifest, SourceFacts
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.backup.recipe import Recipe
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster_tests.conftest import TEST_KEY

DUMP = b"""--
-- PostgreSQL database dump
--

SET client_encoding = 'UTF8';

COPY public.t (i) FROM stdin;
1
2
\\.

--
-- PostgreSQL database dump complete
--

"""
FACTS = DatabaseFacts(
    name="kanbu",
    server_version="16.4",
    pg_dump_version="16.4",
    mode="direct",
    size_bytes=1000,
    rows={"public.t": 2},
)
KEYS = Keyring(derive_key(TEST_KEY))


@dataclass(frozen=True)
class Bytes:
    """A source that gives the bytes it was made with, and says of them what it was told to say."""

    content: bytes = DUMP
    facts: DatabaseFacts | SourceFacts = field(default=FACTS)

    @property
    def name(self) -> str:
        return "dump"

    @property
    def backup_type(self) -> BackupType:
        return BackupType.DATABASE if isinstance(self.facts, DatabaseFacts) else BackupType.SOURCE

    @property
    def estimated_bytes(self) -> int:
        return len(self.content)

    def open(self, settings: Settings) -> Bytes:
        return self

    def chunks(self) -> Iterator[bytes]:
        yield self.content

    def findings(self) -> DatabaseFacts | SourceFacts:
        return self.facts


def store_backup(
    folder: Path, source: Bytes | None = None, *, keys: Keyring = KEYS, origin: Origin | None = None
) -> Manifest:
    """A backup in `folder`, by the real pipeline; encrypted when there is a key."""
    storage = FolderStorage(folder)
    storage.prepare()
    recipe = Recipe(source or Bytes()).with_compression(2).with_checksum()
    if keys.current is not None:
        recipe = recipe.with_encryption(keys.current.key_id)
    return make_backup(recipe, settings=Settings(), keys=keys, storage=storage, origin=origin or Origin())

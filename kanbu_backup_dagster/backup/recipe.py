"""The recipe: a backup described, before a byte flows.

What belongs here: the frozen, picklable description that ops hand on, and `Flow`, which pulls it through once. What
does not: where the bytes go (`storage`) and where they come from (`sources`).

A recipe holds no secret: the database's password and the key are taken from the environment when the flow is opened.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol

from kanbu_backup_dagster.backup import stages
from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.manifest import DatabaseFacts, SourceFacts, StageReport
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.errors import EncryptionKeyError
from kanbu_backup_dagster.settings import Settings


class OpenSource(Protocol):
    """A source whose bytes are flowing."""

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in chunks of about 1 MiB. Closing the generator ends the source at once, leaving no process."""

    def findings(self) -> DatabaseFacts | SourceFacts:
        """What was learnt on the way; valid when `chunks` is exhausted, which it only is when the source was whole."""


class Source(Protocol):
    """Where a recipe's bytes come from. Frozen, picklable, without secrets."""

    @property
    def name(self) -> str:
        """The stage's name in reports: `dump` or `archive`."""

    @property
    def backup_type(self) -> BackupType:
        """What kind of backup this makes."""

    @property
    def estimated_bytes(self) -> int:
        """About how many bytes will flow; for progress only."""

    def open(self, settings: Settings) -> OpenSource:
        """Begin. Secrets are taken from `settings` now."""


@dataclass(frozen=True)
class Compress:
    """gzip by ISA-L at `level` (0 to 3)."""

    level: int


@dataclass(frozen=True)
class Checksum:
    """SHA-256 of the bytes that pass here; the stored bytes have their own in any case."""


@dataclass(frozen=True)
class Encrypt:
    """AES-256-GCM under the key of that id."""

    key_id: str


@dataclass(frozen=True)
class Recipe:
    """A source and the stages its bytes go through, in order."""

    source: Source
    compression: Compress | None = None
    checksum: Checksum | None = None
    encryption: Encrypt | None = None

    def with_compression(self, level: int) -> Recipe:
        """This recipe, compressing."""
        return replace(self, compression=Compress(level))

    def with_checksum(self) -> Recipe:
        """This recipe, hashing what is compressed."""
        return replace(self, checksum=Checksum())

    def with_encryption(self, key_id: str) -> Recipe:
        """This recipe, encrypting."""
        return replace(self, encryption=Encrypt(key_id))


@dataclass
class _Meter:
    """Counts what leaves a stage and the time spent getting it, upstream included."""

    name: str
    upstream: _Meter | None
    bytes_out: int = 0
    seconds: float = 0.0

    def measure(self, chunks: Iterator[bytes], failed: Callable[[str], None]) -> Iterator[bytes]:
        while True:
            begun = time.perf_counter()
            try:
                chunk = next(chunks)
            except StopIteration:
                return
            except BaseException:
                failed(self.name)
                raise
            finally:
                self.seconds += time.perf_counter() - begun
            self.bytes_out += len(chunk)
            yield chunk

    def report(self) -> StageReport:
        above = self.upstream
        return StageReport(
            name=self.name,
            bytes_in=above.bytes_out if above else self.bytes_out,
            bytes_out=self.bytes_out,
            busy_seconds=round(max(self.seconds - (above.seconds if above else 0.0), 0.0), 3),
        )


@dataclass
class Flow:
    """A recipe being pulled through, once. A context manager: leaving it ends every stage, whatever happened.

    Attributes:
        failed_stage: The stage an error arose in, while or after one did.
    """

    recipe: Recipe
    settings: Settings
    keys: Keyring
    failed_stage: str | None = None
    _meters: list[_Meter] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Flow:
        recipe = self.recipe
        self._content_hash, self._stored_hash = hashlib.sha256(), hashlib.sha256()
        self._source = recipe.source.open(self.settings)
        flow = self._metered(recipe.source.name, self._source.chunks())
        if recipe.compression is not None:
            flow = self._metered("compress", stages.compress(flow, recipe.compression.level))
        if recipe.checksum is not None:
            flow = self._metered("checksum", stages.hashed(flow, self._content_hash.update))
        if recipe.encryption is not None:
            key = self.keys.current
            if key is None or key.key_id != recipe.encryption.key_id:
                raise EncryptionKeyError("BACKUP_ENCRYPTION_KEY changed while the run was under way.")
            flow = self._metered("encrypt", stages.encrypt(flow, key))
        self._flow = flow
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _metered(self, name: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        meter = _Meter(name, self._meters[-1] if self._meters else None)
        self._meters.append(meter)
        measured = meter.measure(chunks, self._note_failure)
        # Left in reverse order: the last stage is closed first and the source's process last, each for certain.
        self._stack.enter_context(closing(chunks))  # type: ignore[type-var]
        self._stack.enter_context(closing(measured))  # type: ignore[type-var]
        return measured

    def _note_failure(self, stage: str) -> None:
        # The innermost stage an exception leaves is the one it arose in.
        if self.failed_stage is None:
            self.failed_stage = stage

    def chunks(self) -> Iterator[bytes]:
        """The stored bytes."""
        for chunk in self._flow:
            self._stored_hash.update(chunk)
            yield chunk

    @property
    def raw_bytes(self) -> int:
        """Bytes the source has given so far."""
        return self._meters[0].bytes_out

    @property
    def compressed_bytes(self) -> int:
        """Bytes before encryption so far."""
        return next(meter.bytes_out for meter in reversed(self._meters) if meter.name != "encrypt")

    @property
    def stored_bytes(self) -> int:
        """Bytes handed on so far."""
        return self._meters[-1].bytes_out

    @property
    def sha256(self) -> str:
        """Of the compressed bytes, once exhausted."""
        return self._content_hash.hexdigest()

    @property
    def stored_sha256(self) -> str:
        """Of the stored bytes, once exhausted."""
        return self._stored_hash.hexdigest()

    def reports(self) -> tuple[StageReport, ...]:
        """A row per stage."""
        return tuple(meter.report() for meter in self._meters)

    def findings(self) -> DatabaseFacts | SourceFacts:
        """What the source learnt, once exhausted."""
        return self._source.findings()

"""Making a backup: a recipe pulled through once into a storage, with its manifest.

What belongs here: the one loop that moves a backup's bytes, and the manifest drawn up from what it saw. What does not:
the stages (`stages`), atomicity (`storage`), and when a backup is made (`orchestration`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

from kanbu_backup_dagster.backup.catalog import Backup, Catalog
from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.manifest import DatabaseFacts, Manifest, SourceFacts, Trigger
from kanbu_backup_dagster.backup.names import candidate_names
from kanbu_backup_dagster.backup.recipe import Flow, Recipe
from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.schedule_file import RetentionPolicy
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.storage.protocol import Storage

# A first backup has no former one to judge by; gzip makes a twentieth of a dump at best.
_BEST_COMPRESSION = 20


@dataclass(frozen=True)
class Origin:
    """What started a backup: recorded in its manifest."""

    trigger: Trigger = Trigger.MANUAL
    schedule_id: int | None = None
    schedule_name: str | None = None
    retention: RetentionPolicy | None = None
    run_id: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a stream is: bytes so far, the estimate of all (0 when unknown), and seconds since it began."""

    done_bytes: int
    estimated_bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.done_bytes / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        percent = (
            f" ({min(self.done_bytes / self.estimated_bytes, 1):.0%} of the estimate)" if self.estimated_bytes else ""
        )
        return f"{self.done_bytes / 1e6:,.0f} MB{percent}, {self.rate / 1e6:,.0f} MB/s"


def expected_stored_bytes(recipe: Recipe, last: Backup | None) -> int:
    """Room the recipe's backup will need, judged by the last one of its kind; a low guess when there is none."""
    estimate = recipe.source.estimated_bytes
    if last is None or last.manifest is None or not last.manifest.raw_bytes:
        return estimate // _BEST_COMPRESSION
    grown = max(estimate / last.manifest.raw_bytes, 0.5)
    return int(last.manifest.stored_bytes * min(grown, 2.0))


def make_backup(
    recipe: Recipe,
    *,
    settings: Settings,
    keys: Keyring,
    storage: Storage,
    origin: Origin,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Pull `recipe` through into `storage`. On any failure nothing is left behind: no process, no partial file.

    Returns:
        The manifest as stored, verification pending.

    Raises:
        KanbuError: A stage failed: the error that arose there, of the same class, its message ending with the stage's
            name.
        StorageError: The storage failed.
    """
    started_at, begun = datetime.now(timezone.utc), time.monotonic()
    catalog = Catalog(storage, keys)
    with storage.receive() as incoming, Flow(recipe, settings, keys) as flow:
        try:
            for chunk in flow.chunks():
                incoming.write(chunk)
                on_progress(Progress(flow.raw_bytes, recipe.source.estimated_bytes, time.monotonic() - begun))
        except KanbuError as error:
            if flow.failed_stage is None:
                raise
            # Of the same class, which says whether trying again may help, and is the command's exit code.
            raise type(error)(
                f"{error.message} (stage `{flow.failed_stage}`)", tried=error.tried, advice=error.advice
            ) from error
        findings = flow.findings()

        def manifest_for(filename: str) -> Manifest:
            return Manifest(
                filename=filename,
                type=recipe.source.backup_type,
                trigger=origin.trigger,
                schedule_id=origin.schedule_id,
                schedule_name=origin.schedule_name,
                created_at=started_at,
                raw_bytes=flow.raw_bytes,
                compressed_bytes=flow.compressed_bytes,
                stored_bytes=flow.stored_bytes,
                sha256=flow.sha256,
                stored_sha256=flow.stored_sha256,
                encrypted=recipe.encryption is not None,
                key_id=recipe.encryption.key_id if recipe.encryption else None,
                database=findings if isinstance(findings, DatabaseFacts) else None,
                source=findings if isinstance(findings, SourceFacts) else None,
                retention=origin.retention,
                duration_seconds=round(time.monotonic() - begun, 3),
                stages=flow.reports(),
                run_id=origin.run_id,
            )

        names = candidate_names(recipe.source.backup_type, started_at, encrypted=recipe.encryption is not None)
        filename = incoming.commit(names, lambda name: catalog.sealed(manifest_for(name)))
    manifest = catalog.get(filename).manifest
    assert manifest is not None
    return manifest

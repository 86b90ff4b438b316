"""Retention at scale: reading a folder of 100,000 backups, and planning what goes."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

from benchmarks.measuring import ROUNDS, Report
from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.keys import Keyring, derive_key
from kanbu_backup_dagster.backup.manifest import (
    DatabaseFacts,
    Manifest,
    Trigger,
    Verification,
    VerificationStatus,
)
from kanbu_backup_dagster.backup.names import BackupName, BackupType
from kanbu_backup_dagster.backup.retention import plan_retention
from kanbu_backup_dagster.schedule_file import RetentionPolicy
from kanbu_backup_dagster.storage.folder import FolderStorage

FILES = int(os.environ.get("KANBU_BENCH_FILES", "100000"))
TABLES = 30
_NEWEST = datetime(2026, 1, 18, 10, 30, tzinfo=timezone.utc)


def run() -> list[Report]:
    """Backups every ten minutes, each with a sealed manifest of `TABLES` tables; CPU seconds."""
    keys = Keyring(derive_key("a benchmark's passphrase"))
    with tempfile.TemporaryDirectory(prefix="kanbu-bench-") as name:
        storage = FolderStorage(Path(name))
        _fill(Path(name), keys)
        catalog = Catalog(storage, keys)
        backups = catalog.backups()
        policies = {1: RetentionPolicy(), 2: RetentionPolicy.parse("365/30/52/24")}
        report = Report(f"{len(backups):,} backups", ("what", "CPU", "bound"))
        for what, bound, work in (
            ("listing the files", "a few seconds", storage.files),
            ("reading every manifest, seal checked", "", catalog.backups),
            (
                "planning, two policies",
                "at most 1 s",
                lambda: plan_retention(
                    backups,
                    backup_type=BackupType.DATABASE,
                    policies=policies,
                    config_whole=True,
                    now=_NEWEST,
                    zone=timezone.utc,
                ),
            ),
        ):
            report.rows.append((what, f"{_cpu_seconds(work):.2f} s", bound))
    return [report]


def _cpu_seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return statistics.median(taken)


def _fill(folder: Path, keys: Keyring) -> None:
    assert keys.current is not None
    model = Manifest(
        filename="",
        type=BackupType.DATABASE,
        trigger=Trigger.SCHEDULED,
        schedule_id=1,
        created_at=_NEWEST,
        raw_bytes=1,
        compressed_bytes=1,
        stored_bytes=0,
        sha256="0" * 64,
        stored_sha256="0" * 64,
        encrypted=True,
        key_id=keys.current.key_id,
        database=DatabaseFacts(
            name="kanbu",
            server_version="16.4",
            pg_dump_version="16.4",
            mode="direct",
            size_bytes=1,
            rows={f'public."Table{number}"': number for number in range(TABLES)},
        ),
        duration_seconds=1,
        verification=Verification(status=VerificationStatus.VERIFIED, at=_NEWEST),
    )
    for number in range(FILES):
        at = _NEWEST - timedelta(minutes=10 * number)
        name = str(BackupName(BackupType.DATABASE, at, compressed=True, encrypted=True))
        (folder / name).touch()
        manifest = model.model_copy(update={"filename": name, "created_at": at})
        (folder / f"{name}.manifest.json").write_bytes(manifest.to_json(keys.current))

"""The main job's memory by size of dump: it must not grow."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from benchmarks.board import board, grow
from benchmarks.jobs import fresh_job, prepare_environment
from benchmarks.measuring import Report, peak_mb
from kanbu_backup_dagster.backup.environment import load_environment

GIGABYTES = sorted(float(size) for size in os.environ.get("KANBU_BENCH_MEMORY_GB", "0.1,1,4").split(","))


def run() -> list[Report]:
    """The peak of the worker's process at each of `GIGABYTES`."""
    report = Report("Peak memory of the worker", ("dump", "stored", "peak resident memory"))
    with tempfile.TemporaryDirectory(prefix="kanbu-bench-") as folder, board(GIGABYTES[0]) as (server, url):
        prepare_environment(Path(folder), DATABASE_URL=url, BACKUP_PG_MODE="direct")
        for size in GIGABYTES:
            grow(server, "kanbu", size)
            peak = peak_mb(fresh_job("database_backup"))
            (backup,) = load_environment().catalog.backups()
            assert backup.manifest is not None
            sizes = (backup.manifest.raw_bytes, backup.manifest.stored_bytes)
            report.rows.append((*(f"{size / 1e9:.2f} GB" for size in sizes), f"{peak:.0f} MB"))
    return [report]

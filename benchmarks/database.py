"""The main job against what a shell would do: speed, size and verification."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from benchmarks.board import board
from benchmarks.jobs import fresh_job, prepare_environment, step_seconds
from benchmarks.measuring import RATIO_HEADER, Report, interleaved, seconds_of
from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.sources.embedded_postgres import EmbeddedPostgres

GIGABYTES = float(os.environ.get("KANBU_BENCH_GB", "2"))


def run() -> list[Report]:
    """Speed and size at `GIGABYTES`."""
    with tempfile.TemporaryDirectory(prefix="kanbu-bench-") as folder, board(GIGABYTES) as (server, url):
        prepare_environment(Path(folder), DATABASE_URL=url, BACKUP_PG_MODE="direct")
        return [_speed(Path(folder), server, url)]


def _speed(folder: Path, server: EmbeddedPostgres, url: str) -> Report:
    dump = f"{server.bin_folder / 'pg_dump'} -d '{url}'"
    pipeline_file = folder / "pipeline.enc"
    stored: list[float] = []
    verified: list[float] = []

    def whole_job() -> float:
        seconds = seconds_of(fresh_job("database_backup"))
        stored.append(step_seconds("store"))
        verified.append(step_seconds("verify"))
        return seconds

    def digests() -> float:
        here = load_environment()
        (backup,) = here.catalog.backups()
        digest = f"openssl dgst -sha256 {here.storage.path(backup.filename)}"
        return seconds_of(f"{digest} && {digest}")

    pipeline = f"{dump} | gzip -6 | openssl enc -aes-256-ctr -pbkdf2 -pass pass:x > {pipeline_file}"
    seconds = interleaved(
        {
            "pg_dump > /dev/null": lambda: seconds_of(f"{dump} > /dev/null"),
            "dagster job execute": whole_job,
            "openssl dgst, twice": digests,
            "shell pipeline": lambda: seconds_of(pipeline),
        }
    )
    (backup,) = load_environment().catalog.backups()
    assert backup.manifest is not None
    report = Report(
        f"Database backup, a dump of {backup.manifest.raw_bytes / 1e9:.2f} GB (PostgreSQL {server.version})",
        RATIO_HEADER,
    )
    report.ratio("`store` op", "`pg_dump > /dev/null`", stored[1:], seconds["pg_dump > /dev/null"], 1.05)
    report.ratio(
        "`dagster job execute`, the whole process",
        "`pg_dump \\| gzip -6 \\| openssl enc`",
        seconds["dagster job execute"],
        seconds["shell pipeline"],
        0.40,
    )
    report.ratio("`verify` op", "`openssl dgst -sha256`, twice", verified[1:], seconds["openssl dgst, twice"], 1.30)
    size, other = backup.manifest.stored_bytes, pipeline_file.stat().st_size
    report.rows.append(
        (
            "size",
            f"{size / 1e6:.1f} MB",
            "`gzip -6`",
            f"{other / 1e6:.1f} MB",
            f"**{size / other:.3f}**",
            "at most 1.08",
        )
    )
    report.bars["size"] = (size / other, 1.08)
    return report

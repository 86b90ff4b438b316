"""The main job against what a shell would do: speed, size and verification."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dagster import DagsterEventType, DagsterInstance

from benchmarks.board import board
from benchmarks.measuring import RATIO_HEADER, Report, interleaved, seconds_of
from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.orchestration.dagster_home import ensure_home
from kanbu_backup_dagster.sources.embedded_postgres import EmbeddedPostgres

GIGABYTES = float(os.environ.get("KANBU_BENCH_GB", "2"))
_DEFINITIONS = "kanbu_backup_dagster.definitions"
_JOB = [sys.executable, "-m", "dagster", "job", "execute", "-m", _DEFINITIONS, "-j", "database_backup"]


class JobBench:
    """The job with a folder for everything it makes, and the environment that points there."""

    def __init__(self, folder: Path, server: EmbeddedPostgres, url: str) -> None:
        self.store, self.home = folder / "store", folder / "dagster"
        self.server = server
        os.environ |= {
            "DATABASE_URL": url,
            "BACKUP_PG_MODE": "direct",
            "BACKUP_LOCAL_PATH": str(self.store),
            "BACKUP_ENCRYPTION_KEY": "a benchmark's passphrase",
            "DAGSTER_HOME": str(self.home),
        }
        ensure_home()
        self.pipeline_file = folder / "pipeline.enc"

    def clear(self) -> None:
        """One backup at a time on the disk."""
        shutil.rmtree(self.store, ignore_errors=True)
        self.store.mkdir()

    def fresh_job(self) -> Sequence[str]:
        """The job's command, for a Dagster home and a storage that hold nothing yet."""
        self.clear()
        shutil.rmtree(self.home)
        ensure_home()
        return _JOB

    def step_seconds(self, step: str) -> float:
        """How long a step of the last run took, by Dagster's own record."""
        with DagsterInstance.get() as instance:
            (run,) = instance.get_runs()
            moments = {
                event.dagster_event_type: event.timestamp
                for event in instance.all_logs(run.run_id)
                if event.step_key == step and event.dagster_event_type
            }
        return moments[DagsterEventType.STEP_SUCCESS] - moments[DagsterEventType.STEP_START]

    @property
    def dump(self) -> str:
        """The shell's command for the dump alone."""
        return f"{self.server.bin_folder / 'pg_dump'} -d '{os.environ['DATABASE_URL']}'"


def run() -> list[Report]:
    """Speed and size at `GIGABYTES`."""
    with tempfile.TemporaryDirectory(prefix="kanbu-bench-") as folder, board(GIGABYTES) as (server, url):
        return [_speed(JobBench(Path(folder), server, url))]


def _speed(bench: JobBench) -> Report:
    stored: list[float] = []
    verified: list[float] = []

    def whole_job() -> float:
        seconds = seconds_of(bench.fresh_job())
        stored.append(bench.step_seconds("store"))
        verified.append(bench.step_seconds("verify"))
        return seconds

    def digests() -> float:
        (backup,) = load_environment().catalog.backups()
        digest = f"openssl dgst -sha256 {bench.store / backup.filename}"
        return seconds_of(f"{digest} && {digest}")

    pipeline = f"{bench.dump} | gzip -6 | openssl enc -aes-256-ctr -pbkdf2 -pass pass:x > {bench.pipeline_file}"
    seconds = interleaved(
        {
            "pg_dump > /dev/null": lambda: seconds_of(f"{bench.dump} > /dev/null"),
            "dagster job execute": whole_job,
            "openssl dgst, twice": digests,
            "shell pipeline": lambda: seconds_of(pipeline),
        }
    )
    (backup,) = load_environment().catalog.backups()
    assert backup.manifest is not None
    report = Report(
        f"Database backup, a dump of {backup.manifest.raw_bytes / 1e9:.2f} GB (PostgreSQL {bench.server.version})",
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
    size, other = backup.manifest.stored_bytes, bench.pipeline_file.stat().st_size
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

"""Source backups against `tar | gzip -6`: many small files, one large file, and the worker's memory in both."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from dagster import DagsterEventType, DagsterInstance

from benchmarks.measuring import RATIO_HEADER, Report, interleaved, process
from kanbu_backup_dagster.orchestration.dagster_home import ensure_home

FILES = int(os.environ.get("KANBU_BENCH_FILES", "100000"))
GIGABYTES = float(os.environ.get("KANBU_BENCH_GB", "2"))
_JOB = ["dagster", "job", "execute", "-m", "kanbu_backup_dagster.definitions", "-j", "source_backup"]
_BLOCK = 1 << 20


def run() -> list[Report]:
    """The two trees, then the memory of the worker."""
    memory = Report("Memory of the worker", ("tree", "peak of the worker's process"))
    with tempfile.TemporaryDirectory(prefix="kanbu-bench-") as name:
        folder = Path(name)
        os.environ |= {
            "BACKUP_LOCAL_PATH": str(folder / "store"),
            "BACKUP_ENCRYPTION_KEY": "a benchmark's passphrase",
            "DAGSTER_HOME": str(folder / "dagster"),
        }
        many, large = folder / "many", folder / "large"
        _grow_many(many)
        reports = [_against_tar(many, f"{FILES:,} small files", 0.60, memory)]
        shutil.rmtree(many)
        _grow_large(large)
        reports.append(_against_tar(large, f"one file of {GIGABYTES:g} GB", 0.25, memory))
    return [*reports, memory]


def _lines(chance: random.Random, size: int) -> bytes:
    words = [f"{chance.choice('abcdefgh')}{chance.randrange(5000):x}" for _ in range(size // 6 + 1)]
    return " ".join(words).encode()[:size]


def _grow_many(top: Path) -> None:
    chance = random.Random(1)
    text = _lines(chance, _BLOCK)
    for number in range(FILES):
        folder = top / f"package{number // 1000}" / f"src{number // 50 % 20}"
        if number % 50 == 0:
            folder.mkdir(parents=True, exist_ok=True)
        size = chance.randrange(200, 6000)
        at = chance.randrange(len(text) - size)
        (folder / f"component{number}.tsx").write_bytes(text[at : at + size])


def _grow_large(top: Path) -> None:
    top.mkdir()
    chance = random.Random(2)
    with (top / "large.csv").open("wb") as file:
        blocks = [_lines(chance, _BLOCK) for _ in range(64)]
        for _ in range(int(GIGABYTES * 1e9) // _BLOCK):
            file.write(chance.choice(blocks))


def _against_tar(tree: Path, what: str, bound: float, memory: Report) -> Report:
    store, home = Path(os.environ["BACKUP_LOCAL_PATH"]), Path(os.environ["DAGSTER_HOME"])
    os.environ["KANBU_SOURCE_PATH"] = str(tree)
    streamed: list[float] = []
    peaks: list[float] = []

    def job() -> float:
        for folder in (store, home):
            shutil.rmtree(folder, ignore_errors=True)
        ensure_home()
        measured = process([sys.executable, "-m", *_JOB])
        streamed.append(_step_seconds("archive") + _step_seconds("store"))
        peaks.append(measured.peak_mb)
        return measured.seconds

    archive = tree.parent / "archive.tar.gz"
    pipeline = f"set -o pipefail; tar -C {tree.parent} -cf - {tree.name} | gzip -6 > {archive}"
    seconds = interleaved(
        {"dagster job execute": job, "tar | gzip -6": lambda: process(["bash", "-c", pipeline]).seconds}
    )
    memory.rows.append((what, f"{max(peaks):.0f} MB"))
    report = Report(f"Source backup, {what}", RATIO_HEADER)
    report.ratio(f"`archive` and `store`, {what}", "`tar \\| gzip -6`", streamed[1:], seconds["tar | gzip -6"], bound)
    whole, other = seconds["dagster job execute"], seconds["tar | gzip -6"]
    report.ratio(f"the whole process, verified, {what}", "`tar \\| gzip -6`", whole, other, bound)
    return report


def _step_seconds(step: str) -> float:
    """How long a step of the last run took, by Dagster's own record."""
    with DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        moments = {
            event.dagster_event_type: event.timestamp
            for event in instance.all_logs(run.run_id)
            if event.step_key == step and event.dagster_event_type
        }
    return moments[DagsterEventType.STEP_SUCCESS] - moments[DagsterEventType.STEP_START]

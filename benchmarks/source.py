"""Source backups against `tar | gzip -6`: many small files, one large file, and the worker's memory in both."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

from benchmarks.jobs import fresh_job, prepare_environment, step_seconds
from benchmarks.measuring import RATIO_HEADER, Report, interleaved, peak_mb, seconds_of

FILES = int(os.environ.get("KANBU_BENCH_FILES", "100000"))
GIGABYTES = float(os.environ.get("KANBU_BENCH_GB", "2"))
MEMORY_GIGABYTES = sorted(float(size) for size in os.environ.get("KANBU_BENCH_MEMORY_GB", "0.1,1,4").split(","))
_BLOCK = 1 << 20


def run() -> list[Report]:
    """The two trees, then the memory of the worker."""
    memory = Report("Peak memory of the worker", ("tree", "peak resident memory"))
    with tempfile.TemporaryDirectory(prefix="kanbu-bench-") as name:
        folder = Path(name)
        prepare_environment(folder)
        many, large = folder / "many", folder / "large"
        _grow_many(many)
        reports = [_against_tar(many, f"{FILES:,} small files", 0.60)]
        memory.rows.append((f"{FILES:,} small files", _peak()))
        shutil.rmtree(many)
        _grow_large(large, GIGABYTES)
        reports.append(_against_tar(large, f"one file of {GIGABYTES:g} GB", 0.25))
        for gigabytes in MEMORY_GIGABYTES:
            shutil.rmtree(large)
            _grow_large(large, gigabytes)
            memory.rows.append((f"one file of {gigabytes:g} GB", _peak()))
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


def _grow_large(top: Path, gigabytes: float) -> None:
    top.mkdir()
    chance = random.Random(2)
    with (top / "large.csv").open("wb") as file:
        blocks = [_lines(chance, _BLOCK) for _ in range(64)]
        for _ in range(int(gigabytes * 1e9) // _BLOCK):
            file.write(chance.choice(blocks))


def _peak() -> str:
    return f"{peak_mb(fresh_job('source_backup')):.0f} MB"


def _against_tar(tree: Path, what: str, bound: float) -> Report:
    os.environ["KANBU_SOURCE_PATH"] = str(tree)
    streamed: list[float] = []

    def job() -> float:
        seconds = seconds_of(fresh_job("source_backup"))
        streamed.append(step_seconds("archive") + step_seconds("store"))
        return seconds

    archive = tree.parent / "archive.tar.gz"
    pipeline = f"set -o pipefail; tar -C {tree.parent} -cf - {tree.name} | gzip -6 > {archive}"
    seconds = interleaved({"dagster job execute": job, "tar | gzip -6": lambda: seconds_of(["bash", "-c", pipeline])})
    report = Report(f"Source backup, {what}", RATIO_HEADER)
    report.ratio(f"`archive` and `store`, {what}", "`tar \\| gzip -6`", streamed[1:], seconds["tar | gzip -6"], bound)
    whole, other = seconds["dagster job execute"], seconds["tar | gzip -6"]
    report.ratio(f"the whole process, verified, {what}", "`tar \\| gzip -6`", whole, other, bound)
    return report

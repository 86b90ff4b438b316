"""What benchmarks share: timing whole processes, interleaving, and the report's form."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROUNDS = int(os.environ.get("KANBU_BENCH_ROUNDS", "5"))


@dataclass(frozen=True)
class Measured:
    """One process, measured: wall seconds, and peak resident memory of its largest process in MB."""

    seconds: float
    peak_mb: float


@dataclass
class Report:
    """A table for the results page: a title, what is compared, rows, and bars for the plot (label to ratio, bound)."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    bars: dict[str, tuple[float, float]] = field(default_factory=dict)

    def ratio(self, what: str, against: str, ours: Sequence[float], theirs: Sequence[float], bound: float) -> None:
        """Add a row comparing medians of seconds."""
        median, other = statistics.median(ours), statistics.median(theirs)
        self.rows.append(
            (what, f"{median:.2f} s", against, f"{other:.2f} s", f"**{median / other:.2f}**", f"at most {bound:.2f}")
        )
        self.bars[what] = (median / other, bound)

    def markdown(self) -> str:
        """The table."""
        lines = [f"## {self.title}", "", "| " + " | ".join(self.header) + " |", "|" + " --- |" * len(self.header)]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows), ""])


RATIO_HEADER = ("what", "median", "against", "median", "ratio", "bound")


def process(command: Sequence[str | Path] | str, environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command (a string is given to a shell) to its end.

    Raises:
        RuntimeError: It failed.
    """
    begun = time.perf_counter()
    with subprocess.Popen(
        command,
        shell=isinstance(command, str),
        env={**os.environ, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stderr is not None
        said = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if child.returncode != 0:
        raise RuntimeError(f"{command} ended with {child.returncode}: {said.decode()[-2000:]}")
    return Measured(seconds, usage.ru_maxrss / 1024)


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Each run in turn, a warm-up round and then `rounds` counted ones, so that the machine's moods hit all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = run()
            print(f"  {name}: {took:.2f} s{' (warm-up)' if number == 0 else ''}", flush=True)  # noqa: T201
            if number:
                seconds[name].append(took)
    return seconds


def machine() -> str:
    """What this ran on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"{os.cpu_count()} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}"

"""What benchmarks share: timing whole processes, interleaving, and the report's form."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROUNDS = int(os.environ.get("KANBU_BENCH_ROUNDS", "5"))


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


# A process's peak counts from what its parent had grown to, so one that has grown to nothing starts it.
_PEAK = (
    "import resource, subprocess, sys; status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
)


def seconds_of(command: Sequence[str | Path] | str) -> float:
    """How long a command (a string is given to a shell) takes, by the wall's clock.

    Raises:
        RuntimeError: It failed.
    """
    begun = time.perf_counter()
    _run(command, subprocess.DEVNULL)
    return time.perf_counter() - begun


def peak_mb(command: Sequence[str | Path]) -> float:
    """Peak resident memory of a command's largest process, in MB.

    Raises:
        RuntimeError: It failed.
    """
    return int(_run([sys.executable, "-I", "-S", "-c", _PEAK, *command], subprocess.PIPE)) / 1024


def _run(command: Sequence[str | Path] | str, stdout: int) -> str:
    done = subprocess.run(
        command, shell=isinstance(command, str), stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout or ""


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

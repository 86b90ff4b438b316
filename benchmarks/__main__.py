"""`make bench`: run the benchmarks named in the arguments (default: all) and write a page and a plot of each."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import matplotlib as mpl

import benchmarks
from benchmarks.measuring import ROUNDS, Report, machine

mpl.use("svg")
from matplotlib import pyplot as plt  # the backend is chosen first

FOLDER = Path(__file__).parent
_SHARED = {"__main__", "measuring", "board", "jobs"}


def main(arguments: Sequence[str]) -> None:
    """Run, print and write."""
    available = sorted({module.name for module in pkgutil.iter_modules(benchmarks.__path__)} - _SHARED)
    if unknown := set(arguments) - set(available):
        sys.exit(f"no benchmark called {', '.join(sorted(unknown))}; there are {', '.join(available)}")
    for name in arguments or available:
        print(f"{name}:", flush=True)  # noqa: T201
        reports: list[Report] = importlib.import_module(f"benchmarks.{name}").run()
        page = "\n".join(
            [
                f"# Benchmark `{name}`",
                "",
                f"{datetime.now(timezone.utc):%Y-%m-%d}, {machine()}; medians of {ROUNDS} interleaved runs.",
                "",
                *(report.markdown() for report in reports),
            ]
        )
        (FOLDER / f"{name}.md").write_text(page)
        bars = {label: bar for report in reports for label, bar in report.bars.items()}
        if bars:
            _plot(bars, FOLDER / f"{name}.svg")
        print(page)  # noqa: T201


def _plot(bars: dict[str, tuple[float, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(bars) + 1.2), layout="constrained")
    labels = [label.replace("`", "") for label in bars]
    axes.barh(labels, [ratio for ratio, _ in bars.values()], color="#4c78a8", height=0.5)
    for row, (ratio, bound) in enumerate(bars.values()):
        axes.plot([bound, bound], [row - 0.35, row + 0.35], color="#e45756", linewidth=2)
        axes.annotate(f" {ratio:.2f}", (ratio, row), va="center")
    axes.invert_yaxis()
    axes.set_xlabel("ratio to what it is compared with (less is better); the red line is the bound")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


main(sys.argv[1:])

"""A restore against `gunzip | psql`: how long loading takes, and how long the live name is away, by size."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import psycopg2

from benchmarks.board import board, grow
from benchmarks.measuring import RATIO_HEADER, Report, interleaved, seconds_of
from kanbu_backup_dagster.backup.environment import Environment, load_environment
from kanbu_backup_dagster.backup.landing import Origin, make_backup
from kanbu_backup_dagster.backup.manifest import Manifest
from kanbu_backup_dagster.backup.recipe import Recipe
from kanbu_backup_dagster.restore.database import abandon, check_staging, load_staging, swap_in
from kanbu_backup_dagster.restore.plan import RestorePlan, RestoreRequest, plan_restore
from kanbu_backup_dagster.restore.staging import drop_database
from kanbu_backup_dagster.sources.embedded_postgres import EmbeddedPostgres
from kanbu_backup_dagster.sources.postgres import prepare_dump

LOAD_GIGABYTES = float(os.environ.get("KANBU_BENCH_GB", "1"))
DOWNTIME_SIZES = [float(size) for size in os.environ.get("KANBU_BENCH_MEMORY_GB", "0.1,1,4").split(",")]
CLIENTS = 20


def run() -> list[Report]:
    """Loading at `LOAD_GIGABYTES`, then downtime under reconnecting clients at each of `DOWNTIME_SIZES`."""
    with tempfile.TemporaryDirectory(prefix="kanbu-bench-") as folder, board(min(DOWNTIME_SIZES)) as (server, url):
        os.environ |= {"DATABASE_URL": url, "BACKUP_PG_MODE": "direct", "BACKUP_LOCAL_PATH": folder}
        os.environ.pop("BACKUP_ENCRYPTION_KEY", None)
        here = load_environment()
        downtime = Report(
            f"The live name, away during a restore under {CLIENTS} reconnecting clients (bound: 1 s)",
            ("dump", "both renames, by the server's clock", "longest silence, as the clients saw it"),
        )
        reports = []
        for size in sorted({*DOWNTIME_SIZES, LOAD_GIGABYTES}):
            grow(server, "kanbu", size)
            manifest = _backup(here)
            if size == LOAD_GIGABYTES:
                reports.append(_loading(here, server, manifest, Path(folder)))
            if size in DOWNTIME_SIZES:
                away, silence = _swap_under_clients(here, server, manifest)
                downtime.rows.append((f"{manifest.raw_bytes / 1e9:.2f} GB", f"{away:.3f} s", f"{silence:.3f} s"))
            here.storage.delete(manifest.filename)
        return [*reports, downtime]


def _backup(here: Environment) -> Manifest:
    here.storage.prepare()
    recipe = Recipe(prepare_dump(here.settings)[0]).with_compression(2).with_checksum()
    return make_backup(recipe, settings=here.settings, keys=here.keys, storage=here.storage, origin=Origin())


def _plan(here: Environment, manifest: Manifest) -> RestorePlan:
    request = RestoreRequest(manifest.filename, confirm_overwrite=True, confirm_target="kanbu")
    return plan_restore(request, here.settings, here.storage, here.keys)


def _loading(here: Environment, server: EmbeddedPostgres, manifest: Manifest, folder: Path) -> Report:
    def ours() -> float:
        plan = _plan(here, manifest)
        begun = time.perf_counter()
        load_staging(plan, here.settings, here.storage, here.keys)
        seconds = time.perf_counter() - begun
        abandon(plan, here.settings)
        return seconds

    def shell(options: str) -> Callable[[], float]:
        def load() -> float:
            begun = time.perf_counter()
            server.create_database("shell")
            # By TCP, like ours.
            url = os.environ["DATABASE_URL"].removesuffix("/kanbu") + "/shell"
            psql = f"{server.bin_folder / 'psql'} --no-psqlrc -q -v ON_ERROR_STOP=1 {options} -o /dev/null -d '{url}'"
            seconds_of(f"gunzip -c {folder / manifest.filename} | {psql}")
            seconds = time.perf_counter() - begun
            server.psql("DROP DATABASE shell WITH (FORCE)")
            return seconds

        return load

    seconds = interleaved(
        {"load": ours, "gunzip | psql": shell(""), "gunzip | psql --single-transaction": shell("--single-transaction")}
    )
    report = Report(
        f"Loading a dump of {manifest.raw_bytes / 1e9:.2f} GB, both passes and making the database included",
        RATIO_HEADER,
    )
    for name in ("gunzip | psql", "gunzip | psql --single-transaction"):
        report.ratio(
            f"`load` against `{name}`".replace("|", "\\|"),
            f"`{name}`".replace("|", "\\|"),
            seconds["load"],
            seconds[name],
            1.05,
        )
    return report


def _swap_under_clients(here: Environment, server: EmbeddedPostgres, manifest: Manifest) -> tuple[float, float]:
    """Seconds that the name was away, and the longest time in which no client got an answer."""
    plan = _plan(here, manifest)
    try:
        loaded = load_staging(plan, here.settings, here.storage, here.keys)
        check_staging(plan, here.settings, here.storage, here.keys, loaded)
        with _clients(server.database_url("kanbu")) as answers:
            time.sleep(1)
            swapped = swap_in(plan, here.settings)
            time.sleep(1)
        moments = sorted(answers)
    finally:
        abandon(plan, here.settings)
    assert swapped.replaced is not None
    assert swapped.downtime_seconds is not None
    drop_database(plan.server, here.settings, swapped.replaced)
    return swapped.downtime_seconds, max(late - early for early, late in pairwise(moments))


@contextmanager
def _clients(url: str) -> Iterator[list[float]]:
    """Clients that ask again and again, connecting anew when thrown out; gives the moments they were answered."""
    stop, answers = threading.Event(), list[float]()

    def ask() -> None:
        connection = None
        while not stop.is_set():
            try:
                connection = connection or psycopg2.connect(url)
                connection.cursor().execute("SELECT 1")
                answers.append(time.perf_counter())
            except psycopg2.Error:
                connection = None
            time.sleep(0.005)

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()

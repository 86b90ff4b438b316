"""Docker mode: a dump read out of a container, against Docker's own command line.

Needs what the tests of docker mode need: root, docker.io, and Debian's PostgreSQL.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

from benchmarks.measuring import RATIO_HEADER, Report, interleaved, seconds_of
from kanbu_backup_dagster.sources.docker_exec import ExecProcess
from kanbu_backup_dagster_tests.docker_engine import DATABASE, USER, DockerEngine, missing_for_an_engine
from kanbu_backup_dagster_tests.real_docker import ContainerPostgres

GIGABYTES = float(os.environ.get("KANBU_BENCH_DOCKER_GB", "0.5"))
_ROW_BYTES = 270
_TABLE = """
CREATE TABLE activity AS
  SELECT n AS id, md5(n::text) AS task, repeat(md5((n * 7)::text), 6) AS details, timestamptz '2026-01-01' AS at
    FROM generate_series(1, {rows}) n
"""


def run() -> list[Report]:
    """The time each takes to read the whole dump, and as many zeros as the engine hands on, and throw it all away."""
    missing = missing_for_an_engine()
    if missing is not None:
        sys.exit(f"docker mode cannot be measured here: {missing}")
    with DockerEngine() as engine, engine.postgres() as container:
        server = ContainerPostgres(engine, container)
        server.psql(_TABLE.format(rows=int(GIGABYTES * 1e9 / _ROW_BYTES)), DATABASE)
        os.environ |= server.variables
        dump = ["pg_dump", "-U", USER, "-d", DATABASE]
        zeros = ["head", "-c", str(int(GIGABYTES * 1e9)), "/dev/zero"]
        return [
            _compare("A dump out of a container", engine, container, dump),
            _compare("Zeros, as many as the engine hands on", engine, container, zeros),
        ]


def _compare(title: str, engine: DockerEngine, container: str, command: list[str]) -> Report:
    size = _ours(container, command)[1]
    seconds = interleaved(
        {
            "docker mode": lambda: _ours(container, command)[0],
            "docker exec": lambda: seconds_of(engine.command_line("exec", container, *command)),
        }
    )
    speed = f"{size / statistics.median(seconds['docker mode']) / 1e6:.0f} MB/s"
    report = Report(f"{title}: {size / 1e9:.2f} GB", RATIO_HEADER)
    what = f"`{command[0]}` in docker mode, {speed}"
    # At least 0.8 of the command line's speed.
    report.ratio(what, "`docker exec ... > /dev/null`", seconds["docker mode"], seconds["docker exec"], 1 / 0.8)
    return report


def _ours(container: str, command: list[str]) -> tuple[float, int]:
    begun, size = time.perf_counter(), 0
    with ExecProcess(container, command, {}) as program:
        for chunk in program.chunks():
            size += len(chunk)
        status = program.wait()
    assert status == 0, program.stderr
    return time.perf_counter() - begun, size

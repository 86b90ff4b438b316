"""The supervisor on small real programs: order, restarts, programs that hang, and programs that will not end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kanbu_backup_dagster.server import supervisor
from kanbu_backup_dagster.server.supervisor import Program, Supervisor


def run_for(seconds: float, programs: list[Program], grace: float = 5, ready: Callable[[], None] | None = None) -> None:
    """Supervise until a SIGTERM comes, as it does to the real one."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        Supervisor(programs, grace_seconds=grace).run(on_ready=ready)
    finally:
        timer.cancel()


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def test_a_program_that_keeps_ending_is_started_ever_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kanbu_backup.server")
    starts = tmp_path / "starts"
    run_for(4, [Program("flapping", sh(f"date +%s.%N >> {starts}; exit 3"))])
    moments = [float(line) for line in starts.read_text().splitlines()]
    assert 2 <= len(moments) <= 4  # after 0, 1, 3 and 7 seconds
    assert moments[1] - moments[0] >= 1
    lines = [record.getMessage() for record in caplog.records]
    assert "[Server] The flapping ended with status 3; it starts again in 1 s" in lines
    if len(moments) > 2:
        assert moments[2] - moments[1] >= 2


def test_one_that_needs_another_waits_until_that_is_well(tmp_path: Path) -> None:
    first, second, ready = tmp_path / "first", tmp_path / "second", []
    programs = [
        Program("first", sh(f"sleep 0.7; touch {first}; sleep 60"), is_well=first.exists),
        Program("second", sh(f"test -e {first} && touch {second}; sleep 60"), needs="first"),
    ]
    run_for(3, programs, ready=lambda: ready.append(first.exists()))
    assert second.exists(), "it started too early, or not at all"
    assert ready == [True]


def test_one_that_stops_answering_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kanbu_backup.server")
    monkeypatch.setattr(supervisor, "_UNHEALTHY_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "_CHECK_SECONDS", 0.1)
    answers = tmp_path / "answers"
    # Answers for half a second after each start, then hangs.
    program = Program("hanging", sh(f"touch {answers}; sleep 0.5; rm {answers}; sleep 60"), is_well=answers.exists)
    run_for(5, [program])
    lines = [record.getMessage() for record in caplog.records]
    assert "[Server] The hanging does not answer; it is ended" in lines
    assert len([line for line in lines if "has started" in line]) >= 2


def test_what_will_not_end_is_killed_with_all_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    stubborn = f'trap "" TERM; sh -c \'trap "" TERM; echo $$ > {child}; while :; do sleep 1; done\' & wait; sleep 60'
    begun = time.monotonic()
    run_for(1, [Program("stubborn", sh(stubborn))], grace=1)
    assert 2 <= time.monotonic() - begun < 10
    pid = int(child.read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1]:
        assert time.monotonic() < deadline, "what it started lives on"
        time.sleep(0.05)


def test_signals_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    run_for(0.3, [])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before

"""Keeping a few programs running: started in order, restarted when they end, ended together with all they started.

What belongs here: processes. What does not: which programs (`serve`), and anything about Dagster.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kanbu_backup_dagster.sources.commands import die_with_parent

logger = logging.getLogger("kanbu_backup.server")

_POLL_SECONDS = 0.2
_SHORTEST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
_STABLE_SECONDS = 60.0
_CHECK_SECONDS = 5.0
_UNHEALTHY_SECONDS = 30.0


@dataclass(frozen=True)
class Program:
    """A program to keep running.

    Attributes:
        name: What people call it.
        command: Its arguments.
        is_well: Whether it does its work; may take a while. None: running is enough.
        needs: The name of a program that has to be well before this one starts.
        keeps: File descriptors it inherits.
    """

    name: str
    command: Sequence[str]
    is_well: Callable[[], bool] | None = None
    needs: str | None = None
    keeps: Sequence[int] = ()


@dataclass
class _Child:
    program: Program
    process: subprocess.Popen[bytes] | None = None
    groups: list[int] = field(default_factory=list)
    started: float = 0.0
    start_at: float = 0.0
    pause: float = _SHORTEST_PAUSE
    last_well: float | None = None

    @property
    def well(self) -> bool:
        """Whether others may rely on it."""
        return self.process is not None and (self.program.is_well is None or self.last_well is not None)


class Supervisor:
    """Runs programs until told to stop.

    Args:
        programs: In the order of starting; they are ended in the reverse order.
        grace_seconds: How long they and what they started may take to end before they are killed.
    """

    def __init__(self, programs: Sequence[Program], *, grace_seconds: float = 40) -> None:
        self._children = {program.name: _Child(program) for program in programs}
        self._grace = grace_seconds
        self._stopping = threading.Event()

    def run(self, *, on_ready: Callable[[], None] | None = None) -> None:
        """Keep the programs running until SIGTERM, SIGINT or SIGHUP, then end them. For the main thread.

        Args:
            on_ready: Called once, when all are well for the first time.
        """
        # Started with `&` by a non-interactive shell, SIGINT is ignored, and children would inherit that.
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup, which is meant
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, lambda *_: self._stopping.set()) for number in numbers}
        checker = threading.Thread(target=self._check_health, daemon=True)
        checker.start()
        try:
            while not self._stopping.wait(_POLL_SECONDS):
                for child in self._children.values():
                    self._tend(child)
                if on_ready is not None and all(child.well for child in self._children.values()):
                    on_ready()
                    on_ready = None
        finally:
            self._stopping.set()
            self._end_all()
            checker.join(_POLL_SECONDS)  # it may be within a check that takes long
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _tend(self, child: _Child) -> None:
        now = time.monotonic()
        if child.process is None:
            needed = child.program.needs
            if now >= child.start_at and (needed is None or self._children[needed].well):
                self._start(child)
            return
        status = child.process.poll()
        if status is not None:
            child.process = None
            child.last_well = None
            if now - child.started >= _STABLE_SECONDS:
                child.pause = _SHORTEST_PAUSE
            child.start_at = now + child.pause
            logger.error(
                "[Server] The %s %s; it starts again in %.0f s", child.program.name, _in_words(status), child.pause
            )
            child.pause = min(child.pause * 2, _LONGEST_PAUSE)
        elif child.last_well is not None and now - child.last_well > _UNHEALTHY_SECONDS:
            logger.error("[Server] The %s does not answer; it is ended", child.program.name)
            child.process.kill()

    def _start(self, child: _Child) -> None:
        child.process = subprocess.Popen(
            child.program.command,
            stdin=subprocess.DEVNULL,
            pass_fds=child.program.keeps,
            # A group of its own: Ctrl-C comes to us alone, and the group can be ended whole.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        child.started = time.monotonic()
        # Earlier groups may still hold a backup that outlived the program's end.
        child.groups = [group for group in child.groups if _exists(group)] + [child.process.pid]
        logger.info("[Server] The %s has started (pid %d)", child.program.name, child.process.pid)

    def _check_health(self) -> None:
        pause = _POLL_SECONDS
        while not self._stopping.wait(pause):
            for child in self._children.values():
                process, is_well = child.process, child.program.is_well
                if process is not None and is_well is not None and is_well() and child.process is process:
                    child.last_well = time.monotonic()
            pause = _CHECK_SECONDS if all(child.well for child in self._children.values()) else _POLL_SECONDS

    def _end_all(self) -> None:
        deadline = time.monotonic() + self._grace
        for child in reversed(self._children.values()):
            for group in child.groups:
                _signal_group(group, signal.SIGTERM)
            self._await_end(child, deadline)

    def _await_end(self, child: _Child, deadline: float) -> None:
        while time.monotonic() < deadline:
            if child.process is not None:
                child.process.poll()
            if not any(_exists(group) for group in child.groups):
                logger.info("[Server] The %s has ended", child.program.name)
                return
            time.sleep(0.05)
        logger.warning("[Server] The %s did not end in time; it is killed", child.program.name)
        for group in child.groups:
            _signal_group(group, signal.SIGKILL)
        if child.process is not None:
            child.process.wait()


def _in_words(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _exists(group: int) -> bool:
    return _signal_group(group, 0)


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True

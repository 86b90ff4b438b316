"""What a run holds and what it owes: given back and done when the run ends, however it ends.

What belongs here: the resource `run_scope`, which lives as long as the run. What does not: what is held (`target_lock`)
or owed (the ops).

An op ends before the next begins, so a lock that spans ops cannot be an op's own. A resource lives as long as the
process that executes the run's steps; jobs that need one scope for all their ops run in one process.
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of resources as objects.

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from dagster import InitResourceContext, resource

from kanbu_backup_dagster.orchestration.target_lock import Holder, Locks, open_locks


class RunScope:
    """One run's locks and debts."""

    def __init__(self, stack: ExitStack, locks: Locks, job: str, run_id: str) -> None:
        self._stack = stack
        self._locks = locks
        self._job = job
        self._run_id = run_id
        self._held: dict[str, bool] = {}
        self._owed: set[str] = set()

    def hold(self, name: str, *, exclusive: bool, wait_seconds: float = 0) -> None:
        """Hold the lock `name` until the run ends; what the run holds already it holds.

        Raises:
            BusyError: Other runs hold it; says which.
        """
        if name in self._held and (self._held[name] or not exclusive):
            return
        holder = Holder.now(self._job, self._run_id)
        self._stack.enter_context(self._locks.hold(name, holder, exclusive=exclusive, wait_seconds=wait_seconds))
        self._held[name] = exclusive

    def at_end(self, name: str, duty: Callable[[], None]) -> None:
        """Do `duty` when the run ends, before any lock taken so far is given back; once, whoever owes it again."""
        if name not in self._owed:
            self._owed.add(name)
            self._stack.callback(duty)


@resource(description="Locks and clean-up that last as long as the run.")
def run_scope(context: InitResourceContext) -> Iterator[RunScope]:
    """The scope of the run that is being executed."""
    run = context.run
    with ExitStack() as stack:
        yield RunScope(stack, open_locks(), run.job_name if run else "unknown", run.run_id if run else "")

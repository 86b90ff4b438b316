"""Docker mode: PostgreSQL's client programs run in the server's own container.

What belongs here: which container, and what the programs connect to in it. What does not: how a program runs there
(`docker_exec`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kanbu_backup_dagster.errors import SettingsError, SourceError
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.commands import Process
from kanbu_backup_dagster.sources.connection import Connection, require_connection
from kanbu_backup_dagster.sources.docker_exec import ExecProcess, connect, engine_faults

NOT_FOUND = "PostgreSQL container not found"

_ADVICE = (
    "Find the container with `docker ps | grep postgres`, then set POSTGRES_CONTAINER to its name, or "
    "POSTGRES_CONTAINER_PATTERN to what its name matches. Without Docker, set DATABASE_URL and BACKUP_PG_MODE=direct."
)
_DEFAULT_NAME = "kanbu"

# What DATABASE_URL says of the session goes for the container's socket too; the network's part does not.
_KEPT_PARAMETERS = ("user", "password", "dbname", "application_name", "connect_timeout", "options")

# A variable of the container itself would lead the programs elsewhere. Empty is libpq's default: the local socket.
# PGPORT stays, as it names that socket.
_LOCAL_SOCKET = {"PGHOST": "", "PGHOSTADDR": "", "PGOPTIONS": ""}


@dataclass(frozen=True)
class DockerAccess:
    """Programs in a container, connecting over the server's local socket there.

    Attributes:
        container: Its name.
        choice: Why this one, for people; names the others that it could have been.
    """

    container: str
    choice: str
    client_version: str

    @property
    def mode(self) -> str:
        return "docker"

    @property
    def description(self) -> str:
        return f"docker container {self.container} ({self.choice}), with its own programs ({self.client_version})"

    def connection(self, settings: Settings) -> Connection:
        """User, password and database: of DATABASE_URL, else of the container's own variables, else `kanbu`.

        Raises:
            SourceError: The container is gone or the engine does not answer.
        """
        own = _variables(self.container)
        user = own.get("POSTGRES_USER") or _DEFAULT_NAME
        # The image names the database after the user when it is told no name for it.
        parameters = {"user": user, "dbname": own.get("POSTGRES_DB") or own.get("POSTGRES_USER") or _DEFAULT_NAME}
        dropped: tuple[str, ...] = ()
        if settings.database_url is not None:
            given = require_connection(settings)
            parameters |= {name: given.parameters[name] for name in _KEPT_PARAMETERS if name in given.parameters}
            dropped = given.dropped
        if "password" not in parameters and parameters["user"] == user and own.get("POSTGRES_PASSWORD"):
            parameters["password"] = own["POSTGRES_PASSWORD"]
        return Connection(parameters, dropped)

    def start(
        self,
        settings: Settings,
        tool: str,
        arguments: Sequence[str],
        *,
        database: str | None = None,
        feeds: bool = False,
    ) -> Process:
        connection = self.connection(settings)
        if database is not None:
            connection = connection.to_database(database)
        environment = {"LC_ALL": "C.UTF-8", **_LOCAL_SOCKET, **connection.environment()}
        return ExecProcess(self.container, [tool, *arguments], environment, feeds=feeds)


def find_container(settings: Settings) -> DockerAccess:
    """The container that POSTGRES_CONTAINER names, else the first running one, by name, that
    POSTGRES_CONTAINER_PATTERN matches.

    Raises:
        SettingsError: The pattern is no regular expression.
        SourceError: There is none ("PostgreSQL container not found"), it is not running, or it has no pg_dump.
    """
    name, choice = _choose(settings, _containers())
    return DockerAccess(name, choice, _client_version(name))


def _choose(settings: Settings, containers: dict[str, str]) -> tuple[str, str]:
    wanted, pattern = settings.postgres_container, settings.postgres_container_pattern
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise SettingsError(
            f"POSTGRES_CONTAINER_PATTERN cannot be used: {pattern!r} is not a regular expression: {error}."
        ) from None
    if wanted in containers:
        # Another one in its place, because it happens to match, may hold another database.
        if containers[wanted] != "running":
            raise SourceError(
                f"{NOT_FOUND}: the container {wanted} (POSTGRES_CONTAINER) is {containers[wanted]}.",
                advice=f"Run `docker {'unpause' if containers[wanted] == 'paused' else 'start'} {wanted}`, or name "
                "another in POSTGRES_CONTAINER.",
            )
        return wanted, "POSTGRES_CONTAINER"
    running = sorted(name for name, state in containers.items() if state == "running")
    candidates = [name for name in running if matches(name)]
    if candidates:
        return candidates[0], f"first that matches POSTGRES_CONTAINER_PATTERN {pattern!r}: {', '.join(candidates)}"
    raise SourceError(
        f"{NOT_FOUND}.",
        tried=(
            f"POSTGRES_CONTAINER: there is no container {wanted}",
            f"POSTGRES_CONTAINER_PATTERN: {pattern!r} matches no running container",
            f"running: {', '.join(running) or 'none'}",
        ),
        advice=_ADVICE,
    )


def _containers() -> dict[str, str]:
    """The name of each container, and its state in the engine's words."""
    try:
        with engine_faults(""):
            client = connect()
            try:
                listed: list[dict[str, Any]] = client.api.containers(all=True)
            finally:
                client.close()
    except SourceError as error:
        raise SourceError(
            f"{NOT_FOUND}: {error.message}",
            advice="Start Docker, and see that this user may use its socket: `docker ps` must work. Without Docker, "
            "set DATABASE_URL and BACKUP_PG_MODE=direct.",
        ) from None
    # A container has further names, with a slash inside, where another links to it.
    return {
        name[1:]: container["State"]
        for container in listed
        for name in container["Names"] or ()
        if name.count("/") == 1
    }


def _variables(container: str) -> dict[str, str]:
    with engine_faults(container):
        client = connect()
        try:
            configured = client.api.inspect_container(container)["Config"]["Env"] or []
        finally:
            client.close()
    return dict(entry.partition("=")[::2] for entry in configured)


def _client_version(container: str) -> str:
    with ExecProcess(container, ["pg_dump", "--version"], {}) as process:
        output = b"".join(process.chunks()).decode(errors="replace")
        status = process.wait()
    version = re.search(r"\) (\d[\w.]*)", output)
    if status != 0 or version is None:
        raise SourceError(
            f"The container {container} has no pg_dump that can be used: {process.stderr or output.strip()}",
            advice="Name the container of the PostgreSQL server itself in POSTGRES_CONTAINER.",
        )
    return version[1]

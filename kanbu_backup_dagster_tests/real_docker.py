"""PostgreSQL in a container for tests.

What belongs here: what the fixture `docker_postgres` hands out. What does not: the engine (`docker_engine`), and that
fixture.
"""

from __future__ import annotations

import secrets
import subprocess
from urllib.parse import quote

from kanbu_backup_dagster.sources.commands import quote_identifier
from kanbu_backup_dagster_tests.docker_engine import DATABASE, PASSWORD, USER, DockerEngine


class ContainerPostgres:
    """One container as one test sees it. The databases it creates are dropped at the test's end.

    Attributes:
        container: Its name.
        variables: What must be in the environment beside DATABASE_URL for this mode.
    """

    def __init__(self, engine: DockerEngine, container: str) -> None:
        self.engine = engine
        self.container = container
        self.variables = {
            "BACKUP_PG_MODE": "docker",
            "POSTGRES_CONTAINER": container,
            "DOCKER_HOST": engine.host,
        }
        self._databases: list[str] = []

    def database(self, script: str) -> str:
        """The URL of a fresh database, holding what `script` makes."""
        name = f"test_{secrets.token_hex(6)}"
        self._databases.append(name)
        self.psql(f"CREATE DATABASE {name}", DATABASE)
        self.psql(script, name)
        return self.database_url(name)

    def database_url(self, name: str) -> str:
        """A URL as Kanbu has it: with a host and port that mean nothing inside the container."""
        return f"postgresql://{USER}:{quote(PASSWORD, safe='')}@db.invalid:6543/{name}?schema=public"

    def database_name(self, url: str) -> str:
        """The database that `url` names."""
        return url.rpartition("/")[2].partition("?")[0]

    def psql(self, script: str, database: str) -> str:
        """What `script` prints, by Docker's own command line."""
        command = self.engine.command_line("exec", "-i", self.container, "psql", "-XqAt", "-v", "ON_ERROR_STOP=1")
        done = subprocess.run(
            [*command, "-U", USER, "-d", database], input=script, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def processes(self) -> list[str]:
        """The command lines of what runs in the container besides the server itself, and of the server's sessions."""
        lines = self.engine.inside(self.container, "ps", "-eo", "args").splitlines()[1:]
        own = ("ps ", "postgres -D", "docker-entrypoint", "postgres: checkpointer", "postgres: background writer")
        own = (*own, "postgres: walwriter", "postgres: autovacuum", "postgres: logical replication")
        return [line for line in map(str.strip, lines) if not line.startswith(own)]

    def drop_databases(self) -> None:
        """Drop what `database` and `sample_database` created, ending connections to it."""
        drops = [f"DROP DATABASE IF EXISTS {quote_identifier(name)} WITH (FORCE);" for name in self._databases]
        self.psql("\n".join(drops), DATABASE)
        self._databases.clear()

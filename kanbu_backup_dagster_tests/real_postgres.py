"""Real PostgreSQL servers for tests: one a major version, started once a session, and fresh databases on them.

What belongs here: what the fixtures `postgres` and `newest_postgres` hand out. What does not: those fixtures.
"""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
from pathlib import Path
from urllib.parse import quote

from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.sources.commands import quote_identifier
from kanbu_backup_dagster.sources.embedded_postgres import SUPERUSER, EmbeddedPostgres
from kanbu_backup_dagster.sources.server_binaries import find_server_binaries

SAMPLE_SCRIPT = Path(__file__).parent.parent / "demo" / "sample.sql"
_SAMPLE_TEMPLATE = "kanbu_sample_template"


def available_majors() -> list[int]:
    """The major versions that can be started here, oldest first."""
    try:
        return sorted({binaries.major for binaries in find_server_binaries()})
    except SourceError:
        return []


class PostgresServers:
    """The session's servers, each started when first asked for."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[EmbeddedPostgres, str]] = {}
        self._to_close: list[object] = []

    def get(self, major: int) -> tuple[EmbeddedPostgres, str]:
        """The server of `major`, and its superuser's password for TCP."""
        if major not in self._running:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            manager = EmbeddedPostgres.temporary(
                major=major, settings={"listen_addresses": "127.0.0.1,::1", "port": str(port), "max_connections": "50"}
            )
            server = manager.__enter__()
            self._to_close.append(manager)
            password = "p@ss/" + secrets.token_urlsafe(12)
            server.psql(f"ALTER ROLE {SUPERUSER} PASSWORD '{password}'")
            self._running[major] = (server, password)
        return self._running[major]

    def close(self) -> None:
        while self._to_close:
            self._to_close.pop().__exit__(None, None, None)  # type: ignore[attr-defined]


class PostgresForTest:
    """One server as one test sees it. The databases it creates are dropped at the test's end.

    Attributes:
        server: The server itself; shared by the session, so neither stop nor change it.
        major: For example 18.
        version: For example "18.4".
        bin_folder: Where the server's own `pg_dump`, `psql` and so on are.
        password: The superuser's, for TCP; it holds characters that a URL must escape.
    """

    def __init__(self, server: EmbeddedPostgres, password: str) -> None:
        self.server = server
        self.major = server.major
        self.version = server.version
        self.bin_folder = server.bin_folder
        self.password = password
        self._databases: list[str] = []

    def database(self, script: str | Path = "") -> str:
        """The URL of a fresh database, holding what `script` (SQL, or a path to it) makes."""
        name = self._new_name()
        return self.server.create_database(name, script.read_text("utf-8") if isinstance(script, Path) else script)

    def sample_database(self) -> str:
        """The URL of a fresh database that holds the demo's sample project board; quicker than loading it anew."""
        if not self.server.has_database(_SAMPLE_TEMPLATE):
            self.server.create_database(_SAMPLE_TEMPLATE, SAMPLE_SCRIPT.read_text("utf-8"))
        name = self._new_name()
        self.server.psql(f"CREATE DATABASE {name} TEMPLATE {_SAMPLE_TEMPLATE}")
        return self.server.database_url(name)

    def tcp_url(self, url: str, host: str = "127.0.0.1") -> str:
        """`url` over TCP with a password, as applications have it in DATABASE_URL."""
        user = f"{SUPERUSER}:{quote(self.password, safe='')}"
        return f"postgresql://{user}@{host}:{self.server.port}/{quote(self.database_name(url), safe='')}"

    def database_name(self, url: str) -> str:
        """The database that `url`, one of ours, names."""
        return next(name for name in self._databases if url == self.server.database_url(name))

    def query(self, url: str, sql: str) -> list[list[str]]:
        """The rows of `sql` as text, NULL as the empty string; values must hold no newline and no `|`."""
        return [line.split("|") for line in self.server.psql(sql, self.database_name(url)).splitlines()]

    def execute(self, url: str, sql: str) -> None:
        """Run a script on the database."""
        self.server.psql(sql, self.database_name(url))

    def dump(self, url: str) -> str:
        """The database as plain SQL by the server's own pg_dump, without the line that is random each time."""
        text = subprocess.run(
            [self.bin_folder / "pg_dump", "-d", url], check=True, capture_output=True, text=True, encoding="utf-8"
        ).stdout
        return re.sub(r"(?m)^\\(un)?restrict .*\n", "", text)

    def drop_databases(self) -> None:
        """Drop what `database` and `sample_database` created, and what restores of it replaced, ending connections."""
        if self._databases:
            found = self.server.psql("SELECT datname FROM pg_database").splitlines()
            ours = [name for name in found if name.startswith(tuple(self._databases))]
            self.server.psql("\n".join(f"DROP DATABASE {quote_identifier(name)} WITH (FORCE);" for name in ours))
            self._databases.clear()

    def _new_name(self) -> str:
        name = f"test_{secrets.token_hex(6)}"
        self._databases.append(name)
        return name

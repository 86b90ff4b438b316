"""Dagster's own PostgreSQL: where DAGSTER_POSTGRES_URL says it is, and how to get in.

What belongs here: the URL in the form that SQLAlchemy takes, and connections of our own. What does not: the storage on
it (`dagster_home`), the locks on it (`target_lock`), and the database that is backed up (`sources`).

The URL holds a password. It is read from the environment by each process that needs it, and is in no configuration of
Dagster's: that is shown in the UI and handed to child processes as an argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg2
from sqlalchemy import URL
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.settings import dagster_postgres_url
from kanbu_backup_dagster.sources.connection import parse_database_url

VARIABLE = "DAGSTER_POSTGRES_URL"
# Any number will do, as long as all use it for the same: here the first bytes of "kanbu" and "tables".
_TABLES_LOCK = (0x6B616E62, 0x7461626C)


class DagsterDatabaseError(KanbuError):
    """Dagster's PostgreSQL cannot be reached or used."""


@dataclass(frozen=True)
class DagsterDatabase:
    """The database that DAGSTER_POSTGRES_URL names.

    Attributes:
        parameters: libpq's, by its own names, password included.
    """

    parameters: Mapping[str, str] = field(repr=False)

    @property
    def sqlalchemy_url(self) -> str:
        """The URL as SQLAlchemy takes it, password included, with the driver that Dagster brings: by default it is
        another one from SQLAlchemy 2.1 on."""
        others = dict(self.parameters)
        user, password, name = (others.pop(key, None) for key in ("user", "password", "dbname"))
        # Host and port among the parameters: there they may be several, or a socket's folder.
        url = URL.create("postgresql+psycopg2", username=user, password=password, database=name, query=others)
        return url.render_as_string(hide_password=False)

    @retry(
        retry=retry_if_exception_type(DagsterDatabaseError),
        stop=stop_after_attempt(4),
        wait=wait_exponential(multiplier=0.5),
        reraise=True,
    )
    def connect(self) -> Any:
        """A connection of psycopg2 that commits each statement; tried for a few seconds, as long as a restart takes.

        Raises:
            DagsterDatabaseError: It cannot be had.
        """
        try:
            connection = psycopg2.connect(**self.parameters)
        except psycopg2.Error as error:
            raise DagsterDatabaseError(
                f"Dagster's own database cannot be reached: {' '.join(str(error).split())}.",
                advice=f"Check {VARIABLE} and its server; without the variable Dagster's records are in DAGSTER_HOME.",
            ) from None
        connection.autocommit = True
        return connection

    @contextmanager
    def making_tables(self) -> Iterator[None]:
        """Two programs that start at the same time would each make Dagster's tables, and one would fail."""
        with closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s, %s)", _TABLES_LOCK)
            yield


def dagster_database() -> DagsterDatabase | None:
    """The database of Dagster's records, or None when they are in its home.

    Raises:
        SettingsError: DAGSTER_POSTGRES_URL cannot be used.
    """
    url = dagster_postgres_url()
    if url is None:
        return None
    # Dagster's own documentation names the driver in the URL; PostgreSQL's form does not know it.
    connection = parse_database_url(url.replace("+psycopg2://", "://", 1), variable=VARIABLE)
    return DagsterDatabase({"connect_timeout": "10", "application_name": "kanbu-backup", **connection.parameters})

"""DATABASE_URL: Prisma's form, libpq's variables, and nothing that shows a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from kanbu_backup_dagster.errors import SettingsError, SourceError
from kanbu_backup_dagster.sources.clients import ClientPrograms, choose_clients
from kanbu_backup_dagster.sources.connection import child_environment, parse_database_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql://u:p%40ss@host:5432/kanbu?schema=public&connection_limit=5&pgbouncer=true",
            "user=u password=p@ss host=host port=5432 dbname=kanbu",
        ),
        ("postgres://u@host/kanbu", "user=u host=host dbname=kanbu"),
        ("postgresql://u:a%2Fb%3Ac%23@[::1]:5433/db", "user=u password=a/b:c# host=::1 port=5433 dbname=db"),
        ("postgresql://u:p@localhost/db?host=/run/pg", "user=u password=p host=/run/pg dbname=db"),
        ("postgresql://%2Frun%2Fpg/db", "host=/run/pg dbname=db"),
        ("postgresql://u@a:1,b:2/db?gssencmode=disable", "user=u host=a,b port=1,2 dbname=db gssencmode=disable"),
        ("postgresql://u@h/d%2Bb?sslmode=verify-full", "user=u host=h dbname=d+b sslmode=verify-full"),
        (
            "postgresql://u@h/db?sslmode=require&sslaccept=strict&sslcert=/ca.pem",
            "user=u host=h dbname=db sslmode=verify-full sslrootcert=/ca.pem",
        ),
        ("postgresql://h/db?sslcert=/c.pem&sslkey=/k.pem", "host=h dbname=db sslcert=/c.pem sslkey=/k.pem"),
        ("postgresql://u:p@ss@h/db", "user=u password=p@ss host=h dbname=db"),
    ],
)
def test_a_url_is_taken_apart(url: str, expected: str) -> None:
    assert dict(parse_database_url(url).parameters) == dict(pair.split("=") for pair in expected.split())


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:s3cret@h/db",
        "postgresql://u:s3cret@h",
        "postgresql://u:s3cret@h:port/db",
        "postgresql://u:s3cret/x@h:5432/db",
        "postgresql://u:s3cret@[::1/db",
        "postgresql://u:s3cret@h/db?sslpassword=s3cret",
        "postgresql://u:s3cret@h/db?sslidentity=/x.p12",
        "s3cret",
    ],
)
def test_what_cannot_be_used_is_said_without_the_password(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^DATABASE_URL cannot be used") as caught:
        parse_database_url(url)
    assert "s3cret" not in str(caught.value)


def test_a_connection_never_shows_its_password() -> None:
    connection = parse_database_url("postgresql://u:s3cret@h:1/db?schema=x")
    assert "s3cret" not in repr(connection)
    assert connection.server == "h:1"
    assert connection.dropped == ("schema",)


def test_programs_get_the_connection_and_none_of_our_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("PGSERVICE", "surprise")
    monkeypatch.setenv("BACKUP_ENCRYPTION_KEY", "k")
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:s3cret@h/db")
    environment = child_environment(parse_database_url("postgresql://u:s3cret@h/db"))
    assert (environment["PGHOST"], environment["PGPASSWORD"], environment["PGDATABASE"]) == ("h", "s3cret", "db")
    assert not {"PGSERVICE", "BACKUP_ENCRYPTION_KEY", "DATABASE_URL"} & environment.keys()
    assert "PATH" in environment


def _clients(*versions: str) -> list[ClientPrograms]:
    return [ClientPrograms(Path(f"/pg/{version}"), version) for version in versions]


@pytest.mark.parametrize(
    ("server", "available", "chosen"),
    [
        ("16.4", ("15.18", "16.9", "18.4"), "16.9"),
        ("14.2", ("18.4", "15.18"), "15.18"),
        ("18beta1", ("18.4",), "18.4"),
        ("15.20", ("15.9", "15.20", "15.18"), "15.20"),
    ],
)
def test_the_client_is_the_servers_own_or_the_nearest_newer(
    server: str, available: tuple[str, ...], chosen: str
) -> None:
    assert choose_clients(_clients(*available), server).version == chosen


def test_an_older_client_is_refused_naming_both_versions_and_where_was_looked() -> None:
    with pytest.raises(SourceError) as caught:
        choose_clients(_clients("14.1", "15.18"), "17.2")
    said = str(caught.value)
    assert "PostgreSQL 17.2" in said
    assert "pg_dump 15.18 in /pg/15.18 is older" in said
    assert "looked in" in said

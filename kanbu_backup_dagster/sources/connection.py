"""DATABASE_URL taken apart, and given to PostgreSQL's programs.

What belongs here: the URL's form (PostgreSQL's, as Prisma writes it) and libpq's environment. What does not: running
anything.

Everything reaches libpq through its environment variables (https://www.postgresql.org/docs/current/libpq-envars.html),
never through argv, which any user of the machine can read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, unquote

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.settings import Settings, is_secret, variable_names

# Parameters of a connection URI that libpq reads from the environment too.
_LIBPQ_VARIABLES = {
    "application_name": "PGAPPNAME",
    "channel_binding": "PGCHANNELBINDING",
    "client_encoding": "PGCLIENTENCODING",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "dbname": "PGDATABASE",
    "gssdelegation": "PGGSSDELEGATION",
    "gssencmode": "PGGSSENCMODE",
    "gsslib": "PGGSSLIB",
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "krbsrvname": "PGKRBSRVNAME",
    "load_balance_hosts": "PGLOADBALANCEHOSTS",
    "max_protocol_version": "PGMAXPROTOCOLVERSION",
    "min_protocol_version": "PGMINPROTOCOLVERSION",
    "options": "PGOPTIONS",
    "passfile": "PGPASSFILE",
    "password": "PGPASSWORD",
    "port": "PGPORT",
    "require_auth": "PGREQUIREAUTH",
    "requirepeer": "PGREQUIREPEER",
    "service": "PGSERVICE",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "sslcert": "PGSSLCERT",
    "sslcertmode": "PGSSLCERTMODE",
    "sslcompression": "PGSSLCOMPRESSION",
    "sslcrl": "PGSSLCRL",
    "sslcrldir": "PGSSLCRLDIR",
    "sslkey": "PGSSLKEY",
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslrootcert": "PGSSLROOTCERT",
    "sslsni": "PGSSLSNI",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "user": "PGUSER",
}
_CONNECT_TIMEOUT_SECONDS = "10"
_SCHEMES = ("postgresql://", "postgres://")


@dataclass(frozen=True)
class Connection:
    """Where the database is and how to get in.

    Attributes:
        parameters: libpq's parameters by its own names (`host`, `user`, `dbname`, `sslmode`...), password included.
        dropped: Parameters of the URL that libpq does not know (Prisma's `schema`, `connection_limit`...).
    """

    parameters: Mapping[str, str] = field(repr=False)
    dropped: tuple[str, ...] = ()

    @property
    def database(self) -> str:
        """The database's name."""
        return self.parameters["dbname"]

    @property
    def server(self) -> str:
        """Host and port, for people: holds no secret."""
        host = self.parameters.get("host", "local socket")
        return f"{host}:{self.parameters['port']}" if "port" in self.parameters else host

    def to_database(self, name: str) -> Connection:
        """The same server, another database."""
        return replace(self, parameters={**self.parameters, "dbname": name})

    def environment(self) -> dict[str, str]:
        """libpq's variables for this connection."""
        variables = {_LIBPQ_VARIABLES[name]: value for name, value in self.parameters.items()}
        variables.setdefault("PGCONNECT_TIMEOUT", _CONNECT_TIMEOUT_SECONDS)
        variables.setdefault("PGAPPNAME", "kanbu-backup")
        return variables


class _MalformedError(Exception):
    """Why a URL cannot be used; says nothing that may be secret."""


def parse_database_url(url: str, *, variable: str = "DATABASE_URL") -> Connection:
    """Take a PostgreSQL URL apart, as Prisma or libpq writes it.

    Args:
        variable: Where it comes from, for the message.

    Raises:
        SettingsError: It cannot be one. The message never repeats the URL, which holds a password.
    """
    try:
        return _parse(url)
    except _MalformedError as reason:
        raise SettingsError(
            f"{variable} cannot be used: {reason}.", advice="It looks like postgresql://user:password@host:5432/kanbu."
        ) from None


def _parse(url: str) -> Connection:
    scheme = next((scheme for scheme in _SCHEMES if url.startswith(scheme)), None)
    if scheme is None:
        raise _MalformedError("it does not begin with postgresql://")
    rest, _, query = url[len(scheme) :].partition("?")
    authority, _, path = rest.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    user, has_password, password = userinfo.partition(":")
    parameters: dict[str, str] = {}
    if user:
        parameters["user"] = unquote(user)
    if has_password:
        parameters["password"] = unquote(password)
    _read_hosts(hosts, parameters)
    if path:
        parameters["dbname"] = unquote(path)
    dropped = []
    given = dict(parse_qsl(query, keep_blank_values=True))
    _translate_prisma(given)
    for name, value in given.items():
        if name == "sslpassword":
            raise _MalformedError(
                "sslpassword cannot be handed to libpq without showing it; use a client key without a passphrase"
            )
        if name in _LIBPQ_VARIABLES:
            parameters[name] = value
        else:
            dropped.append(name)
    if not parameters.get("dbname"):
        raise _MalformedError("it names no database (the part after the host, as in postgresql://user@host:5432/kanbu)")
    if any("\0" in value for value in parameters.values()):
        raise _MalformedError("it holds a NUL character")
    return Connection({name: value for name, value in parameters.items() if value}, tuple(sorted(dropped)))


def _read_hosts(hosts: str, parameters: dict[str, str]) -> None:
    names, ports = [], []
    for entry in hosts.split(","):
        if entry.startswith("["):
            host, bracket, port = entry[1:].partition("]")
            if not bracket or (port and not port.startswith(":")):
                raise _MalformedError("an IPv6 address needs the form [::1]:5432")
            port = port[1:]
        else:
            host, _, port = entry.partition(":")
        if port and not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise _MalformedError(
                "the port is not a number; does the password hold a character to be percent-encoded (@ : / #)?"
            )
        names.append(unquote(host))
        ports.append(port)
    if any(names):
        parameters["host"] = ",".join(names)
    if any(ports):
        parameters["port"] = ",".join(ports)


def _translate_prisma(given: dict[str, str]) -> None:
    """Prisma's TLS parameters in libpq's words: its `sslcert` without a key is the authority's certificate."""
    if "sslcert" in given and "sslkey" not in given:
        given["sslrootcert"] = given.pop("sslcert")
    if given.pop("sslaccept", None) == "strict" and given.get("sslmode") == "require":
        given["sslmode"] = "verify-full"
    if "sslidentity" in given:
        raise _MalformedError("sslidentity (PKCS#12) is not read by libpq; give sslcert and sslkey as PEM files")


def require_connection(settings: Settings) -> Connection:
    """The connection of DATABASE_URL.

    Raises:
        SettingsError: It is not set or malformed.
    """
    url = settings.secret("database_url")
    if url is None:
        raise SettingsError("DATABASE_URL is not set.", advice="Set it in .env or the environment.")
    return parse_database_url(url)


def child_environment(connection: Connection) -> dict[str, str]:
    """The environment of a client program: ours without libpq's variables and our secrets, then the connection's."""
    secrets = {variable for field, variable in variable_names().items() if is_secret(field)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG") and name not in secrets}
    # Messages are read by us and by people looking them up: in English.
    return {**inherited, "LC_ALL": "C.UTF-8", **connection.environment()}

"""Who may use Dagster's UI and GraphQL: one login for every route and websocket, and nothing for other sites.

What belongs here: the ASGI layer around Dagster's web server, which has no login of its own. What does not: the
trigger, which has its own key (`trigger`).

Three questions are asked of each request, in this order: is it addressed to us by a name of ours (an attacker's name
may resolve to our address: DNS rebinding), does another site send it (a browser sends a user's credentials along with
whatever a foreign page asks of us), and does the sender hold the login.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from kanbu_backup_dagster.server.attempts import FailedAttempts

logger = logging.getLogger("kanbu_backup.server")

SESSION_SECONDS = 12 * 3600
_COOKIE = "kanbu_session"
_GRAPHQL = "/graphql"
_JSON_TYPES = {"application/json", "application/graphql"}
_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1

SECURITY_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'self'; form-action 'self'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Login:
    """The one user name and password."""

    username: str
    password: str


@dataclass(frozen=True)
class _Entry:
    """How a request got in: whether with the password, which earns a session, or with a session, or freely."""

    with_password: bool


class Doors:
    """Lets through to `app` only whom the module's three questions let through; adds security headers to all answers.

    Args:
        app: What is guarded.
        login: None: no login is asked for. Requests must then come to `localhost`, an IP address or an allowed host.
        allowed_hosts: Names this server is called by, without port. Given any, no other is answered.
        attempts: Counts failed logins.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        login: Login | None,
        allowed_hosts: frozenset[str] = frozenset(),
        attempts: FailedAttempts | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._app = app
        self._login = login
        self._allowed_hosts = allowed_hosts
        self._attempts = FailedAttempts() if attempts is None else attempts
        self._clock = clock
        # Sessions end with the process: browsers hold the password and simply start another.
        self._session_key = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        outcome = self._misaddressed(connection) or self._foreign(connection) or self._enter(connection)
        if isinstance(outcome, _Entry):
            outcome = self._unsafe_graphql(connection) or outcome
        secured = _with_headers(send, self._headers(connection, outcome))
        if isinstance(outcome, _Entry):
            await self._app(scope, receive, secured)
        elif scope["type"] == "websocket":
            await WebSocketClose(_POLICY_VIOLATION)(scope, receive, secured)
        else:
            await outcome(scope, receive, secured)

    def _misaddressed(self, connection: HTTPConnection) -> Response | None:
        name = _host_name(connection.headers.get("host", ""))
        if self._allowed_hosts:
            known = name in self._allowed_hosts
        else:
            # With a login, a foreign name gains nothing: browsers keep credentials per name.
            known = self._login is not None or _is_own_by_nature(name)
        if known:
            return None
        return PlainTextResponse("This server is not known by that name. See BACKUP_UI_ALLOWED_HOSTS.", 421)

    def _foreign(self, connection: HTTPConnection) -> Response | None:
        headers, scope = connection.headers, connection.scope
        origin = headers.get("origin")
        if origin is not None:
            same = _is_own_origin(origin, headers.get("host", ""))
        elif headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            same = True
        else:
            # A link on another site may lead here. It may not fetch, frame or post.
            same = (
                scope["type"] == "http"
                and scope["method"] in ("GET", "HEAD")
                and headers.get("sec-fetch-mode") == "navigate"
                and headers.get("sec-fetch-dest") == "document"
            )
        return None if same else PlainTextResponse("Requests from other sites are refused.", 403)

    def _unsafe_graphql(self, connection: HTTPConnection) -> Response | None:
        """Dagster runs mutations that come by GET or with a form's content type, as other sites could send them."""
        scope = connection.scope
        if scope["type"] != "http":
            return None
        at_graphql = scope["path"] == _GRAPHQL
        if scope["method"] == "POST":
            essence = connection.headers.get("content-type", "").partition(";")[0].strip().lower()
            if essence not in _JSON_TYPES and (essence or at_graphql):
                return PlainTextResponse("The content type must be application/json.", 415)
        elif at_graphql and "text/html" not in connection.headers.get("accept", ""):
            return PlainTextResponse("GraphQL is answered by POST only.", 405, {"Allow": "POST"})
        return None

    def _enter(self, connection: HTTPConnection) -> _Entry | Response:
        if self._login is None or self._has_session(connection):
            return _Entry(with_password=False)
        given = connection.headers.get("authorization")
        if given is None:
            return _login_required()
        client = client_of(connection)
        wait = self._attempts.wait(client)
        if wait > 0:
            return PlainTextResponse("Too many failed logins.", 429, {"Retry-After": str(math.ceil(wait))})
        if self._is_login(given, self._login):
            self._attempts.succeeded(client)
            return _Entry(with_password=True)
        self._attempts.failed(client)
        logger.warning("[Server] Failed login from %s", client)
        return _login_required()

    def _is_login(self, authorization: str, login: Login) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            username, _, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        right_name = same_secret(username, login.username.encode())
        right_password = same_secret(password, login.password.encode())
        return right_name and right_password

    def _has_session(self, connection: HTTPConnection) -> bool:
        for header in connection.headers.getlist("cookie"):
            try:
                morsel = SimpleCookie(header).get(_COOKIE)
            except CookieError:
                continue
            if morsel is None:
                continue
            expiry, _, signature = morsel.value.partition(".")
            if expiry.isdecimal() and expiry.isascii() and hmac.compare_digest(signature, self._signature(expiry)):
                return int(expiry) > self._clock()
        return False

    def _signature(self, expiry: str) -> str:
        return hmac.new(self._session_key, expiry.encode(), hashlib.sha256).hexdigest()

    def _headers(self, connection: HTTPConnection, outcome: _Entry | Response) -> dict[str, str]:
        headers = dict(SECURITY_HEADERS)
        secure = connection.scope["scheme"] in ("https", "wss")
        if secure:
            headers["Strict-Transport-Security"] = "max-age=31536000"
        if isinstance(outcome, _Entry) and outcome.with_password:
            expiry = str(int(self._clock()) + SESSION_SECONDS)
            headers["Set-Cookie"] = (
                f"{_COOKIE}={expiry}.{self._signature(expiry)}; Path=/; Max-Age={SESSION_SECONDS}; HttpOnly; "
                f"SameSite=Strict{'; Secure' if secure else ''}"
            )
        return headers


def same_secret(given: bytes, expected: bytes) -> bool:
    """Compare in a time that tells nothing of either, their lengths included."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(expected).digest())


def client_of(connection: HTTPConnection) -> str:
    """The address a request came from; behind a trusted proxy, the one the proxy names."""
    return connection.client.host if connection.client else "unknown"


def _login_required() -> Response:
    return PlainTextResponse(
        "Log in.", 401, {"WWW-Authenticate": 'Basic realm="Kanbu Backup", charset="UTF-8"', "Cache-Control": "no-store"}
    )


def _host_name(host: str) -> str:
    """`Host` without its port and an IPv6 address's brackets, in lower case; empty when it is malformed."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_own_by_nature(name: str) -> bool:
    """Whether no name server has a say in where `name` leads."""
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761, section 6.3
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_own_origin(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    # The scheme is not compared: behind a proxy that ends TLS, ours is http.
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower() != ""


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    async def secured(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept"):
            present = MutableHeaders(scope=message)
            for name, value in headers.items():
                # Dagster's page brings a policy for its scripts; browsers apply both.
                if name == "Content-Security-Policy":
                    present.append(name, value)
                else:
                    present[name] = value
        await send(message)

    return secured

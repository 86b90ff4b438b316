"""One attempt to deliver an event, or a ping, over HTTP.

What belongs here: the request, its time limits, and what went wrong with it in words that give no secret away. What
does not: trying again (`backoff` says when; the caller does it), and what is sent (`events`, `chat`).

An attempt is one request: no retries within it, no redirects, no cookies, no `.netrc`. TLS is verified. Proxies and
private certificate authorities come from the usual variables (`HTTPS_PROXY`, `NO_PROXY`, `REQUESTS_CA_BUNDLE`).

Socket timeouts bound the wait for the next byte only, and looking up a name is bounded by nothing, so the request
runs in a thread of its own, and its connection is shut when the time for the whole is up.
"""

from __future__ import annotations

import http.client
import logging
import queue
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from errno import ENOENT
from http import HTTPStatus
from math import isfinite
from pathlib import Path
from socket import SHUT_RDWR, gaierror, socket
from typing import Any, cast

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_auth_from_url
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import HTTPError, ProxyError

from kanbu_backup_dagster import __version__
from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.notifications.endpoints import Endpoint, SecretUrl
from kanbu_backup_dagster.notifications.events import Event
from kanbu_backup_dagster.notifications.signature import SIGNATURE_HEADER, sign

DELIVERY_HEADER = "X-Kanbu-Delivery"
EVENT_HEADER = "X-Kanbu-Event"
TEST_HEADER = "X-Kanbu-Test"

_USER_AGENT = f"kanbu-backup/{__version__}"
_THREAD_NAME = "kanbu-notify"
_READ_LIMIT = 4096
_EXCERPT_LENGTH = 200
# The receiver took the request and refuses this body, or this event: another event may well be accepted.
_REFUSALS = {400, 406, 409, 411, 413, 415, 417, 422, 431}


@dataclass(frozen=True)
class Limits:
    """Seconds that an attempt may take: to connect (to each address), to wait for the next byte, and as a whole."""

    connect: float = 5.0
    read: float = 10.0
    total: float = 15.0


@dataclass(frozen=True)
class Receipt:
    """A delivery that was accepted: the HTTP status (2xx) and how long the attempt took."""

    status: int
    seconds: float


class DeliveryError(KanbuError):
    """An attempt that was not accepted. Its text names the receiver's scheme and host, never the rest of the URL.

    All are worth another attempt, 4xx too: a receiver that is set up wrongly gets repaired.

    Attributes:
        status: The HTTP status; None when there was no answer.
        refused: Whether the receiver refuses this event in particular, so that others need not wait for it.
        retry_after_seconds: What the receiver asked for, if anything.
    """

    def __init__(
        self,
        message: str,
        *,
        tried: tuple[str, ...] = (),
        advice: str = "",
        status: int | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, tried=tried, advice=advice)
        self.status = status
        self.retry_after_seconds = retry_after_seconds

    @property
    def refused(self) -> bool:
        return self.status in _REFUSALS

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.message, self.tried, self.advice, self.status, self.retry_after_seconds))


def _rebuild(
    message: str, tried: tuple[str, ...], advice: str, status: int | None, retry_after_seconds: float | None
) -> DeliveryError:
    return DeliveryError(message, tried=tried, advice=advice, status=status, retry_after_seconds=retry_after_seconds)


def deliver(event: Event, endpoint: Endpoint, *, test: bool = False, limits: Limits = Limits()) -> Receipt:
    """Post `event` to `endpoint`, once.

    Args:
        event: What to tell.
        endpoint: Whom.
        test: Whether this is a trial (`X-Kanbu-Test: true`).
        limits: How long it may take.

    Raises:
        DeliveryError: The answer was not 2xx, or there was none in time. The event may have arrived nevertheless.
    """
    body = endpoint.body(event, test=test)
    headers = {
        "Content-Type": "application/json",
        DELIVERY_HEADER: event.delivery_id(endpoint.name),
        EVENT_HEADER: event.event,
    }
    if test:
        headers[TEST_HEADER] = "true"
    if endpoint.secret is not None:
        headers[SIGNATURE_HEADER] = sign(body, endpoint.secret)
    return _attempt("Webhook not delivered", _Exchange("POST", endpoint.url, headers, body, limits))


def ping(url: SecretUrl, *, limits: Limits = Limits()) -> Receipt:
    """Get `url` once: the sign of life that a dead-man switch waits for.

    Raises:
        DeliveryError: The answer was not 2xx, or there was none in time.
    """
    return _attempt("Ping not delivered", _Exchange("GET", url, {}, None, limits))


@dataclass(frozen=True)
class _Answer:
    status: int
    excerpt: str
    retry_after_seconds: float | None


def _attempt(what: str, exchange: _Exchange) -> Receipt:
    started = time.monotonic()
    origin = exchange.url.origin
    threading.Thread(target=exchange.run, name=_THREAD_NAME, daemon=True).start()
    try:
        outcome = exchange.outcome.get(timeout=exchange.limits.total)
    except queue.Empty:
        # Judged before the connection is shut: an answer cut off in its head looks complete to http.client.
        outcome = exchange.head or f"no complete answer within {exchange.limits.total:g} seconds"
        exchange.end()
    if isinstance(outcome, str):
        raise DeliveryError(f"{what}: {origin}: {outcome}.")
    if 200 <= outcome.status < 300:
        return Receipt(outcome.status, time.monotonic() - started)
    raise DeliveryError(
        f"{what}: {origin} answered {_status_words(outcome.status)}"
        + (f": {outcome.excerpt}" if outcome.excerpt else "."),
        advice="Redirects are not followed: set the address that it leads to." if 300 <= outcome.status < 400 else "",
        status=outcome.status,
        retry_after_seconds=outcome.retry_after_seconds,
    )


class _Exchange:
    """One request and its answer, run in one thread and ended, when need be, from another.

    Attributes:
        outcome: Receives the answer, or in words why there is none.
        head: The answer as soon as its head is known, without an excerpt of its body.
    """

    def __init__(
        self, method: str, url: SecretUrl, headers: dict[str, str], body: bytes | None, limits: Limits
    ) -> None:
        self.method, self.url, self.headers, self.body, self.limits = method, url, headers, body, limits
        self.outcome: queue.Queue[_Answer | str] = queue.Queue()
        self.head: _Answer | None = None
        self._ended = threading.Event()
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        """Do the exchange. Every way it can end is put into `outcome`."""
        try:
            self.outcome.put(self._request())
        except Exception as error:  # noqa: BLE001 - the thread's last line: whatever it is, the caller is told
            self.outcome.put(_reason(error))

    def end(self) -> None:
        """Shut the connection, now or as soon as there is one: `run` ends, and nothing more is sent."""
        self._ended.set()
        sock = self._connection.sock if self._connection is not None else None
        if isinstance(sock, socket):
            # The plain method: the one of TLS sockets changes state that the other thread is using.
            with suppress(OSError):
                socket.shutdown(sock, SHUT_RDWR)

    def watch(self, connection: http.client.HTTPConnection) -> None:
        """Take note of the connection in use."""
        self._connection = connection

    def refuse_when_ended(self) -> None:
        """Raises: ConnectionAbortedError: `end` was called before there was a connection to shut."""
        if self._ended.is_set():
            raise ConnectionAbortedError

    def _request(self) -> _Answer:
        adapter = _WatchedAdapter(self)
        with requests.Session() as session:
            # With an `auth` of its own a session does not look into .netrc.
            user, password = get_auth_from_url(self.url.reveal())
            session.auth = (user, password) if user or password else _no_auth
            session.headers.clear()
            session.headers.update({"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", "Connection": "close"})
            request = session.prepare_request(
                requests.Request(self.method, self.url.reveal(), headers=self.headers, data=self.body)
            )
            environment: Any = session.merge_environment_settings(request.url, {}, True, None, None)
            authorities = environment["verify"]
            if isinstance(authorities, str) and not Path(authorities).exists():
                raise FileNotFoundError(
                    ENOENT, "the file that REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names does not exist"
                )
            try:
                # The adapter, not the session: a session reads the whole body of a redirect.
                response = adapter.send(request, timeout=(self.limits.connect, self.limits.read), **environment)
                return self._read(response)
            finally:
                adapter.close()

    def _read(self, response: requests.Response) -> _Answer:
        with response:
            self.head = _Answer(response.status_code, "", _retry_after(response.headers.get("Retry-After")))
            if 200 <= response.status_code < 300:
                return self.head
            try:
                start = response.raw.read(_READ_LIMIT, decode_content=False)
            except (HTTPError, OSError):
                return self.head  # The status was the answer; its body is a courtesy.
            return _Answer(response.status_code, _excerpt(start, self.url), self.head.retry_after_seconds)


class _WatchedAdapter(HTTPAdapter):
    """Tells an exchange which connection it is using."""

    def __init__(self, exchange: _Exchange) -> None:
        super().__init__(max_retries=0)
        self._exchange = exchange

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> HTTPConnectionPool:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        exchange = self._exchange
        kind: Any = pool.ConnectionCls

        class Watched(kind):  # type: ignore[misc] # the base is the pool's choice: plain, TLS or SOCKS
            def connect(self) -> None:
                exchange.watch(self)
                super().connect()
                exchange.refuse_when_ended()

        pool.ConnectionCls = Watched
        return cast(HTTPConnectionPool, pool)


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _reason(error: BaseException) -> str:
    # Outer exceptions quote the URL, and some what was received; the innermost that is known says what happened.
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    known = (words for words in map(_words_for, reversed(chain)) if words)
    proxy = any(isinstance(link, ProxyError) for link in chain)
    return ("the proxy set in the environment did not connect: " if proxy else "") + next(
        known, f"the request failed ({type(chain[-1]).__name__})"
    )


def _words_for(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its TLS certificate is not accepted: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError):
        return "TLS could not be agreed on"
    if isinstance(error, gaierror):
        return "the host's name could not be looked up"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)):
        return "the connection was closed before there was an answer"
    if isinstance(error, http.client.HTTPException):
        return "the answer is not HTTP"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return ""


def _status_words(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _excerpt(start: bytes, url: SecretUrl) -> str:
    text = start.decode("utf-8", "replace")
    pieces = url.secret_pieces()
    if len(start) >= _READ_LIMIT and pieces:
        # What was read may end within a repeated piece of the URL, which would then not be recognised.
        text = text[: -len(pieces[0])]
    for piece in pieces:
        text = text.replace(piece, "***")
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= _EXCERPT_LENGTH else text[: _EXCERPT_LENGTH - 1] + "…"


def _retry_after(value: str | None) -> float | None:
    # RFC 9110, 10.2.3: seconds or a date. Discord sends fractions too.
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        seconds = (moment - datetime.now(timezone.utc)).total_seconds()
    return min(max(seconds, 0.0), 86_400.0) if isfinite(seconds) else None


def _not_ours(record: logging.LogRecord) -> bool:
    return record.threadName != _THREAD_NAME


# urllib3 logs the path of each request (debug) and the whole URL of an answer with odd headers (warning).
for _logger in ("connection", "connectionpool", "response", "util.retry"):
    logging.getLogger(f"urllib3.{_logger}").addFilter(_not_ours)

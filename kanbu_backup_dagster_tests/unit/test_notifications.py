"""Notifications: payloads, chat messages, endpoints, backoff, and delivery to a real receiver on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import pickle
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.notifications.backoff import (
    FIRST_WAIT,
    LEAST_ATTEMPTS,
    LONGEST_WAIT,
    Backoff,
    after_failure,
)
from kanbu_backup_dagster.notifications.chat import discord_message, slack_message
from kanbu_backup_dagster.notifications.delivery import DeliveryError, Limits, deliver, ping
from kanbu_backup_dagster.notifications.endpoints import SecretUrl, recognise, webhook_endpoint
from kanbu_backup_dagster.notifications.events import (
    ERROR_LENGTH,
    BackupCompleted,
    BackupFailed,
    BackupOverdue,
    BackupPart,
    BackupRecovered,
    ConfigInvalid,
    ConfigPart,
    ConfigProblem,
    DrillCompleted,
    DrillFailed,
    DrillPart,
    Event,
    OverduePart,
    PruneHeld,
    PrunePart,
    RestoreCompleted,
    RestoreFailed,
    RestorePart,
    ScheduleRef,
    StorageLow,
    StoragePart,
    VerificationFailed,
    VerificationPart,
    example_event,
    parse_event,
    short_error,
)
from kanbu_backup_dagster.notifications.javascript_json import stringify
from kanbu_backup_dagster.schedule_file import WebhookFormat

NOW = datetime(2026, 1, 18, 2, 0, 5, 432_999, tzinfo=timezone.utc)
NAME = "kanbu_backup_2026-01-18T02-00-00.sql.gz.enc"
DAILY = ScheduleRef(id=1, name="Daily Database Backup")
TOKEN = "T0K3N-in-the-path"
SECRET_QUERY = "key=s3cr3t-query"
HMAC_SECRET = "hmac-s3cret"
QUICK = Limits(connect=2, read=0.5, total=1)

ALL_EVENTS: list[Event] = [
    BackupCompleted(
        key="run-1",
        timestamp=NOW,
        schedule=DAILY,
        backup=BackupPart(
            type=BackupType.DATABASE,
            filename=NAME,
            file_size=1048576,
            is_encrypted=True,
            checksum="a1b2",
            duration_ms=5432,
        ),
    ),
    BackupFailed(
        key="run-2", timestamp=NOW, backup=BackupPart(type=BackupType.DATABASE), error="Storage not accessible: /data"
    ),
    BackupOverdue(
        key="overdue/1",
        timestamp=NOW,
        schedule=DAILY,
        backup=BackupPart(type=BackupType.DATABASE),
        overdue=OverduePart(expected_by=NOW),
    ),
    BackupRecovered(
        key="run-3",
        timestamp=NOW,
        schedule=DAILY,
        backup=BackupPart(type=BackupType.SOURCE, filename="kanbu_source_2026-01-18T02-00-00.tar.gz"),
        overdue=OverduePart(last_success_at=NOW - timedelta(days=2), expected_by=NOW),
    ),
    RestoreCompleted(
        key="run-4",
        timestamp=NOW,
        restore=RestorePart(
            type=BackupType.DATABASE, filename=NAME, target="kanbu", previous="kanbu_before", duration_ms=90_000
        ),
    ),
    RestoreFailed(
        key="run-5",
        timestamp=NOW,
        restore=RestorePart(type=BackupType.DATABASE, filename=NAME, target="kanbu"),
        error="Checksum mismatch",
    ),
    DrillCompleted(
        key="run-6",
        timestamp=NOW,
        drill=DrillPart(type=BackupType.DATABASE, filename=NAME, tables=42, rows=123456, duration_ms=61_000),
    ),
    DrillFailed(key="run-7", timestamp=NOW, drill=DrillPart(type=BackupType.DATABASE), error="rows are missing"),
    VerificationFailed(
        key="run-8/f",
        timestamp=NOW,
        verification=VerificationPart(type=BackupType.DATABASE, filename=NAME, file_size=12, checksum="a1b2"),
        error="Checksum verification failed",
    ),
    PruneHeld(key="run-9", timestamp=NOW, prune=PrunePart(reason="the clock leapt", held=12)),
    StorageLow(
        key="storage/1",
        timestamp=NOW,
        storage=StoragePart(path="/data/backups", free_bytes=5, needed_bytes=3 << 30),
    ),
    ConfigInvalid(
        key="config/1",
        timestamp=NOW,
        config=ConfigPart(
            file="kanbu_backup.yaml",
            problems=(
                ConfigProblem(line=3, column=9, message="cron: not a cron expression"),
                ConfigProblem(message="id: twice"),
            ),
        ),
    ),
]


def test_the_payload_is_the_users_guides_to_the_byte() -> None:
    assert ALL_EVENTS[0].body() == (
        b'{"event":"backup.completed","backup":{"type":"database",'
        b'"filename":"kanbu_backup_2026-01-18T02-00-00.sql.gz.enc","fileSize":1048576,"isEncrypted":true,'
        b'"checksum":"a1b2","durationMs":5432},"schedule":{"id":1,"name":"Daily Database Backup"},'
        b'"timestamp":"2026-01-18T02:00:05.432Z"}'
    )


def test_a_failure_carries_its_error_and_null_for_what_does_not_exist() -> None:
    assert json.loads(ALL_EVENTS[1].body()) == {
        "event": "backup.failed",
        "backup": {
            "type": "database",
            "filename": None,
            "fileSize": None,
            "isEncrypted": None,
            "checksum": None,
            "durationMs": None,
        },
        "schedule": None,
        "error": "Storage not accessible: /data",
        "timestamp": "2026-01-18T02:00:05.432Z",
    }


def test_every_event_has_the_documented_payload() -> None:
    documented = re.findall(
        r"^```json\n(.*?)\n```$",
        (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    by_name = {example["event"]: example for example in map(json.loads, documented)}
    assert set(by_name) == {event.event for event in ALL_EVENTS}
    for event in ALL_EVENTS:
        assert _shape(event.payload()) == _shape(by_name[event.event]), event.event


def _shape(value: Any) -> Any:
    """The keys of an object in their order, recursively; a schedule may be null on either side."""
    if not isinstance(value, dict):
        return None
    return [(name, None if name == "schedule" else _shape(inner)) for name, inner in value.items()]


@pytest.mark.parametrize("event", ALL_EVENTS, ids=lambda event: event.event)
def test_an_event_survives_being_kept(event: Event) -> None:
    again = parse_event(event.to_record())
    assert again == event
    assert type(again) is type(event)
    assert again.body() == event.body()


def test_a_record_of_an_unknown_event_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backup\.sung"):
        parse_event('{"event":"backup.sung","key":"1"}')


def test_events_are_frozen_and_need_a_time_zone() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ALL_EVENTS[0].key = "other"
    with pytest.raises(ValueError, match="zone"):
        example_event("1", datetime(2026, 1, 18))  # noqa: DTZ001


def test_the_delivery_id_is_the_same_each_time_and_differs_by_event_run_and_endpoint() -> None:
    completed = ALL_EVENTS[0]
    first = completed.delivery_id("webhook")
    assert first == parse_event(completed.to_record()).delivery_id("webhook")
    others = {
        completed.delivery_id("other"),
        completed.model_copy(update={"key": "run-99"}).delivery_id("webhook"),
        ALL_EVENTS[3].model_copy(update={"key": completed.key}).delivery_id("webhook"),
    }
    assert len(others | {first}) == 4


def test_an_error_is_short_on_one_line_and_without_credentials() -> None:
    text = (
        "could not connect:\n  postgresql://kanbu:hunter2@db:5432/kanbu"
        " password=hunter2 PGPASSWORD='hunter 2' token: hunter2"
    )
    assert short_error(text) == (
        "could not connect: postgresql://***@db:5432/kanbu password=*** PGPASSWORD=*** token: ***"
    )
    assert len(short_error("x" * 10_000)) == ERROR_LENGTH
    assert "hunter2" not in RestoreFailed(
        key="1", timestamp=NOW, restore=RestorePart(type=BackupType.DATABASE), error=text
    ).body().decode("ascii")


def test_a_name_that_is_not_unicode_does_not_stop_an_alert() -> None:
    event = BackupFailed(
        key="1", timestamp=NOW, backup=BackupPart(type=BackupType.SOURCE), error="cannot read caf\udce9.txt 😀"
    )
    assert json.loads(event.body())["error"] == "cannot read caf\ufffd.txt 😀"


@pytest.mark.parametrize("value", [1.5, {"1": 1}, {"a": {"07": 1, "7": 2}}, 2**53, -(2**53), b"bytes", {1: 2}])
def test_what_javascript_would_write_differently_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        stringify(value)


def test_the_largest_exact_integers_and_leading_zero_keys_are_written() -> None:
    assert stringify({"01": 2**53 - 1, "-1": -(2**53) + 1}) == b'{"01":9007199254740991,"-1":-9007199254740991}'


# Chat ----------------------------------------------------------------------------------------------------------------

HOSTILE = '<!channel> & <@U123> @everyone `code` [x](http://evil) "*_~|'


def _hostile(text: str) -> list[Event]:
    filled = []
    for event in ALL_EVENTS:
        changes: dict[str, Any] = {"schedule": ScheduleRef(id=1, name=text)}
        if "error" in type(event).model_fields:
            changes["error"] = text
        fields = {**event.model_dump(), **changes}
        for part in ("backup", "restore", "drill", "verification"):
            if part in fields:
                fields[part] = {**fields[part], "filename": text}
        if "config" in fields:
            fields["config"] = {"file": text, "problems": [{"message": text}] * 50}
        filled.append(type(event).model_validate(fields))
    return filled


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("@<>&`*_\\", min_size=600, max_size=700))
def test_chat_messages_keep_the_services_limits(text: str) -> None:
    for event in _hostile(text):
        slack: Any = slack_message(event)
        assert 0 < _units(slack["text"]) < 40_000
        assert len(slack["blocks"]) <= 50
        for block in slack["blocks"]:
            assert "fields" in block or 1 <= _units(block["text"]["text"]) <= 3000
            assert len(block.get("fields", [])) <= 10
            assert all(1 <= _units(field["text"]) <= 2000 for field in block.get("fields", []))
        discord: Any = discord_message(event)
        (embed,) = discord["embeds"]
        assert 1 <= _units(discord["content"]) <= 2000
        assert 1 <= _units(embed["title"]) <= 256
        assert 1 <= _units(embed.get("description", "-")) <= 4096
        assert len(embed["fields"]) <= 25
        assert all(1 <= _units(field["name"]) <= 256 for field in embed["fields"])
        assert all(1 <= _units(field["value"]) <= 1024 for field in embed["fields"])
        assert sum(map(_units, _strings(embed))) <= 6000


def test_text_from_outside_mentions_nobody() -> None:
    for event in _hostile(HOSTILE):
        slack = stringify(slack_message(event)).decode()
        assert "<" not in slack
        assert "&lt;!channel&gt; &amp; " in slack
        for message in (slack, stringify(discord_message(event)).decode()):
            assert "everyone" in message
            assert "@everyone" not in message
            assert "<@U123>" not in message
        assert discord_message(event)["allowed_mentions"] == {"parse": []}


@pytest.mark.parametrize("event", ALL_EVENTS, ids=lambda event: event.event)
def test_a_chat_message_says_what_the_event_says(event: Event) -> None:
    slack, discord = slack_message(event), discord_message(event, test=True)
    said = slack["text"]
    assert isinstance(said, str)
    assert str(getattr(event, "error", "")) in said
    payload: Any = event.payload()
    for part in ("backup", "restore", "drill", "verification"):
        if filename := payload.get(part, {}).get("filename"):
            assert filename in said
            assert filename in "".join(_strings(discord)).replace("\\", "")
    assert str(discord["content"]).startswith("[Test] ")


def test_chat_messages_speak_in_human_units() -> None:
    text = "\n".join(str(slack_message(event)["text"]) for event in ALL_EVENTS)
    for words in (
        "Size: 1.0 MiB",
        "Took: 5.4 s",
        "Took: 0:01:30",
        "Encrypted: yes",
        "Rows: 123,456",
        "Free: 5 B",
        "Needed: 3.0 GiB",
        "Last success: 2026-01-16 02:00:05 UTC",
        "Problem: line 3, column 9: cron: not a cron expression",
        "Schedule: Daily Database Backup (1)",
    ):
        assert words in text


# Endpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://hooks.slack.com/services/T0/B0/X", WebhookFormat.SLACK),
        ("https://hooks.slack-gov.com/services/T0/B0/X", WebhookFormat.SLACK),
        ("https://HOOKS.slack.com/workflows/T0/B0/X", WebhookFormat.SLACK),
        ("https://discord.com/api/webhooks/1/x", WebhookFormat.DISCORD),
        ("https://discordapp.com/api/webhooks/1/x", WebhookFormat.DISCORD),
        ("https://ptb.discord.com/api/v10/webhooks/1/x?wait=true", WebhookFormat.DISCORD),
        ("https://canary.discordapp.com/api/webhooks/1/x/", WebhookFormat.DISCORD),
        ("https://discord.com/api/webhooks/1/x/slack", WebhookFormat.SLACK),
        ("https://discord.com/blog/webhooks", WebhookFormat.KANBU),
        ("https://example.com/hooks.slack.com/services/T0", WebhookFormat.KANBU),
        ("https://hooks.slack.com.evil.example/services/T0", WebhookFormat.KANBU),
        ("https://notdiscord.com/api/webhooks/1/x", WebhookFormat.KANBU),
    ],
)
def test_the_form_is_recognised_by_the_url(url: str, expected: WebhookFormat) -> None:
    assert recognise(SecretUrl(url, source="X")) is expected
    assert webhook_endpoint(url).format is expected
    assert webhook_endpoint(url, webhook_format=WebhookFormat.DISCORD).format is WebhookFormat.DISCORD


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "empty"),
        (f"file:///etc/{TOKEN}", "only http"),
        (f"ftp://example.com/{TOKEN}", "only http"),
        (f"gopher://127.0.0.1:6379/{TOKEN}", "only http"),
        (f"example.com/{TOKEN}", "only http"),
        (f"https:///{TOKEN}", "no host"),
        (f"https://user:{TOKEN}@/x", "no host"),
        (f"https://example.com:port/{TOKEN}", "not a URL"),
        (f"https://example.com:99999/{TOKEN}", "not a URL"),
        (f"https://[::1/{TOKEN}", "not a URL"),
        (f"https://exa mple.com/{TOKEN}", "space"),
        (f"https://example.com/{TOKEN}\nX-Evil: 1", "control"),
        (f"https://*.example.com/{TOKEN}", "cannot|can be requested"),
    ],
)
def test_a_url_that_cannot_be_called_is_refused_without_repeating_it(url: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        webhook_endpoint(url)
    shown = "".join(traceback.format_exception(caught.value))
    assert "BACKUP_WEBHOOK_URL" in str(caught.value)
    assert TOKEN not in shown


def test_an_endpoint_shows_neither_url_nor_secret() -> None:
    endpoint = webhook_endpoint(f"https://u:pw-{TOKEN}@[::1]:8443/{TOKEN}?{SECRET_QUERY}", secret=HMAC_SECRET)
    assert endpoint.url.origin == "https://[::1]:8443"
    for shown in (repr(endpoint), str(endpoint), f"{endpoint.url}"):
        assert TOKEN not in shown
        assert "s3cret" not in shown
        assert "[::1]:8443" in shown
    assert pickle.loads(pickle.dumps(endpoint)) == endpoint


# Backoff -------------------------------------------------------------------------------------------------------------


def test_waits_double_to_an_hour_and_days_pass_before_giving_up() -> None:
    now, state, waits = NOW, None, []
    give_up_after = timedelta(days=3)
    while state is None or not state.is_hopeless(now, give_up_after):
        state = after_failure(state, now)
        waits.append(state.next_attempt_at - now)
        assert not state.is_due(state.next_attempt_at - timedelta(seconds=1))
        assert state.is_due(state.next_attempt_at)
        now = state.next_attempt_at
    assert waits[:4] == [FIRST_WAIT, FIRST_WAIT * 2, FIRST_WAIT * 4, FIRST_WAIT * 8]
    assert max(waits) == waits[-1] == LONGEST_WAIT
    assert give_up_after <= now - NOW <= give_up_after + LONGEST_WAIT
    assert state.attempts == 78


def test_a_clock_that_leaps_neither_gives_up_nor_waits_for_ever() -> None:
    state = after_failure(None, NOW)
    later = NOW + timedelta(days=400)
    assert not after_failure(state, later).is_hopeless(later, timedelta(days=3))
    assert state.is_due(NOW - timedelta(days=400))
    for _ in range(LEAST_ATTEMPTS):
        state = after_failure(state, later)
    assert state.is_hopeless(later, timedelta(days=3))
    assert not state.is_hopeless(later, timedelta(days=500))


def test_what_a_receiver_asks_for_is_obeyed_within_an_hour() -> None:
    assert after_failure(None, NOW, 300).next_attempt_at == NOW + timedelta(seconds=300)
    assert after_failure(None, NOW, 0.2).next_attempt_at == NOW + FIRST_WAIT
    assert after_failure(None, NOW, 86_400).next_attempt_at == NOW + LONGEST_WAIT


@given(st.integers(1, 10**6), st.floats(0, 1e6))
def test_backoff_survives_as_json_and_never_overflows(attempts: int, retry_after: float) -> None:
    before = Backoff(attempts=attempts, first_failed_at=NOW, last_failed_at=NOW, next_attempt_at=NOW)
    state = after_failure(before, NOW, retry_after)
    assert FIRST_WAIT <= state.next_attempt_at - NOW <= LONGEST_WAIT
    assert Backoff.model_validate_json(state.model_dump_json()) == state


# Delivery ------------------------------------------------------------------------------------------------------------


class Request:
    """What a receiver got."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self.method, self.path = handler.command, handler.path
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))


class Receiver:
    """An HTTP server on loopback that answers each request with `behave`."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.behave: Callable[[BaseHTTPRequestHandler], None] = answer(204)
        self.stopping = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            stopping = self.stopping

            def handle_any(self) -> None:
                receiver.requests.append(Request(self))
                receiver.behave(self)

            do_GET = do_POST = do_CONNECT = handle_any

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's signature
                """Nothing: what arrived is in `requests`."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """Nothing: clients that hang up are what these tests are about."""

        self.server = Server(("127.0.0.1", 0), Handler)
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.scheme = "http" if context is None else "https"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def origin(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.origin}/hook/{TOKEN}?{SECRET_QUERY}"

    def close(self) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def answer(status: int, body: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def behave(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def raw(content: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def behave(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(content)
        handler.close_connection = True

    return behave


def hang(handler: Any) -> None:
    handler.stopping.wait(20)


def dribble(start: bytes) -> Callable[[Any], None]:
    """`start`, then a byte of a header or body that never ends, each well within the read timeout."""

    def behave(handler: Any) -> None:
        handler.wfile.write(start)
        while not handler.stopping.wait(0.1):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    return behave


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with contextlib.closing(Receiver()) as started:
        yield started


def _fail(receiver: Receiver, limits: Limits = QUICK, url: str | None = None) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        deliver(ALL_EVENTS[0], webhook_endpoint(url or receiver.url, secret=HMAC_SECRET), limits=limits)
    error = caught.value
    # As Dagster records it: the whole chain, with its contexts.
    shown = "".join(traceback.format_exception(error)) + repr(error.__context__)
    for secret in (TOKEN, "s3cr3t-query", HMAC_SECRET, "/hook/"):
        assert secret not in shown
    assert receiver.origin in str(error)
    return error


def test_a_delivery_arrives_whole_and_signed(receiver: Receiver) -> None:
    receipt = deliver(ALL_EVENTS[0], webhook_endpoint(receiver.url, secret="clé"))
    assert receipt.status == 204
    (request,) = receiver.requests
    assert (request.method, request.path) == ("POST", f"/hook/{TOKEN}?{SECRET_QUERY}")
    assert request.body == ALL_EVENTS[0].body()
    assert request.headers == {
        "host": receiver.origin.removeprefix("http://"),
        "user-agent": request.headers["user-agent"],
        "accept-encoding": "identity",
        "connection": "close",
        "content-type": "application/json",
        "content-length": str(len(request.body)),
        "x-kanbu-delivery": ALL_EVENTS[0].delivery_id("webhook"),
        "x-kanbu-event": "backup.completed",
        "x-kanbu-signature": hmac.new("clé".encode(), request.body, hashlib.sha256).hexdigest(),
    }
    assert request.headers["user-agent"].startswith("kanbu-backup/")


@pytest.mark.parametrize("secret", [None, ""])
def test_without_a_secret_nothing_is_signed(receiver: Receiver, secret: str | None) -> None:
    deliver(ALL_EVENTS[0], webhook_endpoint(receiver.url, secret=secret), test=True)
    (request,) = receiver.requests
    assert "x-kanbu-signature" not in request.headers
    assert request.headers["x-kanbu-test"] == "true"


@pytest.mark.parametrize("form", [WebhookFormat.SLACK, WebhookFormat.DISCORD])
def test_chat_services_get_their_own_bodies(receiver: Receiver, form: WebhookFormat) -> None:
    receiver.behave = answer(200, b"ok")
    deliver(ALL_EVENTS[1], webhook_endpoint(receiver.url, webhook_format=form))
    body = json.loads(receiver.requests[0].body)
    assert (
        set(body)
        == {
            WebhookFormat.SLACK: {"text", "blocks"},
            WebhookFormat.DISCORD: {"content", "embeds", "allowed_mentions"},
        }[form]
    )
    assert "Storage not accessible" in receiver.requests[0].body.decode()


def test_a_ping_is_a_bare_get(receiver: Receiver) -> None:
    receiver.behave = answer(200, b"OK")
    assert ping(SecretUrl(receiver.url, source="X")).status == 200
    (request,) = receiver.requests
    assert (request.method, request.body) == ("GET", b"")
    receiver.behave = answer(404)
    with pytest.raises(DeliveryError, match=r"Ping not delivered: http://127.0.0.1:\d+ answered 404 Not Found"):
        ping(SecretUrl(receiver.url, source="X"))


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_every_2xx_is_a_delivery(receiver: Receiver, status: int) -> None:
    receiver.behave = answer(status)
    assert deliver(ALL_EVENTS[0], webhook_endpoint(receiver.url)).status == status


@pytest.mark.parametrize(
    ("status", "refused"),
    [(400, True), (413, True), (401, False), (404, False), (410, False), (500, False), (799, False)],
)
def test_every_other_status_is_an_error(receiver: Receiver, status: int, refused: bool) -> None:
    receiver.behave = answer(status, b"no_service")
    error = _fail(receiver)
    assert (error.status, error.refused) == (status, refused)
    assert str(error).endswith(": no_service")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.status, again.refused) == (str(error), status, refused)


def test_what_a_receiver_repeats_of_the_url_is_taken_out(receiver: Receiver) -> None:
    for page in (
        f"Cannot POST /hook/{TOKEN}?{SECRET_QUERY}",
        f"<pre>token {TOKEN}\x1b[31m</pre>",
        f"no such hook: cl\u00e9-{TOKEN} cl%C3%A9-{TOKEN}",
        " " * 4090 + TOKEN + " is unknown",  # cut in the middle of the token by the reading limit
    ):
        receiver.behave = answer(404, page.encode())
        error = _fail(receiver, url=receiver.url.replace(TOKEN, f"{TOKEN}/cl\u00e9-{TOKEN}"))
        assert "T0K" not in str(error)
        assert "cl" not in str(error)
        assert "\x1b" not in str(error)


def test_a_long_answer_is_cut(receiver: Receiver) -> None:
    receiver.behave = answer(500, b"\xff<h1>Oops</h1>\n" * 100_000)
    assert len(str(_fail(receiver))) < 350


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(receiver: Receiver, status: int) -> None:
    receiver.behave = answer(status, b"moved", Location=f"{receiver.origin}/elsewhere")
    error = _fail(receiver)
    assert len(receiver.requests) == 1
    assert "Redirects are not followed" in str(error)
    assert "elsewhere" not in str(error)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("120", 120, 120),
        ("0.25", 0.25, 0.25),
        ("-5", 0, 0),
        ("1e999", None, None),
        ("soon", None, None),
        ("Fri, 31 Dec 1999 23:59:59 +" + "9" * 30, None, None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400, 86_400),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0, 0),
    ],
)
def test_retry_after_is_understood(receiver: Receiver, value: str, low: float | None, high: float | None) -> None:
    receiver.behave = answer(429, Retry_After=value)
    found = _fail(receiver).retry_after_seconds
    if low is None or high is None:
        assert found is None
    else:
        assert found is not None
        assert low <= found <= high


def _wait_until_no_attempt_runs() -> None:
    for thread in threading.enumerate():
        if thread.name == "kanbu-notify":
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("behave", "limits", "words", "seconds"),
    [
        pytest.param(hang, QUICK, "no answer in time", 0.5, id="hangs"),
        pytest.param(dribble(b""), QUICK, "no complete answer within 1 s", 1, id="dribbles-status"),
        pytest.param(dribble(b"HTTP/1.1 200 OK\r\nX-Slow: "), QUICK, "no complete answer", 1, id="dribbles-head"),
        pytest.param(
            dribble(b"HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\nRetry-After: 7\r\n\r\n"),
            QUICK,
            "answered 503 Service Unavailable",
            1,
            id="dribbles-body",
        ),
    ],
)
def test_a_slow_receiver_holds_nobody_up(
    receiver: Receiver, behave: Callable[[Any], None], limits: Limits, words: str, seconds: float
) -> None:
    receiver.behave = behave
    started = time.monotonic()
    error = _fail(receiver, limits)
    assert seconds <= time.monotonic() - started < seconds + 1
    assert words in str(error)
    assert error.retry_after_seconds == (7 if error.status == 503 else None)
    # Not merely left behind: the connection is shut, so that attempt upon attempt cannot pile up.
    _wait_until_no_attempt_runs()


def test_a_slow_name_lookup_holds_nobody_up_and_sends_nothing_late(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, answered = socket.getaddrinfo, threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        answered.wait(20)
        return look_up(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert "no complete answer within 1 s" in str(_fail(receiver))
    answered.set()
    _wait_until_no_attempt_runs()
    assert receiver.requests == []


def test_a_delivery_is_made_by_its_status_however_slow_the_rest(receiver: Receiver) -> None:
    receiver.behave = dribble(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    started = time.monotonic()
    assert deliver(ALL_EVENTS[0], webhook_endpoint(receiver.url), limits=QUICK).status == 200
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "closed before there was an answer"),
        (b"HTTP/1.1 20", "not HTTP"),
        (b"SSH-2.0-OpenSSH_9.2 T0K3N-in-the-path\r\n", "not HTTP"),
        (b"\x00\xff\xfe\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 abc T0K3N-in-the-path\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 500 T0K3N-in-the-path\r\n\r\n", "answered 500 Internal Server Error"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 200 + b"\r\n", "not HTTP"),
        (b"HTTP/1.1 500 No\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nzz", "answered 500"),
        (b"HTTP/1.1 500 No\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope", "answered 500"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 50\r\n\r\nshort", "answered 500"),
    ],
)
def test_garbage_is_an_error_in_plain_words(receiver: Receiver, content: bytes, words: str) -> None:
    receiver.behave = raw(content)
    assert re.search(words, str(_fail(receiver)))


def test_nobody_there(receiver: Receiver) -> None:
    receiver.close()
    error = _fail(receiver)
    assert "connection refused" in str(error)
    assert error.status is None


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(DeliveryError, match=r"http://nowhere\.invalid: (the host's name|no complete answer)"):
        deliver(ALL_EVENTS[0], webhook_endpoint(f"http://nowhere.invalid/{TOKEN}"), limits=Limits(1, 1, 3))


def test_the_url_is_in_no_log(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for behave in (
        answer(200),
        answer(500),
        raw(b"HTTP/1.1 200 OK\r\nno colon here\r\nX: 1\r\n\r\n"),
        raw(b"HTTP/1.1 500 No\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        raw(b""),
    ):
        receiver.behave = behave
        with contextlib.suppress(DeliveryError):
            deliver(ALL_EVENTS[0], webhook_endpoint(receiver.url), limits=QUICK)
    assert len(receiver.requests) == 5
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("urllib3")]
    assert not [line for line in logged if TOKEN in line or "s3cr3t" in line]


def test_other_users_of_urllib3_still_log(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    import requests

    caplog.set_level(logging.DEBUG, logger="urllib3.connectionpool")
    requests.get(f"{receiver.origin}/others", timeout=5)
    assert "/others" in caplog.text


def test_credentials_in_the_url_are_sent_and_netrc_is_not(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    deliver(ALL_EVENTS[0], webhook_endpoint(receiver.url))
    deliver(ALL_EVENTS[0], webhook_endpoint(receiver.url.replace("http://", "http://me:p%40ss@")))
    bare, basic = receiver.requests
    assert "authorization" not in bare.headers
    assert basic.headers["authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss
    receiver.behave = answer(401, b"me:p@ss is wrong")
    error = _fail(receiver, url=receiver.url.replace("http://", "http://me:p%40ss@"))
    assert "p@ss" not in str(error)
    assert "p%40ss" not in str(error)


def test_a_proxy_of_the_environment_is_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", receiver.origin)
    deliver(ALL_EVENTS[0], webhook_endpoint("http://alerts.example/hook"))
    assert receiver.requests[0].path == "http://alerts.example/hook"
    monkeypatch.setenv("HTTPS_PROXY", receiver.origin)
    receiver.behave = answer(403)
    with pytest.raises(
        DeliveryError, match=r"https://alerts\.example: the proxy set in the environment did not connect"
    ):
        deliver(ALL_EVENTS[0], webhook_endpoint("https://alerts.example/hook"), limits=QUICK)
    assert receiver.requests[1].method == "CONNECT"
    assert "hook" not in receiver.requests[1].path


def test_a_proxy_that_dribbles_holds_nobody_up(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", receiver.origin)
    receiver.behave = dribble(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    with pytest.raises(DeliveryError, match="no complete answer within 1 seconds"):
        deliver(ALL_EVENTS[0], webhook_endpoint("https://alerts.example/hook"), limits=QUICK)
    _wait_until_no_attempt_runs()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate for `localhost` and its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(timezone.utc)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "localhost.pem"
    path.write_bytes(
        built.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture
def tls_receiver(certificate: Path) -> Iterator[Receiver]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with contextlib.closing(Receiver(context)) as started:
        yield started


def test_tls_is_verified_and_a_private_authority_can_be_named(
    tls_receiver: Receiver, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tls_receiver.url.replace("127.0.0.1", "localhost")
    with pytest.raises(DeliveryError, match="its TLS certificate is not accepted: self-signed certificate"):
        deliver(ALL_EVENTS[0], webhook_endpoint(named))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert deliver(ALL_EVENTS[0], webhook_endpoint(named)).status == 204
    assert "its TLS certificate is not accepted" in str(_fail(tls_receiver))  # right authority, wrong name
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.with_name("gone.pem")))
    with pytest.raises(DeliveryError, match="that REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names does not exist"):
        deliver(ALL_EVENTS[0], webhook_endpoint(named))
    assert len(tls_receiver.requests) == 1


def test_a_slow_tls_receiver_holds_nobody_up(
    tls_receiver: Receiver, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    tls_receiver.behave = dribble(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    with pytest.raises(DeliveryError, match="no complete answer"):
        deliver(ALL_EVENTS[0], webhook_endpoint(tls_receiver.url.replace("127.0.0.1", "localhost")), limits=QUICK)
    _wait_until_no_attempt_runs()


def test_a_receiver_that_speaks_no_tls(receiver: Receiver) -> None:
    with pytest.raises(DeliveryError, match="TLS could not be agreed on"):
        deliver(ALL_EVENTS[0], webhook_endpoint(receiver.url.replace("http://", "https://")), limits=QUICK)


def test_repeats_bear_one_id_and_lose_nothing_while_a_receiver_is_down(receiver: Receiver) -> None:
    """What a caller does with `Backoff`: keep the event, try when due; the receiver ends up with each, in order."""
    endpoint = webhook_endpoint(receiver.url)
    answers = iter([answer(500), raw(b""), answer(302, Location="/"), answer(200), raw(b"garbage\r\n"), answer(200)])
    now, state, waiting = NOW, None, list(ALL_EVENTS[:2])
    while waiting:
        receiver.behave = next(answers)
        try:
            deliver(waiting[0], endpoint, limits=QUICK)
        except DeliveryError as error:
            state = after_failure(state, now, error.retry_after_seconds)
            now = state.next_attempt_at
        else:
            state = None
            waiting.pop(0)
    heard = [(request.headers["x-kanbu-event"], request.headers["x-kanbu-delivery"]) for request in receiver.requests]
    first, second = ((event.event, event.delivery_id("webhook")) for event in ALL_EVENTS[:2])
    assert heard == [first] * 4 + [second] * 2

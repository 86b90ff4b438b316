"""Access control: each route and websocket of Dagster's real application, by who asks, from where and by what name."""

from __future__ import annotations

import base64
import http.client
import logging
import socket
from collections.abc import Callable

import pytest
import requests
import websockets.sync.client
from starlette.routing import Mount, Route, WebSocketRoute
from websockets.exceptions import InvalidStatus

from kanbu_backup_dagster.server.access import SECURITY_HEADERS
from kanbu_backup_dagster.server.attempts import FailedAttempts
from kanbu_backup_dagster_tests.server.conftest import LiveServer
from kanbu_backup_dagster_tests.server.serving import KEY, LOGIN, PASSWORD, USERNAME

Start = Callable[..., LiveServer]
GUARDED = {"ui_password": PASSWORD, "trigger_api_key": KEY, "scheduler_mode": "both"}
MUTATION = "mutation { reloadWorkspace { __typename } }"
PARAMETERS = {"path": "a/b", "run_id": "0c5fcc6e-6f4a-4b8e-9d0a-2f6d4a8f8c11", "asset_key": "database_backup"}

WRONG_LOGINS = [
    ("Basic", b"admin:wrong"),
    ("Basic", b"admin:"),
    ("Basic", f"root:{PASSWORD}".encode()),
    ("Basic", f"{USERNAME}:{KEY}".encode()),
    ("Basic", b"nothing at all"),
    ("Basic", b"\xff\xfe:\x00"),
]


def basic(credentials: bytes) -> str:
    return "Basic " + base64.b64encode(credentials).decode()


RIGHT = basic(f"{USERNAME}:{PASSWORD}".encode())
WRONG_HEADERS = [
    *(f"{scheme} {base64.b64encode(text).decode()}" for scheme, text in WRONG_LOGINS),
    f"Bearer {KEY}",
    f"Bearer {PASSWORD}",
    "Basic not-base64!",
    "Basic",
    "",
    f"Digest username={USERNAME}",
]


@pytest.fixture(scope="module")
def guarded(live_server: Start) -> LiveServer:
    return live_server(GUARDED, login_attempts=FailedAttempts(free=1_000_000))


def http_routes(live: LiveServer) -> list[tuple[str, str]]:
    """Every method and path of Dagster's application, with parameters filled in."""
    found = []
    for route in live.server.dagster.routes:
        if isinstance(route, Mount):
            found.append(("GET", f"{route.path}/anything"))
        elif isinstance(route, Route):
            path = route.path
            for name, value in PARAMETERS.items():
                for kind in ("path", "str"):
                    path = path.replace(f"{{{name}:{kind}}}", value)
            assert "{" not in path, f"a parameter of {route.path} has no value in this test"
            found += [(method, path) for method in sorted(route.methods or {"GET"})]
    return found


def ask(live: LiveServer, method: str, path: str, **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"query": "{ version }"} if method == "POST" else None
    return requests.request(method, live.url + path, headers=named, json=body, timeout=30, allow_redirects=False)


def test_the_routes_are_those_known_to_need_a_login(guarded: LiveServer) -> None:
    paths = {path.split("/")[1] for _, path in http_routes(guarded)}
    assert {
        "graphql",
        "report_asset_materialization",
        "report_asset_check",
        "report_asset_observation",
        "logs",
        "download_debug",
        "notebook",
        "server_info",
        "",
    } <= paths
    assert len(http_routes(guarded)) > 40  # static files included


def test_no_route_opens_without_the_login(guarded: LiveServer) -> None:
    for method, path in http_routes(guarded):
        answer = ask(guarded, method, path)
        assert answer.status_code == 401, (method, path)
        assert answer.headers["WWW-Authenticate"].startswith("Basic "), (method, path)
        assert method == "HEAD" or answer.text == "Log in."


@pytest.mark.parametrize("authorization", WRONG_HEADERS)
def test_no_route_opens_with_a_wrong_login(guarded: LiveServer, authorization: str) -> None:
    routes = [route for route in http_routes(guarded) if "static" not in route[1]]
    some = routes if authorization == WRONG_HEADERS[0] else [("GET", "/"), ("POST", "/graphql"), ("GET", "/logs/a/b")]
    for method, path in some:
        assert ask(guarded, method, path, Authorization=authorization).status_code == 401, (method, path)


def test_every_route_opens_with_the_login(guarded: LiveServer) -> None:
    statuses = {}
    for method, path in http_routes(guarded):
        answer = ask(guarded, method, path, Authorization=RIGHT, Accept="text/html")
        statuses[method, path] = answer.status_code
    assert not [route for route, status in statuses.items() if status in (401, 403, 421, 429)]
    assert statuses["GET", "/"] == 200
    assert statuses["POST", "/graphql"] == 200
    assert statuses["GET", "/server_info"] == 200


def test_the_login_is_also_open_to_other_spellings_of_basic(guarded: LiveServer) -> None:
    assert requests.get(guarded.url, auth=LOGIN, timeout=30).status_code == 200
    assert ask(guarded, "GET", "/", Authorization=RIGHT.replace("Basic", "basic")).status_code == 200


def test_paths_that_look_like_the_trigger_lead_nowhere_else(guarded: LiveServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=30)
    for path in (
        "/api/backup/../../graphql?query={version}",
        "/api/backup/%2e%2e/%2e%2e/graphql",
        "/api/backup/..%2f..%2fgraphql",
        "/api/backup//graphql",
        "/api/backup/",
        "/API/backup/trigger",
        "//api/backup/trigger",
        "/api/backup",
    ):
        for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status in (401, 404), path
            assert "data" not in text


def websocket(live: LiveServer, host: str = "", **headers: str) -> websockets.sync.client.ClientConnection:
    return websockets.sync.client.connect(
        f"ws://{host or f'127.0.0.1:{live.port}'}/graphql",
        sock=socket.create_connection(("127.0.0.1", live.port)),
        subprotocols=["graphql-ws"],  # type: ignore[list-item]
        additional_headers={name.replace("_", "-"): value for name, value in headers.items()},
        open_timeout=10,
    )


def is_acknowledged(connection: websockets.sync.client.ClientConnection) -> bool:
    with connection:
        connection.send('{"type": "connection_init"}')
        return "connection_ack" in str(connection.recv(10))


def test_websockets_need_the_login(guarded: LiveServer) -> None:
    assert [route.path for route in guarded.server.dagster.routes if isinstance(route, WebSocketRoute)] == ["/graphql"]
    for headers in ({}, *({"Authorization": header} for header in WRONG_HEADERS)):
        with pytest.raises(InvalidStatus) as refused:
            websocket(guarded, **headers)
        assert refused.value.response.status_code == 403
    assert is_acknowledged(websocket(guarded, Authorization=RIGHT))


def test_a_session_stands_in_for_the_login_on_http_and_websockets(guarded: LiveServer) -> None:
    entered = ask(guarded, "GET", "/", Authorization=RIGHT)
    cookie = entered.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    pair = cookie.partition(";")[0]
    assert ask(guarded, "POST", "/graphql", Cookie=pair).status_code == 200
    assert ask(guarded, "POST", "/graphql", Cookie=f"other=1; {pair}").status_code == 200
    assert is_acknowledged(websocket(guarded, Cookie=pair))
    name, _, value = pair.partition("=")
    expiry, _, signature = value.partition(".")
    for forged in (
        f"{int(expiry) + 1}.{signature}",
        f"{expiry}.{signature[:-1]}",
        f"{expiry}.",
        f"{expiry}",
        f".{signature}",
        f"-1.{signature}",
        "",
        "٣.x",
    ):
        answer = requests.get(guarded.url, headers={"Cookie": f"{name}={forged}".encode()}, timeout=30)
        assert answer.status_code == 401, forged


def test_a_session_ends(live_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    live = live_server(GUARDED, login_attempts=FailedAttempts())
    pair = ask(live, "GET", "/", Authorization=RIGHT).headers["Set-Cookie"].partition(";")[0]
    assert ask(live, "GET", "/", Cookie=pair).status_code == 200
    doors = live.server._doors
    monkeypatch.setattr(doors, "_clock", lambda: 4_000_000_000.0)
    assert ask(live, "GET", "/", Cookie=pair).status_code == 401


FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1"},  # another port is another origin
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "file://"},
    {"Origin": "http://["},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
    {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"},
    {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"},
]


@pytest.mark.parametrize("settings", [GUARDED, {}], ids=["login", "no login"])
@pytest.mark.parametrize("headers", FOREIGN)
def test_other_sites_are_refused_although_the_browser_sends_the_login(
    live_server: Start, settings: dict[str, str], headers: dict[str, str]
) -> None:
    live = live_server(settings)
    for method, path in (("POST", "/graphql"), ("GET", "/logs/a/b"), ("POST", "/report_asset_check/x")):
        assert ask(live, method, path, Authorization=RIGHT, **headers).status_code == 403, path
    with pytest.raises(InvalidStatus):
        websocket(live, Authorization=RIGHT, **headers)


def test_our_own_pages_and_links_from_elsewhere_work(live_server: Start) -> None:
    live = live_server({})
    own = {"Origin": live.url, "Sec_Fetch_Site": "same-origin"}
    assert ask(live, "POST", "/graphql", **own).status_code == 200
    assert is_acknowledged(websocket(live, **own))
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert ask(live, "GET", "/runs/x", **link).status_code == 200
    assert ask(live, "POST", "/graphql", **link).status_code == 403


def test_a_mutation_comes_neither_by_get_nor_as_a_form(live_server: Start) -> None:
    live = live_server({})

    def post(content_type: str | None) -> int:
        headers = {"Content-Type": content_type} if content_type else {}
        return requests.post(
            live.url + "/graphql", params={"query": MUTATION}, data=b"x=1", headers=headers, timeout=30
        ).status_code

    assert requests.get(live.url + "/graphql", params={"query": MUTATION}, timeout=30).status_code == 405
    for content_type in (
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
    ):
        assert post(content_type) == 415, content_type
    page = requests.get(live.url + "/graphql", params={"query": MUTATION}, headers={"Accept": "text/html"}, timeout=30)
    assert "data" not in page.headers["Content-Type"]
    assert "reloadWorkspace" not in page.text
    answer = requests.post(live.url + "/graphql", json={"query": MUTATION}, timeout=30)
    assert answer.json()["data"]["reloadWorkspace"]["__typename"] == "Workspace"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:3000", 200),
        ("kanbu.localhost", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:3000", 200),
        ("10.1.2.3", 200),
        ("rebound.evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_without_a_login_only_names_that_nobody_can_point_here_are_answered(
    live_server: Start, host: str, status: int
) -> None:
    live = live_server({})
    assert ask(live, "GET", "/server_info", Host=host).status_code == status
    if status == 421:
        # The rebound page is of the same origin as what it asks for: only the name tells.
        assert ask(live, "POST", "/graphql", Host=host, Origin=f"http://{host}").status_code in (403, 421)
        if host.endswith("example"):
            with pytest.raises(InvalidStatus):
                websocket(live, host=host)


def test_allowed_hosts_are_the_only_ones(live_server: Start) -> None:
    live = live_server({"ui_allowed_hosts": "backup.example.com, other.example.com"})
    assert ask(live, "GET", "/server_info", Host="Backup.Example.com:443").status_code == 200
    assert ask(live, "GET", "/server_info", Host="localhost").status_code == 421


def test_security_headers_come_with_every_answer(guarded: LiveServer) -> None:
    for path, headers in (("/", {}), ("/", {"Authorization": RIGHT}), ("/", {"Origin": "http://evil.example"})):
        answer = ask(guarded, "GET", path, **headers)
        for name, value in SECURITY_HEADERS.items():
            assert value in answer.headers[name], (name, answer.status_code)
    page = ask(guarded, "GET", "/", Authorization=RIGHT)
    # Dagster's policy for scripts, and ours: browsers apply both.
    assert "script-src" in page.headers["Content-Security-Policy"]
    assert "Strict-Transport-Security" not in page.headers


def test_behind_a_proxy_that_ends_tls_the_cookie_is_secure(guarded: LiveServer) -> None:
    answer = ask(guarded, "GET", "/", Authorization=RIGHT, X_Forwarded_Proto="https")
    assert "Secure" in answer.headers["Set-Cookie"]
    assert "Strict-Transport-Security" in answer.headers


def test_failed_logins_are_slowed_and_logged(live_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "kanbu_backup.server")
    live = live_server(GUARDED, login_attempts=FailedAttempts())
    session = ask(live, "GET", "/", Authorization=RIGHT).headers["Set-Cookie"].partition(";")[0]
    wrong = basic(b"admin:guess")
    statuses = [ask(live, "GET", "/", Authorization=wrong).status_code for _ in range(12)]
    assert statuses[:6] == [401] * 6
    assert set(statuses[6:]) == {429}
    refused = ask(live, "GET", "/", Authorization=RIGHT)
    assert refused.status_code == 429  # or guesses could be told apart while the door is closed
    assert int(refused.headers["Retry-After"]) >= 1
    assert ask(live, "GET", "/", Cookie=session).status_code == 200
    assert ask(live, "GET", "/", Authorization=RIGHT, X_Forwarded_For="203.0.113.7").status_code == 200
    lines = [record.getMessage() for record in caplog.records]
    assert lines.count("[Server] Failed login from 127.0.0.1") == 6
    assert not [line for line in lines if "guess" in line]


def test_a_request_without_credentials_is_no_failed_login(live_server: Start) -> None:
    live = live_server(GUARDED)
    for _ in range(20):
        assert ask(live, "GET", "/").status_code == 401
    assert ask(live, "GET", "/", Authorization=RIGHT).status_code == 200

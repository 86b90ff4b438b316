"""The trigger: its answers to right and wrong requests, and backups that really run."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation import GenerationMode

from kanbu_backup_dagster.backup.manifest import Manifest
from kanbu_backup_dagster.server.openapi import DOCUMENT, MAX_BODY_BYTES
from kanbu_backup_dagster_tests.server.conftest import LiveServer
from kanbu_backup_dagster_tests.server.serving import KEY, LOGIN, PASSWORD, Serving

Start = Callable[..., LiveServer]
OPEN = {"trigger_api_key": KEY, "scheduler_mode": "external", "ui_password": PASSWORD}
BEARER = {"Authorization": f"Bearer {KEY}"}


def post(live: LiveServer | Serving, body: Any = None, query: str = "", **options: Any) -> requests.Response:
    options.setdefault("headers", {**BEARER, "Content-Type": "application/json"})
    data = options.pop("data", json.dumps(body))
    return requests.post(f"{live.url}/api/backup/trigger{query}", data=data, timeout=60, **options)


def code_of(answer: requests.Response) -> str:
    assert answer.headers["Content-Type"] == "application/json"
    assert "Traceback" not in answer.text
    return str(answer.json()["error"]["code"])


def test_a_wrong_key_or_another_secret_opens_nothing(live_server: Start) -> None:
    live = live_server(OPEN)
    for authorization in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {PASSWORD}".encode(),
        f"Basic {KEY}",
        KEY,
        f"bearer{KEY}",
    ):
        headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
        answer = post(live, {"type": "database"}, headers=headers)
        assert answer.status_code in (401, 429), authorization
        assert answer.status_code == 429 or answer.headers["WWW-Authenticate"] == "Bearer"
        state = requests.get(f"{live.url}/api/backup/runs/x", headers=headers, timeout=30)
        assert state.status_code in (401, 429)
    assert post(live, {"type": "database"}, headers=None, auth=LOGIN).status_code == 401
    session = requests.get(live.url, auth=LOGIN, timeout=30).headers["Set-Cookie"].partition(";")[0]
    assert post(live, {"type": "database"}, headers={"Cookie": session}).status_code == 401


def test_wrong_keys_are_slowed_and_the_right_one_is_not(live_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "kanbu_backup.server")
    live = live_server({**OPEN, "ui_username": "slowed"})
    wrong = {"Authorization": "Bearer guess"}
    answers = [post(live, {"type": "database"}, headers=wrong) for _ in range(10)]
    assert [answer.status_code for answer in answers] == [401] * 6 + [429] * 4
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert post(live, {"type": "nothing"}).status_code == 422
    lines = [record.getMessage() for record in caplog.records]
    assert lines.count("[Server] Wrong trigger key from 127.0.0.1") == 6
    assert not [line for line in lines if "guess" in line]


def test_without_a_key_it_is_closed(live_server: Start) -> None:
    live = live_server({"scheduler_mode": "both"})
    for authorization in ("Bearer ", "Bearer None", "Bearer x", ""):
        answer = post(live, {"type": "database"}, headers={"Authorization": authorization})
        assert (answer.status_code, code_of(answer)) == (401, "closed")
    assert requests.get(f"{live.url}/api/backup/trigger/health", timeout=30).json()["accepting"] is False


def test_internal_mode_refuses_it(live_server: Start) -> None:
    live = live_server({**OPEN, "scheduler_mode": "internal"})
    answer = post(live, {"type": "database"})
    assert (answer.status_code, code_of(answer)) == (403, "internal_mode")
    assert post(live, {"type": "database"}, headers={}).status_code == 401


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 9000, 400, "not JSON"),
        (b'{"type": NaN}', 422, "type"),
        (b"null", 422, "body"),
        (b"[]", 422, "body"),
        (b"{}", 422, "type"),
        (b'{"type": "everything"}', 422, "type"),
        (b'{"type": "database", "scheduleId": "1"}', 422, "scheduleId"),
        (b'{"type": "database", "scheduleId": 0}', 422, "scheduleId"),
        (b'{"type": "database", "scheduleId": true}', 422, "scheduleId"),
        (b'{"type": "database", "scheduleId": 1.5}', 422, "scheduleId"),
        (b'{"type": "database", "scheduleID": 1}', 422, "scheduleID"),
        (b'{"type": "database", "schedule_id": 1}', 422, "schedule_id"),
        (b'{"type": "database", "scheduleId": 1e400}', 422, "scheduleId"),
        (b'{"type": "database", "scheduleId": 99.0}', 404, "no schedule 99"),
        (b'{"type": "database", "scheduleId": 99}', 404, "no schedule 99"),
        (b'{"type": "database", "scheduleId": 2}', 422, "is of type source, not database"),
        (b'{"type": "source", "scheduleId": 1' + b"0" * 400 + b"}", 404, "no schedule"),
    ],
)
def test_a_body_that_cannot_be_followed_is_explained(web_only: Serving, body: bytes, status: int, words: str) -> None:
    answer = post(web_only, data=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    code_of(answer)


@pytest.mark.parametrize("wait", ["", "x", "-1", "nan", "inf", "3601", "1e9"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(web_only: Serving, wait: str) -> None:
    answer = post(web_only, {"type": "database"}, f"?wait={wait}")
    assert (answer.status_code, code_of(answer)) == (422, "invalid")


def test_what_is_not_json_or_too_long_is_refused(web_only: Serving) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""):
        answer = post(web_only, {"type": "database"}, headers={**BEARER, "Content-Type": content_type})
        assert (answer.status_code, code_of(answer)) == (415, "unsupported_media_type")
    encoded = {**BEARER, "Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert post(web_only, {"type": "database"}, headers=encoded).status_code == 415
    long = b'{"type": "database"' + b" " * MAX_BODY_BYTES + b"}"
    assert (answer := post(web_only, data=long)).status_code == 413, answer.text
    chunked = requests.post(
        f"{web_only.url}/api/backup/trigger",
        data=iter([b" " * 10_000] * 1000),
        headers={**BEARER, "Content-Type": "application/json"},
        timeout=30,
    )
    assert code_of(chunked) == "too_large"


def test_other_methods_and_paths_answer_json(web_only: Serving) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = requests.request(method, f"{web_only.url}/api/backup/trigger", headers=BEARER, timeout=30)
        assert (answer.status_code, code_of(answer)) == (405, "method_not_allowed")
        assert answer.headers["Allow"] == "POST"
    assert code_of(requests.get(f"{web_only.url}/api/backup/else", headers=BEARER, timeout=30)) == "not_found"
    for run_id in ("x", "00000000-0000-4000-8000-000000000000", "%00", "a" * 5000):
        answer = requests.get(f"{web_only.url}/api/backup/runs/{run_id}", headers=BEARER, timeout=30)
        assert (answer.status_code, code_of(answer)) == (404, "no_such_run")


def test_other_sites_scripts_are_told_nothing(web_only: Serving) -> None:
    """A browser asks first (CORS); without a permission in the answer it does not send the request."""
    answer = requests.options(
        f"{web_only.url}/api/backup/trigger",
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        timeout=30,
    )
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_a_caller_that_goes_away_while_waiting_leaves_the_server_well(web_only: Serving) -> None:
    host, port = web_only.url.removeprefix("http://").split(":")
    body = b'{"type": "database"}'
    with socket.create_connection((host, int(port))) as caller:
        caller.sendall(
            b"POST /api/backup/trigger?wait=3600 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer " + KEY.encode() + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        web_only.await_output(r"\[Backup\] database backup triggered from 127\.0\.0\.1: run ")
    assert requests.get(f"{web_only.url}/api/backup/trigger/health", timeout=30).status_code == 200


def test_while_no_jobs_are_loaded_it_says_so(live_server: Start) -> None:
    live = live_server(OPEN)
    health = requests.get(f"{live.url}/api/backup/trigger/health", timeout=30)
    assert health.status_code == 503
    assert health.json() == {"status": "unavailable", "accepting": False, "reason": "the jobs are not loaded"}
    answer = post(live, {"type": "database"})
    assert (answer.status_code, code_of(answer)) == (503, "unavailable")


def test_a_fault_of_ours_is_answered_in_json_without_a_traceback(
    live_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_server({**OPEN, "ui_username": "faulty"})

    def broken(*_: object) -> None:
        raise RuntimeError("secret of the schedule file")

    monkeypatch.setattr("kanbu_backup_dagster.server.trigger.load_schedule_file", broken)
    answer = post(live, {"type": "database", "scheduleId": 1})
    assert (answer.status_code, code_of(answer)) == (500, "internal")
    assert "secret" not in answer.text


# --- the OpenAPI document -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("operation", ["triggerBackup", "triggerHealth", "backupRun"])
def test_the_answers_are_those_of_the_openapi_document(web_only: Serving, operation: str, mode: GenerationMode) -> None:
    described = schemathesis.openapi.from_url(f"{web_only.url}/api/backup/openapi.json").find_operation_by_id(operation)
    if operation == "triggerHealth" and mode is GenerationMode.NEGATIVE:
        return  # it takes nothing that could be wrong

    @given(case=described.as_strategy(generation_mode=mode))
    # The same requests each time: what a new one would find is for a person to look at, not for a landing to trip over.
    @settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    def answers_as_described(case: schemathesis.Case) -> None:
        if isinstance(case.query.get("wait"), (int, float)) and case.query["wait"] > 0:
            case.query["wait"] = min(case.query["wait"], 0.01) if case.query["wait"] <= 3600 else case.query["wait"]
        wrong = {place for place, part in case.meta.components.items() if part.mode is GenerationMode.NEGATIVE}
        if mode is GenerationMode.NEGATIVE and wrong <= {ParameterLocation.HEADER}:
            return  # the key is put right below, and nothing else was wrong
        answer = case.call(headers=BEARER, timeout=30)
        sent = parse_qs(urlsplit(answer.request.url).query, keep_blank_values=True)
        if not set(case.query) <= set(sent):
            return  # an empty list, say, leaves no trace in a URL: what was to be wrong was not sent
        if answer.status_code == 422 and answer.json()["error"]["code"] == "type_mismatch":
            return  # which schedules there are, and of what type, no schema can tell
        # 503, documented, is a server's error to schemathesis; a fault of ours is 500.
        case.validate_response(answer, excluded_checks=[not_a_server_error])
        assert answer.status_code != 500

    answers_as_described()


def test_the_openapi_document_is_served_and_whole(web_only: Serving) -> None:
    assert requests.get(f"{web_only.url}/api/backup/openapi.json", timeout=30).json() == DOCUMENT
    assert DOCUMENT["openapi"].startswith("3.1")


# --- backups that run -----------------------------------------------------------------------------------------------


def finished(kanbu: Serving, status_url: str, seconds: float = 200) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state: dict[str, Any] = requests.get(status_url, headers=BEARER, timeout=30).json()
        if state["status"] in ("succeeded", "failed", "canceled"):
            return state
        time.sleep(0.2)
    raise AssertionError(f"still {state}")


def test_a_triggered_backup_is_the_schedules_and_lands(kanbu: Serving) -> None:
    answer = kanbu.trigger({"type": "database", "scheduleId": 1})
    assert answer.status_code == 202, answer.text
    accepted = answer.json()
    assert accepted["status"] in ("queued", "running")
    assert accepted["url"] == f"{kanbu.url}/runs/{accepted['runId']}"
    assert answer.headers["Location"] == accepted["statusUrl"]
    state = finished(kanbu, accepted["statusUrl"])
    assert state["status"] == "succeeded", state
    assert state["error"] is None
    file = kanbu.storage / state["backup"]["filename"]
    manifest = Manifest.model_validate_json(file.with_name(file.name + ".manifest.json").read_bytes())
    assert state["backup"] == {
        "filename": manifest.filename,
        "fileSize": file.stat().st_size,
        "checksum": manifest.sha256,
    }
    assert (manifest.trigger.value, manifest.schedule_id, manifest.schedule_name) == ("external", 1, "Nightly Database")
    run = kanbu.graphql(
        "query($id: ID!) { runOrError(runId: $id) { ... on Run { status tags { key value } } } }", id=accepted["runId"]
    )["runOrError"]
    tags = {tag["key"]: tag["value"] for tag in run["tags"]}
    assert tags["kanbu/trigger"] == "external"
    assert tags["kanbu/schedule_id"] == "1"
    assert tags["kanbu/schedule_name"] == "Nightly Database"
    assert tags["kanbu/type"] == tags["kanbu/target"] == "database"


def test_waiting_answers_with_the_end_and_with_202_when_the_time_is_up(kanbu: Serving) -> None:
    ended = kanbu.trigger({"type": "database"}, wait=200)
    assert ended.status_code == 200, ended.text
    assert ended.json()["status"] == "succeeded"
    assert ended.json()["endedAt"] >= ended.json()["startedAt"]
    begun = time.monotonic()
    early = kanbu.trigger({"type": "database"}, wait=0.1)
    assert early.status_code == 202
    assert time.monotonic() - begun < 5
    finished(kanbu, early.json()["statusUrl"])


def test_a_backup_that_fails_while_waited_for_is_a_500_with_the_reason(kanbu: Serving) -> None:
    (kanbu.folder / ".env").write_text("DATABASE_URL=postgresql://nobody@127.0.0.1:1/nothing\nBACKUP_PG_MODE=direct\n")
    try:
        answer = kanbu.trigger({"type": "database"}, wait=200)
    finally:
        (kanbu.folder / ".env").unlink()
    assert answer.status_code == 500
    assert answer.json()["status"] == "failed"
    assert answer.json()["error"]["code"] == "backup_failed"
    assert "127.0.0.1" in answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


def test_the_guides_curl_line(kanbu: Serving) -> None:
    """The command of the users' guide's Kubernetes CronJob."""
    done = subprocess.run(
        [
            "curl",
            "--silent",
            "--fail",
            "-X",
            "POST",
            "-H",
            f"Authorization: Bearer {KEY}",
            "-H",
            "Content-Type: application/json",
            "-d",
            '{"type":"database"}',
            f"{kanbu.url}/api/backup/trigger",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    finished(kanbu, json.loads(done.stdout)["statusUrl"])


_NODE_CLIENT = """\
const client = require(process.argv[2].startsWith('https') ? 'https' : 'http');
const url = new URL(process.argv[2]);
const options = {
  hostname: url.hostname, port: url.port, path: '/api/backup/trigger', method: 'POST',
  ca: process.env.CA && require('fs').readFileSync(process.env.CA),
  headers: { Authorization: `Bearer ${process.env.BACKUP_API_KEY}`, 'Content-Type': 'application/json' },
};
const req = client.request(options, (res) => {
  let body = '';
  res.on('data', (chunk) => { body += chunk; });
  res.on('end', () => console.log(JSON.stringify({ statusCode: res.statusCode, body: JSON.parse(body) })));
});
req.write(JSON.stringify({ type: 'database' }));
req.end();
"""


def node_trigger(node: str, url: str, **environment: str) -> Any:
    """What the users' guide's Lambda does, in Node. Its body is sent in chunks, without a length."""
    done = subprocess.run(
        [node, "-", url],
        input=_NODE_CLIENT,
        env={"BACKUP_API_KEY": KEY, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_guides_node_client(kanbu: Serving, node: str) -> None:
    answer = node_trigger(node, kanbu.url)
    assert answer["statusCode"] == 202
    finished(kanbu, answer["body"]["statusUrl"])


def test_the_documented_graphql_line(kanbu: Serving) -> None:
    """docs/trigger.md: the line is run as it stands there, but for the address, the login and the key."""
    page = (Path(__file__).parents[2] / "docs" / "trigger.md").read_text("utf-8")
    line = page.partition("<!-- graphql -->")[2].partition("```sh\n")[2].partition("```")[0]
    assert "launchRun" in line
    line = line.replace("https://kanbu.example.com", kanbu.url)
    done = subprocess.run(
        ["sh", "-c", line],
        env={"PATH": "/usr/bin:/bin", "BACKUP_UI_PASSWORD": PASSWORD},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    launched = json.loads(done.stdout)["data"]["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    finished(kanbu, f"{kanbu.url}/api/backup/runs/{launched['run']['runId']}")


def test_health_needs_no_key(kanbu: Serving) -> None:
    answer = requests.get(f"{kanbu.url}/api/backup/trigger/health", timeout=30)
    assert answer.json() == {"status": "ok", "accepting": True, "reason": None}


def test_a_connection_is_kept_after_refusals(kanbu: Serving) -> None:
    """A refusal must not leave a body unread that is then taken for the next request."""
    host = kanbu.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    for _ in range(3):
        connection.request("POST", "/api/backup/trigger", body=b"x" * 1000, headers={"Content-Type": "text/plain"})
        answer = connection.getresponse()
        assert answer.status == 401
        answer.read()

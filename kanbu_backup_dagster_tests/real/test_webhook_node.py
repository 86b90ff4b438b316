"""Webhooks as seen by JavaScript: the users' guide's receiver, and Node's own JSON."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.notifications.delivery import DeliveryError, deliver
from kanbu_backup_dagster.notifications.endpoints import webhook_endpoint
from kanbu_backup_dagster.notifications.events import BackupFailed, BackupPart, ScheduleRef
from kanbu_backup_dagster.notifications.javascript_json import MAX_SAFE_INTEGER, stringify

pytestmark = pytest.mark.real("node")

NOW = datetime(2026, 1, 18, 2, 0, 5, 432_000, tzinfo=timezone.utc)

# A line of hex in, the hex of JSON.stringify(JSON.parse(line)) out.
REWRITE = """
require('readline').createInterface({ input: process.stdin }).on('line', (line) => {
  const body = JSON.stringify(JSON.parse(Buffer.from(line, 'hex').toString('utf8')));
  console.log(Buffer.from(body, 'utf8').toString('hex'));
});
"""

# The body is parsed by a JSON middleware, then checked with the lines of the users' guide.
RECEIVER = """
const crypto = require('crypto');
const http = require('http');
const webhookSecret = process.env.WEBHOOK_SECRET;
http.createServer((req, res) => {
  const chunks = [];
  req.on('data', (chunk) => chunks.push(chunk));
  req.on('end', () => {
    req.body = JSON.parse(Buffer.concat(chunks).toString('utf8'));
    const signature = req.headers['x-kanbu-signature'];
    const expected = crypto.createHmac('sha256', webhookSecret).update(JSON.stringify(req.body)).digest('hex');
    res.statusCode = signature === expected ? 204 : 401;
    res.end();
  });
}).listen(0, '127.0.0.1', function () { console.log(this.address().port); });
"""


@pytest.fixture(scope="module")
def rewriter(node: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([node, "-e", REWRITE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.terminate()


def _rewritten(rewriter: subprocess.Popen[str], body: bytes) -> bytes:
    assert rewriter.stdin is not None
    assert rewriter.stdout is not None
    rewriter.stdin.write(body.hex() + "\n")
    rewriter.stdin.flush()
    return bytes.fromhex(rewriter.stdout.readline())


# All of Unicode, lone surrogates included, and what JSON and JavaScript treat apart.
TEXT = st.text(st.characters(exclude_categories=[])) | st.text(
    "\x00\x08\t\n\x0b\x0c\r\x1b\x1f\x7f\"\\/'\u0080\u00ad\u2028\u2029\ufeff\ufffe\ud83d\ude00\udfff😀é"
)
KEYS = TEXT.filter(lambda key: not (key.isascii() and key.isdigit()))
VALUES = st.recursive(
    TEXT | st.booleans() | st.none() | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=500, deadline=None)
def test_our_json_is_javascripts(rewriter: subprocess.Popen[str], value: object) -> None:
    body = stringify(value)  # type: ignore[arg-type]
    assert _rewritten(rewriter, body) == body


def test_our_json_is_javascripts_for_every_code_point(rewriter: subprocess.Popen[str]) -> None:
    for start in range(0, 0x110000, 0x1000):
        body = stringify({"text": "".join(map(chr, range(start, start + 0x1000)))})
        assert _rewritten(rewriter, body) == body, hex(start)


@given(error=TEXT, name=TEXT, filename=TEXT)
@settings(max_examples=200, deadline=None)
def test_an_event_of_any_text_is_what_javascript_would_write(
    rewriter: subprocess.Popen[str], error: str, name: str, filename: str
) -> None:
    body = _failed(error, name, filename).body()
    assert _rewritten(rewriter, body) == body


def _failed(error: str, name: str, filename: str) -> BackupFailed:
    return BackupFailed(
        key="run",
        timestamp=NOW,
        schedule=ScheduleRef(id=7, name=name),
        backup=BackupPart(type=BackupType.SOURCE, filename=filename, duration_ms=0),
        error=error,
    )


@pytest.mark.parametrize("secret", ["s3cret", "clé 😀"])
def test_the_users_guides_receiver_accepts_our_signature(node: str, secret: str) -> None:
    with subprocess.Popen(
        [node, "-e", RECEIVER], stdout=subprocess.PIPE, text=True, env={"WEBHOOK_SECRET": secret}
    ) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}/hook"
            event = _failed('no room on "/data\\b": 0 < 5 \u2028 \x01 é 😀 \ud800', "Täglich / 毎日", "caf\udce9")
            assert deliver(event, webhook_endpoint(url, secret=secret)).status == 204
            with pytest.raises(DeliveryError, match="401"):
                deliver(event, webhook_endpoint(url, secret=secret + "x"))
        finally:
            process.terminate()

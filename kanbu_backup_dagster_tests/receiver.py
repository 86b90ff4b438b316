"""A webhook receiver on loopback that does what a test tells it: accepts, refuses, hangs, answers garbage, is down."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    """A request that came in."""

    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        decoded: dict[str, Any] = json.loads(self.body)
        return decoded


@dataclass
class Receiver:
    """The receiver. `behave` is asked about each request: a status, `hang` or `garbage`."""

    behave: Callable[[Received], int | str] = lambda request: 204
    attempts: list[Received] = field(default_factory=list)
    accepted: list[Received] = field(default_factory=list)
    port: int = 0
    _server: ThreadingHTTPServer | None = None
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook/S3CRET-IN-PATH"

    @property
    def events(self) -> list[str]:
        """The names of the events that were accepted, in order."""
        return [request.event["event"] for request in self.accepted]

    def start(self) -> None:
        """Listen; the second time on the same port."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received = Received(dict(self.headers), self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(received)

            def do_GET(self) -> None:
                self._answer(Received(dict(self.headers), b'{"event":"ping"}'))

            def _answer(self, received: Received) -> None:
                receiver.attempts.append(received)
                answer = receiver.behave(received)
                if answer == "hang":
                    receiver._ended.wait(60)
                elif answer == "garbage":
                    self.wfile.write(b"\x00\xff not HTTP at all\r\n\r\n")
                else:
                    assert isinstance(answer, int)
                    # Before the answer: whoever has read it may look at once.
                    if answer < 300:
                        receiver.accepted.append(received)
                    self.send_response(answer)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._ended.clear()
        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Go down: connections are refused."""
        self._ended.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

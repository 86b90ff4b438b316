"""The connection to one exec of a Docker engine: bytes to a program's standard input, frames of its two outputs.

What belongs here: the engine's stream format, read and written with time limits. What does not: whose exec it is and
what its end means (`docker_exec`).

The engine multiplexes both outputs into frames on one connection, each with a header of 8 bytes: stream, three zeros,
big-endian length (https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach).
They are read here from the connection itself, many at a time. The SDK's own reader hands on a frame at a time, waits
for the next one without end, and cannot write.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
from typing import Any

import docker

from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.sources.commands import CHUNK_BYTES, STDERR_KEPT_BYTES

_HEADER = struct.Struct(">BxxxL")
_STDOUT = 1
_GATHER_SECONDS = 0.01


class Frames:
    """Takes the two outputs of a program apart.

    Attributes:
        stderr: The last bytes of its standard error output.
    """

    def __init__(self) -> None:
        self.stderr = b""
        self._header = b""
        self._kind = 0
        self._left = 0

    @property
    def whole(self) -> bool:
        """Whether the last frame came to its end."""
        return not self._left and not self._header

    def feed(self, data: memoryview) -> bytes:
        """What `data`, the stream's next bytes, holds of the standard output."""
        pieces = []
        while data:
            if not self._left:
                missing = _HEADER.size - len(self._header)
                self._header += data[:missing]
                data = data[missing:]
                if len(self._header) == _HEADER.size:
                    self._kind, self._left = _HEADER.unpack(self._header)
                    self._header = b""
                continue
            piece = data[: self._left]
            data = data[len(piece) :]
            self._left -= len(piece)
            if self._kind == _STDOUT:
                pieces.append(piece)
            else:
                self.stderr = (self.stderr + piece)[-STDERR_KEPT_BYTES:]
        return b"".join(pieces)


class ExecStream:
    """The connection to one exec, started by making this."""

    def __init__(self, api: docker.APIClient, exec_id: str) -> None:
        self.frames = Frames()
        handle: Any = api.exec_start(exec_id, socket=True)
        self._response = handle._response
        self._socket: socket.socket = getattr(handle, "_sock", handle)
        if not isinstance(self._socket, socket.socket):
            self._response.close()
            raise SourceError(
                "The Docker engine is reached in a way that docker mode cannot stream through.",
                advice="Set DOCKER_HOST to a unix:// or tcp:// address; `ssh -L` forwards a remote engine's socket.",
            )
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        # The reader of the HTTP answer may have read beyond it.
        self._socket.settimeout(0)
        self._early = b""
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            self._early = self._response.raw._fp.fp.peek()

    def read(self, timeout: float) -> bytes | None:
        """The next bytes of the standard output, none when only the other output had some; None at the end.

        Raises:
            TimeoutError: Nothing came for `timeout` seconds.
        """
        if self._early:
            early, self._early = self._early, b""
            return self.frames.feed(memoryview(early))
        self._socket.settimeout(timeout)
        filled = count = self._receive(0)
        # A stream in flow is gathered into large chunks; one that rests is handed on at once.
        self._socket.settimeout(min(timeout, _GATHER_SECONDS))
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while count and filled < len(self._buffer):
                count = self._receive(filled)
                filled += count
        return self.frames.feed(self._buffer[:filled]) if filled else None

    def _receive(self, offset: int) -> int:
        try:
            return self._socket.recv_into(self._buffer[offset:])
        except ConnectionError:
            return 0

    def wait_to_write(self, timeout: float) -> tuple[bool, bool]:
        """Whether, within `timeout` seconds, there is something to read and whether there is room to write."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLOUT)
        events = sum(event for _, event in poll.poll(timeout * 1000))
        return bool(events & ~select.POLLOUT), bool(events & select.POLLOUT)

    def write(self, data: bytes | memoryview) -> int:
        """Send what there is room for to the standard input; returns how many bytes that was.

        Raises:
            BrokenPipeError: The connection has ended.
        """
        self._socket.settimeout(0)
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except ConnectionError:
            raise BrokenPipeError("the connection has ended") from None

    def end_input(self) -> None:
        """End the standard input; both outputs go on."""
        self._socket.shutdown(socket.SHUT_WR)

    @property
    def can_end_input(self) -> bool:
        """Not so with TLS, where Python ends both directions or none."""
        return not isinstance(self._socket, ssl.SSLSocket)

    def close(self) -> None:
        """End the connection; more than once does no harm."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._response.close()

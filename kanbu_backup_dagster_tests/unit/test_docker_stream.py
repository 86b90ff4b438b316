"""The engine's frames taken apart, however the stream is cut."""

from __future__ import annotations

import socket
import struct
import threading
from pathlib import Path

import docker
from hypothesis import given
from hypothesis import strategies as st

from kanbu_backup_dagster.sources.commands import STDERR_KEPT_BYTES
from kanbu_backup_dagster.sources.docker_stream import ExecStream, Frames


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BxxxL", kind, len(payload)) + payload


FRAMES = st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=300)), max_size=20)


@given(FRAMES, st.lists(st.integers(1, 100), min_size=1))
def test_frames_survive_every_cut(frames: list[tuple[int, bytes]], sizes: list[int]) -> None:
    stream = memoryview(b"".join(frame(kind, payload) for kind, payload in frames))
    reader, output, turn = Frames(), b"", 0
    while stream:
        size = sizes[turn % len(sizes)]
        output += reader.feed(stream[:size])
        stream, turn = stream[size:], turn + 1
    assert output == b"".join(payload for kind, payload in frames if kind == 1)
    stderr = b"".join(payload for kind, payload in frames if kind == 2)
    assert reader.stderr == stderr[-STDERR_KEPT_BYTES:]
    assert reader.whole


@given(FRAMES.filter(lambda frames: sum(8 + len(payload) for _, payload in frames) > 0), st.data())
def test_a_frame_cut_short_is_noticed(frames: list[tuple[int, bytes]], data: st.DataObject) -> None:
    whole, ends = b"", {0}
    for kind, payload in frames:
        whole += frame(kind, payload)
        ends.add(len(whole))
    cut = data.draw(st.integers(0, len(whole)))
    reader = Frames()
    reader.feed(memoryview(whole[:cut]))
    assert reader.whole == (cut in ends)


def test_what_comes_together_with_the_http_answer_is_not_lost(tmp_path: Path) -> None:
    """An engine decides when its bytes come; here one that sends the first frames in one go with its answer."""
    path = tmp_path / "engine"
    first, second = frame(1, b"first"), frame(2, b"aside") + frame(1, b"second")

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            request = b""
            while b"Detach" not in request:
                request += connection.recv(65536)
            answer = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
            connection.sendall(answer + first + second[:11])
            connection.sendall(second[11:])

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        engine = threading.Thread(target=serve, args=(listener,))
        engine.start()
        stream = ExecStream(docker.APIClient(f"unix://{path}", version="1.41"), "an-exec")
        output = b"".join(iter(lambda: stream.read(5), None))
        stream.close()
        engine.join()
    assert output == b"firstsecond"
    assert stream.frames.stderr == b"aside"

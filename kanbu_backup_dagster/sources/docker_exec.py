"""A client program running in a container, as `commands.Process`.

What belongs here: starting a program through the engine's exec, feeding and reading it, its exit status, and that it
ends when we do. What does not: which container and which program (`docker`).

The end of a program's stream (`docker_stream`) proves nothing. It comes alike when the program is done or killed, its
container removed, or the engine dead; the exit status asked for afterwards tells them apart.

Nor does the end of our connection end the program. A killed engine even leaves it waiting for ever for somebody to
read its output, and holding its locks. So a second program, the guard, sits in the container and expects a sign of life
every few seconds; when none comes it ends the first.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import docker
import requests
from docker.errors import APIError, DockerException, NotFound

from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.sources.commands import Process, shorten
from kanbu_backup_dagster.sources.docker_stream import ExecStream

CALL_SECONDS = 20
"""How long the engine may take to answer a question."""

SILENCE_SECONDS = 10.0
"""After how long without a byte the engine is asked whether the program can still say anything."""

PAUSE_SECONDS = 120.0
"""How long the container may stay paused, as `docker commit` does to it for a while."""

GUARD_AFTER_SECONDS = 1.0
"""A program that only reads, and takes less time, is not worth a guard."""

SIGN_OF_LIFE_SECONDS = 5.0
GUARD_PATIENCE_SECONDS = 60
"""After how long without a sign of life the guard ends the program."""

ENDING_SECONDS = 15.0
"""How long is waited for a program that was ended."""

_POLL_SECONDS = 0.02
_KILL_SECONDS = 1.0  # from the death of its programs until the engine says that a container is dead
_FAULTS = (DockerException, requests.RequestException, OSError)

# Its number first, on stderr, so that the guard knows whom to end; then the program takes the shell's place.
_START = 'echo "process $$" >&2; exec "$0" "$@"'
_STARTED = re.compile(rb"^process (\d+)\n", re.MULTILINE)

# Only with what the official images have, Debian's and Alpine's. SIGINT first: pg_dump and psql then cancel their
# statement on the server, which would otherwise run on, or wait on for its lock, without them.
_GUARD = """
command -v timeout >/dev/null || timeout() { shift; "$@"; }
while word=$(timeout "$1" sh -c 'read -r word && echo "$word"') && [ "$word" = alive ]; do :; done
[ "$word" = done ] && exit
for signal in INT TERM 0 0 0 0 0 0 0 0 0 0 KILL; do
  kill -$signal "$0" 2>/dev/null || exit 0
  sleep 0.3
done
"""

_log = logging.getLogger(__name__)


def connect() -> docker.DockerClient:
    """The engine of DOCKER_HOST, or of the docker command's current context.

    Raises:
        DockerException: It does not answer, or DOCKER_HOST is malformed.
    """
    return docker.DockerClient.from_env(timeout=CALL_SECONDS)


class ExecProcess:
    """A program in a running container. Made by starting it.

    Args:
        container: The container's name.
        command: The program and its arguments; any user of the container can read them.
        environment: Added to the container's own.

    Raises:
        SourceError: The container is gone or does not run, it has no shell, or the engine does not answer.
    """

    def __init__(
        self, container: str, command: Sequence[str], environment: Mapping[str, str], *, feeds: bool = False
    ) -> None:
        self._container = container
        self._tool = command[0]
        self._unread: list[bytes] = []
        self._open = True
        self._ended = False
        self._paused_since: float | None = None
        with contextlib.ExitStack() as undo, engine_faults(container):
            self._api = connect().api
            undo.callback(self._api.close)
            self._started_at = self._container_state()["StartedAt"]
            self._exec = self._api.exec_create(
                container, ["sh", "-c", _START, *command], stdin=feeds, environment=dict(environment)
            )["Id"]
            self._stream = ExecStream(self._api, self._exec)
            undo.callback(self._stream.close)
            if feeds and not self._stream.can_end_input:
                raise SourceError(
                    f"{self._tool} cannot be fed through a Docker engine reached by TLS.",
                    advice="Run this on the engine's machine, or forward its socket with ssh -L and set DOCKER_HOST.",
                )
            # What is fed may change the database, and hold locks on it from its first moment.
            self._guard = _Guard(container, self._read_process_number(), after=0 if feeds else GUARD_AFTER_SECONDS)
            undo.pop_all()

    def _read_process_number(self) -> int:
        frames = self._stream.frames
        while not (started := _STARTED.search(frames.stderr)):
            output = self._read()
            if output is None:
                # What the engine has to say of a program that it cannot start comes as that program's output.
                said = shorten(b"".join([*self._unread, frames.stderr]))
                raise SourceError(f"{self._tool} cannot be started in the container {self._container}: {said}")
            self._unread.append(output)
        frames.stderr = frames.stderr[: started.start()] + frames.stderr[started.end() :]
        return int(started[1])

    def chunks(self) -> Iterator[bytes]:
        while self._open:
            yield from self._take_unread()
            chunk = self._read()
            if chunk:
                yield chunk
        yield from self._take_unread()

    def _take_unread(self) -> Iterator[bytes]:
        unread, self._unread = self._unread, []
        yield from filter(None, unread)

    def _read(self) -> bytes | None:
        """The next of the standard output; None at its end. Raises SourceError when none can come any more."""
        while self._open:
            try:
                output = self._stream.read(SILENCE_SECONDS)
            except TimeoutError:
                self._look_after_silence()
                continue
            self._open = output is not None
            self._paused_since = None
            return output
        return None

    def _look_after_silence(self) -> None:
        """Raises SourceError when nothing can come any more."""
        with engine_faults(self._container):
            state = self._container_state()
            running = self._api.exec_inspect(self._exec)["Running"]
        if not running:
            self._open = False
        if not state["Paused"]:
            self._paused_since = None
            return
        self._paused_since = self._paused_since or time.monotonic()
        if time.monotonic() - self._paused_since >= PAUSE_SECONDS:
            raise SourceError(
                f"The container {self._container} was paused while {self._tool} ran, and is still.",
                advice=f"Run `docker unpause {self._container}`, then run again.",
            )

    def write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            readable, writable = self._stream.wait_to_write(SILENCE_SECONDS)
            if readable:
                # Psql stops reading when nobody reads what it says.
                output = self._read()
                if output is None:
                    raise BrokenPipeError(f"{self._tool} has ended")
                self._unread.append(output)
            elif writable:
                view = view[self._stream.write(view) :]
            else:
                self._look_after_silence()

    def close_input(self) -> None:
        with contextlib.suppress(OSError):  # it has ended, and `wait` says how
            self._stream.end_input()

    def wait(self) -> int:
        """Its exit status, negative for a signal, once it has ended.

        Raises:
            SourceError: The engine cannot tell, or the container did not live through it.
        """
        while self._read() is not None:
            pass
        with engine_faults(self._container):
            asked = time.monotonic()
            while (answer := self._api.exec_inspect(self._exec))["Running"] or answer["ExitCode"] is None:
                time.sleep(_POLL_SECONDS)
                if time.monotonic() - asked > SILENCE_SECONDS:
                    asked = time.monotonic()
                    self._look_after_silence()
            status: int = answer["ExitCode"]
            self._ended = True
            if status != 0:
                self._look_after_failure(status)
        if not self._stream.frames.whole:
            raise SourceError(f"The connection to {self._tool} in the container {self._container} broke off.")
        # A shell's way, and the engine's, to tell of a signal.
        return 128 - status if 128 < status < 160 else status

    def _look_after_failure(self, status: int) -> None:
        """Raises SourceError when the container's end was the program's."""
        deadline = time.monotonic() + (_KILL_SECONDS if status == 128 + signal.SIGKILL else 0)
        while self._container_state()["StartedAt"] == self._started_at:
            if time.monotonic() >= deadline:
                return
            time.sleep(_POLL_SECONDS)
        raise SourceError(f"The container {self._container} was restarted while {self._tool} ran.")

    def _container_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._api.inspect_container(self._container)["State"]
        if state["Status"] in ("removing", "dead"):
            raise SourceError(_gone(self._container))
        if not state["Running"]:
            raise SourceError(f"The container {self._container} is not running: it is {state['Status']}.")
        return state

    @property
    def stderr(self) -> str:
        return shorten(self._stream.frames.stderr)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._ended = self._ended or not self._may_run()
            self._guard.dismiss(ended=self._ended)
        finally:
            self._stream.close()
            deadline = time.monotonic() + ENDING_SECONDS
            while not self._ended and self._may_run():
                if time.monotonic() > deadline:
                    self._warn("it does not end")
                    break
                time.sleep(_POLL_SECONDS)
            self._api.close()

    def _may_run(self) -> bool:
        try:
            running: bool = self._api.exec_inspect(self._exec)["Running"]
        except NotFound:
            return False
        except _FAULTS as error:
            self._warn(str(error))
            return False
        return running

    def _warn(self, reason: str) -> None:
        _log.warning("%s may still run in the container %s: %s", self._tool, self._container, reason)


class _Guard:
    """Ends a program in a container when it is told to, and when we are no longer there to tell."""

    def __init__(self, container: str, process_number: int, *, after: float) -> None:
        self._after = after
        self._container = container
        self._process_number = process_number
        self._dismissed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._keep, name=f"guard of {process_number}", daemon=True)
        self._thread.start()

    def dismiss(self, *, ended: bool) -> None:
        """Go, ending the program first unless it has `ended`."""
        self._ended = ended
        self._dismissed.set()
        self._thread.join(ENDING_SECONDS)

    def _keep(self) -> None:
        if self._dismissed.wait(self._after) and self._ended:
            return
        while True:
            try:
                self._stand()
            except _FAULTS as error:
                reason = error
            else:
                return
            # A paused container lets no guard in; later it may.
            if self._dismissed.wait(SIGN_OF_LIFE_SECONDS):
                break
        if not self._ended:
            _log.warning("Nobody ended a program in the container %s: %s", self._container, reason)

    def _stand(self) -> None:
        command = ["sh", "-c", _GUARD, str(self._process_number), str(GUARD_PATIENCE_SECONDS)]
        with contextlib.closing(connect()) as client:
            guard = client.api.exec_create(self._container, command, stdin=True)["Id"]
            with contextlib.closing(ExecStream(client.api, guard)) as stream:
                while not self._dismissed.wait(SIGN_OF_LIFE_SECONDS):
                    stream.write(b"alive\n")
                stream.write(b"done\n" if self._ended else b"end\n")


@contextlib.contextmanager
def engine_faults(container: str) -> Iterator[None]:
    """The engine's and its connection's errors as a SourceError for people."""
    try:
        yield
    except NotFound:
        raise SourceError(_gone(container)) from None
    except APIError as error:
        raise SourceError(f"The Docker engine refuses to work with {container}: {error.explanation}") from None
    except _FAULTS as error:
        raise SourceError(
            f"The Docker engine does not answer: {error}.", advice="See whether `docker ps` does, then run again."
        ) from None


def _gone(container: str) -> str:
    return f"The container {container} is gone: it was removed."

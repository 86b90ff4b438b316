"""A Docker engine of the tests' own, and PostgreSQL containers in it.

What belongs here: starting `dockerd` on a socket and in folders of its own, touching neither the machine's engine nor
its network, and ending it for certain. What does not: the image's contents (`postgres_image`), and the fixtures.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException

from kanbu_backup_dagster_tests.postgres_image import image_configuration, installed_major, write_root_filesystem

IMAGE = "kanbu-test/postgres"
IMAGE_MAJOR = int(installed_major() or 0)
"""The image's PostgreSQL; 0 where there is none to make it of."""

USER, PASSWORD, DATABASE = "kanbu", "s3cret/p@ss", "kanbu_in_container"
_START_SECONDS = 30
_STOP_SECONDS = 30
_READY_SECONDS = 30
_PR_SET_PDEATHSIG = 1
_FOLDER, _PREFIX = "/tmp", "kanbu-docker-"


def missing_for_an_engine() -> str | None:
    """Why no engine can be started here, or None."""
    if os.geteuid() != 0:
        return "only root can start a Docker engine"
    if shutil.which("dockerd") is None:
        return "no dockerd: install docker.io"
    if installed_major() is None:
        return "no PostgreSQL server of Debian's to make an image of: install postgresql"
    return None


class DockerEngine:
    """A running engine with the image `IMAGE`. A context manager: leaving it ends the engine and all in it.

    Args:
        image: The image's file system, when another engine has written it already.
    """

    def __init__(self, image: Path | None = None) -> None:
        # Below /tmp, and short: the path of a unix socket has at most 107 characters.
        self.root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_FOLDER))
        self._lock = (self.root / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.host = f"unix://{self.root}/docker.sock"
        self.image = image or self.root / "image.tar"
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DockerEngine:
        try:
            _remove_what_killed_sessions_left()
            self._start()
            self._import_image()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._daemon is not None and self._daemon.poll() is None:
            self._daemon.terminate()
            try:
                self._daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        _remove(self.root)
        self._lock.close()

    def _client(self) -> docker.DockerClient:
        return docker.DockerClient(base_url=self.host)

    @property
    def daemon_pid(self) -> int:
        assert self._daemon is not None
        return self._daemon.pid

    def command_line(self, *arguments: str) -> list[str]:
        """The command of Docker's own command line client for this engine."""
        return ["docker", "--host", self.host, *arguments]

    @contextlib.contextmanager
    def postgres(
        self,
        prefix: str = "postgres-",
        *,
        environment: dict[str, str] | None = None,
        arguments: Sequence[str] = (),
        network: str = "none",
    ) -> Iterator[str]:
        """The name of a PostgreSQL container that answers; it is removed at the end.

        Args:
            environment: Instead of the usual POSTGRES_USER, POSTGRES_PASSWORD and POSTGRES_DB.
            arguments: For `postgres`.
        """
        name = self.start_postgres(prefix, environment=environment, arguments=arguments, network=network)
        try:
            yield name
        finally:
            if name in self.docker("ps", "--all", "--format={{.Names}}").split():
                self.docker("rm", "--force", "--volumes", name)

    def start_postgres(
        self,
        prefix: str = "postgres-",
        *,
        environment: dict[str, str] | None = None,
        arguments: Sequence[str] = (),
        network: str = "none",
    ) -> str:
        """As `postgres`, with a container that stays as long as the engine."""
        name = prefix + secrets.token_hex(4)
        variables = {"POSTGRES_USER": USER, "POSTGRES_PASSWORD": PASSWORD, "POSTGRES_DB": DATABASE}
        options = [f"--env={key}={value}" for key, value in (variables if environment is None else environment).items()]
        self.docker(
            "run", "--detach", "--name", name, "--network", network, "--stop-signal=SIGINT", *options, IMAGE, *arguments
        )
        self.await_answer(name)
        return name

    @contextlib.contextmanager
    def clients(self, socket_folder: Path, port: int) -> Iterator[str]:
        """The name of a container without a server of its own, but with the socket of one that runs outside."""
        name = "clients-" + secrets.token_hex(4)
        options = ["--network=none", f"--volume={socket_folder}:/run/postgresql", f"--env=PGPORT={port}"]
        self.docker("run", "--detach", "--name", name, *options, "--entrypoint=sleep", IMAGE, "infinity")
        try:
            yield name
        finally:
            self.docker("rm", "--force", name)

    def docker(self, *arguments: str) -> str:
        """What Docker's own command line client prints."""
        done = subprocess.run(self.command_line(*arguments), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def inside(self, container: str, *command: str) -> str:
        """What a command in a container prints."""
        return self.docker("exec", container, *command)

    def await_answer(self, container: str) -> None:
        """Wait until the server in a container takes connections."""
        deadline = time.monotonic() + _READY_SECONDS
        # Over TCP: while the database is being made a server may answer on the socket already.
        ask = self.command_line("exec", container, "pg_isready", "-q", "-h", "127.0.0.1")
        while subprocess.run(ask, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0:
            if time.monotonic() > deadline:
                raise TimeoutError(self.docker("logs", container))
            time.sleep(0.05)

    def _start(self) -> None:
        command = [
            "dockerd",
            *("--host", self.host, "--data-root", str(self.root / "data"), "--exec-root", str(self.root / "exec")),
            *("--pidfile", str(self.root / "docker.pid"), "--exec-opt", "native.cgroupdriver=cgroupfs"),
            *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
            "--userland-proxy=false",
        ]
        log = (self.root / "dockerd.log").open("wb")
        with log:
            self._daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_us,
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                with contextlib.closing(self._client()) as client:
                    client.ping()
            except DockerException:
                if self._daemon.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                text = (self.root / "dockerd.log").read_text(errors="replace")
                pytest.skip("dockerd does not start here: " + "".join(text.splitlines(keepends=True)[-5:]))
            return

    def _import_image(self) -> None:
        major = installed_major()
        assert major is not None
        if not self.image.exists():
            write_root_filesystem(self.image, major)
        with contextlib.closing(self._client()) as client:
            client.api.import_image_from_file(
                str(self.image), repository=IMAGE, tag="latest", changes=image_configuration(major)
            )


def _remove_what_killed_sessions_left() -> None:
    for lock in Path(_FOLDER).glob(f"{_PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.parent)


def _remove(root: Path) -> None:
    """Remove an engine's folder, ending first what outlives an engine that was killed: containers and their shims."""
    for pid in _processes_naming(f"{root}/"):
        for child in _children(pid):
            _kill(child)
        _kill(pid)
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((path for path in mounted if path.startswith(f"{root}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)
    shutil.rmtree(root)


def _end_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _processes_naming(text: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and text.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]
    return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

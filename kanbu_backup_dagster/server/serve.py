"""`kanbu-backup serve`: web server, daemon and code server in one command.

What belongs here: what is checked before they start, what is told, and which programs run. What does not: keeping them
running (`supervisor`).
"""

from __future__ import annotations

import fcntl
import http.client
import os
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

from kanbu_backup_dagster import __version__
from kanbu_backup_dagster.errors import BusyError, SettingsError
from kanbu_backup_dagster.orchestration.dagster_home import ensure_home
from kanbu_backup_dagster.schedule_file import load_schedule_file, next_runs
from kanbu_backup_dagster.server import code_server
from kanbu_backup_dagster.server.exposure import bind, check_exposure
from kanbu_backup_dagster.server.logs import log_to_stderr
from kanbu_backup_dagster.server.reloading import following
from kanbu_backup_dagster.server.supervisor import Program, Supervisor
from kanbu_backup_dagster.server.trigger import PREFIX
from kanbu_backup_dagster.settings import SchedulerMode, Settings, load_settings

_HEALTH_SECONDS = 10
_BACKLOG = 256


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `serve` was asked.

    Attributes:
        web: Run the web server.
        daemon: Run the daemon: the queue, schedules and sensors.
        tls_certificate: PEM file; with `tls_key`, the server speaks HTTPS.
        without_password: Listen beyond loopback although no password is set.
    """

    host: str = "127.0.0.1"
    port: int
    web: bool = True
    daemon: bool = True
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    without_password: bool = False


def serve(options: ServeOptions, tell: Callable[[str], None]) -> None:
    """Run until SIGTERM or Ctrl-C. For the main thread.

    Args:
        options: What to run, and where.
        tell: Shows a line to the person who started it.

    Raises:
        KanbuError: It cannot or must not start as asked.
    """
    log_to_stderr()
    # Whoever may write to a unix socket may connect; the code server has another in the system's temporary folder.
    os.umask(os.umask(0o077) | 0o022)
    settings = load_settings()
    _check_tls(options)
    home = ensure_home()
    folder = home / "serve"
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    with ExitStack() as held:
        # The one with the daemon is the one there must not be two of: each would run the schedules.
        name = "code-server" if options.daemon else "web-code-server"
        held.enter_context(_only_one(folder / f"{name}.lock", home))
        listening = held.enter_context(bind(options.host, options.port)) if options.web else None
        if listening is not None:
            check_exposure(
                listening.getsockname()[0],
                has_password=settings.ui_password is not None,
                without_password=options.without_password,
            )
            listening.listen(_BACKLOG)
        code_socket = code_server.socket_path(folder, name)
        code_socket.unlink(missing_ok=True)
        for line in introduction(options, settings, home, listening):
            tell(line)
        held.enter_context(following(settings.config_file.absolute(), code_socket))
        Supervisor(_programs(options, folder, code_socket, listening)).run(
            on_ready=lambda: tell(f"Ready{f': {url_of(options, listening)}' if listening else ''}. Ctrl-C ends it.")
        )
        tell("Stopped.")


def _programs(options: ServeOptions, folder: Path, code_socket: Path, listening: socket.socket | None) -> list[Program]:
    code = Program("code server", code_server.command(code_socket), is_well=partial(code_server.answers, code_socket))
    programs = [code]
    if options.daemon:
        workspace = folder / "workspace.yaml"
        code_server.write_workspace(workspace, code_socket)
        command = [sys.executable, "-m", "dagster._daemon", "run", "--workspace", str(workspace)]
        programs.append(Program("daemon", [*command, "--log-level", "warning"], needs=code.name))
    if listening is not None:
        command = [sys.executable, "-m", "kanbu_backup_dagster.server.web", "--code-server", str(code_socket)]
        command += ["--listening", str(listening.fileno())]
        if options.tls_certificate and options.tls_key:
            command += ["--tls-certificate", str(options.tls_certificate), "--tls-key", str(options.tls_key)]
        if options.without_password:
            command.append("--insecure-without-password")
        is_well = partial(_web_answers, listening, options.tls_certificate is not None)
        programs.append(Program("web server", command, is_well=is_well, keeps=[listening.fileno()]))
    return programs


@contextmanager
def _only_one(lock: Path, home: Path) -> Iterator[None]:
    handle = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BusyError(
            f"Another `kanbu-backup serve` runs with the same Dagster home, {home}.",
            advice="Stop it, or set DAGSTER_HOME to another folder.",
        ) from None
    finally:
        os.close(handle)


def _check_tls(options: ServeOptions) -> None:
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise SettingsError("HTTPS needs both --tls-certificate and --tls-key.")
    if options.tls_certificate is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(options.tls_certificate, options.tls_key)
    except OSError as error:  # ssl.SSLError among them
        raise SettingsError(
            f"{options.tls_certificate} and {options.tls_key} cannot be used: {error.strerror}."
        ) from None


def _web_answers(listening: socket.socket, tls: bool) -> bool:
    """Whether the web server answers. Jobs that cannot be loaded (503) are not its fault, and its pages show why."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection: http.client.HTTPConnection
    if tls:
        # Asked of ourselves, by address: the certificate's name proves nothing here.
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(host, port, timeout=_HEALTH_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=_HEALTH_SECONDS)
    try:
        connection.request("GET", f"{PREFIX}/trigger/health")
        return connection.getresponse().status in (http.client.OK, http.client.SERVICE_UNAVAILABLE)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def url_of(options: ServeOptions, listening: socket.socket) -> str:
    """Where to find the UI."""
    port = listening.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{'https' if options.tls_certificate else 'http'}://{host}:{port}"


def introduction(
    options: ServeOptions, settings: Settings, home: Path, listening: socket.socket | None
) -> Iterator[str]:
    """Lines that tell what is on, and what is missing."""
    where = f" at {url_of(options, listening)}" if listening else ""
    yield f"Kanbu Backup {__version__}{where}"
    if listening is not None:
        yield from _access_lines(options, settings)
    yield f"  storage     {settings.storage.value}: {settings.storage_path}"
    yield "  database    " + ("DATABASE_URL" if settings.database_url else "MISSING: DATABASE_URL is not set")
    yield "  encryption  " + (
        "on" if settings.encryption_key else "MISSING: BACKUP_ENCRYPTION_KEY is not set; backups are readable by anyone"
    )
    yield from _schedule_lines(options, settings)
    yield "  alerts      " + (
        "webhook" if settings.webhook_url else "MISSING: BACKUP_WEBHOOK_URL is not set; failures are told to nobody"
    )
    yield f"  records     {home}"


def _access_lines(options: ServeOptions, settings: Settings) -> Iterator[str]:
    if settings.ui_password:
        yield f"  login       {settings.ui_username}, BACKUP_UI_PASSWORD"
        if options.tls_certificate is None and options.host not in ("127.0.0.1", "::1", "localhost"):
            yield "  WARNING     the password crosses the network readable; use HTTPS here or a proxy that does"
    elif options.without_password:
        yield "  WARNING     NO PASSWORD: whoever reaches this address can read, start and restore backups"
    else:
        yield "  login       MISSING: BACKUP_UI_PASSWORD is not set; anyone on this machine can use it"
    yield "  trigger     " + (
        "closed: BACKUP_SCHEDULER_MODE is internal"
        if settings.scheduler_mode is SchedulerMode.INTERNAL
        else f"POST {PREFIX}/trigger; a backup triggered without scheduleId prunes nothing"
        if settings.trigger_api_key
        else "MISSING: BACKUP_TRIGGER_API_KEY is not set, so it is closed"
    )


def _schedule_lines(options: ServeOptions, settings: Settings) -> Iterator[str]:
    loaded = load_schedule_file(settings.config_file)
    enabled = [schedule for schedule in loaded.schedules if schedule.enabled]
    if settings.scheduler_mode is SchedulerMode.EXTERNAL:
        yield "  schedules   off: BACKUP_SCHEDULER_MODE is external"
    elif not loaded.exists:
        yield f"  schedules   MISSING: there is no {settings.config_file}"
    elif not options.daemon:
        yield f"  schedules   {len(enabled)} enabled; `kanbu-backup serve --daemon` runs them"
    else:
        yield f"  schedules   {len(enabled)} of {len(loaded.schedules)} in {settings.config_file} enabled"
    zone = ZoneInfo(settings.cron_timezone)
    for schedule in enabled:
        upcoming = next_runs(schedule.cron, zone, datetime.now(timezone.utc), 1)
        yield f"              {schedule.id}  {schedule.name}: next {upcoming[0]:%a %d %b %H:%M %Z}"
    for problem in loaded.problems:
        yield f"  PROBLEM     {problem}"

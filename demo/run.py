"""`make demo`: back a database up through Dagster, and show what is now in storage and what to type next.

The database is the one in DATABASE_URL, else the sample in `sample.sql` on an embedded PostgreSQL server that keeps
running for the next demo. Everything the demo makes is in `.demo/`, settings and a random encryption key among it, in a
`.env` of its own: commands run there see those settings, whatever else this machine is set up for.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dotenv import dotenv_values
from rich.console import Console

from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.sources.embedded_postgres import EmbeddedPostgres

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / ".demo"
SERVER = DEMO / "postgres"
DATABASE = "kanbu"

console = Console(highlight=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["--stop"]:
            return stop()
        return demo()
    except KanbuError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False)
        return 1


def demo() -> int:
    """Make a backup and show it."""
    # Under root, PostgreSQL runs as another user, who passes through here to the server's folder.
    DEMO.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, exist_ok=True)
    users_own = dotenv_values(ROOT / ".env").get("DATABASE_URL") or os.environ.get("DATABASE_URL")
    if users_own:
        console.print("Backing up the database in DATABASE_URL.")
        os.environ["DATABASE_URL"] = users_own
        write_settings({})
    else:
        write_settings({"DATABASE_URL": sample_database(), "BACKUP_PG_MODE": "direct"})
    status = run("backup", "database")
    if status != 0:
        return status
    console.print("\n[bold]In storage now[/]")
    run("list")
    show_next_steps(sample=not users_own)
    return 0


def sample_database() -> str:
    """The URL of the sample database; the server is started and the sample loaded where that is still to be done."""
    with console.status("Starting PostgreSQL..."):
        server = EmbeddedPostgres.start(SERVER)
    console.print(f"PostgreSQL {server.version} runs in {server.home}.")
    if not server.has_database(DATABASE):
        with console.status("Loading the sample project board..."):
            server.create_database(DATABASE, (ROOT / "demo" / "sample.sql").read_text("utf-8"))
    return server.database_url(DATABASE)


def write_settings(database: dict[str, str]) -> None:
    """Write `.demo/.env`, keeping its key: the backups already made need it. A user's own URL stays out of it."""
    path = DEMO / ".env"
    known = dotenv_values(path, interpolate=False) if path.exists() else {}
    settings = {
        "BACKUP_STORAGE": "local",
        "BACKUP_LOCAL_PATH": str(DEMO / "backups"),
        "BACKUP_ENCRYPTION_KEY": known.get("BACKUP_ENCRYPTION_KEY") or secrets.token_hex(32),
        "BACKUP_CONFIG_FILE": str(ROOT / "kanbu_backup.yaml"),
        "DAGSTER_HOME": str(DEMO / "dagster"),
        **database,
    }
    lines = [f"{name}='{_escaped(value)}'\n" for name, value in settings.items()]
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.writelines(["# Written by `make demo`. Without this key its backups cannot be read.\n", *lines])
    unfinished.rename(path)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")


def run(*command: str) -> int:
    """Run `kanbu-backup` with the demo's settings; its exit status."""
    sys.stdout.flush()
    return subprocess.run(
        [sys.executable, "-m", "kanbu_backup_dagster.cli", *command], cwd=DEMO, check=False
    ).returncode


def show_next_steps(*, sample: bool) -> None:
    """Print commands that work when pasted into a shell, wherever it stands."""
    folder, programs = shlex.quote(str(DEMO)), shlex.quote(str(Path(sys.executable).parent))
    console.print("\n[bold]What to type next[/]")
    newest = "$(ls backups/*.enc | tail -n 1)"
    steps = [
        ("Stand in the demo's folder, where its settings are:", f"cd {folder} && PATH={programs}:$PATH"),
        ("The web UI, on http://127.0.0.1:3000: runs, schedules, each backup's history:", "kanbu-backup serve"),
        ("What is known of the newest backup:", f"kanbu-backup show {newest}"),
        ("Its SQL, decrypted and unpacked:", f"kanbu-backup decrypt {newest} -o - | gunzip | less"),
    ]
    if sample:
        # With a URL of the user's own these would need DATABASE_URL, which may have been set for this command alone.
        steps += [
            (
                "The same backup again, by Dagster's own command line:",
                "dagster job execute -m kanbu_backup_dagster.definitions -j database_backup",
            ),
            ("The database as it was then; asks before it replaces it:", f"kanbu-backup restore {newest}"),
        ]
    steps.append(("Stop the server and delete all of this:", f"make -C {shlex.quote(str(ROOT))} demo-stop"))
    for what, command in steps:
        console.print(f"  [dim]# {what}[/]")
        console.print(f"  {command}", markup=False)


def stop() -> int:
    """Stop the server and delete everything the demo made."""
    if not DEMO.exists():
        console.print("There is no demo to stop.")
        return 0
    if SERVER.exists():
        EmbeddedPostgres.remove(SERVER)
    shutil.rmtree(DEMO)
    console.print(f"The demo is over: {DEMO} is gone.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

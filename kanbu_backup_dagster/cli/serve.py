"""`kanbu-backup serve`."""

from __future__ import annotations

from pathlib import Path

import click

from kanbu_backup_dagster.cli.group import cli

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", "-p", type=click.IntRange(0, 65535), default=3000, show_default=True, help="0: any free one.")
@click.option("--web", "only_web", is_flag=True, help="The web server only: UI, GraphQL and trigger.")
@click.option("--daemon", "only_daemon", is_flag=True, help="The daemon only: runs, schedules and alerts.")
@click.option("--tls-certificate", type=_FILE, help="PEM file; speak HTTPS, with --tls-key.")
@click.option("--tls-key", type=_FILE, help="PEM file of the certificate's private key.")
@click.option(
    "--insecure-without-password",
    is_flag=True,
    help="Listen beyond this machine without BACKUP_UI_PASSWORD, behind a proxy of yours that asks for a login.",
)
def serve(
    host: str,
    port: int,
    only_web: bool,
    only_daemon: bool,
    tls_certificate: Path | None,
    tls_key: Path | None,
    insecure_without_password: bool,
) -> None:
    """Run the web server and the daemon until Ctrl-C or SIGTERM.

    The daemon starts queued runs, runs the schedules and sends alerts. With --web and --daemon the two can live in two
    containers.
    """
    if only_web and only_daemon:
        raise click.UsageError("Without --web and --daemon, both run.")
    # Dagster is heavy to import, and other commands do without it.
    from kanbu_backup_dagster.server.serve import ServeOptions
    from kanbu_backup_dagster.server.serve import serve as run

    options = ServeOptions(
        host=host,
        port=port,
        web=not only_daemon,
        daemon=not only_web,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        without_password=insecure_without_password,
    )
    run(options, click.echo)

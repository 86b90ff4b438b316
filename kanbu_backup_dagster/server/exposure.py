"""Where the web server may listen: on loopback freely, elsewhere behind a password.

What belongs here: that one rule, asked by `serve` before anything starts and by the web process itself.
"""

from __future__ import annotations

import socket
from ipaddress import ip_address

from kanbu_backup_dagster.errors import SettingsError


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an IP address."""
    parsed = ip_address(address.partition("%")[0])
    return parsed.is_loopback


def check_exposure(address: str, *, has_password: bool, without_password: bool) -> None:
    """Allow listening on an IP address.

    Raises:
        SettingsError: Others could reach it, no password is set, and nobody has said that this is meant.
    """
    if is_loopback(address) or has_password or without_password:
        return
    raise SettingsError(
        f"BACKUP_UI_PASSWORD is not set, and {address} can be reached from other machines: "
        "whoever reaches it could read, start and restore backups.",
        advice="Set BACKUP_UI_PASSWORD; or listen on 127.0.0.1; or, behind a proxy of your own that asks for a login, "
        "give --insecure-without-password.",
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address, and does not listen yet.

    Raises:
        SettingsError: There is no such address here, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise SettingsError(f"{host!r} is not an address to listen on: {error.strerror}.") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise SettingsError(
            f"The web server cannot listen on {host}, port {port}: {error.strerror}.",
            advice="Choose another with --host and --port.",
        ) from None
    return bound

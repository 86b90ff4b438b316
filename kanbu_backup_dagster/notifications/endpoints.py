"""Where events are sent: an address that is kept secret, and the form it takes.

What belongs here: judging a URL when settings are read, and choosing the form of the body. What does not: sending.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

import requests

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.notifications.chat import discord_message, slack_message
from kanbu_backup_dagster.notifications.events import Event
from kanbu_backup_dagster.notifications.javascript_json import stringify
from kanbu_backup_dagster.schedule_file import WebhookFormat

_SLACK_HOSTS = {"hooks.slack.com", "hooks.slack-gov.com"}
_DISCORD_HOSTS = {"discord.com", "discordapp.com"} | {
    f"{channel}.{host}" for channel in ("ptb", "canary") for host in ("discord.com", "discordapp.com")
}


class SecretUrl:
    """An http(s) URL whose path, query and credentials are secret: only `origin` may be shown.

    Args:
        url: The URL.
        source: What it was read from, for the error.

    Raises:
        SettingsError: It is not an http or https URL that can be requested. The error does not repeat it.
    """

    def __init__(self, url: str, *, source: str) -> None:
        address, problem = _checked(url.strip())
        if problem:
            raise SettingsError(
                f"{source} cannot be used: {problem}.",
                advice=f"Set {source} to an address such as https://example.com/hook. It is secret and not shown here.",
            )
        self._url = address

    @property
    def origin(self) -> str:
        """Scheme, host and port: all of the URL that a person may see."""
        parts = urlsplit(self._url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port is not None else "")

    def reveal(self) -> str:
        """The whole URL, for the request alone."""
        return self._url

    def secret_pieces(self) -> tuple[str, ...]:
        """The URL's parts that a receiver may repeat in its answer, as they are and percent-decoded; longest first."""
        parts = urlsplit(self._url)
        userinfo = parts.netloc.rpartition("@")[0]
        whole = [self._url, parts.path.lstrip("/"), parts.query, userinfo, parts.fragment]
        small = [*parts.path.split("/"), *userinfo.split(":")]
        small += [piece for pair in parts.query.split("&") for piece in pair.split("=", 1)]
        pieces = {form for piece in (*whole, *small) for form in (piece, unquote(piece))}
        # Shorter ones are words such as `v1`: no secrets, and often part of other words.
        return tuple(sorted((piece for piece in pieces if len(piece) >= 4), key=len, reverse=True))

    def __repr__(self) -> str:
        return f"<{self.origin}/…>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretUrl) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)


def _checked(url: str) -> tuple[str, str]:
    """`url` as it is requested (percent-encoded), or in words what is wrong with it."""
    if not url:
        return "", "it is empty"
    if any(character.isspace() or not character.isprintable() for character in url):
        return "", "it contains a space or a control character"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "", "it is not a URL"
    if parts.scheme not in ("http", "https"):
        return "", "only http:// and https:// addresses are called"
    if not parts.hostname:
        return "", "it names no host"
    try:
        return requests.Request("POST", url).prepare().url or "", ""
    except (requests.RequestException, ValueError):
        return "", "it is not a URL that can be requested"


def recognise(url: SecretUrl) -> WebhookFormat:
    """The form that the service at `url` takes: Slack's, Discord's (with `/slack` at its end: Slack's), else ours."""
    parts: SplitResult = urlsplit(url.reveal())
    path = [piece for piece in parts.path.split("/") if piece]
    if parts.hostname in _SLACK_HOSTS:
        return WebhookFormat.SLACK
    if parts.hostname in _DISCORD_HOSTS and path[:1] == ["api"] and "webhooks" in path[1:3]:
        return WebhookFormat.SLACK if path[-1] == "slack" else WebhookFormat.DISCORD
    return WebhookFormat.KANBU


@dataclass(frozen=True)
class Endpoint:
    """A receiver of webhooks. Build it with `webhook_endpoint`.

    Attributes:
        name: What it is called in the UI, in logs and in delivery ids; not secret, kept when the URL changes.
        secret: What the body is signed with; None: not signed.
        format: The body's form; never `auto`.
    """

    name: str
    url: SecretUrl
    secret: str | None = field(default=None, repr=False)
    format: WebhookFormat = WebhookFormat.KANBU

    def body(self, event: Event, *, test: bool = False) -> bytes:
        """The bytes to post for `event`."""
        if self.format is WebhookFormat.SLACK:
            return stringify(slack_message(event, test=test))
        if self.format is WebhookFormat.DISCORD:
            return stringify(discord_message(event, test=test))
        return event.body()


def webhook_endpoint(
    url: str,
    *,
    secret: str | None = None,
    webhook_format: WebhookFormat = WebhookFormat.AUTO,
) -> Endpoint:
    """An endpoint out of settings. `auto` recognises the form by the URL; an empty secret is none.

    Raises:
        SettingsError: The URL cannot be used (see `SecretUrl`).
    """
    address = SecretUrl(url, source="BACKUP_WEBHOOK_URL")
    form = recognise(address) if webhook_format is WebhookFormat.AUTO else webhook_format
    return Endpoint("webhook", address, secret or None, form)

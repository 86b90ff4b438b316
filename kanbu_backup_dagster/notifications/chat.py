"""Events as messages of Slack and Discord, whose incoming webhooks refuse any other body.

What belongs here: words, layout, escaping and the services' length limits. What does not: which endpoint gets which
form, and sending.

Limits: Slack, text object (3,000 characters) and section block (10 fields of 2,000); Discord, webhook message (content
2,000) and embed (title 256, description 4,096, 25 fields of 1,024, 6,000 together). Values are cut far below them, so
that escaping cannot take a message past them. Text from outside can mention nobody: its `@` is followed by a
zero-width space, Slack's control characters are escaped, and Discord is told to parse no mention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta

from kanbu_backup_dagster.notifications.events import Event, ScheduleRef
from kanbu_backup_dagster.notifications.javascript_json import JsonValue

VALUE_LENGTH = 200
ERROR_LENGTH = 500
MAX_FACTS = 10

_TITLES = {
    "backup.completed": "Backup completed",
    "backup.failed": "Backup failed",
    "backup.overdue": "Backup overdue",
    "backup.recovered": "Backups are back",
    "restore.completed": "Restore completed",
    "restore.failed": "Restore failed",
    "drill.completed": "Restore drill passed",
    "drill.failed": "Restore drill failed",
    "verification.failed": "Backup is damaged",
    "prune.held": "Clean-up held: nothing was deleted",
    "storage.low": "Storage is running low",
    "config.invalid": "Configuration cannot be used",
}
_LABELS = {
    "type": "Type",
    "filename": "File",
    "file_size": "Size",
    "is_encrypted": "Encrypted",
    "checksum": "SHA-256",
    "duration_ms": "Took",
    "last_success_at": "Last success",
    "expected_by": "Expected by",
    "unsettled": "Not known to have arrived",
    "target": "Restored to",
    "previous": "Replaced, kept as",
    "tables": "Tables",
    "rows": "Rows",
    "reason": "Reason",
    "held": "Files held",
    "path": "Storage",
    "free_bytes": "Free",
    "needed_bytes": "Needed",
    "file": "File",
}
_GREEN, _RED = 0x2E7D32, 0xC62828
_NOT_PARTS = {"event", "key", "schedule", "timestamp", "error"}


def slack_message(event: Event, *, test: bool = False) -> dict[str, JsonValue]:
    """The body of a Slack incoming webhook.

    `text` alone says everything: it is what Slack shows in notifications, and all that services which only speak
    Slack's language (Discord's `/slack`, Mattermost) show.
    """
    title = _title(event, test)
    error = _slack_text(_error(event), ERROR_LENGTH)
    facts = [(label, _slack_text(value, VALUE_LENGTH)) for label, value in _facts(event)]
    lines = [f"*{title}*", *([error] if error else []), *(f"{label}: {value}" for label, value in facts)]
    blocks: list[JsonValue] = [_slack_section("\n".join(lines[: 2 if error else 1]))]
    if facts:
        blocks.append({"type": "section", "fields": [_slack_mrkdwn(f"*{label}*\n{value}") for label, value in facts]})
    return {"text": "\n".join(lines), "blocks": blocks}


def discord_message(event: Event, *, test: bool = False) -> dict[str, JsonValue]:
    """The body of a Discord webhook: one embed, its title in the content too, for notifications."""
    title = _title(event, test)
    embed: dict[str, JsonValue] = {
        "title": title,
        "color": _GREEN if event.is_success or event.event == "backup.recovered" else _RED,
        "timestamp": event.payload()["timestamp"],
        "fields": [
            {"name": label, "value": _discord_text(value, VALUE_LENGTH), "inline": len(value) <= 40}
            for label, value in _facts(event)
        ],
    }
    if error := _error(event):
        embed["description"] = _discord_text(error, ERROR_LENGTH)
    return {"content": title, "embeds": [embed], "allowed_mentions": {"parse": []}}


def _title(event: Event, test: bool) -> str:
    return ("[Test] " if test else "") + _TITLES[event.event]


def _error(event: Event) -> str:
    return str(getattr(event, "error", ""))


def _facts(event: Event) -> list[tuple[str, str]]:
    facts = [] if event.schedule is None else [("Schedule", _schedule(event.schedule))]
    for part in (name for name in type(event).model_fields if name not in _NOT_PARTS):
        fields = getattr(event, part).model_dump()
        facts += [(_LABELS[name], _human(name, value)) for name, value in fields.items() if name in _LABELS]
        facts += [("Problem", _problem(problem)) for problem in fields.get("problems", ())]
    return [(label, value) for label, value in facts if value.strip()][:MAX_FACTS]


def _schedule(schedule: ScheduleRef) -> str:
    return f"{schedule.name} ({schedule.id})"


def _problem(problem: Mapping[str, object]) -> str:
    place = [f"{name} {problem[name]}" for name in ("line", "column") if problem[name] is not None]
    return ", ".join(place) + (": " if place else "") + str(problem["message"])


def _human(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S} UTC"
    if isinstance(value, int):
        if name == "duration_ms":
            return f"{value / 1000:.1f} s" if value < 60_000 else str(timedelta(seconds=value // 1000))
        return _bytes(value) if name == "file_size" or name.endswith("_bytes") else f"{value:,}"
    return str(getattr(value, "value", value))


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _plain(text: str, limit: int) -> str:
    line = " ".join(text.split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return line.replace("@", "@\u200b")


def _slack_text(text: str, limit: int) -> str:
    return _plain(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _slack_mrkdwn(text: str) -> dict[str, JsonValue]:
    # verbatim: Slack makes no links or mentions of its own out of the text.
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def _slack_section(text: str) -> dict[str, JsonValue]:
    return {"type": "section", "text": _slack_mrkdwn(text)}


def _discord_text(text: str, limit: int) -> str:
    return re.sub(r"([\\*_~`|<>\[\]()#])", r"\\\1", _plain(text, limit))

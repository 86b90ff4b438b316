"""The events that are told to the outside, and their payloads.

What belongs here: one frozen class an event, its JSON form, and reading it back (an event may wait in a queue). What
does not: when an event happens, and what a chat service makes of it. The payloads are documented in `docs/webhooks.md`.
"""

from __future__ import annotations

import re
import uuid
from datetime import datetime, timezone
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter
from pydantic.alias_generators import to_camel

from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.notifications.javascript_json import MAX_SAFE_INTEGER, JsonValue, stringify

ERROR_LENGTH = 500
"""Characters of an error that are sent."""

_DELIVERY_IDS = uuid.UUID("5a4b7c1e-2d1f-5c3e-9b70-6b616e627500")

_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^\s/@]*:[^\s/]*@")
_NAMED_SECRET = re.compile(
    r"(?i)\b([\w-]*(?:password|passwd|passphrase|secret|token|api[_-]?key|encryption[_-]?key))(\s*[=:]\s*)"
    r"(\"[^\"]*\"|'[^']*'|[^\s,;&]+)"
)


def short_error(text: str) -> str:
    """`text` on one line of at most 500 characters, without credentials in URLs and without `password=...` values.

    The errors of this project hold no secret; this is for those of other programs, which may.
    """
    line = " ".join(text.split())
    line = _CREDENTIALS_IN_URL.sub("***@", line)
    line = _NAMED_SECRET.sub(r"\1\2***", line)
    return line if len(line) <= ERROR_LENGTH else line[: ERROR_LENGTH - 1] + "…"


def _well_formed(text: object) -> object:
    # A file name that is not UTF-8 arrives with lone surrogates, which many receivers' JSON parsers refuse.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if isinstance(text, str) else text


def _utc_milliseconds(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("a time without a zone")
    moment = moment.astimezone(timezone.utc)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _to_iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


Text = Annotated[str, BeforeValidator(_well_formed)]
ErrorText = Annotated[str, AfterValidator(short_error), BeforeValidator(_well_formed)]
Count = Annotated[int, Field(ge=0, le=MAX_SAFE_INTEGER)]
Moment = Annotated[datetime, AfterValidator(_utc_milliseconds), PlainSerializer(_to_iso, when_used="json")]
"""An aware time, kept in UTC and whole milliseconds, written as `2026-01-18T02:00:05.432Z`."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class ScheduleRef(_Part):
    """The schedule an event belongs to."""

    id: Count
    name: Text


class BackupPart(_Part):
    """A backup made, or one that was to be made: then only what is known of it.

    Attributes:
        file_size: Bytes as stored.
        checksum: SHA-256 of the compressed bytes before encryption, hex.
    """

    type: BackupType
    filename: Text | None = None
    file_size: Count | None = None
    is_encrypted: bool | None = None
    checksum: Text | None = None
    duration_ms: Count | None = None


class OverduePart(_Part):
    """A gap between backups: the last success before it, if any, and when the next was expected at the latest.

    Attributes:
        unsettled: A backup that was made since, and is not known to have arrived where it is kept.
    """

    last_success_at: Moment | None = None
    expected_by: Moment
    unsettled: Text | None = None


class RestorePart(_Part):
    """A restore.

    Attributes:
        filename: The backup that was restored.
        target: The database or folder it was restored to.
        previous: Where what it replaced is kept: a database's or a folder's name.
    """

    type: BackupType
    filename: Text | None = None
    target: Text | None = None
    previous: Text | None = None
    duration_ms: Count | None = None


class DrillPart(_Part):
    """A restore that was only a proof: the backup it proved, and what was found in it."""

    type: BackupType
    filename: Text | None = None
    tables: Count | None = None
    rows: Count | None = None
    duration_ms: Count | None = None


class VerificationPart(_Part):
    """A backup that is not what was written. `checksum` is the one on record.

    Attributes:
        type: None where several were to be verified, and none could be.
        filename: None where the verification itself could not be done.
    """

    type: BackupType | None = None
    filename: Text | None = None
    file_size: Count | None = None
    is_encrypted: bool | None = None
    checksum: Text | None = None


class PrunePart(_Part):
    """A clean-up that deleted nothing because something was in doubt.

    Attributes:
        type: The backups it was about; None: all.
        reason: What was in doubt.
        held: How many files were kept that would have gone.
    """

    type: BackupType | None = None
    reason: ErrorText
    held: Count | None = None


class StoragePart(_Part):
    """Storage with less room (bytes) than the next backups need."""

    path: Text
    free_bytes: Count
    needed_bytes: Count


class ConfigProblem(_Part):
    """One thing that is wrong in a file; line and column count from 1."""

    line: Count | None = None
    column: Count | None = None
    message: ErrorText


class ConfigPart(_Part):
    """A configuration file that could not be used, wholly or in part; `settings` for those of the environment."""

    file: Text
    problems: tuple[ConfigProblem, ...] = ()


class Event(_Part):
    """What all events have.

    Attributes:
        event: The event's name.
        key: What makes it *this* event, the same each time it is sent: a run's id, or for an event without a run
            something like `overdue/1/2026-01-18T02:00:00Z`. Not in the payload.
        schedule: The schedule it belongs to, if any.
        timestamp: When it happened.
    """

    is_success: ClassVar[bool] = False
    """Whether it is news of a success, sent only to those who asked for that; all other events are alerts."""

    event: str
    key: str = Field(min_length=1)
    schedule: ScheduleRef | None = None
    timestamp: Moment

    def payload(self) -> dict[str, JsonValue]:
        """The webhook's JSON object, keys in their documented order."""
        fields = self.model_dump(mode="json", by_alias=True, exclude={"key"})
        last = [name for name in ("schedule", "error", "timestamp") if name in fields]
        middle = [name for name in fields if name != "event" and name not in last]
        return {name: fields[name] for name in ("event", *middle, *last)}

    def body(self) -> bytes:
        """The webhook's body: `JSON.stringify` of the payload, UTF-8."""
        return stringify(self.payload())

    def delivery_id(self, endpoint_name: str) -> str:
        """The value of `X-Kanbu-Delivery`: the same for each attempt to tell this event to that endpoint (a UUID)."""
        return str(uuid.uuid5(_DELIVERY_IDS, f"{endpoint_name}\n{self.event}\n{self.key}"))

    def to_record(self) -> str:
        """The event as JSON to be kept until it is delivered; `parse_event` reads it back."""
        return self.model_dump_json(by_alias=True)


class BackupCompleted(Event):
    """A backup was made, stored and verified."""

    is_success = True
    event: Literal["backup.completed"] = "backup.completed"
    backup: BackupPart


class BackupFailed(Event):
    """A backup was not made. `backup` holds its type, and nulls."""

    event: Literal["backup.failed"] = "backup.failed"
    backup: BackupPart
    error: ErrorText


class BackupOverdue(Event):
    """An enabled schedule made no backup within its period and grace. Sent once a gap."""

    event: Literal["backup.overdue"] = "backup.overdue"
    backup: BackupPart
    overdue: OverduePart


class BackupRecovered(Event):
    """The backup that ended a gap. An alert, so that whoever was told of the gap is told of its end."""

    event: Literal["backup.recovered"] = "backup.recovered"
    backup: BackupPart
    overdue: OverduePart


class RestoreCompleted(Event):
    """A restore was done."""

    is_success = True
    event: Literal["restore.completed"] = "restore.completed"
    restore: RestorePart


class RestoreFailed(Event):
    """A restore was not done; what was there before still is."""

    event: Literal["restore.failed"] = "restore.failed"
    restore: RestorePart
    error: ErrorText


class DrillCompleted(Event):
    """A backup was proven by restoring it aside."""

    is_success = True
    event: Literal["drill.completed"] = "drill.completed"
    drill: DrillPart


class DrillFailed(Event):
    """A backup could not be proven."""

    event: Literal["drill.failed"] = "drill.failed"
    drill: DrillPart
    error: ErrorText


class VerificationFailed(Event):
    """A stored backup is damaged or was changed."""

    event: Literal["verification.failed"] = "verification.failed"
    verification: VerificationPart
    error: ErrorText


class PruneHeld(Event):
    """Clean-up deleted nothing, since something was in doubt."""

    event: Literal["prune.held"] = "prune.held"
    prune: PrunePart


class StorageLow(Event):
    """Storage has less room than the next backups need."""

    event: Literal["storage.low"] = "storage.low"
    storage: StoragePart


class ConfigInvalid(Event):
    """Settings or the schedule file cannot be used, wholly or in part."""

    event: Literal["config.invalid"] = "config.invalid"
    config: ConfigPart


_ANY_EVENT: TypeAdapter[Event] = TypeAdapter(
    Annotated[
        BackupCompleted
        | BackupFailed
        | BackupOverdue
        | BackupRecovered
        | RestoreCompleted
        | RestoreFailed
        | DrillCompleted
        | DrillFailed
        | VerificationFailed
        | PruneHeld
        | StorageLow
        | ConfigInvalid,
        Field(discriminator="event"),
    ]
)


def parse_event(record: str) -> Event:
    """The event that `Event.to_record` wrote.

    Raises:
        ValueError: It is not one, for instance written by a release that knew other events.
    """
    return _ANY_EVENT.validate_json(record)


def example_event(key: str, now: datetime) -> BackupCompleted:
    """The event a webhook is tried out with. It goes out with `X-Kanbu-Test: true`.

    Args:
        key: A new one for each try, so that a receiver that drops repeats does not drop it.
        now: The time it bears.
    """
    return BackupCompleted(
        key=key,
        timestamp=now,
        schedule=ScheduleRef(id=1, name="Daily Database Backup"),
        backup=BackupPart(
            type=BackupType.DATABASE,
            filename=f"kanbu_backup_{now.astimezone(timezone.utc):%Y-%m-%dT%H-%M-%S}.sql.gz.enc",
            file_size=1048576,
            is_encrypted=True,
            checksum="0" * 64,
            duration_ms=5432,
        ),
    )

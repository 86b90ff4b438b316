"""The contents of `kanbu_backup.yaml`, as models, and the JSON schema made from them.

What belongs here: names, types, ranges and defaults of the file's fields. What does not: where in the file a value is.

Types are strict: YAML tells numbers, booleans and texts apart, and so does the JSON schema that editors check against.
"""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kanbu_backup_dagster.schedule_file.cron import cron_problem

FORMAT_VERSION = 1

# Ten years: what anybody means by "for ever", and no more than dates can be reckoned with.
_LONGEST_DAYS = 3_650
_LONGEST_HOURS = 24 * _LONGEST_DAYS


def _usable_cron(cron: str) -> str:
    if problem := cron_problem(cron):
        raise ValueError(f"{cron!r} {problem}")
    return cron


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("has to be text on one line")
    return text


Line = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]


class RetentionPolicy(BaseModel):
    """How long backups are kept: an age limit in days, and how many days, weeks and months are represented."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    retention_days: int = Field(
        default=30, ge=0, description="Days after which a backup expires, unless a week or a month keeps it."
    )
    keep_daily: int = Field(
        default=7, ge=0, description="The most recent days with backups whose backups are kept, within retention_days."
    )
    keep_weekly: int = Field(
        default=4, ge=0, description="The most recent weeks whose Sunday backups are kept, beyond retention_days too."
    )
    keep_monthly: int = Field(
        default=3,
        ge=0,
        description="The most recent months whose backups of the 1st are kept, beyond retention_days too.",
    )

    @classmethod
    def parse(cls, text: str) -> RetentionPolicy:
        """The policy written as `30/7/4/3`: days, then daily, weekly, monthly.

        Raises:
            ValueError: It is not four whole numbers.
        """
        if not re.fullmatch(r"\d{1,6}(/\d{1,6}){3}", text, re.ASCII):
            raise ValueError(f"{text!r} is not a policy such as 30/7/4/3 (days/daily/weekly/monthly)")
        days, daily, weekly, monthly = map(int, text.split("/"))
        return cls(retention_days=days, keep_daily=daily, keep_weekly=weekly, keep_monthly=monthly)

    def __str__(self) -> str:
        return f"{self.retention_days}/{self.keep_daily}/{self.keep_weekly}/{self.keep_monthly}"


class ScheduleType(str, Enum):
    """What a schedule starts: a backup of a type, a restore drill, or the verification of pending backups."""

    DATABASE = "database"
    SOURCE = "source"
    DRILL = "drill"
    VERIFY_PENDING = "verify_pending"


class Schedule(RetentionPolicy):
    """One row of `schedules:`. The retention fields mean something for the types `database` and `source` only."""

    model_config = ConfigDict(strict=True)

    id: int = Field(ge=1, description="Unique, and never used again for another schedule: backups remember it.")
    name: Line = Field(description="What people call it.")
    type: ScheduleType = Field(
        strict=False, description="What it starts: a database or source backup, a drill, or verify_pending."
    )
    cron: Annotated[str, AfterValidator(_usable_cron)] = Field(
        description="When: five cron fields, in the time zone BACKUP_CRON_TIMEZONE. Quote it."
    )
    enabled: bool = Field(default=True, description="Whether it runs. Its retention policy counts either way.")
    catch_up_hours: float = Field(
        default=72,
        ge=0,
        le=_LONGEST_HOURS,
        description="A run missed while the service was down starts late, up to this many hours; 0: ten minutes.",
    )

    @property
    def policy(self) -> RetentionPolicy:
        """The row's retention policy alone, as manifests keep it."""
        return RetentionPolicy(**{name: getattr(self, name) for name in RetentionPolicy.model_fields})

    def __str__(self) -> str:
        return f"schedule {self.id} ({self.name})"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class WebhookFormat(str, Enum):
    """The body a webhook receives. `auto` goes by the URL's host: Slack's, Discord's, else Kanbu's own."""

    AUTO = "auto"
    KANBU = "kanbu"
    SLACK = "slack"
    DISCORD = "discord"


class Notifications(_Section):
    """What is told to the webhook, and how persistently. Its URL and secret are in the environment."""

    on_success: bool = Field(default=False, description="Tell of what went well.")
    on_failure: bool = Field(default=True, description="Tell of what went wrong.")
    format: WebhookFormat = Field(
        default=WebhookFormat.AUTO,
        strict=False,
        description="The body to send: auto recognises Slack and Discord by the URL.",
    )
    give_up_after_days: float = Field(
        default=3, gt=0, le=_LONGEST_DAYS, description="Days of retrying before an alert is given up, visibly."
    )
    overdue_grace_hours: float = Field(
        default=6,
        ge=0,
        le=_LONGEST_HOURS,
        description="Hours beyond a schedule's period without a successful backup before it is overdue.",
    )
    storage_low_days: float = Field(
        default=3,
        ge=0,
        le=_LONGEST_DAYS,
        description="Days of coming backups that storage must have room for, or it is low; 0 never.",
    )


class Assertion(_Section):
    """A query that must return true in a restored database."""

    name: Line = Field(description="What is asserted, for people.")
    query: str = Field(min_length=1, description="One SQL query that returns one row with one column, which is true.")


class Drill(_Section):
    """What a restore drill checks beyond row counts and constraints."""

    assertions: tuple[Assertion, ...] = Field(default=(), strict=False, description="Queries that must return true.")
    older_samples: int = Field(
        default=0, ge=0, description="How many older backups, drawn at random, a drill restores beside the newest."
    )


class Prune(_Section):
    """When pruning holds back."""

    max_shrink: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="The share of size or rows a backup may have lost against the one before; 1 never holds back.",
    )


class Document(_Section):
    """Kanbu's backup schedules, with their retention, notifications, drill and prune settings."""

    version: int = Field(default=FORMAT_VERSION, ge=1, le=FORMAT_VERSION, description="The version of this format.")
    schedules: tuple[Schedule, ...] = Field(
        default=(), strict=False, description="What runs when, and how long it stays."
    )
    notifications: Notifications = Notifications()
    drill: Drill = Drill()
    prune: Prune = Prune()


def schema_text() -> str:
    """The JSON schema of the file, for editors: the text of `kanbu_backup.schema.json`."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Document.model_json_schema(),
        "title": "kanbu_backup.yaml",
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"

"""What the environment and the schedule file say, and what is wrong with them, for whoever must go on regardless.

What belongs here: reading both without raising, so that a mistake in one never takes the code location down. What does
not: acting on what they say.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from dagster import ScheduleDefinition
from dagster._check import CheckError
from dagster._core.errors import DagsterInvalidDefinitionError

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.notifications.endpoints import Endpoint, SecretUrl, webhook_endpoint
from kanbu_backup_dagster.schedule_file import ScheduleFile, load_schedule_file
from kanbu_backup_dagster.settings import SchedulerMode, Settings, load_settings, load_usable_settings


@dataclass(frozen=True)
class Configuration:
    """Settings and schedule file as they are now.

    Attributes:
        settings: None when one of them cannot be used.
        readable: The same for whoever must go on regardless: those that cannot be used are at their default. None when
            the `.env` file cannot be read.
        file: The schedule file; empty when the settings, which name it, cannot be read.
        settings_problems: Why settings cannot be used, one message a problem, secrets left out.
        webhook: Where alerts go; None when none is set, or it cannot be used.
        ping: What is called after each success; likewise.
    """

    settings: Settings | None
    readable: Settings | None
    file: ScheduleFile
    settings_problems: tuple[str, ...] = ()
    webhook: Endpoint | None = None
    ping: SecretUrl | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong, one message a problem."""
        return (*self.settings_problems, *map(str, self.file.problems))

    @property
    def zone(self) -> tzinfo:
        """The time zone of cron expressions."""
        return ZoneInfo(self.zone_name)

    @property
    def zone_name(self) -> str:
        """Its name."""
        return self.readable.cron_timezone if self.readable else "UTC"

    @property
    def runs_schedules(self) -> bool:
        """Whether BACKUP_SCHEDULER_MODE lets our own schedules start anything."""
        return self.readable is not None and self.readable.scheduler_mode is not SchedulerMode.EXTERNAL


def load_configuration() -> Configuration:
    """Read both now. Never raises for what is in them."""
    problems: list[str] = []
    settings: Settings | None = None
    try:
        settings = readable = load_settings()
    except SettingsError as error:
        problems.append(str(error))
        try:
            readable = load_usable_settings()
        except SettingsError:
            return Configuration(None, None, ScheduleFile(Path(), exists=False), tuple(problems))
    file = load_schedule_file(readable.config_file, cron_check=refusal)
    webhook: Endpoint | None = None
    ping: SecretUrl | None = None
    try:
        if url := readable.secret("webhook_url"):
            webhook = webhook_endpoint(
                url,
                secret=readable.secret("webhook_secret"),
                webhook_format=file.notifications.format,
            )
    except SettingsError as error:
        problems.append(str(error))
    try:
        if url := readable.secret("ping_url"):
            ping = SecretUrl(url, source="BACKUP_PING_URL")
    except SettingsError as error:
        problems.append(str(error))
    return Configuration(settings, readable, file, tuple(problems), webhook, ping)


def refusal(cron: str) -> str | None:
    """Why Dagster would not run `cron`, or None: a schedule that it refuses would take all others down with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ScheduleDefinition(name="trial", cron_schedule=cron, job_name="trial")
    except (DagsterInvalidDefinitionError, CheckError) as error:
        return str(error).replace(" for schedule 'trial''", "")
    return None

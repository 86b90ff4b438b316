"""The environment, read once, typed and validated.

What belongs here: every variable the system reads, its default, its form, and where its value came from. What does
not: what a value means to a room (a database URL is taken apart in `sources`, a key derived in `backup.keys`).

Values come from the environment and from the `.env` file in the working directory; `.env` wins, as it does in Dagster's
own command line, so that `dagster ...` and `kanbu-backup ...` in one folder see the same. An empty value counts as
not set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kanbu_backup_dagster.errors import SettingsError

ENV_FILE = Path(".env")


class StorageKind(str, Enum):
    """Where backups are kept."""

    LOCAL = "local"
    GDRIVE = "gdrive"


class PgMode(str, Enum):
    """How PostgreSQL's client programs are run."""

    AUTO = "auto"
    DIRECT = "direct"
    DOCKER = "docker"


class SchedulerMode(str, Enum):
    """What may start backups: our schedules, the HTTP trigger, or both."""

    INTERNAL = "internal"
    EXTERNAL = "external"
    BOTH = "both"


class OnUnreadable(str, Enum):
    """What a file or folder that cannot be read does to a source backup."""

    FAIL = "fail"
    SKIP = "skip"


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, OSError, ValueError):  # an unknown name, a folder's name, a name with `..`
        raise ValueError("not a time zone; use a name such as Europe/Amsterdam") from None
    return name


class Settings(BaseSettings):
    """Every variable, with the users' names as aliases. Build it with `load_settings`."""

    model_config = SettingsConfigDict(
        case_sensitive=True, extra="ignore", frozen=True, populate_by_name=True, env_file_encoding="utf-8"
    )

    storage: StorageKind = Field(
        StorageKind.LOCAL, alias="BACKUP_STORAGE", description="where backups are kept: local or gdrive"
    )
    local_path: Path = Field(Path("/data/backups"), alias="BACKUP_LOCAL_PATH", description="folder of backups (local)")
    gdrive_path: Path | None = Field(None, alias="BACKUP_GDRIVE_PATH", description="folder on the mount (gdrive)")
    rclone_rc_addr: SecretStr | None = Field(
        None, alias="BACKUP_RCLONE_RC_ADDR", description="the mount's remote control, as http://127.0.0.1:5572 (gdrive)"
    )
    rclone_rc_user: str | None = Field(None, alias="BACKUP_RCLONE_RC_USER", description="login of the remote control")
    rclone_rc_password: SecretStr | None = Field(
        None, alias="BACKUP_RCLONE_RC_PASSWORD", description="password of the remote control"
    )
    rclone_timeout_seconds: float = Field(
        60,
        alias="BACKUP_RCLONE_TIMEOUT_SECONDS",
        gt=0,
        le=86_400,
        description="how long the mount may take to answer (gdrive)",
    )
    pg_mode: PgMode = Field(PgMode.AUTO, alias="BACKUP_PG_MODE", description="auto, direct or docker")
    database_url: SecretStr | None = Field(None, alias="DATABASE_URL", description="the database, as Prisma writes it")
    drill_database_url: SecretStr | None = Field(
        None, alias="BACKUP_DRILL_DATABASE_URL", description="a server for restore drills; unset: one of our own"
    )
    drill_container: str | None = Field(
        None, alias="BACKUP_DRILL_CONTAINER", description="a container with a server for restore drills"
    )
    postgres_container: str = Field("kanbu-postgres", alias="POSTGRES_CONTAINER", description="container (docker mode)")
    postgres_container_pattern: str = Field(
        "postgres-", alias="POSTGRES_CONTAINER_PATTERN", description="pattern to find the container by (docker mode)"
    )
    source_path: Path = Field(Path("/app"), alias="KANBU_SOURCE_PATH", description="the source tree to back up")
    source_exclude: str = Field(
        "", alias="BACKUP_SOURCE_EXCLUDE", description="further exclusions of a source backup: a/, *.b, /c/d/"
    )
    source_unreadable: OnUnreadable = Field(
        OnUnreadable.FAIL,
        alias="BACKUP_SOURCE_UNREADABLE",
        description="fail, or skip what cannot be read in the source tree with a warning",
    )
    encryption_key: SecretStr | None = Field(
        None, alias="BACKUP_ENCRYPTION_KEY", description="64 hex characters or a passphrase; turns encryption on"
    )
    encryption_key_previous: SecretStr | None = Field(
        None,
        alias="BACKUP_ENCRYPTION_KEY_PREVIOUS",
        description='former keys, for reading: one as it is, several as ["one","another"]',
    )
    scheduler_mode: SchedulerMode = Field(
        SchedulerMode.INTERNAL, alias="BACKUP_SCHEDULER_MODE", description="internal, external or both"
    )
    trigger_api_key: SecretStr | None = Field(
        None, alias="BACKUP_TRIGGER_API_KEY", description="key of POST /api/backup/trigger; unset: closed"
    )
    cron_timezone: Annotated[str, AfterValidator(_known_zone)] = Field(
        "UTC", alias="BACKUP_CRON_TIMEZONE", description="zone of cron expressions and of retention's calendar"
    )
    config_file: Path = Field(
        Path("kanbu_backup.yaml"), alias="BACKUP_CONFIG_FILE", description="schedules, retention, notifications"
    )
    compression_level: int = Field(
        2, alias="BACKUP_COMPRESSION_LEVEL", ge=0, le=3, description="gzip level of ISA-L: 0 fastest to 3 smallest"
    )
    lock_timeout_seconds: float = Field(
        300, alias="BACKUP_LOCK_TIMEOUT_SECONDS", gt=0, le=604_800, description="how long a dump waits for a table lock"
    )
    webhook_url: SecretStr | None = Field(None, alias="BACKUP_WEBHOOK_URL", description="where alerts are posted")
    webhook_secret: SecretStr | None = Field(None, alias="BACKUP_WEBHOOK_SECRET", description="signs alerts")
    ping_url: SecretStr | None = Field(
        None, alias="BACKUP_PING_URL", description="called after each successful backup (dead-man switch)"
    )
    retry_after_seconds: float = Field(
        300,
        alias="BACKUP_RETRY_AFTER_SECONDS",
        ge=0,
        le=604_800,
        description="pause before a scheduled backup that failed for a passing reason runs once more; 0: never",
    )
    ui_username: str = Field("admin", alias="BACKUP_UI_USERNAME", description="login of the web UI")
    ui_password: SecretStr | None = Field(None, alias="BACKUP_UI_PASSWORD", description="password of the web UI")
    ui_allowed_hosts: str = Field(
        "", alias="BACKUP_UI_ALLOWED_HOSTS", description="names the web UI is called by, separated by commas"
    )
    dagster_postgres_url: SecretStr | None = Field(
        None, alias="DAGSTER_POSTGRES_URL", description="PostgreSQL for Dagster's own records; unset: SQLite"
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value != ""} if isinstance(values, dict) else values

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, dotenv_settings, env_settings

    def secret(self, field: str) -> str | None:
        """The plain value of a secret field, or None when it is not set."""
        value = getattr(self, field)
        return value.get_secret_value() if value is not None else None

    @property
    def source_exclusions(self) -> tuple[str, ...]:
        """The rules in BACKUP_SOURCE_EXCLUDE, which commas separate."""
        return tuple(rule for part in self.source_exclude.split(",") if (rule := part.strip()))

    @property
    def ui_host_names(self) -> frozenset[str]:
        """BACKUP_UI_ALLOWED_HOSTS, taken apart."""
        return frozenset(name.strip().lower() for name in self.ui_allowed_hosts.split(",") if name.strip())

    @property
    def storage_path(self) -> Path:
        """The folder backups are kept in.

        Raises:
            SettingsError: BACKUP_STORAGE is gdrive and BACKUP_GDRIVE_PATH is not set.
        """
        if self.storage is StorageKind.LOCAL:
            return self.local_path.absolute()
        if self.gdrive_path is None:
            raise SettingsError(
                "BACKUP_GDRIVE_PATH is not set, but BACKUP_STORAGE is gdrive.",
                advice="Set it to a folder on the rclone mount, or set BACKUP_STORAGE=local.",
            )
        return self.gdrive_path.absolute()


def variable_names() -> dict[str, str]:
    """Field name to variable name, in the order of the documentation."""
    return {name: field.alias or name for name, field in Settings.model_fields.items()}


def is_secret(field: str) -> bool:
    """Whether the field's value must never be shown."""
    return "SecretStr" in str(Settings.model_fields[field].annotation)


def load_settings(env_file: Path = ENV_FILE) -> Settings:
    """Read the environment and `env_file`.

    Raises:
        SettingsError: A value cannot be used; names the variable and where it was set.
    """
    try:
        return Settings(_env_file=env_file)
    except ValidationError as error:
        origins = value_origins(env_file)
        tried = tuple(
            f"{variable} ({origins.get(variable, 'default')}): {_plain(problem['msg'])}"
            + ("" if _is_secret_variable(variable) else f"; it is {problem['input']!r}")
            for problem in error.errors(include_url=False)
            for variable in [str(problem["loc"][0])]
        )
        raise SettingsError("A setting cannot be used.", tried=tried, advice="Correct it and run again.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(env_file, error) from None


def load_usable_settings(env_file: Path = ENV_FILE) -> Settings:
    """The same for what has to go on when a value cannot be used, to tell so: such a value counts as not set.

    Raises:
        SettingsError: `env_file` cannot be read.
    """
    try:
        return Settings(_env_file=env_file)
    except ValidationError as error:
        # An argument goes before what is set, and an empty one leaves the default.
        unusable: dict[str, Any] = {str(problem["loc"][0]): "" for problem in error.errors(include_url=False)}
        return Settings(_env_file=env_file, **unusable)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(env_file, error) from None


def _unreadable(env_file: Path, error: OSError | UnicodeDecodeError) -> SettingsError:
    return SettingsError(f"The file {env_file.absolute()} cannot be read: {error}.")


def value_origins(env_file: Path = ENV_FILE) -> Mapping[str, str]:
    """Variable name to where its value comes from: `.env line 3`, or `environment`. Variables left at their default
    are not in it."""
    origins = {variable: "environment" for variable in variable_names().values() if variable in os.environ}
    if env_file.is_file():
        with env_file.open(encoding="utf-8") as stream:
            for binding in parse_stream(stream):
                if binding.key in set(variable_names().values()) and binding.value is not None:
                    # The binding's text starts with the blank lines and comments before it.
                    lines_before = binding.original.string[: binding.original.string.index(binding.key)].count("\n")
                    origins[binding.key] = f"{env_file.name} line {binding.original.line + lines_before}"
    return origins


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Input ")


def _is_secret_variable(variable: str) -> bool:
    return any(alias == variable and is_secret(field) for field, alias in variable_names().items())


def dagster_postgres_url() -> str | None:
    """The value of DAGSTER_POSTGRES_URL, or None: Dagster keeps its records in its home.

    Read by itself: each of Dagster's programs needs it, and has to come up when another setting cannot be used, to
    tell so.
    """
    variable = variable_names()["dagster_postgres_url"]
    in_file = dotenv_values(ENV_FILE)
    return (in_file[variable] if variable in in_file else os.environ.get(variable)) or None


def dagster_home() -> Path:
    """The folder of Dagster's records; it may not exist yet.

    Raises:
        SettingsError: DAGSTER_HOME is not absolute, or there is no home folder to fall back to.
    """
    # Dagster's own command line takes .env's before it looks for its home; ours must find the same one.
    given = dotenv_values(ENV_FILE).get("DAGSTER_HOME") or os.environ.get("DAGSTER_HOME")
    if given:
        home = Path(given).expanduser()
        if not home.is_absolute():
            raise SettingsError(f"DAGSTER_HOME must be an absolute path, not {given!r}.")
        return home
    state = os.environ.get("XDG_STATE_HOME")
    try:
        base = Path(state) if state else Path.home() / ".local" / "state"
    except RuntimeError:
        raise SettingsError("There is no home folder for Dagster's records.", advice="Set DAGSTER_HOME.") from None
    return base / "kanbu-backup" / "dagster"

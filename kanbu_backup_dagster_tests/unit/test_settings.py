"""The environment and `.env`: precedence, origins, and errors that name their place and keep secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from dagster._core.secrets.env_file import get_env_var_dict

from kanbu_backup_dagster.errors import SettingsError
from kanbu_backup_dagster.settings import StorageKind, is_secret, load_settings, value_origins, variable_names


def test_the_defaults_are_the_guides() -> None:
    settings = load_settings()
    assert settings.storage is StorageKind.LOCAL
    assert settings.local_path == Path("/data/backups")
    assert settings.postgres_container == "kanbu-postgres"
    assert settings.postgres_container_pattern == "postgres-"
    assert settings.source_path == Path("/app")
    assert settings.cron_timezone == "UTC"
    assert (settings.pg_mode.value, settings.scheduler_mode.value) == ("auto", "internal")
    assert settings.encryption_key is None


def test_env_file_wins_as_in_dagsters_own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_LOCAL_PATH", "/from/environment")
    monkeypatch.setenv("BACKUP_CRON_TIMEZONE", "Europe/Paris")
    Path(".env").write_text('# first\n\nexport BACKUP_LOCAL_PATH="/from file" # trailing\nUNRELATED=1\n')
    settings = load_settings()
    assert settings.local_path == Path(get_env_var_dict(str(Path.cwd()))["BACKUP_LOCAL_PATH"]) == Path("/from file")
    assert settings.cron_timezone == "Europe/Paris"
    assert value_origins() == {"BACKUP_LOCAL_PATH": ".env line 3", "BACKUP_CRON_TIMEZONE": "environment"}


def test_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_ENCRYPTION_KEY", "from the environment")
    Path(".env").write_text("BACKUP_ENCRYPTION_KEY=\nBACKUP_STORAGE=\n")
    settings = load_settings()
    assert settings.encryption_key is None
    assert settings.storage is StorageKind.LOCAL


def test_each_wrong_value_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_STORAGE", "s3")
    Path(".env").write_text("\nBACKUP_CRON_TIMEZONE=Europe/Amsterdm\nBACKUP_COMPRESSION_LEVEL=9\n")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    said = str(caught.value)
    assert "BACKUP_STORAGE (environment)" in said
    assert "'s3'" in said
    assert "BACKUP_CRON_TIMEZONE (.env line 2): not a time zone" in said
    assert "BACKUP_COMPRESSION_LEVEL (.env line 3)" in said


def test_gdrive_needs_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_STORAGE", "gdrive")
    with pytest.raises(SettingsError, match="BACKUP_GDRIVE_PATH is not set"):
        _ = load_settings().storage_path


def test_no_secret_is_ever_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [variable for field, variable in variable_names().items() if is_secret(field)]
    assert {"DATABASE_URL", "BACKUP_ENCRYPTION_KEY", "BACKUP_TRIGGER_API_KEY", "BACKUP_WEBHOOK_URL"} <= set(secrets)
    for variable in secrets:
        monkeypatch.setenv(variable, "h1dden-value")
    assert "h1dden" not in repr(load_settings())
    monkeypatch.setenv("BACKUP_STORAGE", "s3")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "h1dden" not in str(caught.value)


def test_an_env_file_that_is_not_text_is_said() -> None:
    Path(".env").write_bytes(b"BACKUP_STORAGE=\xff\xfe\n")
    with pytest.raises(SettingsError, match=r"\.env cannot be read"):
        load_settings()

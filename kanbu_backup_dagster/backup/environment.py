"""The environment a command or a run works in: the settings, and the keys and storage made of them.

What belongs here: putting those three together. What does not: Dagster, which wraps this as a resource.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from pydantic import SecretStr

from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.keys import Keyring, load_keyring
from kanbu_backup_dagster.settings import Settings, load_settings
from kanbu_backup_dagster.storage.open import open_storage
from kanbu_backup_dagster.storage.protocol import Storage

# Set by the command line (--database-url) when it runs a job in its own process: a URL holds a password, so it can be
# neither run config nor an argument of anything.
database_url: ContextVar[SecretStr | None] = ContextVar("database_url", default=None)


@dataclass(frozen=True)
class Environment:
    """The settings of this process, and what is made of them."""

    settings: Settings
    keys: Keyring
    storage: Storage

    @property
    def catalog(self) -> Catalog:
        """The backups in the storage."""
        return Catalog(self.storage, self.keys)


def load_environment() -> Environment:
    """Read the environment.

    Raises:
        KanbuError: Something in it cannot be used.
    """
    settings = load_settings()
    if (url := database_url.get()) is not None:
        settings = settings.model_copy(update={"database_url": url})
    return Environment(settings, load_keyring(settings), open_storage(settings))

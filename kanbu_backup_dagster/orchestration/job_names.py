"""Job names: what people and programs launch and filter runs by, so that none may change."""

from __future__ import annotations

DATABASE_BACKUP = "database_backup"
SOURCE_BACKUP = "source_backup"
# The one job whose runs make a backup on the way.
RESTORE_DATABASE = "restore_database"
RESTORE_SOURCE = "restore_source"
RESTORE_DRILL = "restore_drill"
VERIFY_BACKUP = "verify_backup"
VERIFY_PENDING_BACKUPS = "verify_pending_backups"
PRUNE_BACKUPS = "prune_backups"
ROTATE_KEYS = "rotate_keys"
SYNC_CATALOG = "sync_catalog"
TEST_WEBHOOK = "test_webhook"

"""Run tags and job names: the names other programs filter and launch by."""

from __future__ import annotations

TYPE = "kanbu/type"
TRIGGER = "kanbu/trigger"
SCHEDULE_ID = "kanbu/schedule_id"
SCHEDULE_NAME = "kanbu/schedule_name"
TARGET = "kanbu/target"
# Of a restore or drill: the backup file, and the database it goes to.
FILE = "kanbu/file"
DATABASE = "kanbu/database"

# The one job whose runs make a backup on the way.
RESTORE_DATABASE = "restore_database"
ROTATE_KEYS = "rotate_keys"
SECOND_ATTEMPT_OF = "kanbu/second_attempt_of"

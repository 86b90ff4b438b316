"""Run tags: the names other programs filter and launch by."""

from __future__ import annotations

TYPE = "kanbu/type"
TRIGGER = "kanbu/trigger"
SCHEDULE_ID = "kanbu/schedule_id"
SCHEDULE_NAME = "kanbu/schedule_name"
TARGET = "kanbu/target"

"""`kanbu_backup.yaml`: schedules with their retention, notifications, drill and prune settings.

What belongs here: the file's contents as models (`model`), reading it with every problem named by line and column
(`load`), changing it without touching what a person wrote around the change (`edit`), and what a cron expression means
(`cron`). What does not: running a schedule, judging a backup by its policy, and secrets, which stay in the environment.
"""

from kanbu_backup_dagster.schedule_file.cron import cron_problem, describe_cron, next_runs
from kanbu_backup_dagster.schedule_file.edit import add_schedule, edit_schedule, remove_schedule
from kanbu_backup_dagster.schedule_file.load import Problem, ScheduleFile, load_schedule_file, parse_schedule_file
from kanbu_backup_dagster.schedule_file.model import (
    FORMAT_VERSION,
    Assertion,
    Drill,
    Notifications,
    Prune,
    RetentionPolicy,
    Schedule,
    ScheduleType,
    WebhookFormat,
    schema_text,
)

__all__ = [
    "FORMAT_VERSION",
    "Assertion",
    "Drill",
    "Notifications",
    "Problem",
    "Prune",
    "RetentionPolicy",
    "Schedule",
    "ScheduleFile",
    "ScheduleType",
    "WebhookFormat",
    "add_schedule",
    "cron_problem",
    "describe_cron",
    "edit_schedule",
    "load_schedule_file",
    "next_runs",
    "parse_schedule_file",
    "remove_schedule",
    "schema_text",
]

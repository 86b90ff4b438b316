"""Run tags: the names other programs filter runs by."""

from __future__ import annotations

from collections.abc import Mapping

TYPE = "kanbu/type"
TRIGGER = "kanbu/trigger"
SCHEDULE_ID = "kanbu/schedule_id"
SCHEDULE_NAME = "kanbu/schedule_name"
TARGET = "kanbu/target"
# Of a restore or drill: the backup file, and the database it goes to.
FILE = "kanbu/file"
DATABASE = "kanbu/database"

# Of a run whose backup was not known to have arrived at the remote: whether it is still waited for, has arrived and is
# verified, or is waited for no more; and the file.
SETTLING = "kanbu/settling"
WAITING, SETTLED, ENDED = "waiting", "settled", "ended"
SETTLING_FILE = "kanbu/settling_file"
# Of the runs that are started once it has arrived: the run that made it.
SETTLED_FOR = "kanbu/settled_for"

SECOND_ATTEMPT_OF = "kanbu/second_attempt_of"

# JSON's numbers are exact up to here, and no schedule file has more rows.
_MOST_DIGITS = 15


def schedule_tags(schedule_id: int, name: str) -> dict[str, str]:
    """The tags of a run that a schedule started, or that was started for one."""
    return {SCHEDULE_ID: str(schedule_id), SCHEDULE_NAME: name}


def schedule_of(run_tags: Mapping[str, str]) -> tuple[int, str] | None:
    """The schedule of a run, its id and name. Anybody may set tags by GraphQL: an id that can be none is none."""
    number = run_tags.get(SCHEDULE_ID, "")
    if not (number.isascii() and number.isdecimal() and len(number) <= _MOST_DIGITS):
        return None
    return int(number), run_tags.get(SCHEDULE_NAME, f"schedule {number}")

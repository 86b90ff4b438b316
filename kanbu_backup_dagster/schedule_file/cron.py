"""What a cron expression means: whether it can be used, in words, and when it comes next.

What belongs here: questions that are answered from the expression, a zone and a moment. What does not: the scheduler's
own verdict on an expression, which is asked for where schedules are loaded.

Expressions are crontab(5)'s: five fields or `@daily` and its kin, with croniter's `L` and `#` for days.
"""

from __future__ import annotations

from datetime import datetime, timezone, tzinfo

from cron_descriptor import FormatError, MissingFieldError, Options, WrongArgumentError, get_description
from croniter import croniter
from croniter.croniter import CroniterError

_ALIASES = {  # crontab(5)
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_FIELDS = (("minutes", 59), ("hours", 23), ("days of the month", 31), ("months", 12), ("days of the week", 7))


def cron_problem(cron: str) -> str | None:
    """Why `cron` cannot be used, in words that follow on its name; None when it can."""
    fields = _ALIASES.get(cron.strip().lower(), cron).split()
    if len(fields) != len(_FIELDS):
        return f"has {len(fields)} fields instead of 5 (minute, hour, day of month, month, day of week)"
    for field, (unit, highest) in zip(fields, _FIELDS, strict=True):
        if field[0] in "hHrR":
            # croniter draws another random time at every reading.
            return f"has {field!r}: random times are not supported"
        for part in field.split(","):
            step = part.partition("/")[2]
            if step.isdecimal() and int(step) > highest:
                # Accepted by every parser, and taken for a step that ends the range at its first value.
                return f"has {part!r}: a step of {step} goes beyond the {unit} there are"
    try:
        croniter(" ".join(fields), datetime(2000, 1, 1, tzinfo=timezone.utc)).get_next(datetime)
    except CroniterError as error:
        never = "failed to find next date" in str(error)
        return "names a day that never comes" if never else f"is not a cron expression: {error}"
    return None


def describe_cron(cron: str) -> str:
    """`cron` in English words, e.g. "At 02:00, every day"; the expression itself where words fail."""
    options = Options()
    options.use_24hour_time_format = True
    options.locale_code = "en_US"  # The library's default is the machine's locale.
    expression = _ALIASES.get(cron.strip().lower(), cron)
    try:
        words: str = get_description(expression, options)
        # Verbosely, "At 02:00" gains "every day", but "Every 15 minutes" gains "every hour, every day".
        options.verbose = words.startswith("At")
        return str(get_description(expression, options)) if options.verbose else words
    except (FormatError, MissingFieldError, WrongArgumentError):
        return cron


def next_runs(cron: str, zone: tzinfo, after: datetime, count: int) -> list[datetime]:
    """The next `count` times of a usable `cron`, later than `after` (aware), in `zone`.

    Where clocks change, times are the scheduler's (Dagster's documented rule): a time that the clocks skip runs when
    the gap ends, a time that comes twice runs at the second one only, and an expression for every hour runs each hour
    there is.
    """
    expression = _ALIASES.get(cron.strip().lower(), cron)
    runs = croniter(expression, after.astimezone(zone))
    every_hour = croniter.expand(expression)[0][1] == ["*"]
    times: list[datetime] = []
    while len(times) < count:
        time = runs.get_next(datetime)
        comes_again = time.utcoffset() != time.replace(fold=1).utcoffset()
        if every_hour or not comes_again:
            times.append(time)
    return times

"""When a delivery that failed is tried again, and when it is given up.

Pure: functions of what happened and of the time. The waiting itself is the caller's, who keeps a `Backoff` for each
endpoint beside its place in the queue.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

FIRST_WAIT = timedelta(seconds=30)
LONGEST_WAIT = timedelta(hours=1)
LEAST_ATTEMPTS = 20
"""No delivery is given up on fewer attempts, however long ago the first was: a clock may leap, a machine may be off."""


class Backoff(BaseModel):
    """A delivery that failed at least once. Survives as JSON (`model_dump_json`, `model_validate_json`).

    The wait doubles from 30 s to an hour: 0:30, 1:00, 2:00 ... 32:00, then hourly, which is about 78 attempts in three
    days. A receiver that says how long to wait (`Retry-After`) is obeyed within the hour.

    Attributes:
        attempts: Attempts that failed.
        first_failed_at: When the first did.
        last_failed_at: When the last did.
        next_attempt_at: Not before this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempts: int = Field(ge=1)
    first_failed_at: AwareDatetime
    last_failed_at: AwareDatetime
    next_attempt_at: AwareDatetime

    def is_due(self, now: datetime) -> bool:
        """Whether to try again. A clock that was set back since the last attempt does not lengthen the wait."""
        return now >= self.next_attempt_at or now < self.last_failed_at

    def is_hopeless(self, now: datetime, give_up_after: timedelta) -> bool:
        """Whether to give up, visibly: so long a time, and at least twenty attempts, have failed."""
        return self.attempts >= LEAST_ATTEMPTS and now - self.first_failed_at >= give_up_after


def after_failure(before: Backoff | None, now: datetime, retry_after_seconds: float | None = None) -> Backoff:
    """The state after one more failed attempt at `now` (aware).

    Args:
        before: The state before it; None for the first.
        now: When it failed.
        retry_after_seconds: What the receiver asked for, if anything (`DeliveryError.retry_after_seconds`).
    """
    attempts = 1 if before is None else before.attempts + 1
    # The exponent is bounded so that it cannot overflow a timedelta.
    wait = min(FIRST_WAIT * 2 ** min(attempts - 1, 16), LONGEST_WAIT)
    if retry_after_seconds is not None:
        wait = min(max(wait, timedelta(seconds=retry_after_seconds)), LONGEST_WAIT)
    return Backoff(
        attempts=attempts,
        first_failed_at=now if before is None else before.first_failed_at,
        last_failed_at=now,
        next_attempt_at=now + wait,
    )

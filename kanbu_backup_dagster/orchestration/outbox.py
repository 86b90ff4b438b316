"""Events waiting to be delivered to one endpoint, and the order in which they are tried.

What belongs here: the queue and what an attempt's end does to it. What does not: where it is kept, and what is sent.

Events go out in the order they came. An endpoint in trouble makes its whole queue wait; an event that the endpoint
refuses waits alone, with the later ones of its own group (a run), whose order is kept. What was given up is remembered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta

from pydantic import AwareDatetime, BaseModel, Field

from kanbu_backup_dagster.errors import KanbuError
from kanbu_backup_dagster.notifications.backoff import Backoff, after_failure
from kanbu_backup_dagster.notifications.delivery import DeliveryError
from kanbu_backup_dagster.notifications.events import Event, parse_event

GIVEN_UP_REMEMBERED = 20


class Waiting(BaseModel):
    """An event in the queue.

    Attributes:
        record: The event, as `Event.to_record` writes it.
        group: Events of one group never overtake each other.
        since: When it was queued.
        refused: Set when the endpoint refused this event in particular.
    """

    record: str
    group: str
    since: AwareDatetime
    refused: Backoff | None = None


class GivenUp(BaseModel):
    """An event that was given up: what it was, when, and the last thing the endpoint said."""

    event: str
    key: str
    at: AwareDatetime
    error: str


class Outbox(BaseModel):
    """One endpoint's queue.

    Attributes:
        waiting: In the order they came.
        trouble: Set while the endpoint itself fails.
        last_error: What it last said.
        given_up: The last few events that were.
        delivered_at: When it last took one.
    """

    waiting: list[Waiting] = Field(default_factory=list)
    trouble: Backoff | None = None
    last_error: str | None = None
    given_up: list[GivenUp] = Field(default_factory=list)
    delivered_at: AwareDatetime | None = None

    def add(self, event: Event, group: str, now: datetime) -> None:
        """Queue `event`."""
        self.waiting.append(Waiting(record=event.to_record(), group=group, since=now))

    def work(
        self,
        deliver: Callable[[Event], object],
        *,
        now: Callable[[], datetime],
        until: float,
        give_up_after: timedelta,
        changed: Callable[[], None],
    ) -> list[GivenUp]:
        """Deliver what is due, one after another, until nothing is or the time is up.

        Args:
            deliver: One attempt; raises DeliveryError.
            now: The time.
            until: No attempt begins after this moment of `time.monotonic`.
            give_up_after: How long an event is tried.
            changed: Called after each attempt, to keep the new state.

        Returns:
            The events that were given up.
        """
        lost: list[GivenUp] = []
        while time.monotonic() < until and (entry := self._next(now())) is not None:
            try:
                event = parse_event(entry.record)
            except ValueError:
                lost += self._give_up([entry], now(), "its record cannot be read by this release")
                changed()
                continue
            try:
                deliver(event)
            except DeliveryError as error:
                lost += self._failed(entry, error, now(), give_up_after)
            except KanbuError as error:
                # Nothing was sent: as good as an endpoint in trouble.
                lost += self._failed(entry, DeliveryError(str(error)), now(), give_up_after)
            else:
                self.waiting.remove(entry)
                self.trouble, self.last_error, self.delivered_at = None, None, now()
            changed()
        return lost

    def _next(self, now: datetime) -> Waiting | None:
        if self.trouble is not None and not self.trouble.is_due(now):
            return None
        held: set[str] = set()
        for entry in self.waiting:
            if entry.group not in held and (entry.refused is None or entry.refused.is_due(now)):
                return entry
            held.add(entry.group)
        return None

    def _failed(self, entry: Waiting, error: DeliveryError, now: datetime, give_up_after: timedelta) -> list[GivenUp]:
        self.last_error = str(error)
        if error.refused:
            self.trouble = None
            entry.refused = after_failure(entry.refused, now, error.retry_after_seconds)
            return self._give_up([entry], now, str(error)) if entry.refused.is_hopeless(now, give_up_after) else []
        self.trouble = after_failure(self.trouble, now, error.retry_after_seconds)
        if not self.trouble.is_hopeless(now, give_up_after):
            return []
        # The endpoint has failed for days; each event has its full time all the same.
        return self._give_up([old for old in self.waiting if now - old.since >= give_up_after], now, str(error))

    def _give_up(self, entries: list[Waiting], now: datetime, error: str) -> list[GivenUp]:
        lost = []
        for entry in entries:
            self.waiting.remove(entry)
            try:
                event = parse_event(entry.record)
                lost.append(GivenUp(event=event.event, key=event.key, at=now, error=error))
            except ValueError:
                lost.append(GivenUp(event="unreadable", key=entry.group, at=now, error=error))
        self.given_up = (self.given_up + lost)[-GIVEN_UP_REMEMBERED:]
        return lost

    def summary(self, name: str) -> str:
        """One line on the queue's state; empty when there is nothing to say."""
        if not self.waiting:
            return ""
        next_attempt = self.trouble.next_attempt_at if self.trouble else None
        when = f", next attempt {next_attempt:%Y-%m-%d %H:%M:%S} UTC" if next_attempt else ""
        return f"{name}: {len(self.waiting)} waiting{when}" + (f"; {self.last_error}" if self.last_error else "")

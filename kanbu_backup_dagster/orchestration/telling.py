"""How an op says what is to be told to the outside: a metadata entry on whatever it logs.

What belongs here: the entry, written and read. What does not: when it is sent (`alerts`), and the events that every
ended run gives by itself (`run_events`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dagster import MetadataValue, TextMetadataValue
from dagster._core.definitions.metadata.metadata_value import MetadataValue as AnyMetadata

from kanbu_backup_dagster.notifications.events import Event, parse_event

TOLD = "kanbu/tell"


def told(*events: Event) -> dict[str, AnyMetadata]:
    """Metadata that makes `events` be told when the run has ended, in this order, after those of earlier steps.

    Merge it into the metadata of an output, a materialization, an observation or a `Failure`. Each event's key is the
    run's id, with a suffix where a run tells several of one kind.
    """
    return {TOLD: MetadataValue.text("\n".join(event.to_record() for event in events))}


def events_in(metadata: Mapping[str, AnyMetadata]) -> Iterator[Event]:
    """The events that `told` put there; entries of a release that knew other events are left out."""
    entry = metadata.get(TOLD)
    lines: Iterable[str] = (entry.text or "").splitlines() if isinstance(entry, TextMetadataValue) else ()
    for line in lines:
        try:
            yield parse_event(line)
        except ValueError:
            continue

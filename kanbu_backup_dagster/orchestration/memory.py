"""What outlives a process, in Dagster's own storage: small JSON documents by key.

What belongs here: reading and writing one. What does not: what is in them. Each key has one writer.
"""

from __future__ import annotations

from typing import TypeVar

from dagster import DagsterInstance
from pydantic import BaseModel

Document = TypeVar("Document", bound=BaseModel)


def recall(instance: DagsterInstance, key: str, kind: type[Document]) -> Document | None:
    """The document under `key`; None when there is none.

    Raises:
        ValidationError: It was written by a release that this one does not understand.
    """
    text = instance.run_storage.get_cursor_values({key}).get(key)
    return kind.model_validate_json(text) if text else None


def remember(instance: DagsterInstance, key: str, document: BaseModel) -> None:
    """Write `document` under `key`, in one step."""
    # One key a call: for several at once Dagster's SQLite storage drops the new ones when others exist.
    instance.run_storage.set_cursor_values({key: document.model_dump_json()})

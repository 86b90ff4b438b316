"""Failures as Dagster shows them.

What belongs here: turning a `KanbuError` into a failed step whose message is the user's, and telling the failures that
trying again cannot mend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dagster import Failure

from kanbu_backup_dagster.errors import KanbuError

# The metadata entry of a failed step that names the kind of `KanbuError` it was.
ERROR_KIND = "error"


@contextmanager
def explained() -> Iterator[None]:
    """Within this, an error meant for the user fails the step with its message."""
    try:
        yield
    except KanbuError as error:
        # `from None`: the message says all a user needs, and causes may quote what must not be shown.
        raise Failure(
            description=str(error), metadata={ERROR_KIND: type(error).__name__}, allow_retries=False
        ) from None

"""The errors a user may see.

What belongs here: exception classes that carry a message written for a person: what was wrong, where it came from
(which variable, which line of which file) and what to do. What does not: anything that decides *when* they are raised,
and faults in our own code, which stay ordinary Python exceptions.

No message here may hold a secret: callers pass names of variables and hosts, never passwords, keys or webhook URLs.
"""

from __future__ import annotations


class KanbuError(Exception):
    """A failure that is explained to the user without a traceback.

    Args:
        message: What was wrong, in one sentence that starts with the words the users' guide taught where it has any.
        tried: What was tried, one entry an attempt; shown as a list.
        advice: What to do, in one or two sentences.
    """

    def __init__(self, message: str, *, tried: tuple[str, ...] = (), advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.tried = tried
        self.advice = advice

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {attempt}" for attempt in self.tried)]
        if self.advice:
            lines.append(self.advice)
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive BaseException's own pickling, and errors cross process borders.
        return (_rebuild, (type(self), self.message, self.tried, self.advice))


def _rebuild(kind: type[KanbuError], message: str, tried: tuple[str, ...], advice: str) -> KanbuError:
    return kind(message, tried=tried, advice=advice)


class SettingsError(KanbuError):
    """A variable or the schedule file holds something that cannot be used."""


class StorageError(KanbuError):
    """The storage cannot be reached, written or trusted ("Storage not accessible")."""


class SourceError(KanbuError):
    """What is to be backed up cannot be read: no server, no client, a dump that is not whole, a missing path."""


class EncryptionKeyError(KanbuError):
    """The key is missing, malformed, or not the one a file was written with."""


class CorruptBackupError(KanbuError):
    """A stored file or its manifest is not what was written ("Checksum mismatch")."""


class BackupNotFoundError(KanbuError):
    """No backup of that name ("Backup file not found"), or a name that cannot be one."""


class BusyError(KanbuError):
    """Another run holds the target."""


class InterruptedRunError(KanbuError):
    """A run was told to end (Ctrl-C, SIGTERM, canceled) and did."""


class RestoreError(KanbuError):
    """A restore or a drill could not be done; the live database is as it was."""


class NotDrillableError(RestoreError):
    """The server of a drill cannot hold what is in the backup ("Not drillable"); nothing is said of the backup."""

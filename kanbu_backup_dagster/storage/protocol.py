"""The storage protocol: what every place that keeps backups promises.

What belongs here: the contract. What does not: any file system call.

A storage keeps *files*, each with a small *sidecar* (`<file>.manifest.json`). Names are plain: no folder, no leading
dot. Files that another program left in a folder within (`production/x`) are kept under that name; new ones never go
there. Every method raises `StorageError` when the place cannot be reached or trusted; none leaves half a file under a
listed name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

SIDECAR_SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class StoredFile:
    """One listed file: its name, size in bytes and time of last change (UTC)."""

    name: str
    size: int
    modified: datetime


@dataclass(frozen=True)
class Settlement:
    """Whether a committed file is where it will stay; if not, why that is not known."""

    done: bool
    reason: str = ""


SETTLED = Settlement(True)


class Incoming(Protocol):
    """A file on its way in, under a name that no listing shows. Leaving its context without `commit` removes it."""

    def write(self, chunk: bytes) -> None:
        """Append `chunk`."""

    def commit(self, names: Iterator[str], sidecar: Callable[[str], bytes]) -> str:
        """Make the file lasting under the first free name of `names` and return that name.

        Order: sync and flush, length check, the sidecar under the chosen name (`sidecar(name)` gives its bytes), the
        rename that commits, sync of the folder. Nothing that exists is overwritten.
        """

    def read_back(self) -> Iterator[bytes]:
        """All that was written, made lasting and read from the medium; nothing may be written after it."""

    def replace(self, name: str) -> None:
        """Put the file, made lasting, in the place of the existing file `name`, in one step: whoever opens that finds
        the one or the other, whole, also after a crash. Its sidecar stays as it is."""


class Storage(Protocol):
    """A place that keeps backup files."""

    @property
    def location(self) -> str:
        """Where this is, for people: a path."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What there is to know of the place beside its location, for people: of a mount, its remote and cache mode."""

    def settlement(self, name: str) -> Settlement:
        """Whether the committed file `name`, with its sidecar, is where it will stay, or may still be on its way (an
        upload in a cache)."""

    @property
    def replaces_in_one_step(self) -> bool:
        """Whether `Incoming.replace` can be asked for here."""

    def prepare(self, *, known_mark: str | None = None, needed_bytes: int = 0) -> str:
        """Check that files can be written, and give the storage's mark (made on first use).

        Args:
            known_mark: The mark this location had before; when it has none or another now, the place behind it is
                another, and refused.
            needed_bytes: Room that the next file is expected to need.
        """

    def receive(self) -> AbstractContextManager[Incoming]:
        """Begin a new file."""

    def files(self) -> list[StoredFile]:
        """All files, also those in folders within, one deep; sidecars left out, in order of name."""

    def sidecars(self) -> list[str]:
        """Names of the files that a sidecar exists for, whether the file does or not, in order."""

    def find(self, name: str) -> StoredFile | None:
        """The file called `name`, if there is one."""

    def read(self, name: str, *, chunk_bytes: int = 1 << 20, cached: bool = False) -> Iterator[bytes]:
        """The file's bytes, as they are on the medium: not from a cache of this machine where that can be avoided.

        Args:
            cached: What this machine remembers of the file will do, and what is read is remembered for the next time:
                for who looks at the bytes themselves, and not at whether the medium kept them.
        """

    def read_sidecar(self, name: str) -> bytes | None:
        """The sidecar of the file `name`, or None when it has none."""

    def replace_sidecar(self, name: str, content: bytes, *, expected: bytes | None = None) -> bool:
        """Replace the sidecar of the file `name` in one step.

        Args:
            expected: Replace it only if it still is this.

        Returns:
            Whether it was replaced.
        """

    def delete(self, name: str) -> None:
        """Remove the file, then its sidecar: a crash between the two leaves no file that looks whole and is not."""

    def remove_leftovers(self) -> list[str]:
        """Remove what killed runs left, where it is provably not in use, and name it."""

    def free_bytes(self) -> int:
        """Room left."""

    def path(self, name: str) -> str:
        """Where the file is, for people and for metadata."""

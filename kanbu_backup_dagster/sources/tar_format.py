"""The bytes of a tar archive's headers.

What belongs here: turning an entry's facts into blocks. What does not: files, folders, reading.

The form is POSIX.1-2001 pax interchange (a ustar header, before it an extended header `x` where there is more to say),
with three of GNU tar's ways, because GNU tar, libarchive, busybox and Python read them and they keep names as bytes
whatever the locale: long names and link targets as `L` and `K` entries, numbers too large for their field in base 256,
and sparse files as "PAX format 1.0" (GNU tar manual, "Basic Tar Format", "Storing Sparse Files").

Python's tarfile makes the same headers at 15 to 30 microseconds each; for 100,000 small files that alone would be more
time than reading them. This takes 2.
"""

from __future__ import annotations

import functools
from enum import Enum

BLOCK = 512
# GNU tar reads and writes in records of 20 blocks, and some readers complain of an archive that is not whole records.
RECORD = 20 * BLOCK

_NUL_BLOCK = bytes(BLOCK)
_NAME_LENGTH = 100
_TAIL_OFFSET = 156
_BILLION = 1_000_000_000
# Twelve bytes hold eleven octal digits and a NUL, eight bytes seven.
_OCTAL_12 = 8**11
_OCTAL_8 = 8**7


class EntryType(bytes, Enum):
    """The type flags written here."""

    FILE = b"0"
    HARD_LINK = b"1"
    SYMLINK = b"2"
    FOLDER = b"5"
    PAX = b"x"
    LONG_NAME = b"L"
    LONG_TARGET = b"K"


def padding(size: int) -> bytes:
    """The NULs that fill `size` bytes up to whole blocks."""
    return _NUL_BLOCK[: -size % BLOCK]


def end_of_archive(written: int) -> bytes:
    """Two blocks of NULs, and as many more as make an archive of `written` bytes so far end with a whole record."""
    return bytes(2 * BLOCK + -(written + 2 * BLOCK) % RECORD)


def entry_header(
    name: bytes,
    kind: EntryType,
    *,
    mode: int,
    uid: int,
    gid: int,
    mtime_ns: int,
    size: int = 0,
    target: bytes = b"",
    pax: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """All blocks that stand before an entry's content.

    Args:
        name: The entry's name in the archive; a folder's ends with a slash.
        kind: What it is.
        mode: Permission bits, 0 to 0o7777.
        uid: Owner, by number: names would be looked up on the machine of the restore, and may mean someone else there.
        gid: Group, likewise.
        mtime_ns: Nanoseconds since 1970, possibly negative. Whole seconds go into the header, the rest into pax.
        size: Bytes that follow (for a sparse file its map and data).
        target: What a link points to.
        pax: Further pax records.
    """
    seconds, fraction = divmod(mtime_ns, _BILLION)
    if fraction:
        pax = ((b"mtime", _decimal_seconds(mtime_ns)), *pax)
    before = _pax_header(b"".join(_pax_record(key, value) for key, value in pax)) if pax else b""
    if len(name) > _NAME_LENGTH:
        before += _long(EntryType.LONG_NAME, name)
    if len(target) > _NAME_LENGTH:
        before += _long(EntryType.LONG_TARGET, target)
    return before + _block(name, kind, mode, uid, gid, size, seconds, target)


def sparse_map(extents: list[tuple[int, int]]) -> bytes:
    """The map that leads a sparse file's content: count, then offset and length of each extent, as lines, padded."""
    lines = b"%d\n" % len(extents) + b"".join(b"%d\n%d\n" % extent for extent in extents)
    return lines + padding(len(lines))


def sparse_pax(name: bytes, size: int) -> tuple[tuple[bytes, bytes], ...]:
    """The pax records of a sparse file of `size` bytes.

    Its header carries another name (`sparse_alias`), so that a reader that does not know sparse files does not put
    the map in the file's place.
    """
    return (
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", name),
        (b"GNU.sparse.realsize", b"%d" % size),
    )


def sparse_alias(name: bytes) -> bytes:
    """The name in a sparse file's own header, as GNU tar forms it: the folder, `GNUSparseFile.0`, the base name."""
    folder, _, base = name.rpartition(b"/")
    return b"%s/GNUSparseFile.0/%s" % (folder, base)


def _block(
    name: bytes, kind: EntryType, mode: int, uid: int, gid: int, size: int, seconds: int, target: bytes
) -> bytes:
    head = b"%b%07o\0%b%b%b%b" % (
        name[:_NAME_LENGTH].ljust(_NAME_LENGTH, b"\0"),
        mode,
        _number_8(uid),
        _number_8(gid),
        _number_12(size),
        _number_12(seconds),
    )
    tail, tail_sum = _tail(kind, target)
    return b"%b%06o\0 %b" % (head, sum(head) + tail_sum, tail)


@functools.lru_cache(maxsize=64)
def _tail(kind: EntryType, target: bytes) -> tuple[bytes, int]:
    """What follows the checksum, and what it and the checksum's own place (eight spaces) add to the checksum."""
    tail = b"%b%bustar\x0000" % (kind.value, target[:_NAME_LENGTH].ljust(_NAME_LENGTH, b"\0"))
    return tail.ljust(BLOCK - _TAIL_OFFSET, b"\0"), sum(tail) + 8 * 32


def _number_8(value: int) -> bytes:
    return b"%07o\0" % value if 0 <= value < _OCTAL_8 else _base_256(value, 8)


def _number_12(value: int) -> bytes:
    return b"%011o\0" % value if 0 <= value < _OCTAL_12 else _base_256(value, 12)


def _base_256(value: int, width: int) -> bytes:
    # Two's complement, big end first; the first byte is 0x80 for a positive number and 0xff for a negative one.
    number = value.to_bytes(width, "big", signed=True)
    return bytes((number[0] | 0x80,)) + number[1:]


def _decimal_seconds(nanoseconds: int) -> bytes:
    whole, fraction = divmod(abs(nanoseconds), _BILLION)
    return b"%b%d.%09d" % (b"-" if nanoseconds < 0 else b"", whole, fraction)


def _pax_record(key: bytes, value: bytes) -> bytes:
    # A record begins with its own length in decimal, which counts those digits too.
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def _pax_header(records: bytes) -> bytes:
    return _pax_block(len(records)) + records + padding(len(records))


@functools.lru_cache(maxsize=64)
def _pax_block(length: int) -> bytes:
    return _block(b"././@PaxHeader", EntryType.PAX, 0o644, 0, 0, length, 0, b"")


def _long(kind: EntryType, text: bytes) -> bytes:
    content = text + b"\0"
    return _block(b"././@LongLink", kind, 0, 0, 0, len(content), 0, b"") + content + padding(len(content))

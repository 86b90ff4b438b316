"""The stages of the stream: what happens to bytes between a source and a storage, and on the way back.

What belongs here: generators over chunks, `Iterator[bytes] -> Iterator[bytes]`. What does not: which stages a backup
has (`recipe`), or what their results are worth (`verification`).

The encrypted form is Kanbu's: 16 bytes IV, ciphertext, 16 bytes tag; AES-256-GCM without additional data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from isal import isal_zlib

from kanbu_backup_dagster.backup.keys import EncryptionKey
from kanbu_backup_dagster.errors import CorruptBackupError, KanbuError

IV_BYTES = 16
TAG_BYTES = 16
# NIST SP 800-38D, section 5.2.1.1: at most 2^39 - 256 bits of plaintext under one IV.
GCM_LIMIT_BYTES = (1 << 36) - 32
GCM_LIMIT_ADVICE = "Raise BACKUP_COMPRESSION_LEVEL, or back up without BACKUP_ENCRYPTION_KEY to an encrypted disk."
_GZIP_WINDOW = 31
_ISAL_MEMORY_LEVEL = 9
_BLOCK_BYTES = 1 << 20


def _keep_freed_memory() -> None:
    """Have the C library keep the memory of freed chunks for the next ones.

    glibc gives a freed megabyte back to the system and takes it anew, 256 page faults each time, until something larger
    was freed: from then on it keeps as much (mallopt(3), M_MMAP_THRESHOLD). What is allocated here is never touched, so
    it costs nothing. Verification takes half to two thirds of the time this way.
    """
    bytes(16 * _BLOCK_BYTES)


_keep_freed_memory()


def counted(chunks: Iterator[bytes], on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """The same chunks; `on_bytes` is told how many bytes have come so far."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        on_bytes(total)
        yield chunk


def hashed(chunks: Iterator[bytes], update: Callable[[bytes], None]) -> Iterator[bytes]:
    """The same chunks, each given to `update` of a hash before it is handed on."""
    for chunk in chunks:
        update(chunk)
        yield chunk


def hashed_beside(chunks: Iterator[bytes], update: Callable[[bytes], None]) -> Iterator[bytes]:
    """The same chunks, hashed on a second core while they are worked on; the hash is whole when they are exhausted.

    One chunk in flight keeps memory flat.
    """
    with ThreadPoolExecutor(1, "hash") as beside:
        pending: Future[None] | None = None
        for chunk in chunks:
            if pending is not None:
                pending.result()
            pending = beside.submit(update, chunk)
            yield chunk
        if pending is not None:
            pending.result()


def compress(chunks: Iterator[bytes], level: int) -> Iterator[bytes]:
    """gzip: one member, modification time 0, no name; the same input gives the same bytes.

    Args:
        level: ISA-L's, 0 (fastest) to 3 (smallest).
    """
    compressor = isal_zlib.compressobj(level, wbits=_GZIP_WINDOW, memLevel=_ISAL_MEMORY_LEVEL)
    # On a core of its own, one block at a time: while it works, the next block is read, which keeps the server and
    # pg_dump from waiting for us.
    with ThreadPoolExecutor(1, "compress") as beside:
        pending: Future[bytes] | None = None
        for block in _even(chunks):
            compressed = pending.result() if pending else b""
            pending = beside.submit(compressor.compress, block)
            if compressed:
                yield compressed
        if pending and (compressed := pending.result()):
            yield compressed
        yield compressor.flush()


def _even(chunks: Iterator[bytes]) -> Iterator[bytes | memoryview]:
    """The same bytes in chunks of one size: where ISA-L ends its blocks depends on what it is given at a time."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size >= _BLOCK_BYTES:
            joined = memoryview(b"".join(parts))
            whole = size - size % _BLOCK_BYTES
            for at in range(0, whole, _BLOCK_BYTES):
                yield joined[at : at + _BLOCK_BYTES]
            parts, size = [bytes(joined[whole:])], size - whole
    yield b"".join(parts)


def decompress(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a gzip stream: one member or several, checked by its own CRC and length.

    Raises:
        CorruptBackupError: Not gzip, damaged, cut short, or followed by something else.
    """
    decompressor = isal_zlib.decompressobj(wbits=_GZIP_WINDOW)
    started = False
    for chunk in chunks:
        data, full = chunk, False
        while data or full:
            if decompressor.eof:
                decompressor = isal_zlib.decompressobj(wbits=_GZIP_WINDOW)
            started = True
            try:
                content = decompressor.decompress(data, _BLOCK_BYTES)
            except isal_zlib.error as error:  # type: ignore[misc]  # the stub types the class as an instance
                raise CorruptBackupError(f"Checksum verification failed: the gzip data is damaged ({error}).") from None
            yield content
            # Bounded output: a megabyte of gzip may hold a gigabyte.
            full = len(content) == _BLOCK_BYTES and not decompressor.eof
            data = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
    if not started or not decompressor.eof:
        raise CorruptBackupError("Checksum verification failed: the gzip data is cut short.")


def encrypt(chunks: Iterator[bytes], key: EncryptionKey, *, limit_bytes: int = GCM_LIMIT_BYTES) -> Iterator[bytes]:
    """Kanbu's encrypted form of `chunks`, under a new random IV.

    Raises:
        KanbuError: More than `limit_bytes` of plaintext, before a byte past the limit is handed on.
    """
    iv = os.urandom(IV_BYTES)
    encryptor = Cipher(AES(key.secret), GCM(iv)).encryptor()
    yield iv
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > limit_bytes:
            raise KanbuError(
                f"The compressed backup exceeds {limit_bytes:,} bytes, the most that AES-GCM can protect in one file.",
                advice=GCM_LIMIT_ADVICE,
            )
        yield encryptor.update(chunk)
    yield encryptor.finalize() + encryptor.tag


def decrypt_unverified(chunks: Iterator[bytes], key: EncryptionKey) -> Iterator[bytes]:
    """The plaintext of Kanbu's encrypted form, *before its tag is checked*: the check comes at the end.

    Only for callers that throw everything away on failure (hashing, a staging database); others check the whole file
    first.

    Raises:
        CorruptBackupError: The tag does not match: wrong key, flipped bytes, or cut short.
    """
    head = b""
    chunks = iter(chunks)
    for chunk in chunks:
        head += chunk
        if len(head) >= IV_BYTES:
            break
    decryptor = Cipher(AES(key.secret), GCM(head[:IV_BYTES])).decryptor() if len(head) >= IV_BYTES else None
    held = head[IV_BYTES:]
    if decryptor is not None:
        if len(held) > TAG_BYTES:
            yield decryptor.update(held[:-TAG_BYTES])
            held = held[-TAG_BYTES:]
        for chunk in chunks:
            # The last 16 bytes seen may be the tag, so they are held back.
            if len(chunk) >= TAG_BYTES:
                yield decryptor.update(held)
                yield decryptor.update(memoryview(chunk)[:-TAG_BYTES])
                held = chunk[-TAG_BYTES:]
            else:
                held += chunk
                yield decryptor.update(held[:-TAG_BYTES])
                held = held[-TAG_BYTES:]
    if decryptor is None or len(held) < TAG_BYTES:
        raise CorruptBackupError("Checksum mismatch: the file is too short to be an encrypted backup.")
    try:
        decryptor.finalize_with_tag(held)
    except InvalidTag:
        raise CorruptBackupError(
            "Checksum mismatch: the encrypted file does not fit the key; it is damaged, cut short, or of another key."
        ) from None

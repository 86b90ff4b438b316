"""The stages: any chunking gives the same bytes, and no damage passes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import random
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanbu_backup_dagster.backup import stages
from kanbu_backup_dagster.backup.keys import derive_key
from kanbu_backup_dagster.errors import CorruptBackupError, KanbuError

KEY = derive_key("a passphrase")
_WORDS = b" ".join(random.Random(1).choices([b"task", b"board", b"\xc3\xbc", b"42", b"done"], k=700_000))
_CHUNKED = st.lists(st.binary(max_size=200), max_size=30)


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@given(_CHUNKED, st.integers(0, 3))
def test_gzip_is_the_same_for_any_chunking_and_stock_gzip_reads_it(chunks: list[bytes], level: int) -> None:
    data = b"".join(chunks)
    compressed = b"".join(stages.compress(iter(chunks), level))
    assert gzip.decompress(compressed) == data
    magic, method, flags, modified = compressed[:2], compressed[2], compressed[3], compressed[4:8]
    assert (magic, method, flags, modified) == (b"\x1f\x8b", 8, 0, bytes(4))
    assert b"".join(stages.decompress(iter([compressed]))) == data


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=20), st.integers(0, 3), st.integers(1, 1 << 20))
def test_compressed_bytes_do_not_depend_on_how_the_stream_was_cut(cuts: list[int], level: int, size: int) -> None:
    data = _WORDS
    pieces, at = [], 0
    for length in cuts:
        pieces.append(data[at : at + length])
        at += length
    pieces.append(data[at:])
    compressed = b"".join(stages.compress(iter(pieces), level))
    assert compressed == b"".join(stages.compress(cut(data, size + 1000), level))
    assert b"".join(stages.decompress(cut(compressed, size))) == data


@given(_CHUNKED, st.integers(1, 50))
def test_encryption_and_back_for_any_chunking(chunks: list[bytes], size: int) -> None:
    sealed = b"".join(stages.encrypt(iter(chunks), KEY))
    assert len(sealed) == sum(map(len, chunks)) + stages.IV_BYTES + stages.TAG_BYTES
    assert b"".join(stages.decrypt_unverified(cut(sealed, size), KEY)) == b"".join(chunks)


def test_no_iv_is_used_twice() -> None:
    assert len({next(stages.encrypt(iter([b"x"]), KEY)) for _ in range(100)}) == 100


def test_every_flipped_byte_and_every_cut_of_an_encrypted_file_is_found() -> None:
    sealed = b"".join(stages.encrypt(iter([b"content of the backup"]), KEY))
    for at in range(len(sealed)):
        flipped = sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
        for damaged in (flipped, sealed[:at]):
            with pytest.raises(CorruptBackupError, match="Checksum mismatch"):
                list(stages.decrypt_unverified(iter([damaged]), KEY))
    with pytest.raises(CorruptBackupError):
        list(stages.decrypt_unverified(iter([sealed]), derive_key("another")))


def test_every_cut_of_a_gzip_file_is_found() -> None:
    compressed = b"".join(stages.compress(iter([b"some text, some more text" * 20]), 2))
    for length in range(len(compressed)):
        with pytest.raises(CorruptBackupError, match="Checksum verification failed"):
            list(stages.decompress(iter([compressed[:length]])))


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_byte_of_gzip_never_gives_other_content(data: st.DataObject) -> None:
    content = b"some text, some more text" * 20
    compressed = b"".join(stages.compress(iter([content]), 2))
    at = data.draw(st.integers(0, len(compressed) - 1))
    flipped = compressed[:at] + bytes([compressed[at] ^ data.draw(st.integers(1, 255))]) + compressed[at + 1 :]
    with contextlib.suppress(CorruptBackupError):  # a flip in the header's time or system byte is none of content
        assert b"".join(stages.decompress(iter([flipped]))) == content


def test_several_gzip_members_are_one_content() -> None:
    members = gzip.compress(b"one") + gzip.compress(b"two")
    for size in (1, 7, 1000):
        assert b"".join(stages.decompress(cut(members, size))) == b"onetwo"


def test_a_little_gzip_that_holds_much_is_read_in_flat_memory() -> None:
    bomb = b"".join(stages.compress((bytes(1 << 20) for _ in range(256)), 3))
    assert len(bomb) < 2 << 20
    tracemalloc.start()
    try:
        assert sum(map(len, stages.decompress(iter([bomb])))) == 256 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_past_the_limit_of_gcm_nothing_more_is_written() -> None:
    passed: list[bytes] = []
    with pytest.raises(KanbuError, match="AES-GCM"):
        passed.extend(stages.encrypt(iter([b"12345", b"6789", b"abc"]), KEY, limit_bytes=10))
    assert sum(map(len, passed[1:])) == 9
    assert stages.GCM_LIMIT_BYTES == 2**36 - 32


def test_the_checksum_is_of_the_bytes_before_encryption() -> None:
    content = b"".join(stages.compress(iter([b"x" * 1000]), 2))
    plain = b"".join(stages.decrypt_unverified(stages.encrypt(iter([content]), KEY), KEY))
    assert hashlib.sha256(plain).digest() == hashlib.sha256(content).digest()

"""Headers say to Python's tarfile, and to stock tar, what they were made to say."""

from __future__ import annotations

import io
import subprocess
import tarfile
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanbu_backup_dagster.sources.tar_format import EntryType, end_of_archive, entry_header, padding
from kanbu_backup_dagster_tests.trees import needs_tar

names = st.binary(min_size=1, max_size=400).filter(lambda name: not {0, ord("/")} & set(name))
mtimes = st.integers(-(2**33) * 10**9, 2**36 * 10**9)
ids = st.integers(0, 2**32 - 1)


@given(names, st.integers(0, 0o7777), ids, ids, mtimes, st.binary(max_size=1500))
def test_a_file(name: bytes, mode: int, uid: int, gid: int, mtime_ns: int, content: bytes) -> None:
    header = entry_header(name, EntryType.FILE, mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns, size=len(content))
    raw = header + content + padding(len(content))
    raw += end_of_archive(len(raw))
    assert len(raw) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        (member,) = archive.getmembers()
        read = archive.extractfile(member)
        assert read is not None
        assert read.read() == content
    assert member.name.encode("utf-8", "surrogateescape") == name
    assert (member.mode, member.uid, member.gid, member.isreg()) == (mode, uid, gid, True)
    assert int(Decimal(member.pax_headers.get("mtime", str(member.mtime))) * 10**9) == mtime_ns


@given(names, st.binary(min_size=1, max_size=400).filter(lambda target: 0 not in target), mtimes)
def test_a_symbolic_link(name: bytes, target: bytes, mtime_ns: int) -> None:
    raw = entry_header(name, EntryType.SYMLINK, mode=0o777, uid=0, gid=0, mtime_ns=mtime_ns, target=target)
    raw += end_of_archive(len(raw))
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        (member,) = archive.getmembers()
    assert member.issym()
    assert member.linkname.encode("utf-8", "surrogateescape") == target


@given(st.lists(st.binary(max_size=120), min_size=1, max_size=3))
def test_pax_records_of_any_length(values: list[bytes]) -> None:
    pax = tuple((b"KANBU.%d" % n, value.hex().encode()) for n, value in enumerate(values))
    raw = entry_header(b"x", EntryType.FILE, mode=0, uid=0, gid=0, mtime_ns=0, pax=pax)
    raw += end_of_archive(len(raw))
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
        (member,) = archive.getmembers()
    assert member.pax_headers == {key.decode(): value.decode() for key, value in pax}


@needs_tar
@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 9 << 30, 1 << 42])
def test_stock_tar_reads_huge_sizes(size: int) -> None:
    header = entry_header(b"huge", EntryType.FILE, mode=0o600, uid=0, gid=0, mtime_ns=0, size=size)
    # The content is missing, which tar says after it has listed the entry.
    listed = subprocess.run(["tar", "tvf", "-"], input=header, capture_output=True, check=False)
    assert f" {size} " in listed.stdout.decode()


@needs_tar
def test_stock_tar_reads_huge_numbers_of_users() -> None:
    raw = entry_header(b"x", EntryType.FILE, mode=0o600, uid=2**32 - 2, gid=2**21, mtime_ns=0)
    listed = subprocess.run(["tar", "tvf", "-"], input=raw + end_of_archive(len(raw)), capture_output=True, check=True)
    assert f"{2**32 - 2}/{2**21}" in listed.stdout.decode()

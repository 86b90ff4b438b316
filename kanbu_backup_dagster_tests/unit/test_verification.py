"""Verification: no damage passes, and no sound backup is called damaged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.catalog import Catalog
from kanbu_backup_dagster.backup.keys import Keyring, derive_key
from kanbu_backup_dagster.backup.manifest import Manifest, SourceFacts, Verification, VerificationStatus
from kanbu_backup_dagster.backup.stages import encrypt
from kanbu_backup_dagster.backup.verification import verify
from kanbu_backup_dagster.errors import BackupNotFoundError, EncryptionKeyError
from kanbu_backup_dagster.sources.source_tree import SourceTree
from kanbu_backup_dagster.storage.folder import FolderStorage
from kanbu_backup_dagster_tests.backups import DUMP, FACTS, KEYS, Bytes, store_backup
from kanbu_backup_dagster_tests.trees import archive, grow_everything_a_tree_can_hold, grow_sparse_files

NO_KEYS = Keyring()
OTHER_KEYS = Keyring(derive_key("another key"))
LEGACY = "kanbu_backup_2020-01-01T00-00-00.sql"


def judge(folder: Path, name: str, *, keys: Keyring = KEYS, deep: bool = False) -> Verification:
    storage = FolderStorage(folder)
    return verify(Catalog(storage, keys).get(name), storage, keys, deep=deep)


@pytest.mark.parametrize("keys", [KEYS, NO_KEYS], ids=["encrypted", "plain"])
@pytest.mark.parametrize("deep", [False, True], ids=["plain", "deep"])
def test_every_flipped_byte_and_every_cut_is_found(tmp_path: Path, keys: Keyring, deep: bool) -> None:
    name = store_backup(tmp_path, keys=keys).filename
    whole = (tmp_path / name).read_bytes()
    assert judge(tmp_path, name, keys=keys, deep=deep).status is VerificationStatus.VERIFIED
    damaged = [whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :] for at in range(len(whole))]
    damaged += [whole[:length] for length in range(len(whole))]
    damaged += [whole + b"\0", whole + whole]
    for number, content in enumerate(damaged):
        (tmp_path / name).write_bytes(content)
        assert judge(tmp_path, name, keys=keys, deep=deep).status is VerificationStatus.FAILED, number


def test_every_flipped_byte_of_a_sealed_manifest_is_found_or_changes_nothing(tmp_path: Path) -> None:
    manifest = store_backup(tmp_path)
    sidecar = tmp_path / f"{manifest.filename}.manifest.json"
    sealed = sidecar.read_bytes()
    found = 0
    for at in range(len(sealed)):
        sidecar.write_bytes(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
        backup = Catalog(FolderStorage(tmp_path), KEYS).get(manifest.filename)
        if backup.manifest != manifest:
            assert backup.status is VerificationStatus.FAILED, sealed[max(0, at - 20) : at + 20]
            assert judge(tmp_path, manifest.filename).status is VerificationStatus.FAILED
            found += 1
    assert found > len(sealed) / 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seal", None),
        ("seal", "0123456789abcdef:" + 64 * "0"),
        ("stored_sha256", 64 * "0"),
        ("held", True),
        ("filename", "kanbu_backup_2026-01-01T00-00-00.sql.gz.enc"),
        ("encrypted", False),
    ],
)
def test_an_edited_manifest_is_found(tmp_path: Path, field: str, value: object) -> None:
    name = store_backup(tmp_path).filename
    sidecar = tmp_path / f"{name}.manifest.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), field: value}))
    assert judge(tmp_path, name).status is VerificationStatus.FAILED


def test_swapped_contents_and_swapped_manifests_are_found(tmp_path: Path) -> None:
    one = store_backup(tmp_path).filename
    other = store_backup(tmp_path, Bytes(DUMP.replace(b"1\n2\n", b"3\n4\n"))).filename
    assert one != other
    for suffix in ("", ".manifest.json"):
        first, second = tmp_path / (one + suffix), tmp_path / (other + suffix)
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        for name in (one, other):
            assert judge(tmp_path, name).status is VerificationStatus.FAILED, suffix
        first.write_bytes(contents[0])
        second.write_bytes(contents[1])
    assert judge(tmp_path, one).status is VerificationStatus.VERIFIED


@pytest.mark.parametrize(("keys", "says"), [(NO_KEYS, "BACKUP_ENCRYPTION_KEY is not set"), (OTHER_KEYS, "with key")])
def test_without_its_key_a_file_is_not_judged_unless_its_stored_bytes_are_damaged(
    tmp_path: Path, keys: Keyring, says: str
) -> None:
    name = store_backup(tmp_path).filename
    with pytest.raises(EncryptionKeyError, match=says):
        judge(tmp_path, name, keys=keys)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    verdict = judge(tmp_path, name, keys=keys)
    assert verdict.status is VerificationStatus.FAILED
    before = (tmp_path / f"{name}.manifest.json").read_bytes()
    catalog = Catalog(FolderStorage(tmp_path), keys)
    # Whoever lacks the key could only write a manifest without its seal.
    assert not catalog.record_verdict(catalog.get(name), verdict)
    assert (tmp_path / f"{name}.manifest.json").read_bytes() == before


def test_a_verdict_is_recorded_and_sealed(tmp_path: Path) -> None:
    name = store_backup(tmp_path).filename
    catalog = Catalog(FolderStorage(tmp_path), KEYS)
    assert catalog.get(name).status is VerificationStatus.PENDING
    before = catalog.get(name).fingerprint
    assert catalog.record_verdict(catalog.get(name), judge(tmp_path, name, deep=True))
    backup = catalog.get(name)
    assert backup.manifest is not None
    assert (backup.status, backup.manifest.verification.deep) == (VerificationStatus.VERIFIED, True)
    assert backup.manifest.sealed_by == KEYS.current.key_id  # type: ignore[union-attr]
    assert backup.fingerprint != before
    (tmp_path / name).unlink()
    with pytest.raises(BackupNotFoundError):
        catalog.record_verdict(backup, judge_missing())


def test_no_verdict_is_taken_away_by_one_that_is_none(tmp_path: Path) -> None:
    name = store_backup(tmp_path).filename
    catalog = Catalog(FolderStorage(tmp_path), KEYS)
    pending = Verification(status=VerificationStatus.PENDING, detail="on its way")
    assert catalog.record_verdict(catalog.get(name), pending)
    assert catalog.get(name).verification == pending
    for known in (judge(tmp_path, name), judge_missing()):
        assert catalog.record_verdict(catalog.get(name), known)
        assert not catalog.record_verdict(catalog.get(name), pending)
        assert catalog.get(name).verification == known


def test_a_manifest_that_appears_meanwhile_is_amended_and_not_written_over(tmp_path: Path) -> None:
    name = store_backup(tmp_path).filename
    content = (tmp_path / f"{name}.manifest.json").read_bytes()
    (tmp_path / f"{name}.manifest.json").unlink()

    class AdoptedMeanwhile(FolderStorage):
        """Between the first look at the manifest and the second one it is written."""

        def read_sidecar(self, name: str) -> bytes | None:
            found = super().read_sidecar(name)
            if found is None:
                self.replace_sidecar(name, content)
            return found

    others, storage = Catalog(FolderStorage(tmp_path), KEYS), AdoptedMeanwhile(tmp_path)
    changes = []

    def prove(manifest: Manifest) -> Manifest:
        if not changes:
            others.amend(name, lambda theirs: theirs.model_copy(update={"held": True}))
        changes.append(manifest)
        return manifest.model_copy(update={"proven_at": manifest.created_at})

    Catalog(storage, KEYS).amend(name, prove)
    amended = others.get(name).manifest
    assert amended is not None
    assert (amended.held, amended.proven_at) == (True, amended.created_at)


def judge_missing() -> Verification:
    return Verification(status=VerificationStatus.FAILED)


@pytest.mark.parametrize(
    ("dump", "rows", "says"),
    [
        (DUMP, {"public.t": 3}, "public.t: 2 rows, 3 in the manifest"),
        (DUMP, {"public.t": 2, "public.u": 0}, "public.u: no rows, 0 in the manifest"),
        (DUMP, {}, "public.t: 2 rows, none in the manifest"),
        (DUMP.replace(b"dump complete", b"dump compleat"), {"public.t": 2}, "The dump is not whole"),
        (DUMP[: DUMP.index(b"2\n")], {"public.t": 1}, "it ends within"),
    ],
)
def test_deep_verification_reads_the_dump(tmp_path: Path, dump: bytes, rows: dict[str, int], says: str) -> None:
    facts = FACTS.model_copy(update={"rows": rows})
    name = store_backup(tmp_path, Bytes(dump, facts)).filename
    assert judge(tmp_path, name).status is VerificationStatus.VERIFIED
    verdict = judge(tmp_path, name, deep=True)
    assert verdict.status is VerificationStatus.FAILED
    assert says in verdict.detail


def test_deep_verification_reads_the_archive(tmp_path: Path) -> None:
    tree, store = tmp_path / "tree", tmp_path / "store"
    tree.mkdir()
    grow_everything_a_tree_can_hold(tree)
    grow_sparse_files(tree)
    chunks, facts = archive(SourceTree(tree))
    name = store_backup(store, Bytes(b"".join(chunks), facts)).filename
    assert judge(store, name, deep=True).status is VerificationStatus.VERIFIED
    for field in ("files", "folders", "links", "bytes"):
        wrong = facts.model_copy(update={field: getattr(facts, field) + 1})
        name = store_backup(store, Bytes(b"".join(chunks), wrong)).filename
        assert f"{field}: " in judge(store, name, deep=True).detail
    for damaged in (b"".join(chunks)[: len(b"".join(chunks)) // 2], b"no archive" * 1000, b""):
        name = store_backup(store, Bytes(damaged, facts)).filename
        assert judge(store, name, deep=True).status is VerificationStatus.FAILED


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (LEGACY, DUMP),
        (f"{LEGACY}.gz", gzip.compress(DUMP)),
        (f"{LEGACY}.enc", b"".join(encrypt(iter([DUMP]), derive_key("a passphrase that only tests know")))),
    ],
)
def test_a_file_of_the_past_has_no_checksum_and_is_read_through(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    verdict = judge(tmp_path, name)
    assert (verdict.status, verdict.deep) == (VerificationStatus.NO_CHECKSUM, True)
    catalog = Catalog(FolderStorage(tmp_path), KEYS)
    assert not catalog.record_verdict(catalog.get(name), verdict)
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert judge(tmp_path, name).status is VerificationStatus.FAILED
    if name.endswith(".enc"):
        with pytest.raises(EncryptionKeyError):
            judge(tmp_path, name, keys=NO_KEYS)


def test_source_facts_are_told_apart_from_a_databases(tmp_path: Path) -> None:
    facts = SourceFacts(path="/app", files=0, folders=0, links=0, bytes=0)
    assert store_backup(tmp_path, Bytes(bytes(10240), facts)).filename.startswith("kanbu_source_")

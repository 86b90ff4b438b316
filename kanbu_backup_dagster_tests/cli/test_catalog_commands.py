"""The commands on backups as a whole: verify many, sync, adopt, hold, retention, prune, history."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from kanbu_backup_dagster.backup.environment import load_environment
from kanbu_backup_dagster.backup.manifest import VerificationStatus
from kanbu_backup_dagster.cli import main as command_line
from kanbu_backup_dagster.orchestration import target_lock
from kanbu_backup_dagster_tests.backups import DUMP, store_backup

Configure = Callable[..., Path]
Kanbu = Callable[..., tuple[int, str, str]]
SCHEDULES = """\
version: 1
schedules:
  - {id: 1, name: Daily, type: database, cron: "0 2 * * *", keep_daily: 2, keep_weekly: 0, keep_monthly: 0}
"""


@pytest.fixture
def kanbu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kanbu:
    """Runs the command line here; gives its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kanbu-backup", *arguments])
        code = 0
        try:
            command_line.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def answer(kanbu: Kanbu, *arguments: str) -> Any:
    code, out, err = kanbu(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def legacy(store: Path, days: int) -> str:
    at = datetime.now(timezone.utc) - timedelta(days=days)
    name = f"kanbu_backup_{at:%Y-%m-%dT%H-%M-%S}.sql.gz"
    store.mkdir(exist_ok=True)
    (store / name).write_bytes(gzip.compress(DUMP))
    return name


def test_verifying_many_and_the_history_of_it(configure: Configure, kanbu: Kanbu) -> None:
    store = configure()
    assert kanbu("history")[1] == "No runs yet.\n"
    names = [store_backup(store).filename for _ in range(2)]
    verdicts = answer(kanbu, "verify", "--all-pending")
    assert [(one["filename"], one["status"], one["deep"]) for one in verdicts] == [
        (name, "verified", True) for name in names
    ]
    assert answer(kanbu, "verify", "--all-pending") == []
    (store / names[1]).write_bytes(b"")
    code, out, err = kanbu("verify", "--all")
    assert (code, f"{names[1]}: failed" in out, f"{names[0]}: verified" in out) == (1, True, True)
    assert "1 of 2 backups are not verified" in err
    latest, *older = answer(kanbu, "history")
    assert len(older) == 2
    assert (latest["job"], latest["status"], latest["trigger"]) == ("verify_pending_backups", "failure", "manual")
    assert names[1] in latest["error"]
    assert latest["duration_s"] > 0
    assert datetime.fromisoformat(latest["started_at"]).tzinfo is not None
    assert [row["status"] for row in answer(kanbu, "history", "-n", "2", "--job", "verify_pending_backups")] == [
        "failure",
        "success",
    ]
    counts = answer(kanbu, "status")["backups"]
    assert (counts["total"], counts["verified"], counts["failed"]) == (2, 1, 1)
    assert counts["by_type"]["database"] == {"total": 2, "verified": 1, "failed": 1, "pending": 0, "no_checksum": 0}
    for arguments in ((), ("--all", "--all-pending"), (names[0], "--all")):
        assert kanbu("verify", *arguments)[0] == 2


def test_adopting_holding_and_what_the_next_prune_does(configure: Configure, kanbu: Kanbu) -> None:
    store = configure()
    Path("kanbu_backup.yaml").write_text(SCHEDULES)
    files = [legacy(store, days) for days in (3, 2, 1)]
    (store / "notes.txt").write_text("not a backup")
    (store / "a[b].txt").write_text("nor this one, with a name that is no markup either")
    preview = answer(kanbu, "retention", "preview", "--type", "database")
    assert {one["filename"]: one["rules"] for one in preview} == {
        **{name: ["no_manifest"] for name in files},
        "notes.txt": ["foreign_name"],
        "a[b].txt": ["foreign_name"],
    }
    assert "a[b].txt" in kanbu("retention", "preview", "--type", "database")[1]
    (store / "a[b].txt").unlink()
    for name in files:
        manifest = answer(kanbu, "adopt", name)
        assert manifest["database"]["rows"] == {"public.t": 2}
        assert load_environment().catalog.get(name).status is VerificationStatus.VERIFIED
    code, _, err = kanbu("adopt", files[0])
    assert (code, "has a manifest already" in err) == (1, True)
    assert answer(kanbu, "catalog", "sync") == {"new": [], "changed": [], "vanished": []}

    def fates(*arguments: str) -> list[bool]:
        plan = {one["filename"]: one["keep"] for one in answer(kanbu, "retention", "preview", *arguments)}
        return [plan[name] for name in files]

    # Two days stay; with the coming backup counted in, one day less of those that are there.
    assert fates("--now") == [False, True, True]
    assert fates() == [False, False, True]
    assert fates("--schedule", "1", "--policy", "30/3/0/0") == [False, True, True]
    assert fates("--policy", "1/0/0/0", "--now") == [False, False, True]
    assert kanbu("retention", "preview", "--policy", "many")[0] == 2
    assert kanbu("retention", "preview", "--schedule", "9")[0] == 3
    assert "held until it is released" in kanbu("hold", files[0])[1]
    assert "held already" in kanbu("hold", files[0])[1]
    assert fates("--now") == [True, True, True]
    assert answer(kanbu, "prune")["database"]["deleted"] == 0
    kanbu("release", files[0])
    assert answer(kanbu, "catalog", "sync") == {"new": [], "changed": [], "vanished": []}
    assert answer(kanbu, "prune", "--dry-run")["database"] == {
        "deleted": 0,
        "would_go": 1,
        "kept": 2,
        "held_back": "",
    }
    assert "database: 1 deleted, 2 kept" in kanbu("prune")[1]
    assert not (store / files[0]).exists()
    assert fates_of_the_rest(kanbu) == {files[1], files[2], "notes.txt"}


def fates_of_the_rest(kanbu: Kanbu) -> set[str]:
    return {one["filename"] for one in answer(kanbu, "retention", "preview", "--now", "--type", "database")}


def test_a_file_is_not_adopted_while_a_rotation_may_replace_it(
    configure: Configure, kanbu: Kanbu, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = legacy(configure(), 1)
    monkeypatch.setattr(target_lock, "STORAGE_PATIENCE_SECONDS", 0.1)
    lock = target_lock.storage_name(load_environment().storage)
    with target_lock.open_locks().hold(lock, target_lock.Holder.now("rotate_keys", "a-rotation"), exclusive=True):
        code, _, err = kanbu("adopt", name)
    assert (code, "held by rotate_keys, run a-rotation" in err) == (8, True)
    assert load_environment().catalog.get(name).manifest is None
    # Others that read may go on meanwhile.
    with target_lock.open_locks().hold(lock, target_lock.Holder.now("restore_database", "one"), exclusive=False):
        assert kanbu("adopt", name)[0] == 0


def test_what_cannot_be_read_through_is_not_adopted(configure: Configure, kanbu: Kanbu) -> None:
    store = configure()
    name = legacy(store, 1)
    (store / name).write_bytes(gzip.compress(DUMP)[:-1])
    code, _, err = kanbu("adopt", name)
    assert (code, "the gzip data is cut short" in err) == (7, True)
    assert load_environment().catalog.get(name).manifest is None


def test_a_source_tree_on_the_command_line(
    configure: Configure, kanbu: Kanbu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure()
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "main.ts").write_text("x")
    monkeypatch.setenv("KANBU_SOURCE_PATH", str(tmp_path / "app"))
    manifest = answer(kanbu, "backup", "source")
    assert (manifest["source"]["files"], manifest["verification"]["status"]) == (1, "verified")
    assert answer(kanbu, "verify", manifest["filename"], "--deep")["status"] == "verified"

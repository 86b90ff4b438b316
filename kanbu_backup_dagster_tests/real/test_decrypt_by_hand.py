"""The script in docs/files.md reads our encrypted files, and refuses what is not whole."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.keys import derive_key
from kanbu_backup_dagster.backup.stages import encrypt

DOCUMENT = Path(__file__).parents[2] / "docs" / "files.md"


@pytest.mark.parametrize("key", ["0123456789abcdef" * 4, "my-super-secure-passphrase-2026"])
def test_the_documented_script(node: str, tmp_path: Path, key: str) -> None:
    found = re.search(r"```javascript\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert found is not None
    script, stored, plain = tmp_path / "decrypt.js", tmp_path / "stored.enc", tmp_path / "plain"
    script.write_text(found[1])
    content = bytes(range(256)) * 999
    stored.write_bytes(b"".join(encrypt(iter([content]), derive_key(key))))

    def run(with_key: str) -> int:
        return subprocess.run(
            [node, script, stored, plain], env={"BACKUP_ENCRYPTION_KEY": with_key}, capture_output=True, check=False
        ).returncode

    assert run(key) == 0
    assert plain.read_bytes() == content
    plain.unlink()
    assert run("another key") != 0
    stored.write_bytes(stored.read_bytes()[:-1])
    assert run(key) != 0
    assert not plain.exists()

"""The encrypted form against Node's own crypto: Node reads ours, we read Node's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kanbu_backup_dagster.backup.keys import derive_key
from kanbu_backup_dagster.backup.stages import decrypt_unverified, encrypt

HEX_KEY = "00112233445566778899AABBCCDDEEFF00112233445566778899aabbccddeeff"
KEYS = {"hex": HEX_KEY, "ascii": "my-super-secure-passphrase-2026", "unicode": "Schlüßel 鍵 🔑"}
SIZES = [0, 1, 15, 16, 17, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]

# Kanbu's form, said in Node: reads a file, writes a file; the key comes in the environment.
NODE_SCRIPT = """
const crypto = require('crypto'), fs = require('fs');
const [mode, from, to] = process.argv.slice(2);
const text = process.env.KEY_UNDER_TEST;
const key = /^[0-9a-f]{64}$/i.test(text)
  ? Buffer.from(text, 'hex')
  : crypto.pbkdf2Sync(text, 'kanbu-backup-encryption-salt-v1', 100000, 32, 'sha256');
const data = fs.readFileSync(from);
if (mode === 'encrypt') {
  const iv = crypto.randomBytes(16);
  const cipher = crypto.createCipheriv('aes-256-gcm', key, iv);
  fs.writeFileSync(to, Buffer.concat([iv, cipher.update(data), cipher.final(), cipher.getAuthTag()]));
} else {
  const decipher = crypto.createDecipheriv('aes-256-gcm', key, data.subarray(0, 16));
  decipher.setAuthTag(data.subarray(-16));
  fs.writeFileSync(to, Buffer.concat([decipher.update(data.subarray(16, -16)), decipher.final()]));
}
"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
def test_node_and_we_read_one_another(node: str, tmp_path: Path, key: str, size: int) -> None:
    script = tmp_path / "kanbu.js"
    script.write_text(NODE_SCRIPT)
    plain, ours, theirs, back = (tmp_path / name for name in ("plain", "ours", "theirs", "back"))
    content = bytes(range(256)) * (size // 256 + 1)
    plain.write_bytes(content[:size])
    chunks = (content[at : min(at + 70_000, size)] for at in range(0, size, 70_000))
    ours.write_bytes(b"".join(encrypt(chunks, derive_key(key))))

    def run(mode: str, source: Path, target: Path) -> None:
        subprocess.run([node, script, mode, source, target], check=True, env={"KEY_UNDER_TEST": key}, timeout=60)

    run("decrypt", ours, back)
    assert back.read_bytes() == plain.read_bytes()
    run("encrypt", plain, theirs)
    assert theirs.stat().st_size == ours.stat().st_size
    assert b"".join(decrypt_unverified(iter([theirs.read_bytes()]), derive_key(key))) == plain.read_bytes()

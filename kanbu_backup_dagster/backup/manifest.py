"""The manifest: what is known of a backup file, kept beside it as `<file>.manifest.json`.

What belongs here: the fields, their JSON form, its version, and the seal (HMAC) that shows an edit. What does not:
reading and writing files (`storage`), and judging a backup (`verification`).

The manifest lands before its file, so a file of ours always has one; a file without is a legacy backup.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kanbu_backup_dagster.backup.keys import EncryptionKey, Keyring
from kanbu_backup_dagster.backup.names import MANIFEST_SUFFIX, BackupType, require_name
from kanbu_backup_dagster.errors import CorruptBackupError
from kanbu_backup_dagster.schedule_file import RetentionPolicy

FORMAT_VERSION = 1


class Trigger(str, Enum):
    """What started the run that made a backup."""

    SCHEDULED = "scheduled"
    MANUAL = "manual"
    EXTERNAL = "external"
    PRE_RESTORE = "pre_restore"


class VerificationStatus(str, Enum):
    """What is known of a backup's integrity (the users' guide's four words)."""

    VERIFIED = "verified"
    PENDING = "pending"
    FAILED = "failed"
    NO_CHECKSUM = "no_checksum"


def _require_zone(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("a time without a zone")
    return moment


Moment = Annotated[datetime, AfterValidator(_require_zone)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Verification(_Part):
    """The last verdict on the file.

    Attributes:
        status: The verdict.
        at: When it was reached; None while pending.
        detail: Why, where there is something to say.
        deep: Whether the content was read too (gzip CRC, dump trailer, row counts), not only the hashes.
    """

    status: VerificationStatus = VerificationStatus.PENDING
    at: Moment | None = None
    detail: str = ""
    deep: bool = False


class StageReport(_Part):
    """One stage of the stream: bytes in and out, and seconds spent in the stage itself (not in those above it)."""

    name: str
    bytes_in: int
    bytes_out: int
    busy_seconds: float


# Plain dataclasses: of a live database these may hold bytes that are no text in UTF-8, which a model refuses.
@dataclass(frozen=True)
class Locale:
    """How a database orders and classifies text.

    Attributes:
        encoding: As PostgreSQL names it, e.g. `UTF8`.
        collate, ctype: LC_COLLATE and LC_CTYPE.
        provider: `libc`, `icu` or `builtin`.
        name: The provider's own locale, where it is not libc.
        rules: ICU's additional rules.
    """

    encoding: str
    collate: str
    ctype: str
    provider: str
    name: str | None = None
    rules: str | None = None

    @property
    def description(self) -> str:
        """For people."""
        of_provider = f", {self.name} of {self.provider}" if self.name is not None else ""
        return f"{self.collate} ({self.encoding}{of_provider})"


@dataclass(frozen=True)
class Grant:
    """A privilege on a database. `grantee` None is everybody; `grantable`: it may be passed on."""

    grantee: str | None
    grantor: str
    privilege: str
    grantable: bool


@dataclass(frozen=True)
class RoleSettings:
    """What `ALTER DATABASE ... SET` (`role` None) or `ALTER ROLE ... IN DATABASE ... SET` set, as `name=value`."""

    role: str | None
    settings: tuple[str, ...]


@dataclass(frozen=True)
class DatabaseProperties:
    """What belongs to a database itself, and is in no plain dump of what is in it.

    Attributes:
        grants: None while they were never changed.
        connection_limit: -1: none.
    """

    owner: str
    locale: Locale
    grants: tuple[Grant, ...] | None = None
    settings: tuple[RoleSettings, ...] = ()
    comment: str | None = None
    connection_limit: int = -1


class DatabaseFacts(_Part):
    """What was dumped, and what a restore will need.

    Attributes:
        name: The database's name.
        server_version: As the server says it, e.g. `16.4`.
        server_id: The server's own identifier (`pg_control_system()`); empty where it is not known.
        pg_dump_version: The client's, likewise.
        mode: `direct` or `docker`.
        size_bytes: `pg_database_size` when the dump began.
        roles: Roles that own something or are granted something in the dump.
        extensions: Installed extensions, name to version.
        rows: Rows per table, keyed by the dump's own qualified name (`public."Task"`), counted in the dump stream.
        properties: For a restore where there is no such database any more; without parameters that have a dot in their
            name, where applications keep secrets. None in older manifests.
    """

    name: str
    server_version: str
    server_id: str = ""
    pg_dump_version: str
    mode: str
    size_bytes: int
    roles: tuple[str, ...] = ()
    extensions: dict[str, str] = Field(default_factory=dict)
    rows: dict[str, int] = Field(default_factory=dict)
    properties: DatabaseProperties | None = None


class ExclusionFacts(_Part):
    """What one exclusion rule kept out of a source archive: entries, and bytes of the files among them."""

    rule: str
    count: int
    bytes: int


class SourceFacts(_Part):
    """What a source archive holds.

    Attributes:
        path: The folder archived.
        files: Regular files (each hard link's first name).
        folders: Folders.
        links: Symbolic and further hard links.
        bytes: Bytes of the regular files.
        excluded: What each rule kept out.
        warnings: What was skipped or changed while it was read, one line each.
        git_commit: The commit checked out there, if any.
    """

    path: str
    files: int
    folders: int
    links: int
    bytes: int
    excluded: tuple[ExclusionFacts, ...] = ()
    warnings: tuple[str, ...] = ()
    git_commit: str | None = None


class Rotation(_Part):
    """The same content under another key, while it takes the file's place: which of the two is there, its IV tells.

    Attributes:
        iv: The first 16 bytes of the file under the new key, in hex.
        key_id: That key.
        stored_sha256: Of that file.
    """

    iv: str
    key_id: str
    stored_sha256: str


class Manifest(_Part):
    """All that is known of one backup file. Sizes in bytes, times aware (UTC in JSON), hashes in lower-case hex.

    Attributes:
        sha256: Of the compressed bytes, before encryption.
        stored_sha256: Of the file as stored.
        key_id: Which key encrypted it (`keys.EncryptionKey.key_id`).
        retention: The policy of the schedule that made it.
        held: Pinned against every retention rule.
        proven_at: When a drill last restored it.
        rotation: While the file is being replaced by the same content under another key; None otherwise.
        seal: Id of the key and HMAC-SHA256 over everything else under its seal key, as `id:hex`; None without a key.
    """

    format_version: int = FORMAT_VERSION
    filename: str
    type: BackupType
    trigger: Trigger
    schedule_id: int | None = None
    schedule_name: str | None = None
    created_at: Moment
    raw_bytes: int
    compressed_bytes: int
    stored_bytes: int
    sha256: str
    stored_sha256: str
    encrypted: bool
    key_id: str | None = None
    database: DatabaseFacts | None = None
    source: SourceFacts | None = None
    retention: RetentionPolicy | None = None
    duration_seconds: float
    stages: tuple[StageReport, ...] = ()
    run_id: str = ""
    verification: Verification = Verification()
    held: bool = False
    proven_at: Moment | None = None
    rotation: Rotation | None = None
    seal: str | None = None

    @property
    def sealed_by(self) -> str | None:
        """The id of the key that sealed it."""
        return self.seal.partition(":")[0] if self.seal is not None else None

    def of_file_beginning(self, head: bytes) -> Manifest:
        """The manifest of the file that begins with `head` (16 bytes), where a rotation was under way."""
        if self.rotation is None or head.hex() != self.rotation.iv:
            return self
        return self.model_copy(update={"key_id": self.rotation.key_id, "stored_sha256": self.rotation.stored_sha256})

    def to_json(self, key: EncryptionKey | None) -> bytes:
        """The manifest as JSON for people and programs, sealed with `key` where there is one."""
        fields = self.model_dump(mode="json", exclude={"seal"})
        fields["seal"] = _seal(fields, key) if key else None
        return (json.dumps(fields, ensure_ascii=False, indent=2) + "\n").encode()


_canonical = json.JSONEncoder(ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode


def _seal(fields: dict[str, Any], key: EncryptionKey) -> str:
    canonical = _canonical({name: value for name, value in fields.items() if name != "seal"})
    return f"{key.key_id}:{hmac.digest(key.seal_key, canonical.encode(), 'sha256').hex()}"


def parse_manifest(filename: str, content: bytes, keys: Keyring) -> Manifest:
    """Read `content`, found beside the file `filename`.

    Args:
        filename: The backup file's name; the manifest must be about it.
        content: The manifest file's bytes.
        keys: The keys a seal may have been made with. A seal of another key is not judged: the file it is about
            cannot be read without that key either.

    Raises:
        CorruptBackupError: Not a manifest, another file's, or edited since it was sealed.
    """
    where = filename + MANIFEST_SUFFIX
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptBackupError(f"The manifest {where} is not JSON: {error}.") from None
    if b"\\u" in content:  # json.loads passes halves of a surrogate pair, which are no text
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CorruptBackupError(f"The manifest {where} is not text: {error.reason}.") from None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CorruptBackupError(
            f"The manifest {where} has format version {version}; this release reads up to {FORMAT_VERSION}.",
            advice="Upgrade kanbu-backup-dagster to read it.",
        )
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise CorruptBackupError(f"The manifest {where} cannot be read: {field}: {first['msg']}.") from None
    if manifest.filename != filename:
        raise CorruptBackupError(f"The manifest {where} is about another file, {manifest.filename}.")
    name = require_name(filename)
    if (name.type, name.encrypted) != (manifest.type, manifest.encrypted):
        raise CorruptBackupError(f"The manifest {where} contradicts the file's name.")
    if keys.all:
        _judge_seal(where, manifest, fields, keys)
    return manifest


def _judge_seal(where: str, manifest: Manifest, fields: dict[str, Any], keys: Keyring) -> None:
    if manifest.seal is None:
        # A backup made while no key was set has an honest manifest without a seal; an encrypted one never has.
        if manifest.encrypted:
            raise CorruptBackupError(f"The manifest {where} has lost its seal: it was edited.")
        return
    if manifest.encrypted and manifest.key_id in keys.ids and manifest.sealed_by not in keys.ids:
        # Whoever edits a manifest could otherwise name a key that nobody has, and be believed.
        raise CorruptBackupError(f"The manifest {where} is sealed with key {manifest.sealed_by}, which is not set.")
    for key in keys.all:
        if key.key_id == manifest.sealed_by and not hmac.compare_digest(_seal(fields, key), manifest.seal):
            raise CorruptBackupError(f"The manifest {where} does not match its seal: it was edited.")

"""Making Dagster know what is in storage: storage is the truth, Dagster's record follows it.

What belongs here: comparing the two and telling Dagster the difference. What does not: how a file is recorded
(`register`).
"""

# No `from __future__ import annotations` here: Dagster reads the annotations of ops as objects.

from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from dagster import AssetRecordsFilter, DagsterInstance, MetadataValue, OpExecutionContext, op
from dagster._core.definitions.metadata.metadata_value import MetadataValue as AnyMetadata

from kanbu_backup_dagster.backup.environment import Environment
from kanbu_backup_dagster.backup.manifest import VerificationStatus
from kanbu_backup_dagster.backup.names import BackupType
from kanbu_backup_dagster.orchestration.assets import BACKUP_ASSETS, FINGERPRINT
from kanbu_backup_dagster.orchestration.failures import explained
from kanbu_backup_dagster.orchestration.known_storage import prepare_storage
from kanbu_backup_dagster.orchestration.register import JUDGED, Register
from kanbu_backup_dagster.orchestration.resources import BackupEnvironment
from kanbu_backup_dagster.orchestration.target_lock import STORAGE_PATIENCE_SECONDS, Holder, open_locks, storage_name
from kanbu_backup_dagster.orchestration.verify_ops import observe_counts

_PAGE = 1000


@dataclass
class Difference:
    """What Dagster did not know.

    Attributes:
        new: Files it had not heard of.
        changed: Files whose manifest says something else than it had recorded.
        vanished: Files it knew that are no longer in storage.
    """

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.vanished)


@op(description="Compares Dagster's record with the storage, by the manifests alone, and brings it up to date.")
def sync(context: OpExecutionContext, environment: BackupEnvironment) -> None:
    with explained():
        loaded = environment.load()
        # An empty folder where a volume is not mounted would make every backup look lost.
        prepare_storage(context.instance, loaded.storage, needed_bytes=0)
        holder = Holder.now(context.job_name, context.run_id)
        with open_locks().hold(
            storage_name(loaded.storage), holder, exclusive=False, wait_seconds=STORAGE_PATIENCE_SECONDS
        ):
            differences = {kind: _sync_type(context, loaded, kind) for kind in BackupType}
    told: dict[str, Any] = {}
    for name in ("new", "changed", "vanished"):
        files = [file for difference in differences.values() for file in getattr(difference, name)]
        told[name] = MetadataValue.json(files)
        if files:
            log = context.log.warning if name == "vanished" else context.log.info
            log(f"[Catalog] {len(files)} {name}: {', '.join(files[:20])}{' and more' if len(files) > 20 else ''}")
    context.add_output_metadata(told)


def _sync_type(context: OpExecutionContext, loaded: Environment, backup_type: BackupType) -> Difference:
    register, difference = Register.of_run(context), Difference()
    known = set(context.instance.get_dynamic_partitions(BACKUP_ASSETS[backup_type][1]))
    recorded = _recorded(context.instance, backup_type, known)
    backups = loaded.catalog.backups(backup_type)
    for backup in backups:
        before = recorded.get(backup.filename, {})
        if backup.filename not in known:
            difference.new.append(backup.filename)
        elif _text(before, FINGERPRINT) != backup.fingerprint:
            difference.changed.append(backup.filename)
        else:
            continue
        was, now = _text(before, "verification"), backup.status
        # A verdict can be taken back only by a new materialization, and a file that got a manifest has more to tell.
        if backup.filename not in known or now not in JUDGED or was == VerificationStatus.NO_CHECKSUM.value:
            register.add(backup, loaded.storage.path(backup.filename))
            was = None
        register.observe(backup)
        if was != now.value:
            register.evaluate(backup, backup.verification)
    for filename in sorted(known - {backup.filename for backup in backups}):
        difference.vanished.append(filename)
        noticed = MetadataValue.timestamp(datetime.now(timezone.utc))
        register.remove(
            filename,
            backup_type,
            {
                "status": MetadataValue.text("vanished"),
                "noticed_at": noticed,
                "run": MetadataValue.dagster_run(context.run_id),
            },
        )
    if difference:
        observe_counts(context, loaded, backup_type)
    return difference


def _recorded(instance: DagsterInstance, backup_type: BackupType, known: set[str]) -> dict[str, dict[str, AnyMetadata]]:
    """The last recorded state of each known file, from the asset's observations, the latest first."""
    found: dict[str, dict[str, AnyMetadata]] = {}
    cursor: str | None = None
    while len(found) < len(known):
        page = instance.fetch_observations(
            AssetRecordsFilter(BACKUP_ASSETS[backup_type][0]), limit=_PAGE, cursor=cursor
        )
        for record in page.records:
            seen = record.asset_observation
            if seen is not None and seen.partition in known and FINGERPRINT in seen.metadata:
                found.setdefault(str(seen.partition), dict(seen.metadata))
        if not page.has_more:
            break
        cursor = page.cursor
    return found


def _text(metadata: dict[str, AnyMetadata], name: str) -> str | None:
    entry = metadata.get(name)
    return str(entry.value) if entry is not None else None

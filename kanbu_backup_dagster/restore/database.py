"""A restore of a database, step by step: load, check, swap.

What belongs here: the order of things within each step. What does not: the pre-restore backup and who runs the steps
(`orchestration`).

Until `swap_in` nothing but the staging database and missing roles was touched; `abandon` takes the former away.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from kanbu_backup_dagster.backup.keys import Keyring
from kanbu_backup_dagster.backup.landing import Progress
from kanbu_backup_dagster.backup.reading import prove
from kanbu_backup_dagster.errors import RestoreError
from kanbu_backup_dagster.restore.checks import Checked, check_database
from kanbu_backup_dagster.restore.plan import RestorePlan, find_backup, is_empty
from kanbu_backup_dagster.restore.server import Server, find_databases, run
from kanbu_backup_dagster.restore.staging import (
    Loaded,
    create_anew,
    create_staging,
    drop_leftovers,
    drop_staging,
    load,
    read_head,
)
from kanbu_backup_dagster.restore.swap import Swapped, dress, dress_anew, swap, wait_until_unused
from kanbu_backup_dagster.settings import Settings
from kanbu_backup_dagster.sources.commands import quote_identifier
from kanbu_backup_dagster.storage.protocol import Storage


def load_staging(
    plan: RestorePlan,
    settings: Settings,
    storage: Storage,
    keys: Keyring,
    *,
    on_checked: Callable[[int], None] = lambda count: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Loaded:
    """Verify the file, make the staging database, and load the file into it.

    The caller holds the lock on the target.

    Args:
        on_checked: Told how many content bytes the first pass has read.
        on_progress: Told how far the second pass is.
        tell: Told in words what is done on the way.

    Raises:
        KanbuError: It could not be done; the staging database is to be abandoned.
    """
    backup, storage = find_backup(plan.request, storage, keys)
    for name in drop_leftovers(plan.server, settings, plan.target):
        tell(f"Removed what a killed restore left: {name}")
    # The server makes the staging database meanwhile. One that replaces none waits: its encoding is told by the dump,
    # which is not to be believed before all of it is proven.
    with ThreadPoolExecutor(1, "staging") as beside:
        making = None
        if plan.live is not None:
            making = beside.submit(create_staging, plan.server, settings, plan.staging, like=plan.live)
        proven = prove(backup, storage, keys, on_bytes=on_checked)
        if making is not None:
            making.result()
    head = read_head(backup, storage, keys)
    if head.creates_database:
        raise RestoreError(
            f"{backup.filename} drops or creates a database by itself (pg_dump --create), and is not loaded.",
            advice="Take those statements and the \\connect line out of it, or restore it by hand with psql.",
        )
    create_roles(plan.server, settings, plan.missing_roles)
    for role in plan.missing_roles:
        tell(f"Created the role {role}, which cannot log in")
    remarks = []
    if plan.live is None:
        remarks = create_anew(plan.server, settings, plan.staging, recorded=plan.recorded, encoding=head.encoding)
    loaded = load(
        backup,
        storage,
        keys,
        plan.server,
        settings,
        plan.staging,
        proven=proven,
        on_progress=on_progress,
    )
    for statement in loaded.left_out:
        tell(f"Left out, since this server does not know it: {statement}")
    return replace(loaded, remarks=tuple(remarks))


def create_roles(server: Server, settings: Settings, roles: tuple[str, ...]) -> None:
    """Create roles that cannot log in.

    Raises:
        SourceError: The server refused.
    """
    if roles:
        run(server, settings, [f"CREATE ROLE {quote_identifier(role)} NOLOGIN;" for role in roles])


def check_staging(plan: RestorePlan, settings: Settings, storage: Storage, keys: Keyring, loaded: Loaded) -> Checked:
    """Look at what was loaded.

    Raises:
        RestoreError: It is not what was backed up.
    """
    backup, _ = find_backup(plan.request, storage, keys)
    facts = backup.manifest.database if backup.manifest else None
    expected = facts.rows if facts else loaded.findings.rows if loaded.findings else {}
    checked = check_database(plan.server, settings, plan.staging, expected)
    if facts is None and checked.tables == 0 and not plan.request.force:
        raise RestoreError(
            f"{backup.filename} holds no table, and has no manifest that says so.",
            advice="If that is right, use force (--force).",
        )
    return checked


def swap_in(plan: RestorePlan, settings: Settings) -> Swapped:
    """Give the staging database the live name.

    Raises:
        KanbuError: It could not be done; the live database is as it was.
    """
    remarks = []
    if plan.live is not None:
        dress(plan.server, settings, plan.staging, like=plan.live)
    elif plan.recorded is not None:
        remarks = dress_anew(plan.server, settings, plan.staging, recorded=plan.recorded)
    wait_until_unused(plan.server, settings, plan.staging)
    swapped = swap(
        plan.server,
        settings,
        staging=plan.staging,
        target=plan.target,
        expected=plan.live,
        by=plan.request.file,
    )
    return replace(swapped, remarks=tuple(remarks))


def is_kept(plan: RestorePlan, settings: Settings, replaced: str) -> bool:
    """Whether the database that is called `replaced` now stays until the restored one has a verified backup.

    One that was empty when the restore was planned, and of which there is no pre-restore backup, may have been written
    to since.

    Raises:
        SourceError: It cannot be asked.
    """
    if plan.empty:
        return not is_empty(plan.server, settings, replaced)
    return plan.request.keep_replaced


def abandon(plan: RestorePlan, settings: Settings) -> bool:
    """Drop the staging database if it is still there; a live name is never touched.

    Returns:
        Whether it was there.
    """
    if plan.staging not in find_databases(plan.server, settings):
        return False
    drop_staging(plan.server, settings, plan.staging)
    return True

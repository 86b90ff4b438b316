"""A project board of any size on an embedded PostgreSQL server, for benchmarks.

Its shape is that of a Prisma application: UUID keys, prose in tasks, and an activity log that is most of the bytes.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from kanbu_backup_dagster.sources.embedded_postgres import SUPERUSER, EmbeddedPostgres

_TASKS_A_STEP = 250_000
# What a task and its three entries in the activity log are in a dump, about.
_BYTES_A_TASK = 1250
_SCHEMA = """
CREATE TABLE words AS SELECT row_number() OVER () - 1 AS n, w FROM unnest(string_to_array(
'task board sprint review the and for with this that fix bug login page button user project please check after before '
'release deploy server error message when clicking save field form title comment assign due date label column move '
'done todo progress blocked customer reported issue cannot open file upload image attach link email notify team '
'meeting notes plan design draft final update version test fails passes sometimes only on mobile desktop browser '
'chrome firefox slow fast query database index migration schema add remove rename refactor cleanup docs typo '
'translate german dutch french settings profile admin role permission workspace invite member search filter sort',
' ')) w;
CREATE TABLE "Task" (
  id uuid PRIMARY KEY, "projectId" uuid NOT NULL, title text NOT NULL, description text, position float8,
  priority text, "createdAt" timestamptz NOT NULL, done boolean NOT NULL, meta jsonb);
CREATE TABLE "Activity" (
  id uuid PRIMARY KEY, "taskId" uuid NOT NULL, "userId" int NOT NULL, action text NOT NULL, path text NOT NULL,
  details jsonb, "userAgent" text, at timestamptz NOT NULL);
CREATE FUNCTION prose(seed bigint, length int) RETURNS text LANGUAGE sql STABLE AS $$
  SELECT string_agg(w, ' ') FROM generate_series(1, length) g
  JOIN words ON n = abs(hashint8(seed * 31 + g)) % (SELECT count(*) FROM words) $$;
CREATE TABLE prose_pool AS SELECT i AS n, prose(i, 6) AS short, prose(i * 7919, 28) AS long
  FROM generate_series(0, 49999) i;
CREATE INDEX ON prose_pool (n);
"""
_TASKS = """
INSERT INTO "Task"
SELECT md5(i::text)::uuid, md5((i % 977)::text)::uuid, a.short || ' ' || i, a.long || E'\\n' || b.short, i * 1.5,
       (ARRAY['low', 'medium', 'high'])[1 + i % 3], timestamptz '2024-01-01' + i * interval '7.013 seconds', i % 5 = 0,
       jsonb_build_object('estimate', i % 13, 'tag', b.short)
FROM generate_series({first}, {last}) i
JOIN prose_pool a ON a.n = abs(hashint8(i)) % 50000
JOIN prose_pool b ON b.n = abs(hashint8(i * 3)) % 50000
"""
_ACTIVITY = """
INSERT INTO "Activity"
SELECT md5(i || '/' || k)::uuid, md5(i::text)::uuid, abs(hashint8(i * k)) % 500,
       (ARRAY['moved', 'assigned', 'commented', 'closed'])[1 + i % 4], '/api/tasks/' || md5(i::text)::uuid,
       jsonb_build_object('from', 'todo', 'to', 'doing', 'etag', md5((i * k)::text)),
       'Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0 Safari/537.36',
       timestamptz '2024-01-01' + i * interval '7.013 seconds' + k * interval '1 hour'
FROM generate_series({first}, {last}) i, generate_series(1, 3) k
"""


@contextmanager
def board(gigabytes: float) -> Iterator[tuple[EmbeddedPostgres, str]]:
    """A server with a database `kanbu` whose dump is at least `gigabytes` (10^9 bytes), and its URL.

    The URL is one of TCP with a password, as applications have it. It matters: a Unix socket's small buffer stalls the
    server whenever pg_dump waits for a core, TCP's does not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "fsync": "off",
        "max_wal_size": "8GB",
        "shared_buffers": "512MB",
        "checkpoint_timeout": "1h",
    }
    with EmbeddedPostgres.temporary(settings=settings) as server:
        server.create_database("kanbu", _SCHEMA)
        grow(server, "kanbu", gigabytes)
        password = secrets.token_hex(8)
        server.psql(f"ALTER ROLE {SUPERUSER} PASSWORD '{password}'")
        yield server, f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{port}/kanbu"


def grow(server: EmbeddedPostgres, database: str, gigabytes: float) -> None:
    """Add tasks until the dump is at least that large."""
    tasks = int(server.psql('SELECT count(*) FROM "Task"', database))
    wanted = int(gigabytes * 1e9 / _BYTES_A_TASK) + 1
    for first in range(tasks + 1, wanted + 1, _TASKS_A_STEP):
        span = {"first": first, "last": min(first + _TASKS_A_STEP - 1, wanted)}
        server.psql(_TASKS.format(**span) + ";" + _ACTIVITY.format(**span), database)
    if wanted > tasks:
        server.psql("VACUUM ANALYZE", database)
        server.psql("CHECKPOINT", database)

-- All that a plain pg_dump carries, in one database. Run as a superuser.
CREATE SCHEMA board;
CREATE SCHEMA "Schema with ""quotes"" and spaces";
COMMENT ON SCHEMA board IS 'it''s a \ board';

CREATE TYPE board.status AS ENUM ('open', 'in progress', 'it''s done');
CREATE TYPE board.point AS (x integer, y numeric(10, 2));
CREATE TYPE board.span AS RANGE (subtype = timestamptz);
CREATE DOMAIN board.email AS text COLLATE "C" NOT NULL DEFAULT 'x@y' CONSTRAINT has_at CHECK (VALUE ~ '@');
CREATE COLLATION board.bytes FROM "C";

CREATE FUNCTION board.plus(integer, integer) RETURNS integer LANGUAGE sql IMMUTABLE STRICT AS 'SELECT $1 + $2';
CREATE FUNCTION board.tricky() RETURNS text LANGUAGE plpgsql SET search_path TO 'board', 'public' AS $body$
BEGIN
  -- COPY board.task (id) FROM stdin; is no COPY, and neither is \. here
  RETURN 'a;b' || $q$ -- PostgreSQL database dump complete $q$ || E'\\.\n\'';
END
$body$;
CREATE PROCEDURE board.do_nothing() LANGUAGE sql AS 'SELECT 1';
CREATE AGGREGATE board.total(integer) (SFUNC = board.plus, STYPE = integer, INITCOND = '0');
CREATE OPERATOR board.<+> (LEFTARG = integer, RIGHTARG = integer, FUNCTION = board.plus, COMMUTATOR = OPERATOR(board.<+>));
CREATE CAST (board.point AS text) WITH INOUT;
CREATE FUNCTION board.point_less(board.point, board.point) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT ($1).x < ($2).x';

CREATE TABLE board."user" (
  id integer GENERATED ALWAYS AS IDENTITY (START 10 INCREMENT 5) PRIMARY KEY,
  "select" text COLLATE board.bytes DEFAULT 'a''b\c',
  mail board.email,
  big bigserial UNIQUE,
  doubled integer GENERATED ALWAYS AS (length("select") * 2) STORED,
  place board.point, spent board.span, tags text[], data jsonb, bin bytea, num numeric, at timestamptz, xid uuid,
  CONSTRAINT positive CHECK (big > 0) NO INHERIT
);
INSERT INTO board."user" ("select", mail, place, spent, tags, data, bin, num, at, xid)
SELECT repeat(chr(65 + i % 26), i % 7) || E'\t\\N\n\\.\r', 'u' || i || '@example.org', (i, i / 3.0)::board.point,
       board.span(timestamptz '2026-01-01' , timestamptz '2026-01-01' + i * interval '1 hour'), ARRAY['a', NULL, '"{}', E'\\'],
       jsonb_build_object('n', i, 'text', E'ü\u2028"\\'), decode(lpad(to_hex(i), 8, '0'), 'hex'),
       CASE i % 3 WHEN 0 THEN 'NaN' WHEN 1 THEN i / 7.0 END, CASE WHEN i % 5 = 0 THEN 'infinity'::timestamptz END,
       md5(i::text)::uuid
  FROM generate_series(1, 500) i;
DELETE FROM board."user" WHERE id % 3 = 0;

CREATE TABLE board.task (
  id serial PRIMARY KEY, owner integer REFERENCES board."user" ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED,
  state board.status DEFAULT 'open', title text, body tsvector, during tstzrange
) WITH (fillfactor = 70, autovacuum_enabled = false);
INSERT INTO board.task (owner, state, title, body, during)
SELECT (SELECT id FROM board."user" ORDER BY id OFFSET i % 50 LIMIT 1), (ARRAY['open', 'in progress', 'it''s done']::board.status[])[i % 3 + 1],
       'Task ' || i, to_tsvector('simple', 'task number ' || i), tstzrange('2026-01-01', '2026-01-02')
  FROM generate_series(1, 1000) i;
ALTER TABLE board.task ADD CONSTRAINT long_title CHECK (length(title) > 100) NOT VALID;
CREATE INDEX task_text ON board.task USING gin (body);
CREATE INDEX task_open ON board.task (lower(title) DESC NULLS LAST, id) INCLUDE (owner) WHERE state = 'open';
CREATE STATISTICS board.task_stats (dependencies, mcv) ON owner, state FROM board.task;
ALTER TABLE board.task CLUSTER ON task_pkey;
ALTER TABLE board.task REPLICA IDENTITY FULL;
ALTER TABLE board.task ALTER COLUMN title SET STATISTICS 500, ALTER COLUMN title SET STORAGE EXTERNAL;

CREATE TABLE board.event (at date NOT NULL, kind text, n integer, PRIMARY KEY (at, kind, n)) PARTITION BY RANGE (at);
CREATE TABLE board.event_2025 PARTITION OF board.event FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
CREATE TABLE board.event_2026 PARTITION OF board.event FOR VALUES FROM ('2026-01-01') TO ('2027-01-01') PARTITION BY LIST (kind);
CREATE TABLE board.event_2026_a PARTITION OF board.event_2026 FOR VALUES IN ('a', 'b');
CREATE TABLE board.event_rest PARTITION OF board.event DEFAULT;
ALTER TABLE board.event DETACH PARTITION board.event_2025;
ALTER TABLE board.event ATTACH PARTITION board.event_2025 FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
INSERT INTO board.event SELECT date '2024-06-01' + i, CASE WHEN i % 2 = 0 THEN 'a' ELSE 'b' END, i FROM generate_series(1, 700) i;
CREATE INDEX event_kind ON board.event (kind);

CREATE TABLE board.animal (name text, legs integer CHECK (legs >= 0));
CREATE TABLE board.dog (barks boolean DEFAULT true) INHERITS (board.animal);
INSERT INTO board.animal VALUES ('ant', 6);
INSERT INTO board.dog VALUES ('rex', 4), ('fido', 3);
CREATE UNLOGGED TABLE board.scratch AS SELECT generate_series(1, 10) AS n;
CREATE TABLE board.empty ();
CREATE TABLE board."table" ("column" integer, "a
b" text, "--" text, "COPY x FROM stdin;" text);
INSERT INTO board."table" VALUES (1, E'line\nfeed', '--', '\.'), (2, NULL, '', E'\\N');
CREATE TABLE "Schema with ""quotes"" and spaces"."new
line;\!" (id integer);
INSERT INTO "Schema with ""quotes"" and spaces"."new
line;\!" SELECT generate_series(1, 7);
CREATE TABLE public.keep_out (r int4range, EXCLUDE USING gist (r WITH &&) DEFERRABLE);
INSERT INTO public.keep_out VALUES ('[1,5)'), ('[5,9)');

CREATE SEQUENCE board.odd AS smallint INCREMENT -3 MINVALUE -900 MAXVALUE 90 START 33 CACHE 4 CYCLE;
SELECT nextval('board.odd'), nextval('board.odd');

CREATE VIEW board.open_task WITH (security_barrier) AS SELECT id, title FROM board.task WHERE state = 'open' WITH LOCAL CHECK OPTION;
CREATE MATERIALIZED VIEW board.per_state AS SELECT state, count(*) FROM board.task GROUP BY 1;
CREATE UNIQUE INDEX ON board.per_state (state);
CREATE MATERIALIZED VIEW board.unfilled AS SELECT 1 AS one WITH NO DATA;
CREATE RULE quiet AS ON DELETE TO board.open_task DO INSTEAD NOTHING;
CREATE FUNCTION board.touched() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER touch BEFORE UPDATE OF title ON board.task FOR EACH ROW WHEN (OLD.title IS DISTINCT FROM NEW.title) EXECUTE FUNCTION board.touched();
CREATE CONSTRAINT TRIGGER later AFTER INSERT ON board.task DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION board.touched();
ALTER TABLE board.task DISABLE TRIGGER touch;
CREATE FUNCTION board.on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN NULL; END';
CREATE EVENT TRIGGER watch_ddl ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION board.on_ddl();

DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'kanbu reader') THEN CREATE ROLE "kanbu reader"; END IF;
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'kanbu_owner') THEN CREATE ROLE kanbu_owner; END IF;
END $$;
ALTER TABLE board.task ENABLE ROW LEVEL SECURITY;
ALTER TABLE board.task FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tasks ON board.task AS RESTRICTIVE FOR SELECT TO "kanbu reader" USING (owner IS NOT NULL);
GRANT USAGE ON SCHEMA board TO "kanbu reader" WITH GRANT OPTION;
GRANT SELECT (id, title), UPDATE (title) ON board.task TO "kanbu reader";
REVOKE EXECUTE ON FUNCTION board.tricky() FROM PUBLIC;
ALTER DEFAULT PRIVILEGES FOR ROLE kanbu_owner IN SCHEMA board GRANT SELECT ON TABLES TO "kanbu reader";
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
ALTER TABLE board.animal OWNER TO kanbu_owner;
CREATE PUBLICATION some_tables FOR TABLE board.task, board.animal WITH (publish = 'insert');
CREATE PUBLICATION all_tables FOR ALL TABLES;
CREATE SUBSCRIPTION idle CONNECTION 'host=nowhere.invalid dbname=x' PUBLICATION p WITH (connect = false, slot_name = NONE, enabled = false);

CREATE FOREIGN DATA WRAPPER nothing OPTIONS (debug 'true');
CREATE SERVER elsewhere TYPE 'x' VERSION '1' FOREIGN DATA WRAPPER nothing OPTIONS (host 'h');
CREATE USER MAPPING FOR PUBLIC SERVER elsewhere OPTIONS ("user" 'u');
CREATE FOREIGN TABLE board.far (id integer OPTIONS (name 'ident') NOT NULL, t text) SERVER elsewhere OPTIONS ("table" 't');
CREATE TEXT SEARCH DICTIONARY board.plain (TEMPLATE = simple, stopwords = 'english');
CREATE TEXT SEARCH CONFIGURATION board.search (PARSER = default);
ALTER TEXT SEARCH CONFIGURATION board.search ADD MAPPING FOR asciiword, word WITH board.plain;
CREATE CONVERSION board.conv FOR 'LATIN1' TO 'UTF8' FROM iso8859_1_to_utf8;
CREATE OPERATOR FAMILY board.family USING btree;
CREATE ACCESS METHOD another_heap TYPE TABLE HANDLER heap_tableam_handler;
CREATE TABLE board.in_another_heap (n integer) USING another_heap;
INSERT INTO board.in_another_heap VALUES (1), (2);

SELECT lo_from_bytea(4711, decode(repeat('00ff', 5000), 'hex')), lo_from_bytea(4712, ''), lo_create(4713);
COMMENT ON LARGE OBJECT 4711 IS 'a large object';
GRANT SELECT ON LARGE OBJECT 4712 TO "kanbu reader";
ALTER LARGE OBJECT 4713 OWNER TO kanbu_owner;

COMMENT ON TABLE board."table" IS E'several\nlines; and a ''quote''';
COMMENT ON COLUMN board."table"."column" IS 'a column';
COMMENT ON CONSTRAINT positive ON board."user" IS 'a constraint';
COMMENT ON TRIGGER touch ON board.task IS 'a trigger';

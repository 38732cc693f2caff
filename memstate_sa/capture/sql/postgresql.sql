--- Triggers of a tracked table on PostgreSQL. They run once per statement, for all of its rows.
---
--- memstate_sa.capture.sql_text reads this file. A line "-- name: x" begins the template x. Names in braces are filled
--- in. Lines that begin with three dashes are for you alone; other comments become part of the function.

-- name: function
{header}
DECLARE
  moment text := {moment};
  its_tx text := coalesce(
    {tx},
    -- Of another program: one for each of its transactions, in the form of ours.
    lpad(to_hex((extract(epoch FROM transaction_timestamp()) * 1000)::bigint), 12, '0')
      || lpad(to_hex(pg_current_xact_id()::text::bigint), 20, '0')
  );
  its_time timestamptz := clock_timestamp();
  counts boolean := {step} IS DISTINCT FROM 'off';
  undoes boolean := {skip} IS NOT DISTINCT FROM 'on';
  nested boolean := pg_trigger_depth() > 1;
BEGIN
{check}
  IF nested THEN
    PERFORM set_config('memstate.nested', moment, true);
  END IF;

{body}

  RETURN NULL;
END

--- The body of a function.
---
--- One statement may touch a row several times, by cascades of foreign keys or by other triggers. The first old row of
--- a key has the image before the statement, unless the statement inserted the row before that. The current image is
--- read from the table. A change is logged if it differs from the last entry of the log.
---
--- A fact that an undo logs itself is looked up by a scalar subquery. For an EXISTS, PostgreSQL would build a hash of
--- all facts of the undo, once for each of its statements.

-- name: baselines
  INSERT INTO {ours}.memstate_log (tx, at, xid, version, step, entity, key, op, image)
  SELECT its_tx, its_time, pg_current_xact_id()::text::bigint, {version}, false, {entity}, o.key, 'baseline',
    o.image::jsonb
  FROM ({old}) AS o LEFT JOIN ({new}) AS n ON n.key = o.key LEFT JOIN ({now}) AS t ON t.key = o.key
  WHERE (n.n IS NULL OR o.n <= n.n) AND o.image IS DISTINCT FROM t.image
    AND NOT (undoes AND coalesce(
      (SELECT true FROM {ours}.memstate_trigger_context WHERE name = 'skip ' || {entity} || o.key), false))
    AND (SELECT true FROM {ours}.memstate_log WHERE entity = {entity} AND key = o.key ORDER BY id DESC LIMIT 1) IS NULL;

-- name: changes
  WITH state AS (
    SELECT k.key, t.image::jsonb AS image, l.op AS last_op, l.image AS last_image
    FROM ({touched}) AS k LEFT JOIN ({now}) AS t ON t.key = k.key LEFT JOIN LATERAL ({last}) AS l ON true
    WHERE NOT (undoes AND coalesce(
      (SELECT true FROM {ours}.memstate_trigger_context WHERE name = 'skip ' || {entity} || k.key), false))
  ), changed AS (
    SELECT key, image, CASE WHEN image IS NULL THEN 'delete' WHEN last_op IS DISTINCT FROM 'delete'
      AND last_op IS NOT NULL THEN 'update' ELSE 'insert' END AS op
    FROM state WHERE CASE WHEN image IS NULL THEN coalesce(last_op, 'delete') <> 'delete'
      ELSE coalesce(last_op, 'delete') = 'delete' OR image IS DISTINCT FROM last_image END
  ), logged AS (
    INSERT INTO {ours}.memstate_log (tx, at, xid, snapshot, version, step, entity, key, op, image)
    SELECT its_tx, its_time, pg_current_xact_id()::text::bigint,
      CASE WHEN row_number() OVER () = 1 THEN pg_current_snapshot()::text END, {version}, counts, {entity}, key, op,
      image
    FROM changed
  )
  INSERT INTO {ours}.memstate_outbox (tx, created_at, xid, intent, slot, entity, key)
  SELECT its_tx, its_time, pg_current_xact_id()::text::bigint, false,
    mod(get_byte(sha256(convert_to({entity} || key, 'UTF8')), 0), {slots}), {entity}, key
  FROM changed;

--- A Session reads this setting before its COMMIT. To read the log instead would be a conflict in SERIALIZABLE.

-- name: remember_tx
  IF FOUND AND position(its_tx IN coalesce(current_setting('memstate.logged', true), '')) = 0 THEN
    PERFORM set_config('memstate.logged', concat_ws(' ', current_setting('memstate.logged', true), its_tx), true);
  END IF;

--- There are two cases in which the new rows of the statement are logged, and the table is not read:
--- 1. A policy applies to the function's owner (FORCE ROW LEVEL SECURITY), and may hide rows of the table.
--- 2. In SERIALIZABLE, each read can make unrelated transactions fail, because PostgreSQL locks parts of an index. So
---    the table is not read, and the log is not read for a new row.
--- An exception to case 2: a trigger of the application ran another statement within this one. The setting
--- memstate.nested shows that.

-- name: shown_or_read
  IF row_security_active(TG_RELID) OR (NOT nested AND current_setting('transaction_isolation') = 'serializable'
    AND current_setting('memstate.nested', true) IS DISTINCT FROM moment)
  THEN

{shown}

  ELSE

{read}

  END IF;

-- name: check_truncate
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'TRUNCATE would remove rows that this transaction does not see, past their log'
      USING HINT = 'Truncate in READ COMMITTED.';
  END IF;
  IF row_security_active(TG_RELID) THEN
    RAISE EXCEPTION 'TRUNCATE would remove rows that row-level security hides from this function, past their log'
      USING HINT = 'Delete the rows, or give the function an owner with BYPASSRLS.';
  END IF;

--- The rows of the body.

-- name: numbered_rows
SELECT {key} AS key, {image} AS image, {criterion} AS ours, row_number() OVER () AS n FROM {rows} AS r

-- name: first_old
SELECT DISTINCT ON (key) key, image, n FROM ({numbered_rows}) AS x WHERE ours ORDER BY key, n

-- name: first_new
SELECT key, min(n) AS n FROM ({numbered_rows}) AS x WHERE ours GROUP BY key

-- name: last_new
SELECT DISTINCT ON (key) key, image FROM ({numbered_rows}) AS x WHERE ours ORDER BY key, n DESC

--- This SELECT reads row by row, because a cached plan must not read the whole table.

-- name: current_rows
SELECT {key} AS key, {image} AS image
FROM ({touched}) AS k CROSS JOIN LATERAL (SELECT * FROM {table} AS i WHERE {same} LIMIT 1) AS t
WHERE {criterion}

-- name: touched_keys
SELECT {keys} FROM {rows} AS r

-- name: all_rows
SELECT {key} AS key, {image} AS image, 0::bigint AS n FROM {table} AS t WHERE {criterion}

-- name: no_rows
SELECT NULL::text AS key, NULL::text AS image, 0::bigint AS n WHERE false

-- name: keys
SELECT key FROM ({rows}) AS y

-- name: last_entry
SELECT op, image FROM {ours}.memstate_log WHERE entity = {entity} AND key = k.key ORDER BY id DESC LIMIT 1

-- name: no_last_entry
SELECT NULL::text AS op, NULL::jsonb AS image

--- The schema of a table, as an identifier and as a literal, and the reason why triggers cannot capture it. Every name
--- is qualified, because the search_path of a migration may contain schemas of others.

-- name: schema
pg_catalog.quote_ident(CAST(n.nspname AS text))

-- name: schema_name
pg_catalog.quote_literal(CAST(n.nspname AS text))

-- name: parts
CASE
  WHEN c.relkind = 'p' THEN 'is partitioned'
  WHEN c.relispartition THEN 'is a partition'
  WHEN EXISTS (SELECT FROM pg_catalog.pg_inherits AS i WHERE c.oid IN (i.inhrelid, i.inhparent))
  THEN 'inherits, or is inherited'
END

-- name: from_table
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = CAST(pg_catalog.to_regclass({table}) AS oid)

--- Creates the triggers where Python cannot query the database first: in an offline script of Alembic.

-- name: offline
DECLARE
  its text;
  its_name text;
  ours text;
  parts text;
BEGIN
  SELECT {schema}, {schema_name}, {parts} INTO its, its_name, parts {from_its};
  SELECT {schema} INTO ours {from_ours};
  IF its IS NULL OR ours IS NULL OR parts IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = 'Cannot create triggers on ' || {table},
      DETAIL = 'It is partitioned or inherited, or it does not exist, or the tables of memstate_sa do not.';
  END IF;
{statements}
END

--- A source with this comment in front shows that other roles may run the function.

-- name: installed
SELECT nullif(n.nspname, current_schema()), c.relname, t.tgname,
  CASE WHEN {is_closed} THEN p.prosrc ELSE '-- others may run it' || p.prosrc END
FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid JOIN pg_class AS c ON c.oid = t.tgrelid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE t.tgname LIKE 'memstate\_%' AND t.tgenabled IN ('O', 'A')
  AND (CAST(:table AS text) IS NULL OR c.oid = to_regclass(CAST(:table AS text)))

--- Triggers of a tracked table on SQLite. They run once per row. The new row is read from the table, because triggers
--- of the application may have changed it.
---
--- memstate_sa.capture.sql_text reads this file. A line "-- name: x" begins the template x. Names in braces are filled
--- in. Lines that begin with three dashes are for you alone.

-- name: trigger
CREATE TRIGGER {name} {moment} ON {table} FOR EACH ROW {condition}BEGIN
{header}
{body}
END

--- Log the row before its change, if the log has no entry of it.

-- name: baseline
INSERT INTO memstate_log (tx, at, version, step, entity, key, op, image)
SELECT {tx}, {now}, {version}, 0, {entity}, {key}, 'baseline', {image} {source} {criterion}
  AND NOT EXISTS (SELECT 1 FROM memstate_log WHERE entity = {entity} AND key = {key})
  AND {is_ours};

--- Log the change of a key, if its last entry differs. An extra outbox row does no harm.

-- name: settle
INSERT INTO memstate_log (tx, at, version, step, entity, key, op, image)
SELECT {tx}, {now}, {version}, {step}, {entity}, {key}, {op}, {image} {from_row}
  AND ({op} = 'insert' OR {last_image} IS NOT {image})
  AND {is_ours} AND {when};
INSERT INTO memstate_log (tx, at, version, step, entity, key, op, image)
SELECT {tx}, {now}, {version}, {step}, {entity}, {key}, 'delete', NULL
WHERE {last_op} <> 'delete' AND NOT EXISTS (SELECT 1 {from_row})
  AND {is_ours} AND {when};
INSERT INTO memstate_outbox (tx, created_at, xid, intent, slot, entity, key)
SELECT tx, at, 0, 0, 0, entity, key FROM memstate_log
WHERE id = (SELECT max(id) FROM memstate_log)
  AND entity = {entity} AND key = {key} AND op <> 'baseline' AND {when};

-- name: from_row
FROM {table} AS r WHERE {same} AND {row_key} = {key} AND {criterion}

-- name: op
CASE WHEN coalesce({last_op}, 'delete') = 'delete' THEN 'insert' ELSE 'update' END

-- name: last
(SELECT {column} FROM memstate_log WHERE entity = {entity} AND key = {key} ORDER BY id DESC LIMIT 1)

-- name: is_ours
NOT EXISTS (SELECT 1 FROM memstate_trigger_context WHERE name = 'skip ' || {entity} || {key})

-- name: now
strftime('%Y-%m-%d %H:%M:%f000', 'now')

--- A trigger cannot know the transaction of a write without a Session. Such writes in one millisecond share a `tx`.

-- name: tx
coalesce((SELECT value FROM memstate_trigger_context WHERE name = 'tx'),
  (SELECT tx FROM memstate_log WHERE id = (SELECT max(id) FROM memstate_log) AND at = {now} AND tx LIKE 'outside-%'),
  'outside-' || lower(hex(randomblob(12))))

-- name: step
coalesce((SELECT value FROM memstate_trigger_context WHERE name = 'step'), 1)

-- name: installed
SELECT NULL, tbl_name, name, sql FROM sqlite_master
WHERE type = 'trigger' AND name LIKE 'memstate\_%' ESCAPE '\' AND (:table IS NULL OR tbl_name = :table)

"""Functions run only for the table and event that they were made for. The log refuses entries with old ids."""

from alembic import op

revision = "memstate_0003"
down_revision = "memstate_0002"
branch_labels = None
depends_on = None

# Copied from the version of that time, because the package creates other triggers today.
ON_POSTGRESQL = (
    """CREATE OR REPLACE FUNCTION memstate_append_only() RETURNS trigger LANGUAGE plpgsql SET search_path = \
pg_catalog, pg_temp AS $memstate$
BEGIN
  IF (CASE WHEN current_setting('memstate.rewrite_at', true) = extract(epoch FROM \
transaction_timestamp())::text THEN nullif(current_setting('memstate.rewrite', true), '') END) IS \
DISTINCT FROM 'on' THEN
    RAISE EXCEPTION USING ERRCODE = 'restrict_violation', MESSAGE = 'memstate_log is append-only: \
memory.rollback() undoes a change, memory.erase() forgets a fact, Retention(log=...) folds old entries';
  END IF;
  RETURN NULL;
END
$memstate$""",
    """REVOKE ALL ON FUNCTION memstate_append_only() FROM PUBLIC""",
    """CREATE OR REPLACE TRIGGER memstate_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON memstate_log \
FOR EACH STATEMENT EXECUTE FUNCTION memstate_append_only()""",
    """CREATE OR REPLACE FUNCTION memstate_append_only_insert() RETURNS trigger LANGUAGE plpgsql SECURITY \
DEFINER SET search_path = pg_catalog, pg_temp AS $memstate$
DECLARE
  ids regclass;
  newest bigint;
BEGIN
  -- memstate_sa: for one table and one event
  IF TG_TABLE_NAME <> 'memstate_log' OR TG_OP <> 'INSERT' OR TG_WHEN <> 'BEFORE' OR TG_LEVEL <> \
'ROW' THEN
    RAISE EXCEPTION USING ERRCODE = 'restrict_violation', MESSAGE = 'memstate_log is append-only: \
memory.rollback() undoes a change, memory.erase() forgets a fact, Retention(log=...) folds old entries';
  END IF;
  ids := format('%I.memstate_log_id_seq', TG_TABLE_SCHEMA);
  newest := pg_sequence_last_value(ids);
  IF newest IS NULL OR NEW.id = newest THEN
    RETURN NEW;
  END IF;
  BEGIN
    IF NEW.id = currval(ids) THEN
      RETURN NEW;
    END IF;
  EXCEPTION WHEN object_not_in_prerequisite_state THEN
    NULL;  -- This session has numbered no entry.
  END;
  IF NEW.id < newest OR NEW.id > 4611686018427387904 THEN
    RAISE EXCEPTION USING ERRCODE = 'restrict_violation', MESSAGE = 'memstate_log is append-only: \
memory.rollback() undoes a change, memory.erase() forgets a fact, Retention(log=...) folds old entries';
  END IF;
  PERFORM setval(ids, greatest(NEW.id, nextval(ids)));
  RETURN NEW;
END
$memstate$""",
    """REVOKE ALL ON FUNCTION memstate_append_only_insert() FROM PUBLIC""",
    """CREATE OR REPLACE TRIGGER memstate_append_only_insert BEFORE INSERT ON memstate_log FOR EACH ROW \
EXECUTE FUNCTION memstate_append_only_insert()""",
    # Close the functions of tracked tables, which an older version left open to all roles.
    """DO $memstate_do$
DECLARE
  f record;
  path text := pg_catalog.current_setting('search_path');
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
  FOR f IN
    SELECT p.proname, p.prosrc, n.nspname, t.its, t.relname, position('-- memstate_sa: for one table \
and one event' IN p.prosrc) > 0 AS is_checked,
      upper(split_part(p.proname, '_', 2)) AS event
    FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace LEFT JOIN LATERAL (
      SELECT i.nspname AS its, c.relname FROM pg_trigger AS t
      JOIN pg_class AS c ON c.oid = t.tgrelid JOIN pg_namespace AS i ON i.oid = c.relnamespace
      WHERE t.tgfoid = p.oid
      ORDER BY position(format('%I.%I', i.nspname, c.relname) IN p.prosrc) = 0, t.tgname <> \
p.proname, t.oid LIMIT 1
    ) AS t ON true
    WHERE p.proname LIKE 'memstate\\_%' AND p.prorettype = 'trigger'::regtype AND p.prosecdef AND \
position('memstate_log' IN p.prosrc) > 0 AND NOT (NOT has_function_privilege('public', p.oid, \
'EXECUTE') AND p.proconfig @> ARRAY['search_path=pg_catalog, pg_temp'] AND position('-- memstate_sa: \
for one table and one event' IN p.prosrc) > 0) AND pg_has_role(p.proowner, 'USAGE')
  LOOP
    IF f.its IS NULL THEN
      EXECUTE format('DROP FUNCTION %I.%I()', f.nspname, f.proname);
      CONTINUE;
    END IF;
    IF NOT f.is_checked AND position(E'\\nBEGIN\\n' IN f.prosrc) > 0 THEN
      f.prosrc := overlay(f.prosrc PLACING E'\\nBEGIN\\n' || format(
        '  -- memstate_sa: for one table and one event
  IF TG_TABLE_SCHEMA <> %1$L OR TG_TABLE_NAME <> %2$L OR TG_OP <> ''%3$s'' OR TG_WHEN <> ''%4$s'' OR \
TG_LEVEL <> ''STATEMENT'' THEN
    RAISE EXCEPTION USING ERRCODE = ''insufficient_privilege'',
      MESSAGE = ''This function captures %3$s of '' || %1$L || ''.'' || %2$L || '', not of '' || \
TG_TABLE_SCHEMA || ''.'' || TG_TABLE_NAME || ''.'',
      HINT = ''Was the table renamed or moved? Untrack it and track it again: \
memory.create_tables(engine), or a migration.'';
  END IF;
',
        f.its, f.relname, f.event, CASE f.event WHEN 'TRUNCATE' THEN 'BEFORE' ELSE 'AFTER' END
      ) FROM position(E'\\nBEGIN\\n' IN f.prosrc) FOR 7);
    END IF;
    EXECUTE format(
      'CREATE OR REPLACE FUNCTION %I.%I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER '
      'SET search_path = pg_catalog, pg_temp AS %L', f.nspname, f.proname, f.prosrc
    );
    EXECUTE format('REVOKE ALL ON FUNCTION %I.%I() FROM PUBLIC', f.nspname, f.proname);
  END LOOP;
  PERFORM pg_catalog.set_config('search_path', path, true);
END
$memstate_do$""",
)
# The function of 0001.
BEFORE = """CREATE OR REPLACE FUNCTION memstate_append_only() RETURNS trigger LANGUAGE plpgsql AS $memstate$
BEGIN
  IF current_setting('memstate.rewrite', true) IS DISTINCT FROM 'on' THEN
    RAISE EXCEPTION USING ERRCODE = 'restrict_violation', MESSAGE = 'memstate_log is append-only: \
memory.rollback() undoes a change, memory.erase() forgets a fact, Retention(log=...) folds old entries';
  END IF;
  RETURN NULL;
END
$memstate$"""
ON_SQLITE = """CREATE TRIGGER memstate_append_only_past AFTER INSERT ON memstate_log FOR EACH ROW WHEN EXISTS \
(SELECT 1 FROM memstate_log WHERE id > NEW.id) AND NOT EXISTS (SELECT 1 FROM memstate_current WHERE \
name = 'rewrite') BEGIN SELECT RAISE(ABORT, 'memstate_log is append-only: memory.rollback() undoes a \
change, memory.erase() forgets a fact, Retention(log=...) folds old entries'); END"""


def upgrade():
    if op.get_context().dialect.name == "postgresql":
        for statement in ON_POSTGRESQL:
            run(statement)
    else:
        run(ON_SQLITE)


def downgrade():
    """Restore the function of 0001. The functions of tracked tables stay closed."""
    if op.get_context().dialect.name == "postgresql":
        run("DROP TRIGGER IF EXISTS memstate_append_only_insert ON memstate_log")
        run("DROP FUNCTION IF EXISTS memstate_append_only_insert()")
        run(BEFORE)
    else:
        run("DROP TRIGGER IF EXISTS memstate_append_only_past")


def run(statement):
    """Run *statement* as it is. op.execute() would read a colon as a parameter."""
    context = op.get_context()
    if context.as_sql:
        context.impl.static_output(statement + context.impl.command_terminator)
    else:
        op.get_bind().exec_driver_sql(statement, execution_options={"no_parameters": True})

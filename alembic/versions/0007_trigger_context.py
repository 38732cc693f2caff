"""Rename the table memstate_current to memstate_trigger_context, also in the triggers that use it."""

import sqlalchemy as sa
from alembic import op

revision = "memstate_0007"
down_revision = "memstate_0006"
branch_labels = None
depends_on = None

OLD, NEW = "memstate_current", "memstate_trigger_context"

# Functions of tracked tables are in the schema of our tables. They keep their owner, rights and settings.
IN_FUNCTIONS = """DO $memstate_do$
DECLARE
  f record;
  ours oid := (SELECT relnamespace FROM pg_catalog.pg_class WHERE oid = CAST('{new}' AS regclass));
  path text := pg_catalog.current_setting('search_path');
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
  FOR f IN
    SELECT pg_get_functiondef(p.oid) AS source FROM pg_proc AS p
    WHERE p.pronamespace = ours AND p.proname LIKE 'memstate\\_%' AND p.prorettype = 'trigger'::regtype
      AND position('.{old} ' IN p.prosrc) > 0
  LOOP
    EXECUTE replace(f.source, '.{old} ', '.{new} ');
  END LOOP;
  PERFORM pg_catalog.set_config('search_path', path, true);
END
$memstate_do$"""

REFUSED = (
    "memstate_log is append-only: memory.rollback() undoes a change, memory.erase() forgets a fact, "
    "Retention(log=...) folds old entries"
)
# The triggers of the log on SQLite in the version of that time.
OF_LOG = (
    ("update", "BEFORE UPDATE", "1"),
    ("delete", "BEFORE DELETE", "1"),
    ("insert", "BEFORE INSERT", "EXISTS (SELECT 1 FROM memstate_log WHERE id = NEW.id)"),
    ("past", "AFTER INSERT", "EXISTS (SELECT 1 FROM memstate_log WHERE id > NEW.id)"),
)


def upgrade():
    rename(OLD, NEW)


def downgrade():
    rename(NEW, OLD)


def rename(old, new):
    context = op.get_context()
    if context.dialect.name == "postgresql":
        run(f"ALTER TABLE {old} RENAME TO {new}")
        run(f"ALTER TABLE {new} RENAME CONSTRAINT pk_{old} TO pk_{new}")
        run(IN_FUNCTIONS.format(old=old, new=new))
    elif context.as_sql:
        rename_on_sqlite_offline(old, new)
    else:
        rename_on_sqlite(old, new)


def rename_on_sqlite(old, new):
    """Copy the rows, because SQLite cannot rename a constraint, and would change the text of triggers."""
    create(new, f"pk_{new}")
    run(f"INSERT INTO {new} (name, value) SELECT name, value FROM {old}")
    naming = sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND instr(sql, :old)")
    for name, source in op.get_bind().execute(naming, {"old": old}).all():
        run(f'DROP TRIGGER "{name}"')
        run(source.replace(old, new))
    op.drop_table(old)


def rename_on_sqlite_offline(old, new):
    """Let SQLite rename the table in the triggers of tracked tables, which an offline script cannot know."""
    for name, _, _ in OF_LOG:
        run(f"DROP TRIGGER memstate_append_only_{name}")
    run(f"ALTER TABLE {old} RENAME TO {new}")
    create("memstate_renamed", f"pk_{new}")
    run(f"INSERT INTO memstate_renamed (name, value) SELECT name, value FROM {new}")
    run("PRAGMA legacy_alter_table = ON")
    op.drop_table(new)
    run(f"ALTER TABLE memstate_renamed RENAME TO {new}")
    run("PRAGMA legacy_alter_table = OFF")
    for name, moment, when in OF_LOG:
        run(
            f"CREATE TRIGGER memstate_append_only_{name} {moment} ON memstate_log FOR EACH ROW WHEN {when} "
            f"AND NOT EXISTS (SELECT 1 FROM {new} WHERE name = 'rewrite') "
            f"BEGIN SELECT RAISE(ABORT, '{REFUSED}'); END"
        )


def create(name, key):
    op.create_table(
        name,
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f(key)),
        comment="what triggers are told of the transaction that writes; empty outside of it",
        sqlite_with_rowid=False,
    )


def run(statement):
    """Run *statement* as it is. op.execute() would read a colon as a parameter."""
    context = op.get_context()
    if context.as_sql:
        context.impl.static_output(statement + context.impl.command_terminator)
    else:
        op.get_bind().exec_driver_sql(statement, execution_options={"no_parameters": True})

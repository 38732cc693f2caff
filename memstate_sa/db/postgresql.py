"""The PostgreSQL implementation of `dialects.Database`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, MetaData, Table, bindparam, func, inspect, schema, select, text, true
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.mock import MockConnection

from memstate_sa.db.functions import dollar_quoted
from memstate_sa.db.tables import UTCDateTime
from memstate_sa.errors import MemstateError

_RAW = {"no_parameters": True}

_limit = select(
    func.set_config("lock_timeout", bindparam("limit"), True),
    func.set_config("idle_in_transaction_session_timeout", bindparam("limit"), True),
)
_may_ask = select(func.has_function_privilege("pg_control_system()", "execute"))
# The timeline of the WAL insert position. It changes at once when a standby is promoted or a backup is recovered.
_cluster = text(
    "SELECT concat(system_identifier, '/', left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)) "
    "FROM pg_control_system()"
)
_one_at_a_time = select(func.pg_advisory_xact_lock(func.hashtextextended("memstate_sa", 0)))
_older_transactions = text(
    "SELECT count(*) FROM ("
    "SELECT greatest(age(backend_xmin), age(backend_xid)) AS age FROM pg_stat_activity WHERE datname = "
    "current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend' "
    "UNION ALL SELECT age(transaction) FROM pg_prepared_xacts WHERE database = current_database()"
    ") AS others WHERE age > age(CAST(CAST(:mark AS xid8) AS xid))"
)
# The functions are in the schema of our tables, and a database may have several such schemas. A replaced function keeps
# its owner, rights and settings.
_RENAME_IN_FUNCTIONS = """DO $memstate_do$
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


class Postgresql:
    name = "postgresql"
    blocking_driver = "postgresql+psycopg"
    has_one_writer = runs_in_process = has_dynamic_types = False
    has_writing_ctes = has_arrays = has_laterals = has_transaction_settings = aborts_on_error = True

    upsert = staticmethod(insert)

    def clock(self) -> ColumnElement[datetime]:
        return func.clock_timestamp(type_=UTCDateTime())

    def now(self, connection: Connection) -> datetime:
        now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        return now.astimezone(UTC)

    def isolation(self, level: str) -> dict[str, Any]:
        return {"isolation_level": level}

    @contextmanager
    def snapshot(self, engine: Engine) -> Iterator[Connection]:
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            try:
                yield connection
            finally:
                connection.rollback()

    @contextmanager
    def read_only(self, connection: Connection) -> Iterator[None]:
        connection.execute(text("SET TRANSACTION READ ONLY"))
        yield

    def prefer_temporary_tables(self, connection: Connection) -> None:
        path = connection.execute(select(func.current_setting("search_path"))).scalar_one()
        connection.execute(select(func.set_config("search_path", f"pg_temp, {path}", true())))

    def limit_transaction(self, connection: Connection, seconds: float) -> None:
        """Use settings that end with the transaction, because a pooler may give the connection to others."""
        connection.execute(_limit, {"limit": f"{seconds * 1000:.0f}ms"})

    def cluster(self, connection: Connection) -> str | None:
        return connection.scalar(_cluster) if connection.scalar(_may_ask) else None

    def lock_creation(self, connection: Connection) -> None:
        connection.execute(_one_at_a_time)

    def create_tables(self, connection: Connection, metadata: MetaData, tables: list[Table]) -> None:
        """Create all tables in one statement, because a hundred round trips are slow."""
        statements: list[str] = []

        def collect(ddl: Any, *_: Any) -> None:
            statements.append(f"{ddl.compile(dialect=connection.dialect)};")

        metadata.create_all(MockConnection(connection.dialect, collect), tables=tables, checkfirst=False)
        body = "\n".join(("BEGIN", *statements, "END"))
        connection.exec_driver_sql(f"DO {dollar_quoted(body)}", execution_options=_RAW)

    def rename_table(self, connection: Connection, old: str, table: Table) -> None:
        new = str(table.name)
        if inspect(connection).has_table(new):
            statements = [f"DROP TABLE {old}"]
        else:  # a renamed table keeps its rights
            constraint = f"ALTER TABLE {new} RENAME CONSTRAINT pk_{old} TO pk_{new}"
            statements = [f"ALTER TABLE {old} RENAME TO {new}", constraint]
        for statement in (*statements, _RENAME_IN_FUNCTIONS.format(old=old, new=new)):
            connection.exec_driver_sql(statement, execution_options=_RAW)

    def skip_keys(self, connection: Connection, table: Table, highest: int) -> None:
        prepare = connection.dialect.identifier_preparer
        name = prepare.format_table(table).replace("%%", "%")
        [column] = table.primary_key.columns
        sequences = [func.pg_get_serial_sequence(name, column.name)]
        if isinstance(column.default, schema.Sequence):  # the table may not own its sequence
            sequences.append(func.to_regclass(prepare.format_sequence(column.default).replace("%%", "%")))
        for sequence in sequences:
            if connection.scalar(select(sequence)) is not None:
                connection.execute(select(func.setval(sequence, func.greatest(highest, func.nextval(sequence)))))

    def vacuum(self, engine: Engine, tables: Sequence[Table], deadline: float) -> None:
        """Use FULL, because a plain VACUUM leaves deleted bytes on the disk until they are overwritten.

        ANALYZE replaces the statistics, which contain samples of values. VACUUM FULL would also copy deleted rows that
        an older transaction may still see. So this waits for such transactions to end.
        """
        prepare = engine.dialect.identifier_preparer
        names = ", ".join(prepare.format_table(table).replace("%%", "%") for table in dict.fromkeys(tables))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            mark = connection.scalar(text("SELECT CAST(pg_current_xact_id() AS text)"))
            while connection.scalar(_older_transactions, {"mark": mark}):
                if time.monotonic() > deadline:
                    raise MemstateError(
                        "Cannot purge: a transaction from before the purge is still open, and may read erased data. "
                        "End it, and purge again."
                    )
                time.sleep(0.05)
            connection.exec_driver_sql(f"VACUUM (FULL, ANALYZE) {names}", execution_options=_RAW)

"""Query plans, and the check that an index serves them."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Engine, event, text


def plans(engine: Engine, action: Any, tables: str = "memstate_") -> dict[str, str]:
    """The plan of each statement that *action* runs on our tables, or on tables that *tables* matches."""
    seen: dict[str, Any] = {}

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        # "WHERE 0 = 1" takes SQLite's write lock, and its constant condition is tested before the table is read.
        if (
            re.search(tables, statement)
            and "0 = 1" not in statement
            and re.match(r"\s*(SELECT|UPDATE|DELETE)", statement)
        ):
            seen[statement] = parameters[0] if many else parameters

    event.listen(engine, "before_cursor_execute", note)
    action()
    event.remove(engine, "before_cursor_execute", note)
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET enable_seqscan = off"))  # the plan then shows whether an index can serve it
        return {
            statement: "\n".join(
                str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters).all()
            )
            for statement, parameters in seen.items()
        }


def assert_served(
    engine: Engine, found: dict[str, str], tables: str = "log|outbox|ledger|parked|transaction|embedding"
) -> None:
    assert found
    scan = (
        rf"SCAN (memstate_({tables})|earlier)(?! USING)"
        if engine.dialect.name == "sqlite"
        else (rf"Seq Scan on memstate_({tables})")
    )
    bad = {statement: plan for statement, plan in found.items() if re.search(scan, plan)}
    assert not bad, "\n\n".join(f"{s}\n{p}" for s, p in bad.items())

"""The tables that cannot be tracked where they are, with the reason and a way out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sqlalchemy import Engine, Inspector, Table, inspect
from sqlalchemy.engine.reflection import ObjectKind

from memstate_sa.db.dialects import SQLITE, database_of
from memstate_sa.errors import MemstateError

_TRANSLATED = (
    "Cannot use schema_translate_map with tracked models. It sends statements to a table that is not logged. Use an "
    "engine for each schema, with its own search_path."
)
_ATTACHED = (
    "is in an attached database, and SQLite does not commit it together with the log in the main database. Keep the "
    "table in the main database, or open its file with an engine of its own"
)
_VIEW = "is a view and has no rows of its own to log. Track the classes of the tables that it reads"


def require_no_translation(options: Mapping[str, Any]) -> None:
    if options.get("schema_translate_map"):
        raise MemstateError(_TRANSLATED)


def require_supported_tables(engine: Engine, tables: Collection[Table]) -> None:
    """Raise MemstateError where one of *tables* cannot be tracked in the database of *engine*."""
    require_no_translation(engine.get_execution_options())
    for name, reason in unsupported_tables(inspect(engine), tables):
        raise MemstateError(f"Cannot track {name}: it {reason}.")


def unsupported_tables(inspector: Inspector, tables: Collection[Table]) -> Iterator[tuple[str, str]]:
    """The *tables* that cannot be tracked in this database: full name and reason of each."""
    attached: Collection[str | None] = ()
    if database_of(inspector.dialect) is SQLITE:
        attached = {"temp", *inspector.get_schema_names()} - {"main"}
    for schema in {table.schema for table in tables}:
        names = {str(table.name): table.fullname for table in tables if table.schema == schema}
        if schema in attached:
            yield from ((name, _ATTACHED) for name in names.values())
        else:
            views = inspector.get_multi_indexes(schema, filter_names=list(names), kind=ObjectKind.ANY_VIEW)
            yield from ((names[name], _VIEW) for _, name in views)

"""Hazards of a PostgreSQL database: rights and policies that let changes bypass the log, or let others write to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sqlalchemy import Table, text
from sqlalchemy.engine import Connection

from memstate_sa.db import functions
from memstate_sa.db.dialects import database_of

_OPEN = (
    "runs with the rights of its owner, and other roles can attach it to their own tables. Run "
    "memory.create_tables(engine), or a migration, to close it"
)
_HIDDEN_FROM_US = (
    "has row-level security that applies to {role}, the role of this connection. Hidden rows are not compared, and a "
    "relay would remove them from indexes. Connect as a role that sees every row: the table's owner without FORCE, or "
    "a role with BYPASSRLS"
)
_HIDDEN_FROM_TRIGGERS = (
    "has row-level security that applies to {role}, the owner of its trigger functions. They log the rows that a "
    "statement shows them, but TRUNCATE fails. Remove FORCE, or give the functions an owner with BYPASSRLS"
)
_OF_ANOTHER = (
    "belongs to {owner}, and its triggers run as {role}. The owner of a table can make its triggers run other code. "
    "Give the table and the functions one owner"
)

_hidden = text(
    "SELECT t.name, current_user FROM unnest(CAST(:names AS text[])) WITH ORDINALITY AS t (name, n) "
    "WHERE row_security_active(CAST(to_regclass(t.name) AS oid)) ORDER BY t.n"
)
_trigger_owners = text(
    "SELECT t.name, f.rolname AS role, o.rolname AS owner, "
    "c.relrowsecurity AND NOT f.rolsuper AND NOT f.rolbypassrls "
    "AND (c.relforcerowsecurity OR NOT pg_has_role(f.oid, c.relowner, 'USAGE')) AS hidden, "
    "NOT pg_has_role(o.oid, f.oid, 'USAGE') AS foreign "
    "FROM unnest(CAST(:names AS text[])) WITH ORDINALITY AS t (name, n) "
    "JOIN pg_class AS c ON c.oid = to_regclass(t.name) JOIN pg_roles AS o ON o.oid = c.relowner "
    "JOIN LATERAL (SELECT DISTINCT p.proowner FROM pg_trigger AS g JOIN pg_proc AS p ON p.oid = g.tgfoid "
    "WHERE g.tgrelid = c.oid AND g.tgname LIKE 'memstate\\_%') AS p ON true JOIN pg_roles AS f ON f.oid = p.proowner "
    "ORDER BY t.n, f.rolname"
)

_may_update = text("SELECT has_any_column_privilege(CAST(to_regclass(:name) AS oid), 'UPDATE')")


def may_lock(connection: Connection, table: Table) -> bool:
    """Whether this connection's role may lock rows of *table*. PostgreSQL requires the right to update them."""
    if database_of(connection).runs_in_process:
        return True
    [name] = _names(connection, [table])
    return bool(connection.execute(_may_update, {"name": name}).scalar_one())


def hidden(connection: Connection, tables: Iterable[Table]) -> dict[str, str]:
    """The *tables* whose rows a policy may hide from this connection's role: the role, by the table's full name."""
    if database_of(connection).runs_in_process:
        return {}
    names = _names(connection, tables)
    rows = connection.execute(_hidden, {"names": list(names)})
    return {names[name]: role for name, role in rows}


def hazards(connection: Connection, tracked: Iterable[Table], ours: Iterable[Table]) -> Iterator[tuple[str, str]]:
    """The hazards of the database, each as a subject and a message."""
    if database_of(connection).runs_in_process:
        return
    for function in functions.open_functions(connection):
        yield function, _OPEN
    tracked = list(tracked)
    for table, role in hidden(connection, [*tracked, *ours]).items():
        yield table, _HIDDEN_FROM_US.format(role=role)
    names = _names(connection, tracked)
    for name, role, owner, is_hidden, is_foreign in connection.execute(_trigger_owners, {"names": list(names)}):
        if is_hidden:
            yield names[name], _HIDDEN_FROM_TRIGGERS.format(role=role)
        if is_foreign:
            yield names[name], _OF_ANOTHER.format(role=role, owner=owner)


def _names(connection: Connection, tables: Iterable[Table]) -> dict[str, str]:
    """The full names of *tables*, by their names in SQL."""
    prepare = connection.dialect.identifier_preparer
    return {prepare.format_table(table).replace("%%", "%"): table.fullname for table in tables}

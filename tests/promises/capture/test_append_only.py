"""The log is append-only for every writer. Only erasure and retention may change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, delete, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase

from memstate_sa import metadata
from memstate_sa.capture.append_only import rewriting
from memstate_sa.db.tables import log, trigger_context, utcnow
from memstate_sa.relay import Retention
from tests.support import Tag, World
from tests.support.relays import say

pytestmark = pytest.mark.sa20

MESSAGE = r"memstate_log is append-only: .*memory\.erase\(\)"


def contents(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(log).order_by(log.c.id)).all())


class Local(DeclarativeBase):
    metadata = metadata


class Entry(Local):
    """An application may map the log in order to read it."""

    __table__ = log


STATEMENTS: dict[str, Any] = {
    "update": update(log).values(op="insert"),
    "update of one": update(log).where(log.c.id == 1).values(at=func.current_timestamp()),
    "delete": delete(log),
    "delete of one": delete(log).where(log.c.id == 1),
    "text update": text("UPDATE memstate_log SET image = NULL"),
    "text delete": text("DELETE FROM memstate_log WHERE id = 1"),
    "a CTE": text("WITH one AS (SELECT 1 AS id) DELETE FROM memstate_log WHERE id IN (SELECT id FROM one)"),
    "an upsert": text(
        "INSERT INTO memstate_log (id, tx, entity, key, op, version, step, at) "
        "SELECT id, tx, entity, key, 'delete', 1, true, at FROM memstate_log WHERE true "
        "ON CONFLICT (id) DO UPDATE SET op = excluded.op"
    ),
}
REPLACE = text(
    "INSERT OR REPLACE INTO memstate_log (id, tx, entity, key, op, version, step, at) "
    "SELECT id, tx, entity, key, 'delete', 1, 1, at FROM memstate_log"
)
ONLY: dict[str, dict[str, Any]] = {
    "sqlite": {"replace": REPLACE},
    "postgresql": {
        "truncate": text("TRUNCATE memstate_log"),
        "truncate of several": text("TRUNCATE memstate_outbox, memstate_log RESTART IDENTITY CASCADE"),
        "data-modifying CTE": text("WITH gone AS (DELETE FROM memstate_log RETURNING id) SELECT count(*) FROM gone"),
    },
}


@pytest.fixture
def world(engine: Engine) -> Iterator[World]:
    made = World(engine)
    say(made, a="one", b="two")
    yield made
    made.memory.close()


def by_session(world: World, statement: Any) -> None:
    with world.session() as session:
        session.execute(statement)
        session.commit()


def by_engine(world: World, statement: Any) -> None:
    with world.engine.begin() as connection:
        connection.execute(statement)


def by_another_program(world: World, statement: Any) -> None:
    other = create_engine(world.engine.url)  # it knows neither our listeners nor our transactions
    try:
        with other.begin() as connection:
            connection.execute(statement)
    finally:
        other.dispose()


@pytest.mark.parametrize("by", [by_session, by_engine, by_another_program])
def test_every_statement_that_changes_an_entry_is_refused(world: World, by: Callable[[World, Any], None]) -> None:
    """The error names the right method. The log stays as it was, and keeps growing."""
    before = contents(world.engine)
    for name, statement in {**STATEMENTS, **ONLY[world.engine.dialect.name]}.items():
        with pytest.raises(IntegrityError, match=MESSAGE):
            by(world, statement)
            pytest.fail(name)
        assert contents(world.engine) == before, name
    say(world, c="three")
    assert len(contents(world.engine)) == len(before) + 1
    world.assert_in_step()


def test_objects_of_the_log_cannot_be_changed(world: World) -> None:
    """An application that maps the log cannot delete its objects either."""
    before = contents(world.engine)
    with world.session() as session:
        session.scalars(select(Entry)).first().op = "delete"  # type: ignore[union-attr]
        with pytest.raises(IntegrityError, match=MESSAGE):
            session.flush()
        session.rollback()
        session.delete(session.scalars(select(Entry)).first())
        with pytest.raises(IntegrityError, match=MESSAGE):
            session.commit()
    assert contents(world.engine) == before


def test_the_driver_itself_is_refused(world: World) -> None:
    """The refusal also holds below SQLAlchemy."""
    before = contents(world.engine)
    connection: Any = world.engine.raw_connection()
    cursor = connection.cursor()
    with pytest.raises(Exception, match=MESSAGE):
        cursor.execute("DELETE FROM memstate_log")
    connection.rollback()
    connection.close()
    assert contents(world.engine) == before


def test_inserting_is_not_rewriting(world: World) -> None:
    """An INSERT may bring its own id. Restoring a dump does this."""
    row = {"tx": "x", "entity": "e", "key": "[1]", "op": "insert", "version": 1, "step": False, "at": func.now()}
    with world.engine.begin() as connection:
        connection.execute(insert(log).values(id=1000, **row))
        connection.execute(insert(log).values(**row | {"key": "[2]"}))
    assert len(contents(world.engine)) == 4


ENTRY = "(id, tx, entity, key, op, version, step, at)"
PAST: dict[str, str] = {
    "below all": f"INSERT INTO memstate_log {ENTRY} SELECT -5, tx, entity, key, 'delete', 1, step, at {{last}}",
    "zero": f"INSERT INTO memstate_log {ENTRY} SELECT 0, tx, entity, key, 'delete', 1, step, at {{last}}",
    "a gap": f"INSERT INTO memstate_log {ENTRY} SELECT id - 1, tx, entity, key, 'delete', 1, step, at {{last}}",
    "one of several": f"INSERT INTO memstate_log {ENTRY} SELECT id + n, tx, entity, key, op, 1, step, at "
    "FROM memstate_log, (SELECT 1 AS n UNION SELECT -1) AS two WHERE id = (SELECT max(id) FROM memstate_log)",
    "if it is free": f"INSERT INTO memstate_log {ENTRY} SELECT id - 1, tx, entity, key, 'delete', 1, step, at {{last}} "
    "ON CONFLICT DO NOTHING",
}


@pytest.mark.parametrize("name", PAST)
@pytest.mark.parametrize("by", [by_session, by_engine, by_another_program])
def test_an_entry_of_the_past_is_refused(world: World, by: Callable[[World, Any], None], name: str) -> None:
    """An INSERT below the last id is refused, even where that id is free: it would change the past.

    The same kind: COPY, OVERRIDING SYSTEM VALUE, the ids of transactions that were rolled back.
    """
    with world.engine.begin() as connection, rewriting(connection):  # a rollback leaves such a gap on PostgreSQL
        connection.execute(delete(log).where(log.c.key == '["b"]'))
    say(world, c="three")
    before = contents(world.engine)
    with pytest.raises(IntegrityError, match=MESSAGE):
        statement = PAST[name].format(last="FROM memstate_log WHERE id = (SELECT max(id) FROM memstate_log) AND true")
        by(world, text(statement))
    assert contents(world.engine) == before
    say(world, d="four")
    assert contents(world.engine)[:-1] == before


def test_copy_is_refused_as_well(postgres_engine: Engine) -> None:
    """COPY can set ids even when the column does not allow it."""
    world = World(postgres_engine)
    say(world, a="one", b="two")
    before = contents(postgres_engine)
    with postgres_engine.connect() as connection, pytest.raises(Exception, match=MESSAGE):
        driver: Any = connection.connection.driver_connection
        with driver.cursor().copy(f"COPY memstate_log {ENTRY} FROM STDIN") as copy:
            copy.write_row((0, "x", "tag", '["a"]', "delete", 1, True, "2026-01-01 00:00:00+00"))
    assert contents(postgres_engine) == before
    world.memory.close()


ANOTHER = insert(log).values(tx="x", entity="e", op="insert", version=1, step=False, at=func.now())


def test_a_slow_transaction_still_logs(postgres_engine: Engine) -> None:
    """Its ids are lower than ids that other transactions have committed. currval() is not the last id either."""
    world = World(postgres_engine)
    say(world, a="one")
    with postgres_engine.connect() as slow, postgres_engine.connect() as quick:
        slow.execute(ANOTHER.values(key="[1]"))
        for number in range(2):
            quick.execute(ANOTHER, [{"key": f"[2{number}]"}, {"key": f"[3{number}]"}])
            slow.execute(ANOTHER, [{"key": f"[4{number}]"}, {"key": f"[5{number}]"}])
        quick.commit()
        slow.execute(ANOTHER.values(key="[6]"))
        slow.commit()
        with slow.begin_nested() as savepoint:
            slow.execute(ANOTHER.values(key="[7]"))
            savepoint.rollback()
        slow.execute(ANOTHER.values(key="[8]"))
        slow.commit()
    keys = [row.key for row in contents(postgres_engine)]
    assert keys == ['["a"]', "[1]", "[20]", "[30]", "[40]", "[50]", "[21]", "[31]", "[41]", "[51]", "[6]", "[8]"]
    world.memory.close()


def test_a_log_without_entries_takes_any_id(postgres_engine: Engine) -> None:
    """A restored dump (data only) inserts in any order, and sets the sequence last."""
    metadata.create_all(postgres_engine)
    with postgres_engine.begin() as connection:
        for id_ in (5, 3, 7):
            connection.execute(ANOTHER.values(id=id_, key=f"[{id_}]"))
        connection.execute(text("SELECT setval('memstate_log_id_seq', 7)"))
        connection.execute(ANOTHER.values(key="[8]"))
    assert [(row.id, row.key) for row in contents(postgres_engine)] == [(3, "[3]"), (5, "[5]"), (7, "[7]"), (8, "[8]")]


def test_entries_after_an_id_of_the_future_follow_it(world: World) -> None:
    """The log keeps its order on both databases."""
    with world.engine.begin() as connection:
        connection.execute(ANOTHER.values(id=1000, key="[1]"))
        connection.execute(ANOTHER.values(key="[2]"))
    say(world, c="three")
    assert [row.key for row in contents(world.engine)] == ['["a"]', '["b"]', "[1]", "[2]", '["c"]']


# -- permitted changes -------------------------------------------------------------------------------------------------


def rewrite_permission(connection: Connection) -> Any:
    if connection.dialect.name == "postgresql":
        return connection.scalar(text("SELECT nullif(current_setting('memstate.rewrite', true), '')"))
    return connection.scalar(select(trigger_context.c.name))


def test_log_changes_only_inside_rewriting(world: World) -> None:
    """Changes are refused after the block, after a block that failed, and on another connection."""
    with world.engine.begin() as connection:
        with rewriting(connection):
            connection.execute(update(log).values(tx="rewritten"))
        assert rewrite_permission(connection) is None
        with pytest.raises(IntegrityError, match=MESSAGE), connection.begin_nested():
            connection.execute(delete(log))
    assert {row.tx for row in contents(world.engine)} == {"rewritten"}
    with world.engine.begin() as connection:
        with pytest.raises(ZeroDivisionError), rewriting(connection):
            connection.execute(delete(log))
            raise ZeroDivisionError
        assert rewrite_permission(connection) is None
        with pytest.raises(IntegrityError, match=MESSAGE), connection.begin_nested():
            connection.execute(delete(log))
    with world.engine.connect() as connection:
        assert rewrite_permission(connection) is None
        with rewriting(connection):
            connection.execute(delete(log))
            if world.engine.dialect.name == "postgresql":  # SQLite has one writer
                with pytest.raises(IntegrityError, match=MESSAGE):
                    by_another_program(world, delete(log))
        connection.rollback()
    assert len(contents(world.engine)) == 2
    with world.engine.connect() as connection:
        assert rewrite_permission(connection) is None


def test_retention_folds_the_log(world: World) -> None:
    """Folding is the relay's own work. It leaves no permission behind."""
    say(world, a="three")
    with world.engine.begin() as connection, rewriting(connection):
        connection.execute(update(log).values(at=utcnow() - timedelta(days=31)))
    world.memory.relay(world.engine, retention=Retention(log=timedelta(days=1))).drain()
    assert [(row.key, row.op) for row in contents(world.engine)] == [('["b"]', "baseline"), ('["a"]', "baseline")]
    with world.engine.begin() as connection:
        assert rewrite_permission(connection) is None
    world.assert_in_step()
    with pytest.raises(IntegrityError, match=MESSAGE):
        by_session(world, delete(log))


# -- installing --------------------------------------------------------------------------------------------------------


def unprotect(world: World) -> None:
    names = (
        ["memstate_append_only_update", "memstate_append_only_delete", "memstate_append_only_insert"]
        if world.engine.dialect.name == "sqlite"
        else ["memstate_append_only"]
    )
    on = "" if world.engine.dialect.name == "sqlite" else " ON memstate_log"
    with world.engine.begin() as connection:
        for name in names:
            connection.execute(text(f"DROP TRIGGER {name}{on}"))


def test_missing_triggers_are_reported_and_restored(world: World) -> None:
    """An older version, a migration that rebuilt the table or an intruder can have removed them."""
    assert world.memory.doctor(world.engine).healthy
    unprotect(world)
    [problem] = world.memory.doctor(world.engine).problems
    assert problem.subject == "memstate_log"
    assert "no trigger memstate_append_only" in problem.message and "create_tables" in problem.message
    world.memory.create_tables(world.engine)
    assert world.memory.doctor(world.engine).healthy
    with pytest.raises(IntegrityError, match=MESSAGE):
        by_engine(world, delete(log))


def test_disabled_or_replaced_trigger_is_reported(world: World) -> None:
    """The trigger's name is there, but it does nothing."""
    unprotect(world)
    with world.engine.begin() as connection:
        if world.engine.dialect.name == "sqlite":
            connection.execute(
                text("CREATE TRIGGER memstate_append_only_delete BEFORE DELETE ON memstate_log BEGIN SELECT 1; END")
            )
        else:
            world.memory.create_tables(world.engine)
            connection.execute(text("ALTER TABLE memstate_log DISABLE TRIGGER memstate_append_only"))
    [problem] = world.memory.doctor(world.engine).problems
    assert "memstate_append_only" in problem.message
    world.memory.create_tables(world.engine)
    assert world.memory.doctor(world.engine).healthy


def test_create_all_installs_triggers_and_drop_all_leaves_nothing(world: World) -> None:
    """A migration may create the tables without a Memory."""
    metadata.drop_all(world.engine)
    with world.engine.connect() as connection:
        left = "SELECT count(*) FROM sqlite_master WHERE name LIKE '%append_only%'"
        if world.engine.dialect.name == "postgresql":
            left = "SELECT count(*) FROM pg_proc WHERE proname LIKE '%append_only%'"
        assert connection.scalar(text(left)) == 0
    metadata.create_all(world.engine)
    with world.engine.begin() as connection:
        connection.execute(
            insert(log).values(tx="x", entity="e", key="[1]", op="insert", version=1, step=False, at=func.now())
        )
    with pytest.raises(IntegrityError, match=MESSAGE):
        by_another_program(world, text("DELETE FROM memstate_log"))


def test_undo_only_adds(world: World) -> None:
    """A rollback writes new entries."""
    before = contents(world.engine)
    with world.session() as session:
        world.memory.rollback(session)
        session.commit()
        assert session.scalars(select(Tag)).all() == []
    assert contents(world.engine)[:2] == before

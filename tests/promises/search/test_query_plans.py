"""An index serves every statement that may run on a large table."""

from __future__ import annotations

import io
import re
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, inspect, select, text

from memstate_sa import DeliveryError
from memstate_sa.db.tables import embedding, log, outbox, parked, transaction, utcnow
from memstate_sa.embedding import cache
from memstate_sa.log.positions import slot_of
from memstate_sa.relay import retention
from memstate_sa.relay.retention import forget_delivered
from tests.support import Note, Person, Tag, World
from tests.support.plans import assert_served, plans
from tests.support.programs import wipe


def size(engine: Engine) -> int:
    """The number of rows at which PostgreSQL's planner prefers an index. SQLite's always does."""
    return 1500 if engine.dialect.name == "postgresql" else 500


@pytest.fixture
def large(engine: Engine) -> World:
    """A large table with fresh statistics."""
    world = World(engine)
    with world.session() as session:
        session.execute(insert(Person), [{"name": f"p{n}", "about": f"about {n}"} for n in range(size(engine))])
        session.commit()
    world.relay.drain()
    with world.session() as session:
        session.execute(insert(Person), [{"name": f"q{n}", "about": f"new {n}"} for n in range(300)])
        session.commit()
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("ANALYZE"))
    return world


def test_writing_uses_indexes(large: World) -> None:
    """Looks and baselines use indexes."""

    def write() -> None:
        with large.session() as session:
            session.get_one(Person, 5).about = "changed"
            session.delete(session.get_one(Person, 6))
            session.commit()

    assert_served(large.engine, plans(large.engine, write))


def test_rows_are_read_by_composite_keys(large: World) -> None:
    """The application's own table is read for images, locked, and loaded by a search."""
    with large.session() as session:
        person = session.get_one(Person, 7)
        notes = [{"topic": f"t{n}", "number": n, "person_id": person.id, "content": f"note {n}"} for n in range(500)]
        session.execute(insert(Note), notes)
        session.commit()
    if large.engine.dialect.name == "postgresql":
        with large.engine.begin() as connection:
            connection.execute(text("ANALYZE"))

    def write_and_search() -> None:
        with large.session() as session:
            for n in (3, 4):
                session.get_one(Note, (f"t{n}", n)).content = "changed"
            session.delete(session.get_one(Note, ("t5", 5)))
            session.commit()
            large.memory.search(session, "changed", Note)

    found = plans(large.engine, write_and_search, r"\bnote\b")
    scan = r"SCAN note" if large.engine.dialect.name == "sqlite" else r"Seq Scan on note"
    assert found
    bad = {statement: plan for statement, plan in found.items() if re.search(scan, plan)}
    assert not bad, bad


def test_searching_uses_indexes(large: World) -> None:
    """Undelivered keys, parked keys and hydration use indexes."""

    def search() -> None:
        with large.session() as session:
            large.memory.search(session, "about 7", Person)
            session.add(Person(name="x", about="mine"))
            large.memory.search(session, "mine", Person)

    assert_served(large.engine, plans(large.engine, search))


def test_search_walks_no_backlog_of_another_class(large: World) -> None:
    """Among the newest entries, only those of the class are read. A class without entries reads nothing.

    The same kind: a class that is filled for the first time, the caller's own entries, a comparison by verify.
    """

    def search() -> None:
        with large.session() as session:
            session.add(Tag(name="x"))
            assert large.memory.search(session, "x means", Tag).complete

    [plan] = [plan for statement, plan in plans(large.engine, search).items() if "AS own" in statement]
    if large.engine.dialect.name == "sqlite":
        assert "USING INDEX ix_memstate_outbox_entity (entity=? AND xid=?" in plan
    else:  # one walk each for running and for later transactions; a third one is for the caller's own
        assert plan.count("Backward using ix_memstate_outbox_entity") == 2


def test_tables_of_an_earlier_version_get_the_index(large: World) -> None:
    """`create_tables` adds it, like the migration. Without it a search is slower, but finds the same."""
    with large.engine.begin() as connection:
        connection.execute(text("DROP INDEX ix_memstate_outbox_entity"))
    with large.session() as session:
        assert large.memory.search(session, "new 7", Person, limit=1)[0].fact.about == "new 7"
    large.memory.create_tables(large.engine)
    assert "ix_memstate_outbox_entity" in {
        index["name"] for index in inspect(large.engine).get_indexes("memstate_outbox")
    }


def test_relaying_uses_indexes(large: World) -> None:
    """Windows, ledger, acknowledgement and clean-up use indexes."""

    def relay() -> None:
        large.relay.drain()
        with large.engine.begin() as connection:
            forget_delivered(connection)

    found = plans(large.engine, relay)
    # Once a minute, one pass over the outbox deletes entries that every index has.
    assert_served(large.engine, {s: p for s, p in found.items() if not s.startswith("DELETE FROM memstate_outbox")})
    if large.engine.dialect.name == "sqlite":  # a join would read all of an entity's rows for each key
        by_key = [plan for s, plan in found.items() if "AS keys" in s and ("ledger" in s or "parked" in s)]
        assert by_key and all("entity=? AND key=?" in plan for plan in by_key)


def test_embedding_cache_uses_indexes(large: World) -> None:
    """Vectors are found by text, forgotten by text, and evicted by age."""
    with large.engine.connect() as connection:
        digests = connection.scalars(select(embedding.c.text_fingerprint).limit(20)).all()
    assert len(digests) == 20

    def keep() -> None:
        with large.engine.begin() as connection:
            assert len(cache.read(connection, digests, large.embedder.dimension)) == 20
            assert cache.forget(connection, digests) == 20
            assert cache.count(connection) == size(large.engine) - 20
            cache.evict(connection, 100)
            assert cache.count(connection) == size(large.engine) - 120

    found = plans(large.engine, keep)
    # SQLite walks the table itself, which has the right order, up to the limit.
    eviction = found.pop(next(s for s in found if s.startswith("DELETE") and "ORDER BY" in s))
    assert "TEMP B-TREE" not in eviction and "Sort" not in eviction and "Seq Scan" not in eviction
    assert_served(large.engine, found)


def test_undo_and_history_use_indexes(large: World) -> None:
    """This covers one step at the end of a long log, and the history of one fact."""
    with large.session() as session:
        large.memory.annotate(session, session_id="s1", actor="ada")
        session.add(Tag(name="t"))
        session.commit()

    def undo() -> None:
        with large.session() as session:
            large.memory.history(session, Person, 17)
            large.memory.history(session, actor="ada", session_id="s1", limit=20)
            large.memory.rollback(session)
            session.rollback()
            large.memory.rollback(session, session_id="s1", actor="ada")
            session.rollback()

    found = plans(large.engine, undo)
    assert_served(large.engine, found)
    if large.engine.dialect.name == "sqlite":  # PostgreSQL walks the primary key backwards where this is as short
        assert any("ix_memstate_log_step" in plan for plan in found.values())


@pytest.mark.deep_on("postgres")
def test_export_and_import_use_indexes(large: World) -> None:
    """Each page of an export or an import begins where the last page ended."""
    file = io.StringIO()
    exporting = plans(large.engine, lambda: large.memory.export_facts(large.engine, file))
    assert_served(large.engine, exporting)
    wipe(large.engine)
    importing = plans(large.engine, lambda: large.memory.import_facts(large.engine, io.StringIO(file.getvalue())))
    assert_served(large.engine, importing)


@pytest.mark.deep_on("sqlite")
def test_long_undo_and_time_travel_use_indexes(large: World) -> None:
    """This covers undo by all steps, run, actor, class and moment, and as_of by key. No statement sorts."""
    with large.session() as session:
        first = large.memory.history(session, Person, 17)[0]
    for n in range(40):
        with large.session() as session:
            large.memory.annotate(session, session_id="s1", actor="ada")
            session.get_one(Person, n + 1).about = f"changed {n}"
            session.commit()

    def undo() -> None:
        with large.session() as session:
            assert large.memory.as_of(session, Person, 17, first.tx) is not None
            assert large.memory.as_of(session, Person, 17, first.at) is not None
            assert len(large.memory.rollback(session, 30)) == 30
            session.rollback()
            assert len(large.memory.rollback(session, 30, session_id="s1")) == 30
            session.rollback()
            assert len(large.memory.rollback(session, 30, actor="ada", model=Person)) == 30
            session.rollback()
            assert len(large.memory.rollback(session, to=first.at)) > 40
            session.rollback()
            assert len(large.memory.revoke(session, session_id="s1").reverted) == 40
            session.rollback()

    found = plans(large.engine, undo)
    assert_served(large.engine, found)
    earlier = [plan for statement, plan in found.items() if "AS earlier" in statement]
    assert earlier
    if large.engine.dialect.name == "sqlite":
        assert all("ix_memstate_log_key (entity=? AND key=? AND id<?)" in plan for plan in earlier)
        of_some = [plan for statement, plan in found.items() if "memstate_log.tx IN" in statement]
        assert len(of_some) >= 2 and all("ix_memstate_log_tx (tx=?)" in plan for plan in of_some)
        assert not any("TEMP B-TREE" in plan for statement, plan in found.items() if "LIMIT" in statement)


def test_the_walk_over_undoable_steps_is_short(large: World) -> None:
    """It reads a page of the partial index, in order, without a sort."""

    def undo() -> None:
        with large.session() as session:
            large.memory.rollback(session)
            session.rollback()

    walk = next(p for s, p in plans(large.engine, undo).items() if "memstate_log.step" in s and "LIMIT" in s)
    assert "TEMP B-TREE" not in walk and "Sort" not in walk


def test_ids_and_outbox_grow_together(large: World) -> None:
    """The fixture keeps its promise."""
    with large.engine.connect() as connection:
        assert connection.scalar(select(log.c.id).order_by(log.c.id.desc()).limit(1)) == size(large.engine) + 300
        assert connection.scalar(select(outbox.c.id).order_by(outbox.c.id.desc()).limit(1)) == size(large.engine) + 300


@pytest.fixture
def million(postgres_engine: Engine) -> World:
    """PostgreSQL's planner believes that every large table has a million rows. It may still choose to read them all."""
    world = World(postgres_engine)
    tables = ("log", "outbox", "ledger", "parked", "transaction", "embedding")
    large = ["person", *(f"memstate_{name}" for name in tables)]
    with postgres_engine.begin() as connection:
        for name in large:  # otherwise autovacuum would correct the statistics
            connection.execute(text(f"ALTER TABLE {name} SET (autovacuum_enabled = false)"))
    with world.session() as session:
        for count, about in ((300, "about"), (10, "new")):
            for _ in range(count):
                session.execute(insert(Person), [{"name": f"p{n}", "about": f"{about} {n}"} for n in range(10)])
                session.commit()
            if about == "about":
                world.relay.drain()
    with postgres_engine.begin() as connection:
        at = {"index": "memory", "incarnation": world.index.incarnation, "entity": "person"}
        stuck = {"attempts": 1, "next_at": utcnow(), "error": "", "state": "parked", "mark": ""}
        rows = [
            {
                **at,
                "index": "other" if n % 50 else "memory",
                "key": f"[{n}]",
                "slot": slot_of("person", f"[{n}]"),
                **stuck,
            }
            for n in range(1, 1000)
        ]
        connection.execute(insert(parked), rows)
        connection.execute(insert(transaction), [{"tx": f"t{n}", "at": utcnow()} for n in range(500)])
    with postgres_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))  # the visibility map is part of an index-only scan's cost
        scale = "UPDATE pg_class SET reltuples = 1000000, relpages = relpages"
        connection.execute(text(f"{scale} WHERE relname = ANY(:large)"), {"large": large})
        of_them = "SELECT indexrelid FROM pg_index WHERE indrelid::regclass::text = ANY(:large)"
        connection.execute(text(f"{scale} WHERE oid IN ({of_them})"), {"large": large})
    return world


def planned(engine: Engine, action: Any) -> dict[str, str]:
    """The planner's plan of each statement that *action* runs on a table of ours."""
    seen: dict[str, Any] = {}

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if "memstate_" in statement and statement not in seen and re.match(r"\s*(SELECT|UPDATE|DELETE)", statement):
            seen[statement] = ""
            with connection.connection.driver_connection.cursor() as other:
                other.execute("EXPLAIN " + statement, parameters[0] if many else parameters)
                seen[statement] = "\n".join(row[0] for row in other.fetchall())

    event.listen(engine, "before_cursor_execute", explain)
    try:
        action()
    finally:
        event.remove(engine, "before_cursor_execute", explain)
    assert seen
    return seen


def assert_no_large_scan(found: dict[str, str]) -> None:
    scan = r"Seq Scan on (memstate_(log|outbox|ledger|parked|transaction|embedding)|person)\b"
    bad = {statement: plan for statement, plan in found.items() if re.search(scan, plan)}
    assert not bad, "\n\n".join(f"{s}\n{p}" for s, p in bad.items())


def test_a_relay_reads_no_large_table_as_a_whole(million: World) -> None:
    """This covers claims, pages, rows, ledger, parked keys and acknowledgements."""
    found = planned(million.engine, million.relay.drain)
    assert_no_large_scan(found)
    page = next(plan for statement, plan in found.items() if "lateral" in statement.lower() and "SMALLINT" in statement)
    assert page.count("ix_memstate_outbox_xid") == 2
    assert "Sort  (" not in page.replace("Incremental Sort", "") or page.count("Sort  (") == 1  # of one page


@pytest.mark.deep
def test_operation_reads_no_large_table_as_a_whole(million: World) -> None:
    """This covers status, waiting, dead letters, and the poll of an idle relay."""

    def operate() -> None:
        million.memory.status(million.engine)
        with million.engine.connect() as connection:
            tx = connection.scalar(select(log.c.tx).order_by(log.c.id.desc()).limit(1))
        with pytest.raises(DeliveryError):
            million.memory.wait(tx, timeout=0.0, engine=million.engine)
        million.relay.retry_dead()
        million.relay.drop_dead(keys=["[1]"])
        assert million.relay.dead() == []

    assert_no_large_scan(planned(million.engine, operate))


@pytest.mark.deep
def test_undo_reads_no_large_table_as_a_whole(million: World) -> None:
    """This covers a step, many steps, a run, an actor, a transaction, a moment, and a fact's past."""
    for n in range(60):
        with million.session() as session:
            million.memory.annotate(session, session_id=f"s{n % 2}", actor="ada")
            session.get_one(Person, n + 1).about = f"changed {n}"
            session.commit()
    with million.session() as session:
        last = million.memory.history(session, Person, 60)[-1]

    def undo() -> None:
        with million.session() as session:
            assert million.memory.as_of(session, Person, 17, last.tx) is not None
            assert million.memory.as_of(session, Person, 17, last.at) is not None
            for options in (
                {},
                {"steps": 50},
                {"session_id": "s1"},
                {"actor": "ada"},
                {"tx": last.tx},
                {"to": last.tx},
            ):
                million.memory.rollback(session, **options)
                session.rollback()
            assert len(million.memory.revoke(session, session_id="s0").reverted) == 30
            session.rollback()

    assert_no_large_scan(planned(million.engine, undo))


@pytest.mark.deep
def test_a_fresh_search_reads_no_large_table_as_a_whole(million: World) -> None:
    """This covers undelivered keys of the caller and of others, and refused keys."""

    def search() -> None:
        with million.session() as session:
            million.memory.search(session, "about 7", Person)
            session.add(Person(name="x", about="mine"))
            million.memory.search(session, "mine", Person)

    assert_no_large_scan(planned(million.engine, search))


@pytest.mark.deep
def test_cleaning_up_reads_no_large_table_as_a_whole(million: World) -> None:
    """This covers entries that every index has, and old data without a retention."""
    million.relay.drain()

    def clean() -> None:
        with million.engine.begin() as connection:
            retention.forget_delivered(connection)
            retention.forget_ledger(connection, timedelta(days=1))
            retention.fold_log(connection, timedelta(), 0, limit=50)
            assert cache.forget(connection, ["0" * 32]) == 0
            cache.evict(connection, 10)

    assert_no_large_scan(planned(million.engine, clean))


@pytest.mark.deep
def test_a_page_costs_no_more_behind_a_transaction_that_runs_for_ever(million: World) -> None:
    """Such a transaction pins the oldest snapshot. The page is read from the index's position, not from there."""
    pinned = million.engine.connect()
    xid = int(pinned.scalar(text("SELECT pg_current_xact_id()::text")) or 0)
    million.relay.drain()
    with million.session() as session:
        session.execute(insert(Person), [{"name": f"r{n}", "about": f"newer {n}"} for n in range(100)])
        session.commit()
    found = planned(million.engine, million.relay.drain)
    pinned.close()
    page = next(plan for statement, plan in found.items() if "lateral" in statement.lower() and "SMALLINT" in statement)
    [begin] = re.findall(r"Index Cond: \(\(ROW\(xid, id\) > ROW\('(\d+)'::bigint", page)
    assert int(begin) > xid

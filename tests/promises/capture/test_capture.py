"""Capture: which changes are logged, when, on which connection, and why each listener exists."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sqlalchemy import (
    Engine,
    bindparam,
    create_engine,
    delete,
    event,
    insert,
    lambda_stmt,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from memstate_sa import Memory, MemstateError, UntrackedWrite
from memstate_sa.capture.guard import UntrackedWriteWarning
from memstate_sa.db.dialects import database_of
from memstate_sa.db.tables import log, outbox, transaction
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Base, Note, Person, Tag, World
from tests.support.apps import make_app
from tests.support.statements import statements

pytestmark = pytest.mark.sa20


def ops(world: World, model: Any = Person) -> list[tuple[str, Any]]:
    with world.session() as session:
        return [(change.op, change.key) for change in world.memory.history(session, model)]


def test_fact_log_and_outbox_are_one_transaction(world: World) -> None:
    """After a rollback none of the three ever existed; after a commit all three do."""
    with world.session() as session:
        session.add(Person(name="ada", about="likes tea"))
        session.flush()
        connection = session.connection()
        assert connection.scalar(select(log.c.key)) == "[1]" == connection.scalar(select(outbox.c.key))
        session.rollback()
        for table in (Person.__table__, log, outbox):
            assert session.execute(select(table)).all() == []
        session.add(Person(name="ada", about="likes tea"))
        session.commit()
    world.assert_in_step()


def test_flush_sends_at_most_two_statements_a_class(world: World) -> None:
    """The fixed cost of a flush of any size. On PostgreSQL, log and outbox share one round trip."""
    with world.session() as session:
        seen = statements(world.engine)
        session.add_all([Person(name=f"p{n}", about=f"person {n}") for n in range(50)])
        session.add_all([Tag(name=f"t{n}") for n in range(50)])
        session.flush()
        into = [re.findall(r"INSERT INTO memstate_(\w+)", statement) for statement in seen if "memstate" in statement]
        together = world.engine.dialect.name == "postgresql"
        assert into == ([["log", "outbox"]] if together else [["log"], ["outbox"]]) * 2
        session.commit()


def test_one_changed_row_costs_a_fixed_number_of_statements(world: World) -> None:
    """Updating many rows sends no more statements than updating a few."""
    with world.session() as session:
        session.add_all([Person(name=f"p{n}", about="x") for n in range(60)])
        session.commit()
        counts = []
        for many in (2, 60):
            people = session.scalars(select(Person).limit(many)).all()
            seen = statements(world.engine)
            for person in people:
                person.about = f"changed {many}"
            session.flush()
            counts.append(len([s for s in seen if "person SET" not in s]))
            session.commit()
        assert counts[0] == counts[1]


def test_commit_calls_neither_index_nor_embedder(world: World) -> None:
    """A commit touches neither the index nor the embedder."""
    world.embedder.embed = None  # type: ignore[assignment,method-assign]
    world.index.upsert = None  # type: ignore[method-assign]
    with world.session() as session:
        session.add(Person(name="ada", about="likes tea"))
        session.commit()
    assert ops(world) == [("insert", 1)]


def test_row_older_than_tracking_gets_a_baseline_first(world: World) -> None:
    """The first change of an unknown row logs its earlier values."""
    with world.engine.begin() as connection:
        connection.execute(
            insert(Person.__table__), [{"name": "old", "about": "was here"}, {"name": "b", "about": "b"}]
        )
    with world.session() as session:
        session.get_one(Person, 1).about = "changed"
        session.delete(session.get_one(Person, 2))
        session.commit()
        changes = world.memory.history(session, Person)
        assert sorted((c.op, c.key) for c in changes) == [
            ("baseline", 1),
            ("baseline", 2),
            ("delete", 2),
            ("update", 1),
        ]
        updated = next(c for c in changes if c.op == "update")
        assert updated.before == {"id": 1, "name": "old", "about": "was here"}
    world.assert_log_is_truth()


def test_baselines_of_a_flush_are_read_together(world: World) -> None:
    """A flush that changes many unknown rows reads them with one SELECT, not one by one."""
    with world.engine.begin() as connection:
        connection.execute(insert(Person.__table__), [{"name": f"p{n}", "about": "x"} for n in range(40)])
    with world.session() as session:
        for person in session.scalars(select(Person)):
            person.about = "y"
        seen = statements(world.engine)
        session.flush()
        assert len([s for s in seen if s.lstrip().startswith("SELECT")]) <= 5
        session.commit()
    world.assert_log_is_truth()


def test_foreign_keys_nulled_by_the_flush_are_captured(world: World) -> None:
    """Deleting a parent changes its children, which the log may not know yet."""
    with world.engine.begin() as connection:
        connection.execute(insert(Person.__table__), {"id": 7, "name": "p", "about": "x"})
        connection.execute(insert(Tag.__table__), {"name": "t", "meaning": "m", "person_id": 7})
    with world.session() as session:
        session.delete(session.get_one(Person, 7))
        session.commit()
    assert ops(world, Tag) == [("baseline", "t"), ("update", "t")]
    world.assert_in_step()


def test_delete_and_insert_of_one_key_in_one_flush_is_an_update(world: World) -> None:
    """Only the state before and after the flush counts."""
    with world.session() as session:
        session.add(Tag(name="t", meaning="first"))
        session.commit()
        session.delete(session.get_one(Tag, "t"))
        session.add(Tag(name="t", meaning="second"))
        session.commit()
    assert ops(world, Tag) == [("insert", "t"), ("update", "t")]
    world.assert_in_step()


def test_orphans_are_captured(world: World) -> None:
    """delete-orphan rows are never in session.deleted."""
    with world.session() as session:
        person = Person(name="p", about="x", notes=[Note(topic="t", number=1, content="gone soon")])
        session.add(person)
        session.commit()
        person.notes.clear()
        session.commit()
    assert ops(world, Note) == [("insert", ("t", 1)), ("delete", ("t", 1))]
    world.assert_in_step()


def test_a_primary_key_change_is_a_delete_and_an_insert(world: World) -> None:
    """The old key goes and the new one comes, even when another row takes the old key in the same flush."""
    with world.session() as session:
        session.add(Person(name="p", about="x", notes=[Note(topic="t", number=n, content=f"n{n}") for n in (1, 2)]))
        session.commit()
        notes = session.scalars(select(Note).order_by(Note.number)).all()
        notes[1].number = 3
        session.flush()
        notes[0].number = 2
        session.commit()
    assert ops(world, Note)[2:] == [
        ("delete", ("t", 2)),
        ("insert", ("t", 3)),
        ("delete", ("t", 1)),
        ("insert", ("t", 2)),
    ]
    world.assert_in_step()


def test_expired_deferred_and_expression_values_are_in_the_image(world: World) -> None:
    """The image is the row, not the values in the instance."""
    with world.session() as session:
        person = Person(name="p", about="x")
        session.add(person)
        session.commit()  # expires everything
        person.name = Person.name + " the second"
        session.commit()
        assert world.memory.history(session, person)[-1].after == {"id": 1, "name": "p the second", "about": "x"}


def test_nothing_is_logged_for_an_unchanged_object(world: World) -> None:
    """Setting a value to itself is not a change."""
    with world.session() as session:
        person = Person(name="p", about="x")
        session.add(person)
        session.commit()
        session.refresh(person)
        person.name = "p"
        session.commit()
    assert ops(world) == [("insert", 1)]


def test_savepoints_take_exactly_their_own_entries(world: World) -> None:
    """Writes inside a rolled back SAVEPOINT are gone. Writes around it stay."""
    with world.session() as session:
        session.add(Tag(name="before"))
        session.flush()
        with session.begin_nested() as savepoint:
            session.add(Tag(name="inside"))
            session.flush()
            savepoint.rollback()
        with session.begin_nested():
            session.add(Tag(name="kept"))
        session.commit()
    assert ops(world, Tag) == [("insert", "before"), ("insert", "kept")]
    world.assert_in_step()


def test_close_discards_uncommitted_entries(world: World) -> None:
    """close() fires neither commit nor rollback."""
    with world.session() as session:
        session.add(Tag(name="t"))
        session.flush()
    assert ops(world, Tag) == []
    world.assert_in_step()


def test_bulk_statements_are_captured(world: World) -> None:
    """session.execute(insert/update/delete(Model)) and Query.update/delete leave entries like any write."""
    with world.session() as session:
        session.execute(insert(Tag), [{"name": "a"}, {"name": "b"}, {"name": "c"}])
        session.execute(insert(Tag).values(name="d", meaning="given"))
        result = session.execute(update(Tag).where(Tag.name.in_(["a", "b"])).values(meaning="new"))
        assert result.rowcount == 2
        assert session.query(Tag).filter(Tag.name == "b").update({"meaning": "newer"}) == 1
        assert session.execute(delete(Tag).where(Tag.name == "a")).rowcount == 1
        assert session.query(Tag).filter(Tag.name == "c").delete() == 1
        session.commit()
        assert {tag.name: tag.meaning for tag in session.scalars(select(Tag))} == {"b": "newer", "d": "given"}
    world.assert_in_step()


def test_only_the_callers_returning_shows(world: World) -> None:
    """Our own RETURNING does not show; the caller's does."""
    with world.session() as session:
        names = session.scalars(insert(Tag).returning(Tag.name), [{"name": "a"}, {"name": "b"}]).all()
        assert sorted(names) == ["a", "b"]
        tag = session.scalars(insert(Tag).values(name="c").returning(Tag)).one()
        assert (tag.name, tag.meaning) == ("c", "unsaid")
        row = session.execute(insert(Tag).values(name="d").returning(Tag.meaning, Tag.name)).one()
        assert (row.meaning, row.name) == ("unsaid", "d")
        assert session.execute(insert(Tag), [{"name": "e"}, {"name": "f"}]).rowcount == 2
        changed = session.scalars(update(Tag).where(Tag.name == "a").values(meaning="x").returning(Tag.name)).all()
        assert changed == ["a"]
        session.commit()
    world.assert_in_step()


def test_executemany_update_by_key_is_captured(world: World) -> None:
    """Rows named by their primary keys, baselines included."""
    with world.engine.begin() as connection:
        connection.execute(insert(Tag.__table__), [{"name": "a", "meaning": "1"}, {"name": "b", "meaning": "2"}])
    with world.session() as session:
        session.execute(update(Tag), [{"name": "a", "meaning": "x"}, {"name": "b", "meaning": "y"}])
        session.commit()
    assert sorted(ops(world, Tag)) == [("baseline", "a"), ("baseline", "b"), ("update", "a"), ("update", "b")]
    world.assert_in_step()


def test_a_bulk_delete_of_unknown_rows_can_be_undone(world: World) -> None:
    """Baselines are read before the statement is sent."""
    with world.engine.begin() as connection:
        connection.execute(insert(Tag.__table__), [{"name": "a", "meaning": "1"}, {"name": "b", "meaning": "2"}])
    with world.session() as session:
        session.execute(delete(Tag))
        session.commit()
        world.memory.rollback(session)
        session.commit()
        assert {tag.name: tag.meaning for tag in session.scalars(select(Tag))} == {"a": "1", "b": "2"}
    world.assert_in_step()


def test_upsert_logs_baselines_of_rows_older_than_tracking(world: World) -> None:
    """Baselines come first, with the old values. Rows that it inserts or leaves alone have none."""
    with world.engine.begin() as connection:
        rows = [{"name": name, "meaning": "old"} for name in ("kept", "changed")]
        connection.execute(insert(Tag.__table__), rows)
    with world.session() as session:
        session.execute(insert(Tag), [{"name": "known", "meaning": "one"}])
        session.commit()
        statement = database_of(world.engine).upsert(Tag)
        statement = statement.on_conflict_do_update(
            index_elements=["name"], set_={"meaning": statement.excluded.meaning}, where=Tag.name != "kept"
        )
        names = ("kept", "changed", "known", "new")
        session.execute(statement, [{"name": name, "meaning": "put"} for name in names])
        session.commit()
        changes = world.memory.history(session, Tag)
        assert sorted((c.op, c.key, c.after and c.after["meaning"]) for c in changes) == [
            ("baseline", "changed", "old"),
            ("insert", "known", "one"),
            ("insert", "new", "put"),
            ("update", "changed", "put"),
            ("update", "known", "put"),
        ]
        world.memory.rollback(session)
        session.commit()
        assert {tag.name: tag.meaning for tag in session.scalars(select(Tag))} == {
            "kept": "old",
            "changed": "old",
            "known": "one",
        }
    world.memory.backfill(world.engine, Tag)
    world.assert_in_step()


def test_a_failed_bulk_statement_leaves_nothing(world: World) -> None:
    """Neither rows nor entries remain, and the transaction goes on."""
    with world.session() as session:
        session.add(Tag(name="a"))
        session.flush()
        with pytest.raises(IntegrityError):
            session.execute(insert(Tag), [{"name": "b"}, {"name": "a"}])
        session.commit()
    assert ops(world, Tag) == [("insert", "a")]
    world.assert_in_step()


UNTRACKED = {
    "bulk_save_objects": lambda s: s.bulk_save_objects([Tag(name="x")]),
    "bulk_insert_mappings": lambda s: s.bulk_insert_mappings(Tag, [{"name": "x", "meaning": "m"}]),
    "bulk_update_mappings": lambda s: s.bulk_update_mappings(Tag, [{"name": "a", "meaning": "x"}]),
    "core update of many": lambda s: s.execute(
        Tag.__table__.update().where(Tag.name == bindparam("which")), [{"which": "a", "meaning": "m"}] * 2
    ),
    "connection": lambda s: s.connection().execute(Tag.__table__.delete()),
    "key update": lambda s: s.execute(update(Tag).values(name="z")),
    "lambda on a connection": lambda s: s.connection().execute(lambda_stmt(lambda: delete(Tag))),
    "returning star": lambda s: s.execute(update(Tag).values(meaning="x").returning(literal_column("*"))),
    "or replace": lambda s: s.execute(insert(Tag).prefix_with("OR REPLACE").values(name="a", meaning="x")),
}


@pytest.mark.parametrize("way", UNTRACKED)
def test_statements_that_cannot_be_captured_are_refused(world: World, way: str) -> None:
    """UntrackedWrite is raised before anything is sent. It names the statement and the alternative."""
    with world.session() as session:
        session.add(Tag(name="a"))
        session.commit()
        with pytest.raises(UntrackedWrite, match=r"(INSERT|UPDATE|DELETE) on tag would bypass the log of Tag\. "):
            UNTRACKED[way](session)
        session.rollback()
        assert session.scalars(select(Tag.name)).all() == ["a"]
    world.assert_in_step()


def test_other_sessions_and_tables_are_left_alone(world: World) -> None:
    """Only attached Sessions, and only tracked tables, are watched."""
    with Session(world.engine) as session:
        session.bulk_insert_mappings(Tag, [{"name": "x", "meaning": "m"}])
        session.execute(Tag.__table__.delete())
        session.commit()
    assert ops(world, Tag) == []


def test_on_untracked_warn_lets_the_write_through(engine: Engine) -> None:
    """With on_untracked="warn" there is a warning instead, and the write goes through."""
    app = make_app(engine, Tag, text="meaning", on_untracked="warn")
    with app.session() as session:
        with pytest.warns(UntrackedWriteWarning, match="bypass the log of Tag"):
            session.bulk_insert_mappings(Tag, [{"name": "x", "meaning": "m"}])
        session.commit()
        assert session.scalars(select(Tag.name)).all() == ["x"]


def test_before_commit_writes_the_header(world: World) -> None:
    """The commit's own flush comes after before_commit: without flushing there, the header would be missed."""
    with world.session() as session:
        world.memory.annotate(session, actor="ada", reason="because", session_id="s1")
        session.add(Tag(name="t"))
        session.commit()
        change = world.memory.history(session, Tag, "t")[0]
        assert (change.actor, change.reason, change.session_id) == ("ada", "because", "s1")
        assert session.execute(select(transaction.c.tx)).scalars().all() == [change.tx]


def test_after_rollback_ends_the_flush_that_failed(world: World) -> None:
    """A flush that fails inside a SAVEPOINT is over. Later statements do not belong to it."""
    with world.session() as session:
        session.add(Tag(name="a"))
        session.flush()
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(text("SELECT 1"))
            session.add(Person(id=1, name=None))
            session.flush()
        assert world.memory._capture.transaction(session).flush is None
        with pytest.raises(UntrackedWrite):
            session.bulk_insert_mappings(Tag, [{"name": "x", "meaning": "m"}])
        session.rollback()


def test_after_rollback_disarms_the_wake_up(world: World) -> None:
    """A commit that fails after it was sealed does not wake a relay."""
    woken: list[bool] = []
    world.memory._capture._on_commit = lambda engine: woken.append(True)  # type: ignore[method-assign]
    with world.session() as session:

        @event.listens_for(session, "before_commit")
        def veto(_: Session) -> None:
            session.flush()
            raise RuntimeError("veto")

        session.add(Tag(name="t"))
        with pytest.raises(RuntimeError, match="veto"):
            session.commit()
        session.rollback()
        event.remove(session, "before_commit", veto)
        session.execute(select(Tag))
        session.commit()
        assert woken == []
        session.add(Tag(name="t"))
        session.commit()
        assert woken == [True]


def test_after_transaction_end_forgets_the_labels(world: World) -> None:
    """close() ends a transaction without a rollback event: its labels must not reach the next one."""
    with world.session() as session:
        world.memory.annotate(session, actor="ada")
        session.add(Tag(name="t"))
        session.flush()
        session.close()
        session.add(Tag(name="u"))
        session.commit()
        assert [(c.key, c.actor) for c in world.memory.history(session, Tag)] == [("u", None)]


def test_a_savepoint_keeps_the_labels(world: World) -> None:
    """before_commit, after_rollback and after_transaction_end fire for SAVEPOINTs too."""
    with world.session() as session:
        world.memory.annotate(session, actor="ada")
        with session.begin_nested():
            session.add(Tag(name="t"))
        with session.begin_nested() as savepoint:
            session.add(Tag(name="u"))
            session.flush()
            savepoint.rollback()
        session.add(Tag(name="v"))
        session.commit()
        changes = world.memory.history(session, Tag)
        assert [(c.key, c.actor) for c in changes] == [("t", "ada"), ("v", "ada")]
        assert changes[0].tx == changes[1].tx


def test_flush_only_session_logs_without_a_header(world: World) -> None:
    """The application commits the connection itself. Log and outbox are written, but no header."""
    with world.engine.begin() as connection:
        session = world.sessions(bind=connection)
        session.add(Tag(name="t"))
        session.flush()
        session.close()
    with (
        world.engine.begin() as connection,
        world.sessions(bind=connection, join_transaction_mode="rollback_only") as session,
    ):
        session.add(Tag(name="u"))
        session.commit()
    world.assert_in_step()


@pytest.mark.parametrize("kind", ["sessionmaker", "class", "scoped", "session"])
def test_attach_takes_every_kind_of_session(engine: Engine, kind: str) -> None:
    """A sessionmaker, a Session class, a scoped_session or a Session; attaching twice changes nothing."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Tag, text="meaning")
    Base.metadata.create_all(engine)
    memory.create_tables(engine)

    class Own(Session):
        pass

    maker = sessionmaker(engine, class_=Own)
    session = maker()
    target = {"sessionmaker": maker, "class": Own, "scoped": scoped_session(maker), "session": session}[kind]
    memory.attach(target)
    memory.attach(target)
    session.add(Tag(name="t"))
    session.commit()
    assert [c.op for c in memory.history(session, Tag)] == ["insert"]
    session.close()


def test_attach_refuses_objects_that_it_cannot_listen_to() -> None:
    """The error names the types that it takes."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    for wrong in (create_engine("sqlite://"), "session", None):
        with pytest.raises(TypeError, match="sessionmaker, a Session class, a scoped_session or an async_sessionmaker"):
            memory.attach(wrong)


def test_two_memories_do_not_see_each_other(engine: Engine) -> None:
    """Each captures its own models through its own Sessions."""
    first, second = (Memory(InMemoryIndex(), embedder=HashEmbedder()) for _ in range(2))
    first.track(Tag, text="meaning", entity="first")
    second.track(Tag, text="meaning", entity="second")
    sessions = sessionmaker(engine), sessionmaker(engine)
    first.attach(sessions[0])
    second.attach(sessions[1])
    Base.metadata.create_all(engine)
    first.create_tables(engine)
    for maker, name in zip(sessions, "ab", strict=True):
        with maker() as session:
            session.add(Tag(name=name))
            session.commit()
    with sessions[0]() as session:
        assert [c.key for c in first.history(session, Tag)] == ["a"]
        assert [c.key for c in second.history(session, Tag)] == ["b"]


def test_annotating_a_foreign_session_is_refused(world: World) -> None:
    """Labels that would never be stored are a mistake."""
    with Session(world.engine) as session, pytest.raises(MemstateError, match="not attached"):
        world.memory.annotate(session, actor="ada")

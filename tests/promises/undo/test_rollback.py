"""Undo reverts the last transactions by new entries, in the caller's transaction. The vectors follow."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, ForeignKey, String, delete, func, insert, inspect, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from memstate_sa import ConflictError, HistoryMissing, Memory, MemstateError, NotFound
from memstate_sa.db.tables import log
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Note, Person, Tag, World
from tests.support.apps import enforce_foreign_keys, make_app
from tests.support.statements import statements
from tests.support.tags import say, tags

pytestmark = pytest.mark.sa20


def undo(world: World, steps: int = 1, **scope: str) -> list[tuple[str, str]]:
    with world.session() as session:
        changes = world.memory.rollback(session, steps, **scope)
        session.commit()
        return [(change.op, change.key) for change in changes]


def test_undo_moves_sql_and_vectors(world: World) -> None:
    """Inserts, updates and deletes of the last transactions are undone, newest first."""
    say(world, a="1", b="1")
    say(world, a="2", c="1")
    say(world, b=None)
    world.assert_in_step()
    assert sorted(undo(world, 2)) == [("delete", "c"), ("insert", "b"), ("update", "a")]
    assert tags(world) == {"a": "1", "b": "1"}
    world.assert_in_step()


def test_undo_is_part_of_the_callers_transaction(world: World) -> None:
    """Undo does not commit, so the caller's rollback removes it."""
    say(world, a="1")
    say(world, a="2")
    with world.session() as session:
        world.memory.rollback(session)
        assert session.get_one(Tag, "a").meaning == "1"
        session.rollback()
        assert session.get_one(Tag, "a").meaning == "2"
    world.assert_in_step()


def test_the_log_only_grows(world: World) -> None:
    """Compensating entries name the entries that they revert. Nothing is erased."""
    first = say(world, a="1")
    with world.session() as session:
        before = world.memory.history(session, Tag)
        (change,) = world.memory.rollback(session)
        session.commit()
        assert (change.op, change.key, change.reverts, change.reason) == ("delete", "a", first, "rollback")
        assert (change.before, change.after) == ({"name": "a", "meaning": "1", "person_id": None}, None)
        assert world.memory.history(session, Tag) == [*before, change]


def test_two_rollbacks_of_one_step_undo_two_steps(world: World) -> None:
    """Undone transactions and undos do not count."""
    say(world, a="1")
    say(world, a="2")
    say(world, a="3")
    undo(world)
    assert tags(world) == {"a": "2"}
    undo(world)
    assert tags(world) == {"a": "1"}
    say(world, a="4")
    undo(world, 2)
    assert tags(world) == {}
    world.assert_in_step()
    assert undo(world) == []


def test_undoing_an_undo_redoes(world: World) -> None:
    """rollback(tx=…) of a rollback redoes it. A redone step counts again."""
    say(world, a="1")
    say(world, a="2")
    with world.session() as session:
        tx = world.memory.rollback(session)[0].tx
        session.commit()
        assert tags(world) == {"a": "1"}
        redo = world.memory.rollback(session, tx=tx)[0].tx
        session.commit()
        assert tags(world) == {"a": "2"}
        with pytest.raises(ConflictError, match="already undone"):
            world.memory.rollback(session, tx=tx)
        world.memory.rollback(session, tx=redo)
        session.commit()
        assert tags(world) == {"a": "1"}
    world.assert_in_step()


def test_baselines_and_backfill_do_not_count(world: World) -> None:
    """Even a million of them after the last change do not hide it."""
    with world.engine.begin() as connection:
        connection.execute(insert(Tag.__table__), [{"name": f"old{n}", "meaning": "x"} for n in range(5)])
    say(world, old0="changed")
    world.memory.backfill(world.engine, Tag)
    assert undo(world) == [("update", "old0")]
    assert tags(world)["old0"] == "x"
    assert undo(world) == []
    world.assert_in_step()


def test_the_callers_own_uncommitted_work_is_not_undone(world: World) -> None:
    """It is not a step. session.rollback() exists for it."""
    say(world, a="1")
    with world.session() as session:
        session.add(Tag(name="mine"))
        world.memory.rollback(session)
        session.commit()
    assert tags(world) == {"mine": "unsaid"}
    world.assert_in_step()


def test_undo_counts_only_steps_of_a_session_or_an_actor(world: World) -> None:
    """Transactions of others are skipped, and stay."""
    say(world, actor="ada", session_id="s1", a="1")
    say(world, actor="bob", session_id="s1", b="1")
    say(world, actor="ada", session_id="s2", c="1")
    say(world, d="1")
    assert undo(world, session_id="s1") == [("delete", "b")]
    assert undo(world, actor="ada") == [("delete", "c")]
    with world.session() as session:
        world.memory.annotate(session, session_id="s1")
        assert [c.key for c in world.memory.rollback(session)] == ["a"]  # the scope of the Session's annotation
        session.commit()
    assert tags(world) == {"d": "1"}
    world.assert_in_step()


def test_a_later_change_by_someone_else_is_a_conflict(world: World) -> None:
    """Nothing is written. The error has the later changes."""
    say(world, actor="ada", a="1", b="1")
    say(world, actor="bob", a="2")
    with world.session() as session:
        with pytest.raises(ConflictError, match=r"tag 'a' \(update by bob") as caught:
            world.memory.rollback(session, actor="ada")
        assert [(c.key, c.actor, c.op) for c in caught.value.changes] == [("a", "bob", "update")]
        session.commit()
    assert tags(world) == {"a": "2", "b": "1"}
    assert undo(world, actor="bob") == [("update", "a")]
    assert sorted(undo(world, actor="ada")) == [("delete", "a"), ("delete", "b")]
    world.assert_in_step()


def test_parents_come_back_before_children_and_go_after_them(world: World) -> None:
    """Foreign keys hold after every statement of an undo."""
    enforce_foreign_keys(world.engine)
    with world.session() as session:
        session.add(Person(name="p", about="tea", notes=[Note(topic="t", number=n, content=f"n{n}") for n in (1, 2)]))
        session.commit()
        session.delete(session.get_one(Person, 1))
        session.commit()
        assert {c.entity for c in world.memory.rollback(session)} == {"person", "note"}
        session.commit()
        assert sorted(note.number for note in session.get_one(Person, 1).notes) == [1, 2]
        session.close()
        world.assert_in_step()
        world.memory.rollback(session)
        session.commit()
        assert session.scalars(select(Note)).all() == session.scalars(select(Person)).all() == []
    world.assert_in_step()


def test_loaded_instances_are_expired(world: World) -> None:
    """A loaded instance shows the restored values."""
    say(world, a="1")
    with world.session() as session:
        tag = session.get_one(Tag, "a")
        tag.meaning = "2"
        session.commit()
        assert tag.meaning == "2"
        world.memory.rollback(session)
        assert tag.meaning == "1"
        session.commit()


def test_collections_and_references_to_undone_facts_are_read_again(world: World) -> None:
    """A parent's collection follows the undo. Relationships of other objects stay loaded."""
    with world.sessions(expire_on_commit=False) as session:
        persons = [Person(id=n, name=f"p{n}") for n in (1, 2)]
        tag = Tag(name="t", person=persons[1])
        session.add_all([*persons, tag])
        session.commit()
        first, second = persons
        note = Note(topic="tea", number=1, content="green")
        first.notes.append(note)
        session.commit()
        assert [len(person.notes) for person in persons] == [1, 0]
        assert [len(person.tags) for person in persons] == [0, 1]

        world.memory.rollback(session)
        session.commit()
        assert "notes" in inspect(second).dict
        assert first.notes == []

        world.memory.rollback(session, tx=world.memory.history(session, Note)[-1].tx)
        session.commit()
        assert [note.content for note in first.notes] == ["green"]
        first.notes[0].person = second
        tag.person = None
        session.commit()
        assert [len(person.tags) for person in persons] == [0, 0]

        world.memory.rollback(session)
        session.commit()
        assert [len(person.notes) for person in persons] == [1, 0]
        assert (tag.person, second.tags) == (second, [tag])
        session.delete(first)
        session.commit()
    world.assert_in_step()


def test_expiring_relationships_sends_no_statement(world: World) -> None:
    def statements_of_an_undo(*, load: bool) -> list[str]:
        with world.sessions(expire_on_commit=False) as session:
            person = Person(name="p")
            session.add(person)
            session.commit()
            session.add(Note(topic="tea", number=person.id, content="green", person_id=person.id))
            session.commit()
            assert not load or person.notes
            seen = statements(world.engine)
            world.memory.rollback(session)
            sent = list(seen)
            session.commit()
            return sent

    assert statements_of_an_undo(load=True) == statements_of_an_undo(load=False)


def test_cost_depends_on_the_steps_not_on_the_history(world: World) -> None:
    """Undoing one step sends the same statements for a long history and for a short one."""
    costs = []
    for length in (10, 10, 60):
        for n in range(length):
            say(world, **{f"t{n % 7}": f"meaning {length} {n}"})
        with world.session() as session:
            session.connection()
            seen = statements(world.engine)
            world.memory.rollback(session)
            costs.append(len(seen))
            session.commit()
    assert costs[1] == costs[2]  # the first has no earlier undo to read


def test_a_bulk_statement_is_one_step(world: World) -> None:
    """The number of changed rows does not matter."""
    say(world, **{f"t{n}": str(n) for n in range(6)})
    with world.session() as session:
        session.execute(update(Tag).values(meaning="flat"))
        session.execute(delete(Tag).where(Tag.name == "t5"))
        session.commit()
    undo(world)
    assert tags(world) == {f"t{n}": str(n) for n in range(6)}
    world.assert_in_step()


@pytest.mark.parametrize("steps", [0, -1, "1", 1.5, True])
def test_steps_must_be_a_positive_number(world: World, steps: object) -> None:
    """A clear error is raised."""
    with world.session() as session, pytest.raises(MemstateError, match="at least 1"):
        world.memory.rollback(session, steps)  # type: ignore[arg-type]


def test_unknown_and_open_transactions_are_refused(world: World) -> None:
    """The transaction does not exist, or is still open."""
    with world.session() as session:
        with pytest.raises(NotFound, match="no transaction 'x'"):
            world.memory.rollback(session, tx="x")
        session.add(Tag(name="t"))
        session.flush()
        open_tx = session.scalars(select(log.c.tx)).one()
        with pytest.raises(MemstateError, match="still open"):
            world.memory.rollback(session, tx=open_tx)


class Base(DeclarativeBase):
    pass


class Tree(Base):
    """A row that refers to its own table. It has a version counter, a generated column and an onupdate column."""

    __tablename__ = "tree"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("tree.id"))
    label: Mapped[str] = mapped_column(String(50))
    version: Mapped[int] = mapped_column()
    touched: Mapped[int] = mapped_column(default=0, onupdate=lambda: 99)
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012  # SQLAlchemy's own form


def test_undo_restores_self_references_and_moves_versions_on(engine: Engine) -> None:
    """Parents come first within a table, the version counter rises, and onupdate does not overwrite restored values."""
    app = make_app(engine, Tree, text="label")
    with app.session() as session, app.session() as stale:
        session.add_all([Tree(id=3, label="root"), Tree(id=2, parent_id=3, label="twig")])
        session.flush()
        session.add(Tree(id=1, parent_id=2, label="leaf"))
        session.commit()
        leaf = stale.get_one(Tree, 1)
        stale.commit()
        stale.refresh(leaf)
        stale.rollback()
        for id_ in (1, 2, 3):
            session.delete(session.get_one(Tree, id_))
            session.flush()
        session.commit()
        app.memory.rollback(session)
        session.commit()
        assert dict(session.execute(select(Tree.id, Tree.parent_id)).all()) == {1: 2, 2: 3, 3: None}
        session.get_one(Tree, 1).label = "renamed"
        session.commit()
        assert session.execute(select(Tree.version, Tree.touched).where(Tree.id == 1)).one() == (2, 99)
        app.memory.rollback(session)
        session.commit()
        row = session.execute(select(Tree.label, Tree.version, Tree.touched).where(Tree.id == 1)).one()
        assert row == ("leaf", 3, 0)
        assert app.memory.history(session, Tree, 1)[-1].after["version"] == 3  # type: ignore[index]
        relay = app.memory.relay(engine)
        relay.drain()
        assert app.memory.verify(engine).clean
        assert session.scalar(select(func.count()).select_from(Tree)) == 3


def test_undo_of_an_untracked_entity_is_refused(world: World) -> None:
    """Its rows cannot be written back. The error says so."""
    say(world, a="1")
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Person, text="about")
    sessions = sessionmaker(world.engine)
    memory.attach(sessions)
    with sessions() as session, pytest.raises(HistoryMissing, match="Cannot undo changes of tag: this Memory does"):
        memory.rollback(session)

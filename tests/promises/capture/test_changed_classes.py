"""A release tracks a class differently from the release before: options of `track()` that an index or a table
remembers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, delete, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from memstate_sa import ConflictError, Memory, MemoryStore
from memstate_sa.db.tables import projection, refill, unique, utcnow
from memstate_sa.indexes import InMemoryIndex, VectorIndex
from memstate_sa.relay.projections import HELD_BY_INDEX
from memstate_sa.testing import HashEmbedder
from tests.support import assert_index_holds
from tests.support.apps import App
from tests.support.indexes import KINDS, Make, storage


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    title: Mapped[str]
    body: Mapped[str]


def titles(note: Note) -> str:
    return note.title


def bodies(note: Note) -> str:
    return note.body


class Release(App):
    """A process of one release of the application; *track* says how it tracks `Note`."""

    def __init__(self, engine: Engine, indexes: VectorIndex | dict[str, VectorIndex], /, **track: Any) -> None:
        super().__init__(engine, Note, index=indexes, tracking={Note: track})

    def add(self, *ids: int, owner: str = "ann") -> None:
        with self.sessions() as session:
            session.add_all(Note(id=n, owner=owner, title=f"chapter {n}", body=f"zebra {n}") for n in ids)
            session.commit()

    def drain(self) -> None:
        self.relay.drain()

    def found(self, query: str, *criteria: Any) -> tuple[set[int], bool]:
        with self.sessions() as session:
            hits = self.memory.search(session, query, select(Note).where(*criteria), limit=100)
            return {hit.fact.id for hit in hits}, hits.complete

    def texts(self, index: VectorIndex, attribute: str) -> None:
        """Assert that *index* holds exactly the rows by this attribute."""
        with self.sessions() as session:
            rows = {f"note[{note.id}]": getattr(note, attribute) for note in session.scalars(select(Note))}
        assert_index_holds(index, self.embedder, rows)

    def problems(self) -> list[str]:
        return [message for _, message in self.memory.doctor(self.engine, rows=False).problems]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    with storage(request.param, tmp_path, request) as made:
        yield made


PROJECTIONS: dict[str, tuple[Any, Any, str]] = {
    "metadata": ({"text": "title"}, {"text": "title", "metadata": ("owner",)}, "title"),
    "less metadata": (
        {"text": "title", "metadata": ("owner", "body")},
        {"text": "title", "metadata": ("owner",)},
        "title",
    ),
    "text": ({"text": "title"}, {"text": "body"}, "body"),
    "a first text": ({"text": None}, {"text": "body"}, "body"),
    "a function": ({"text": "title"}, {"text": bodies}, "body"),
    "its version": ({"text": titles}, {"text": bodies, "text_version": 2}, "body"),
}


@pytest.mark.parametrize("change", PROJECTIONS)
def test_class_is_delivered_again_when_its_projection_changes(sqlite_engine: Engine, make: Make, change: str) -> None:
    """This holds for each index. Until then a search is incomplete, filters skip old points, and doctor says why."""
    before, after, attribute = PROJECTIONS[change]
    assert_delivered_again(sqlite_engine, make, before, after, attribute)


def test_class_is_delivered_again_on_postgresql(postgres_engine: Engine) -> None:
    index = InMemoryIndex()
    assert_delivered_again(postgres_engine, lambda: index, *PROJECTIONS["metadata"])


def assert_delivered_again(engine: Engine, make: Make, before: Any, after: Any, attribute: str) -> None:
    old = Release(engine, make(), **before)
    old.add(*range(1, 9))
    old.add(9, owner="bob")
    old.drain()
    assert old.problems() == []
    old.memory.close()
    index = make()
    new = Release(engine, index, **after)
    [problem] = new.problems()
    assert "was delivered as" in problem and "A relay of this release delivers it again" in problem
    assert new.found("zebra", Note.owner == "bob")[1] is False
    if before["text"] is not None:
        assert new.found("zebra", Note.owner == "bob")[0] == {9}
    new.drain()
    new.texts(index, attribute)
    assert new.found("zebra", Note.owner == "bob") == ({9}, True)
    assert new.found("zebra") == (set(range(1, 10)), True)
    assert new.memory.verify(engine).clean
    assert new.problems() == []
    new.memory.close()


def test_class_without_text_leaves_the_index(engine: Engine) -> None:
    index = InMemoryIndex()
    old = Release(engine, index, text="title")
    old.add(1, 2)
    old.drain()
    Release(engine, index, text=None).drain()
    assert index.scan(None, 10) == []


def test_changed_text_function_is_noticed_by_stale_hits(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Without text_version, a hit whose text is not its row's makes the search incomplete. doctor reports it.

    The same kind: points that another program has overwritten.
    """
    index = InMemoryIndex()
    old = Release(engine, index, text=titles)
    old.add(*range(1, 9))
    old.drain()
    assert old.problems() == []
    new = Release(engine, index, text=bodies)
    new.drain()
    assert new.found("zebra")[1] is False
    [warning] = [record.getMessage() for record in caplog.records if record.name == "memstate_sa.search"]
    assert "text_version" in warning and "zebra" not in warning
    [problem] = new.problems()
    assert "text_version" in problem
    assert new.memory.verify(engine, repair=True).stale
    assert new.found("zebra") == (set(range(1, 9)), True)
    assert new.problems() == []


def test_changed_row_is_no_sign_of_a_changed_text_function(engine: Engine) -> None:
    """An undelivered change explains a stale hit."""
    release = Release(engine, InMemoryIndex(), text=titles)
    release.add(*range(1, 9))
    release.drain()
    with release.sessions() as session:
        session.execute(update(Note).values(title="zebra"))
        session.commit()
    assert release.found("chapter") == (set(range(1, 9)), True)
    assert release.problems() == []


# -- two releases at once ----------------------------------------------------------------------------------------------


def refilling(engine: Engine) -> bool:
    with engine.connect() as connection:
        return not all(connection.scalars(select(refill.c.done)))


def content_of_index(engine: Engine) -> str:
    """The description of the index's content."""
    with engine.connect() as connection:
        return connection.scalars(select(projection.c.projection).where(projection.c.owner == HELD_BY_INDEX)).one()


def test_two_releases_do_not_refill_in_turns(engine: Engine) -> None:
    """The old relay delivers while it lives, then the new one. The old one does not take the index back."""
    index = InMemoryIndex()
    old = Release(engine, index, text="title")
    old.add(1, 2)
    old.relay.run_once()
    while refilling(engine):
        old.relay.run_once()  # its lease stays valid
    new = Release(engine, index, text="body")
    new.add(3)
    for _ in range(3):
        new.relay.run_once()
        old.relay.run_once()
        assert "title" in content_of_index(engine)
    assert new.found("zebra") == ({1, 2, 3}, False)
    old.relay.stop()
    new.drain()
    new.texts(index, "body")
    assert new.found("zebra") == ({1, 2, 3}, True)
    new.relay.stop()
    old.add(4)
    for _ in range(3):  # the relays take turns, each alone with the index
        old.relay.run_once()
        old.relay.stop()
        assert "body" in content_of_index(engine)
        new.drain()
    new.texts(index, "body")
    assert new.found("zebra") == ({1, 2, 3, 4}, True)


def test_older_release_takes_over_when_it_is_left_alone(engine: Engine) -> None:
    """A new release was tried and withdrawn. Relays of the old release need no restart."""
    index = InMemoryIndex()
    old = Release(engine, index, text="title")
    old.add(1, 2)
    old.drain()
    new = Release(engine, index, text="body")
    new.drain()
    with engine.begin() as connection:
        connection.execute(update(projection).values(seen_at=utcnow().replace(year=2020)))
    old.drain()
    old.texts(index, "title")


def test_newer_process_of_the_older_release_takes_over(engine: Engine) -> None:
    """A deployment was rolled back."""
    index = InMemoryIndex()
    Release(engine, index, text="title").add(1, 2)
    Release(engine, index, text="body").drain()
    again = Release(engine, index, text="title")
    again.drain()
    again.texts(index, "title")


def test_database_of_the_version_before_is_delivered_again_once(engine: Engine) -> None:
    """That version did not record the content of its indexes."""
    index = InMemoryIndex()
    Release(engine, index, text="title").add(1, 2)
    old = Release(engine, index, text="title")
    old.drain()
    with engine.begin() as connection:
        connection.execute(delete(projection))
    assert old.found("chapter") == ({1, 2}, False)
    embedded = old.relay.counters()["memory"].embedded
    old.drain()
    assert old.found("chapter") == ({1, 2}, True)
    assert old.relay.counters()["memory"].embedded == embedded


# -- other options -----------------------------------------------------------------------------------------------------


def test_class_moves_to_another_index(engine: Engine) -> None:
    """Its points move to the new index and leave the old one. Points of other classes stay."""
    indexes: dict[str, VectorIndex] = {"one": InMemoryIndex(), "two": InMemoryIndex()}
    old = Release(engine, indexes, text="title", index="one")
    old.add(1, 2)
    old.drain()
    with old.sessions() as session:
        session.delete(session.get_one(Note, 1))
        session.commit()
    new = Release(engine, indexes, text="title", index="two")
    assert any("no text" in problem for problem in new.problems())
    new.add(3)
    new.drain()
    new.texts(indexes["two"], "title")
    assert indexes["one"].scan(None, 10) == []
    assert new.found("chapter") == ({2, 3}, True)
    assert new.problems() == []
    back = Release(engine, indexes, text="title", index="one")
    back.drain()
    back.texts(indexes["one"], "title")
    assert indexes["two"].scan(None, 10) == []


def test_class_that_is_captured_by_sessions_again_is_logged_once(engine: Engine) -> None:
    """Triggers of the earlier release would log each change a second time. create_tables removes them."""
    index = InMemoryIndex()
    Release(engine, index, text="title", capture="trigger").add(1)
    memory = Memory(index, embedder=HashEmbedder())
    memory.track(Note, text="title")
    memory.attach(sessionmaker(engine))
    assert any("each change is logged twice" in message for _, message in memory.doctor(engine).problems)
    new = Release(engine, index, text="title")
    assert new.problems() == []
    with new.sessions() as session:
        session.get_one(Note, 1).title = "another"
        session.commit()
        assert [change.op for change in memory.history(session, Note, 1)] == ["insert", "update"]


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_doctor_tells_of_a_class_that_was_renamed(engine: Engine, capture: str) -> None:
    index = InMemoryIndex()
    Release(engine, index, text="title", capture=capture).add(1)
    new = Release(engine, index, text="title", entity="notice", capture=capture)
    problems = " ".join(new.problems())
    assert "track it with entity= the old name" in problems
    assert ("has triggers that log it as note" in problems) is (capture == "trigger")
    same = Release(engine, index, text="title", entity="note", capture=capture)
    assert not any("renamed" in problem for problem in same.problems())


# -- unique values -----------------------------------------------------------------------------------------------------


class Person(Base):
    __tablename__ = "person"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str | None]
    phone: Mapped[str | None]


class People(App):
    """A process of one release, with its own unique_by for `Person`."""

    def __init__(self, engine: Engine, **track: Any) -> None:
        super().__init__(engine, Person, text="email", **track)

    def add(self, id_: int, email: str | None, phone: str | None = None) -> None:
        with self.sessions() as session:
            session.add(Person(id=id_, email=email, phone=phone))
            session.commit()

    def holders(self) -> dict[str, str]:
        with self.engine.connect() as connection:
            return {row.value: row.key for row in connection.execute(select(unique))}

    def problems(self) -> list[str]:
        return [message for _, message in self.memory.doctor(self.engine).problems]


@pytest.mark.parametrize("batch_size", [1, 100])
def test_new_unique_by_covers_older_rows_after_backfill(
    engine: Engine, caplog: pytest.LogCaptureFixture, batch_size: int
) -> None:
    """Backfill stores the values, and warns about rows that share one. Until then doctor reports the gap."""
    old = People(engine)
    for id_, email in enumerate(("ann@x", "bob@x", None, "ann@x"), 1):
        old.add(id_, email)
    new = People(engine, unique_by=("email",))
    [problem] = new.problems()
    assert "has 4 rows" not in problem and "has 3 rows without their unique values" in problem
    assert new.memory.backfill(engine, batch_size=batch_size) == 0
    assert new.holders() == {'["ann@x"]': "[1]", '["bob@x"]': "[2]"}
    assert new.problems() == []
    warnings = {record.getMessage().rpartition(": ")[2] for record in caplog.records if record.levelname == "WARNING"}
    assert warnings == {"[4]"}
    for email in ("ann@x", "bob@x"):
        with pytest.raises(ConflictError):
            new.add(9, email)
    new.add(9, "cid@x")


def test_changed_unique_by_forgets_values_of_the_old_columns(engine: Engine) -> None:
    """Values of the old columns block no row. Values of rows deleted while nothing was unique do not either."""
    old = People(engine, unique_by=("email",))
    old.add(1, "5551", "5552")
    old.add(2, "gone")
    between = People(engine)
    with between.sessions() as session:
        session.delete(session.get_one(Person, 2))
        session.commit()
    new = People(engine, unique_by=("phone",))
    new.add(3, None, "5553")
    new.memory.backfill(engine)
    assert new.holders() == {'["5552"]': "[1]", '["5553"]': "[3]"}
    new.add(4, None, "5551")
    new.add(5, None, "gone")
    assert new.problems() == []


def test_backfill_gives_a_changing_row_its_locked_value(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backfill stores the value that the row has when it is locked."""
    from memstate_sa.capture import unique_values

    old = People(engine)
    old.add(1, "ann@x")
    old.add(2, "bob@x")
    new = People(engine, unique_by=("email",))
    inner, looks = unique_values.differences, []

    def differences(*args: Any) -> Any:
        looks.append(args)
        found = inner(*args)
        if len(looks) == 1 and engine.dialect.name == "postgresql":
            with new.sessions() as session:
                session.get_one(Person, 2).email = "cid@x"
                session.commit()
        return found

    monkeypatch.setattr(unique_values, "differences", differences)
    new.memory.backfill(engine)
    emails = {1: "ann@x", 2: "cid@x" if engine.dialect.name == "postgresql" else "bob@x"}
    assert new.holders() == {f'["{email}"]': f"[{id_}]" for id_, email in emails.items()}


class Contact(BaseModel):
    name: str
    email: str


def test_new_unique_by_of_a_fact_type_covers_older_facts(engine: Engine) -> None:
    """An older fact with the same value is updated, not added. A process without this type removes no value."""

    def opened(schema: Mapping[str, Any] | None = None) -> MemoryStore:
        store = MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False)
        if schema is not None:
            store.register_schema("contact", Contact, **schema)
        return store

    with opened(schema={}) as store:
        id_ = store.commit_model(Contact(name="Ann", email="ann@x"))
    with opened(schema={"unique_by": "email"}) as store:
        assert [problem.subject for problem in store.memory.doctor(engine).problems] == ["memstate_fact"]
        store.memory.backfill(engine)
        assert store.memory.doctor(engine).problems == []
    with opened() as store:
        store.memory.backfill(engine)
    with opened(schema={"unique_by": "email"}) as store:
        assert store.commit_model(Contact(name="Ann Lima", email="ann@x")) == id_
        assert [fact.payload["name"] for fact in store.query("contact")] == ["Ann Lima"]

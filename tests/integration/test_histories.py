"""Whatever a Session does, the log replays to the table and the index converges to it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError, InvalidRequestError, SAWarning
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from memstate_sa import metadata
from tests.support import Base, Note, Person, Tag, World

pytestmark = pytest.mark.sa20

small = st.integers(0, 3)
word = st.sampled_from(["tea", "rain", "", "  ", "sushi at noon", "the blue bicycle", "ünïcode 🦊", "a'b\"c"])
STEPS = {
    "add_person": st.tuples(word),
    "edit_person": st.tuples(small, word),
    "same_person": st.tuples(small),
    "expire_and_edit": st.tuples(small, word),
    "delete_person": st.tuples(small),
    "add_note": st.tuples(small, small, word),
    "edit_note_data": st.tuples(small, word),
    "orphan": st.tuples(small),
    "move_note": st.tuples(small, small),
    "renumber_note": st.tuples(small, small),
    "replace_note": st.tuples(small, word),
    "add_tag": st.tuples(small, small),
    "merge_tag": st.tuples(small, word),
    "bulk_insert": st.tuples(small, word),
    "bulk_update": st.tuples(small, word),
    "bulk_update_by_key": st.tuples(small, word),
    "bulk_delete": st.tuples(small),
    "query_update": st.tuples(small, word),
    "expression": st.tuples(small),
    "flush": st.tuples(),
    "flush_error": st.tuples(small),
    "savepoint": st.tuples(),
    "release": st.tuples(),
    "rollback_savepoint": st.tuples(),
    "commit": st.tuples(),
    "rollback": st.tuples(),
    "close": st.tuples(),
    "undo": st.tuples(),
    "relay": st.tuples(),
}
step = st.one_of(*(st.tuples(st.just(name), args) for name, args in STEPS.items()))


class Play:
    """Plays steps on one Session; a step that finds nothing to act on does nothing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.session: Session = world.session()
        self.savepoints: list[Any] = []

    def run(self, steps: list[tuple[str, tuple[Any, ...]]]) -> None:
        for name, args in steps:
            try:
                getattr(self, name)(*args)
            except (IntegrityError, InvalidRequestError, SAWarning, StaleDataError):
                self.rollback()
        try:
            self.session.commit()
        except (IntegrityError, InvalidRequestError, SAWarning, StaleDataError):
            self.session.rollback()
        self.session.close()

    def pick(self, model: Any, n: int) -> Any:
        found = self.session.scalars(select(model)).all()
        return found[n % len(found)] if found else None

    def add_person(self, about: str) -> None:
        self.session.add(Person(name="p", about=about))

    def edit_person(self, n: int, about: str) -> None:
        if person := self.pick(Person, n):
            person.about = about

    def same_person(self, n: int) -> None:
        if person := self.pick(Person, n):
            person.name = person.name

    def expire_and_edit(self, n: int, about: str) -> None:
        if person := self.pick(Person, n):
            self.session.flush()
            self.session.expire(person)
            person.about = about

    def delete_person(self, n: int) -> None:
        if person := self.pick(Person, n):
            self.session.delete(person)

    def add_note(self, n: int, number: int, content: str) -> None:
        if person := self.pick(Person, n):
            person.notes.append(Note(topic="t", number=number, content=content, data={"n": number}))

    def edit_note_data(self, n: int, value: str) -> None:
        if note := self.pick(Note, n):
            if note.data is None:
                note.data = {}
            note.data["value"] = value

    def orphan(self, n: int) -> None:
        if (person := self.pick(Person, n)) and person.notes:
            person.notes.pop()

    def move_note(self, n: int, m: int) -> None:
        if (note := self.pick(Note, n)) and (person := self.pick(Person, m)):
            note.person = person

    def renumber_note(self, n: int, number: int) -> None:
        if note := self.pick(Note, n):
            note.number = number + 10

    def replace_note(self, n: int, content: str) -> None:
        if note := self.pick(Note, n):
            self.session.delete(note)
            self.session.add(
                Note(topic=note.topic, number=note.number, person_id=note.person_id, content=content, data=None)
            )

    def add_tag(self, n: int, m: int) -> None:
        self.session.add(Tag(name=f"tag{n}", person=self.pick(Person, m)))

    def merge_tag(self, n: int, meaning: str) -> None:
        self.session.merge(Tag(name=f"tag{n}", meaning=meaning))

    def bulk_insert(self, n: int, about: str) -> None:
        self.session.execute(insert(Person), [{"name": f"bulk{i}", "about": about} for i in range(n + 1)])

    def bulk_update(self, n: int, about: str) -> None:
        self.session.execute(update(Person).where(Person.id % 4 >= n).values(about=about))

    def bulk_update_by_key(self, n: int, content: str) -> None:
        if note := self.pick(Note, n):
            rows = [{"topic": note.topic, "number": note.number, "content": content}]
            self.session.execute(update(Note), rows)

    def bulk_delete(self, n: int) -> None:
        self.session.execute(delete(Note).where(Note.number == n))

    def query_update(self, n: int, meaning: str) -> None:
        self.session.query(Tag).filter(Tag.name == f"tag{n}").update({"meaning": meaning})

    def expression(self, n: int) -> None:
        if person := self.pick(Person, n):
            person.name = Person.name + "!"

    def flush(self) -> None:
        self.session.flush()

    def flush_error(self, n: int) -> None:
        if person := self.pick(Person, n):
            self.session.execute(insert(Person), [{"id": person.id, "name": "twice", "about": "twice"}])

    def savepoint(self) -> None:
        self.savepoints.append(self.session.begin_nested())

    def release(self) -> None:
        if self.savepoints:
            savepoint = self.savepoints.pop()
            if savepoint.is_active:
                savepoint.commit()

    def rollback_savepoint(self) -> None:
        if self.savepoints:
            savepoint = self.savepoints.pop(len(self.savepoints) // 2)  # out of order: inner ones go with it
            if savepoint.is_active:
                savepoint.rollback()

    def commit(self) -> None:
        self.savepoints.clear()
        self.session.commit()

    def rollback(self) -> None:
        self.savepoints.clear()
        self.session.rollback()

    def close(self) -> None:
        self.savepoints.clear()
        self.session.close()

    def undo(self) -> None:
        self.commit()
        self.world.memory.rollback(self.session)
        self.session.commit()

    def relay(self) -> None:
        self.commit()
        self.world.relay.drain()


def wipe(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in (*reversed(Base.metadata.sorted_tables), *metadata.sorted_tables):
            connection.execute(text(f'DELETE FROM "{table.name}"'))


def check(world: World, steps: list[tuple[str, tuple[Any, ...]]], untracked: int) -> None:
    wipe(world.engine)
    world.index.delete([entry.id for entry in world.index.scan(None, 10_000)])
    world.relay.stop()
    with world.engine.begin() as connection:  # rows that were there before they were tracked
        for n in range(untracked):
            connection.execute(insert(Person.__table__), {"name": f"old{n}", "about": f"was here {n}"})
    world.memory.backfill(world.engine, Person) if untracked == 3 else None
    Play(world).run(steps)
    if untracked:
        world.memory.backfill(world.engine, Person)
    world.assert_in_step()


def histories(examples: int) -> Any:
    def decorate(test: Any) -> Any:
        test = given(steps=st.lists(step, min_size=1, max_size=14), untracked=small)(test)
        return settings(
            max_examples=examples,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )(test)

    return decorate


@histories(300)
def test_random_histories_on_sqlite(sqlite_engine: Engine, steps: Any, untracked: int) -> None:
    """300 random histories: replay(log) == tables and index == tables."""
    check(_world(sqlite_engine), steps, untracked)


@histories(100)
def test_random_histories_on_postgres(postgres_engine: Engine, steps: Any, untracked: int) -> None:
    """100 random histories: replay(log) == tables and index == tables."""
    check(_world(postgres_engine), steps, untracked)


_worlds: dict[int, World] = {}


def _world(engine: Engine) -> World:
    if id(engine) not in _worlds:
        _worlds[id(engine)] = World(engine)
    return _worlds[id(engine)]

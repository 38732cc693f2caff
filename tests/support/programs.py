"""Random programs of an application: their steps, and a memory that plays them."""

from __future__ import annotations

import warnings
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import Engine, delete, insert, inspect, select, text, update
from sqlalchemy.exc import IntegrityError, InvalidRequestError, SAWarning
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from memstate_sa import metadata
from memstate_sa.capture.append_only import rewriting
from memstate_sa.db.dialects import database_of
from memstate_sa.db.tables import trigger_context
from tests.support import Base, Note, Person, Tag, World

UNSYNCHRONISED = {"synchronize_session": False}


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
    "upsert_tag": st.tuples(small, small, word),
    "insert_if_absent": st.tuples(small, word),
    "core_insert": st.tuples(small, word),
    "core_update": st.tuples(small, word),
    "core_delete": st.tuples(small),
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


UNSEEN_STEPS = {
    "text": st.tuples(small, word),
    "bulk_save": st.tuples(small, word),
    "bulk_mappings": st.tuples(small, word),
    "on_the_connection": st.tuples(small, word),
    "rename_tags": st.tuples(small),
    "another_program": st.tuples(small, word),
}
"""Steps that only triggers capture."""


def programs(steps: dict[str, Any]) -> Any:
    one = st.one_of(*(st.tuples(st.just(name), args) for name, args in steps.items()))
    return st.lists(one, min_size=1, max_size=14)


class Play:
    """Plays steps on one Session. A step without a row to act on does nothing."""

    def __init__(self, world: World, session: Session) -> None:
        self.world = world
        self.session = session
        self.savepoints: list[Any] = []
        self.held: list[Any] = []  # loaded instances must not depend on the garbage collector

    def run(self, steps: list[tuple[str, tuple[Any, ...]]]) -> None:
        with warnings.catch_warnings():
            # If these warnings were errors in a flush or a rollback, the Session would be left in the middle of it.
            warnings.filterwarnings("ignore", "Session's state has been changed on a non-active")
            warnings.filterwarnings("ignore", "DELETE statement on table")
            self._run(steps)

    def _run(self, steps: list[tuple[str, tuple[Any, ...]]]) -> None:
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
        found = self.session.scalars(select(model).order_by(*inspect(model).primary_key)).all()
        self.held += found
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

    def upsert_tag(self, n: int, m: int, meaning: str) -> None:
        statement = self.upsert(Tag)
        statement = statement.on_conflict_do_update(
            index_elements=["name"], set_={"meaning": statement.excluded.meaning}, where=Tag.meaning != "rain"
        )
        rows = [{"name": f"tag{i % 4}", "meaning": meaning} for i in range(n, n + m + 1)]
        self.session.execute(statement.values(rows[:1]) if m == 0 else statement, rows if m else None)

    def insert_if_absent(self, n: int, meaning: str) -> None:
        rows = [{"name": f"tag{i}", "meaning": meaning} for i in range(n + 1)]
        self.session.execute(self.upsert(Tag).values(rows).on_conflict_do_nothing())

    def upsert(self, model: Any) -> Any:
        return database_of(self.session.get_bind()).upsert(model)

    def core_insert(self, n: int, about: str) -> None:
        self.session.execute(insert(Person.__table__), [{"name": f"core{i}", "about": about} for i in range(n + 1)])

    def core_update(self, n: int, meaning: str) -> None:
        self.session.execute(update(Tag.__table__).where(Tag.__table__.c.name > f"tag{n}").values(meaning=meaning))

    def core_delete(self, n: int) -> None:
        self.session.execute(delete(Tag.__table__).where(Tag.__table__.c.name == f"tag{n}"))

    # Steps that no Session sees. The first statement flushes pending changes, like the other steps.

    def text(self, n: int, meaning: str) -> None:
        self.session.flush()
        self.session.execute(text("UPDATE tag SET meaning = :m WHERE name > :n"), {"m": meaning, "n": f"tag{n}"})

    def bulk_save(self, n: int, about: str) -> None:
        self.session.bulk_save_objects([Person(name=f"b{i}", about=about) for i in range(n + 1)])

    def bulk_mappings(self, n: int, content: str) -> None:
        if note := self.pick(Note, n):
            row = {"topic": note.topic, "number": note.number, "content": content}
            self.session.bulk_update_mappings(Note, [row])  # type: ignore[arg-type]

    def on_the_connection(self, n: int, about: str) -> None:
        self.session.flush()
        self.session.connection().execute(update(Person.__table__).values(about=about))

    def rename_tags(self, n: int) -> None:
        self.session.execute(
            update(Tag).where(Tag.name == f"tag{n}").values(name=f"tag{n}x"), execution_options=UNSYNCHRONISED
        )
        self.session.expire_all()

    def another_program(self, n: int, about: str) -> None:
        """Change rows by another program, between two transactions of ours."""
        self.commit()
        with self.world.engine.connect() as connection, connection.begin():
            connection.execute(text("INSERT INTO person (name, about) VALUES ('other', :a)"), {"a": about})
            connection.execute(text("DELETE FROM tag WHERE name = :n"), {"n": f"tag{n}"})

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
            savepoint = self.savepoints.pop(len(self.savepoints) // 2)  # its inner SAVEPOINTS end with it
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
    with engine.begin() as connection, rewriting(connection):
        for table in (*reversed(Base.metadata.sorted_tables), *metadata.sorted_tables):
            if table is not trigger_context:
                connection.execute(text(f'DELETE FROM "{table.name}"'))

"""Valid or nothing: the schema decides before SQL is sent, or inside a SAVEPOINT that is rolled back."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import AliasChoices, BaseModel, Field, ValidationError
from sqlalchemy import Engine, func, insert, select, update

from memstate_sa import Memory, MemstateError, ValidationFailed
from memstate_sa.db.tables import log, outbox
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support.apps import make_app
from tests.support.preferences import Preference, PreferenceSchema
from tests.support.statements import statements

pytestmark = pytest.mark.sa20


def checked_by(schema: Any, engine: Engine) -> Any:
    """Sessions whose rows *schema* validates."""
    return make_app(engine, Preference, text="content", schema=schema).sessions


@pytest.fixture
def sessions(engine: Engine) -> Any:
    return checked_by(PreferenceSchema, engine)


def assert_nothing_written(sessions: Any) -> None:
    with sessions() as session:
        for table in (Preference.__table__, log, outbox):
            assert session.execute(select(table)).all() == []


@pytest.mark.parametrize("alias", ["content", AliasChoices("x", "content")])
def test_field_aliased_to_a_column_is_checked(engine: Engine, alias: Any) -> None:
    """A validation alias names the column. Otherwise the value would count as missing, and pass."""

    class Schema(BaseModel):
        text: str | None = Field(default=None, max_length=3, validation_alias=alias)

    with checked_by(Schema, engine)() as session:
        session.add(Preference(content="tea"))
        session.commit()
        session.add(Preference(content="coffee"))
        with pytest.raises(ValidationFailed, match="at most 3 characters"):
            session.flush()


def test_nothing_is_sent_for_an_invalid_object(sessions: Any) -> None:
    """The error has Pydantic's list of errors. The session stays usable, and the object can be corrected."""
    with sessions() as session:
        seen = statements(session.get_bind())
        wrong = Preference(content="x", strength=11)
        session.add(wrong)
        with pytest.raises(ValidationFailed, match="Cannot save this Preference: content: ") as caught:
            session.commit()
        assert not [s for s in seen if s.startswith("INSERT")]
        assert [(e["type"], e["loc"]) for e in caught.value.errors] == [
            ("string_too_short", ("content",)),
            ("less_than_equal", ("strength",)),
        ]
        assert isinstance(caught.value.__cause__, ValidationError)
        assert_nothing_written(sessions)
        wrong.content, wrong.strength = "tea, please", 5
        session.commit()
        assert session.scalars(select(Preference.content)).all() == ["tea, please"]


def test_the_error_list_does_not_repeat_the_fact(sessions: Any) -> None:
    """The list goes to logs and back to models. It has field, type and message, but not the input."""
    with sessions() as session:
        session.add(Preference(content="MY SECRET"))
        with pytest.raises(ValidationFailed) as caught:
            session.flush()
        assert "SECRET" not in repr(caught.value.errors) + str(caught.value)


def test_missing_values_are_invalid_unless_a_default_comes(sessions: Any) -> None:
    """A column without a default is None. A column with one is checked after the database has applied it."""
    with sessions() as session:
        session.add(Preference())
        with pytest.raises(ValidationFailed) as caught:
            session.flush()
        assert [e["loc"] for e in caught.value.errors] == [("content",)]
        session.rollback()
        session.add(Preference(content="fine"))
        session.commit()
        assert session.execute(select(Preference.strength, Preference.low)).one() == (5, 1)


def test_values_that_the_database_computes_are_checked_too(sessions: Any) -> None:
    """Defaults and SQL expressions are known after the statement. The flush fails, and nothing is kept."""
    with sessions() as session:
        session.add(Preference(content="fine", strength=0))  # low defaults to 1 in the database
        with pytest.raises(ValidationFailed, match="low is above strength"):
            session.commit()
        session.rollback()
        assert_nothing_written(sessions)
        preference = Preference(content="fine")
        session.add(preference)
        session.commit()
        preference.content = func.upper(Preference.content)
        with pytest.raises(ValidationFailed, match="no shouting"):
            session.flush()
        session.rollback()
        assert preference.content == "fine"


@pytest.mark.parametrize("kind", ["insert", "update", "query"])
def test_bulk_statements_are_checked_inside_a_savepoint(sessions: Any, kind: str) -> None:
    """An application that swallows the error and commits keeps nothing of the statement."""
    with sessions() as session:
        session.add(Preference(content="fine"))
        session.flush()
        with pytest.raises(ValidationFailed):
            if kind == "insert":
                session.execute(insert(Preference), [{"content": "good"}, {"content": "x"}])
            elif kind == "update":
                session.execute(update(Preference).values(strength=Preference.strength + 50))
            else:
                session.query(Preference).update({"content": "LOUD"})
        session.commit()
        assert session.execute(select(Preference.content, Preference.strength)).all() == [("fine", 5)]
        assert session.scalars(select(log.c.op)).all() == ["insert"]


def test_only_the_schemas_own_fields_are_given_to_it(engine: Engine) -> None:
    """Other columns are ignored, even if the schema forbids unknown fields."""

    class Strict(BaseModel, extra="forbid"):
        content: str

    with checked_by(Strict, engine)() as session:
        session.add(Preference(content="fine"))
        session.commit()


def test_a_schema_must_be_a_model() -> None:
    """A clear error is raised at declaration."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    with pytest.raises(MemstateError, match="not a Pydantic model class"):
        memory.track(Preference, text="content", schema={"content": str})


def test_unique_and_immutable_violations_are_refused(engine: Engine) -> None:
    """They raise ConflictError, and nothing of the flush is kept. A deleted value is free again."""
    from memstate_sa import ConflictError

    app = make_app(engine, Preference, text="content", unique_by=("content",), immutable=True)
    with app.session() as session:
        session.add_all([Preference(content="tea"), Preference(content=None), Preference(content=None)])
        session.commit()
        session.add(Preference(content="tea"))
        with pytest.raises(ConflictError, match="same value of unique_by"):
            session.commit()
        session.rollback()
        session.get_one(Preference, 1).strength = 1
        with pytest.raises(ConflictError, match="immutable"):
            session.commit()
        session.rollback()
        session.delete(session.get_one(Preference, 1))
        session.commit()
        session.add(Preference(content="tea"))
        session.commit()
        with pytest.raises(ConflictError):
            app.memory.rollback(session, tx=app.memory.history(session, Preference, 1)[-1].tx)
        session.rollback()
        assert session.scalars(select(Preference.content).where(Preference.content.is_not(None))).all() == ["tea"]

"""A time without a time zone is refused everywhere: read as local time it would be hours off."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import DateTime, Engine, func, insert, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import Fact, MemoryStore, MemstateError, ValidationFailed
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support.apps import App, make_app

pytestmark = pytest.mark.sa20
TOKYO = timezone(timedelta(hours=9))
SOON = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)


class Said(BaseModel):
    text: str


class Vague(tzinfo):
    """Knows no offset from UTC."""

    def utcoffset(self, _: datetime | None) -> timedelta | None:
        return None


NO_MOMENTS: dict[str, Any] = {
    "naive": SOON.replace(tzinfo=None),
    "vague": SOON.replace(tzinfo=Vague()),
    "ISO text": "2031-01-01T00:00:00Z",
    "text": "soon",
    "date": date(2031, 1, 1),
    "number": 1.9e9,
    "before all times": datetime.min.replace(tzinfo=TOKYO),
}
no_moment = pytest.mark.parametrize("moment", NO_MOMENTS.values(), ids=NO_MOMENTS.keys())


@pytest.fixture
def facts(engine: Engine) -> Iterator[MemoryStore]:
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as made:
        yield made


@no_moment
def test_a_fact_ends_at_no_naive_time(facts: MemoryStore, moment: Any) -> None:
    """In Tokyo, one hour from now in UTC was eight hours ago. The same kind: a date, a number, text."""
    facts.register_schema("one", Said, unique_by="text")
    first = facts.commit(Fact(type="one", payload={"text": "a"}), ttl=timedelta(days=1))
    before = [(fact.id, fact.expires_at) for fact in facts.query()]
    for given in (Fact(type="note", payload={}), Fact(type="one", payload={"text": "a"})):
        given.expires_at = moment
        with pytest.raises(ValidationFailed, match=r"expires_at is .*aware datetime") as raised:
            facts.commit(given)
        assert raised.value.errors[0]["loc"] == ("expires_at",)
    with pytest.raises(ValidationFailed, match="aware datetime"), facts.transaction() as session:
        session.get_one(Fact, first).expires_at = moment
    with pytest.raises(ValidationFailed, match="aware datetime"), facts.transaction() as session:
        session.add(Fact(type="note", payload={}, expires_at=moment))
    with pytest.raises(ValidationFailed, match="aware datetime"), facts.transaction() as session:
        session.execute(update(Fact).where(Fact.id == first).values(expires_at=moment))
    with pytest.raises(ValidationFailed, match="aware datetime"), facts.transaction() as session:
        session.execute(insert(Fact), [{"type": "note", "payload": {}, "expires_at": moment}])
    with pytest.raises(ValidationFailed, match="aware datetime"), facts.transaction() as session:
        session.scalars(select(Fact).where(Fact.expires_at < moment)).all()
    assert [(fact.id, fact.expires_at) for fact in facts.query()] == before


def test_an_aware_time_is_the_same_moment_everywhere(facts: MemoryStore) -> None:
    ends = SOON.astimezone(TOKYO)
    id_ = facts.commit(Fact(type="note", payload={}, expires_at=ends))
    over = facts.commit(Fact(type="note", payload={}, expires_at=ends - timedelta(hours=2)))
    found = facts.get(id_)
    assert facts.memory.sweep(facts.engine) == 1 and facts.get(over) is None
    assert found is not None and found.expires_at == ends and found.expires_at.utcoffset() == timedelta()


def test_a_ttl_beyond_all_times_is_refused(facts: MemoryStore) -> None:
    with pytest.raises(MemstateError, match="ttl="):
        facts.commit(Fact(type="note", payload={}), ttl=timedelta(days=999_999_999))
    assert facts.query() == []


@pytest.mark.parametrize("name", ["naive", "vague", "date", "number"])
def test_the_past_is_asked_by_aware_times(facts: MemoryStore, name: str) -> None:
    moment = NO_MOMENTS[name]
    id_ = facts.commit(Fact(type="note", payload={}))
    memory = facts.memory
    with facts.transaction() as session:
        for ask in (
            lambda: memory.as_of(session, Fact, id_, moment),
            lambda: memory.search(session, "x", Fact, as_of=moment),
            lambda: memory.diff(session, moment),
            lambda: memory.rollback(session, to=moment),
        ):
            with pytest.raises(MemstateError, match="aware datetime"):
                ask()


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(default="text")
    ends: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


@pytest.fixture(params=["session", "trigger"])
def app(request: pytest.FixtureRequest, engine: Engine) -> Iterator[App]:
    app = make_app(engine, Note, expires="ends", capture=request.param)
    yield app
    app.memory.close()


@no_moment
def test_a_column_of_the_application_takes_no_naive_time(app: App, moment: Any) -> None:
    """The type is SQLAlchemy's. PostgreSQL would interpret the value in the time zone of the connection."""
    with app.sessions.begin() as session:
        session.add(Note(id=1, ends=SOON))
    for change in (lambda s: s.add(Note(id=2, ends=moment)), lambda s: setattr(s.get_one(Note, 1), "ends", moment)):
        with pytest.raises(ValidationFailed, match=r"ends is .*aware datetime"), app.sessions.begin() as session:
            change(session)
    with app.session() as session:
        assert [(note.id, note.ends and note.ends.replace(tzinfo=UTC)) for note in session.scalars(select(Note))] == [
            (1, SOON)
        ]


def test_a_column_of_the_application_ends_at_the_moment_that_was_meant(app: App) -> None:
    """SQLite stores no offset, so 9:00 in Tokyo became 9:00 UTC. Loaded values are still naive."""
    with app.sessions.begin() as session:
        over = (SOON - timedelta(hours=2)).astimezone(TOKYO)
        session.add_all([Note(id=1, ends=over), Note(id=2, ends=SOON.astimezone(TOKYO)), Note(id=3)])
        session.add(Note(id=4, ends=func.current_timestamp()))
    with app.sessions.begin() as session:
        session.get_one(Note, 2).text = "changed"
    app.memory.sweep(app.engine)
    with app.session() as session:
        assert {note.id: note.text for note in session.scalars(select(Note))} == {2: "changed", 3: "text"}


def test_a_column_without_a_time_zone_holds_utc(engine: Engine) -> None:
    """A naive time counts as UTC there, and an aware time is stored in UTC."""

    class Own(DeclarativeBase):
        pass

    class Naive(Own):
        __tablename__ = "naive"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        ends: Mapped[datetime | None]

    app = make_app(engine, Naive, expires="ends")
    with app.sessions.begin() as session:
        session.add(Naive(id=1, text="over", ends=(SOON - timedelta(hours=2)).astimezone(TOKYO)))
        session.add(Naive(id=2, text="living", ends=SOON.replace(tzinfo=None)))
    app.memory.sweep(engine)
    with app.session() as session:
        assert [(row.id, row.ends) for row in session.scalars(select(Naive))] == [(2, SOON.replace(tzinfo=None))]
    with pytest.raises(ValidationFailed, match="aware datetime"), app.sessions.begin() as session:
        session.add(Naive(id=3, text="x", ends="soon"))
    app.memory.close()

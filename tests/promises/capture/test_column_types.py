"""Row -> image -> row, for every generic type and PostgreSQL's own types: the stored value comes back unchanged."""

from __future__ import annotations

import enum
import uuid
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy import Engine, inspect, select, text
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, deferred, mapped_column, sessionmaker
from sqlalchemy.types import TypeDecorator

from memstate_sa import Memory, MemstateError, UntrackedWrite
from memstate_sa.db.codec import decode_image
from memstate_sa.db.tables import log
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import explore, sizes
from tests.support.apps import make_app

pytestmark = pytest.mark.sa20


class Mood(enum.Enum):
    good = "g"
    bad = "b"


class Shouting(TypeDecorator[str]):
    """Its two directions disagree on purpose. Only the stored value counts."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value.upper()

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value + "!"


class Prefixed(TypeDecorator[str]):
    """SQL expressions store the value in one form and read it in another."""

    impl = sa.String
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> Any:
        return sa.literal("x:", sa.String) + sa.type_coerce(bindparam, sa.String)

    def column_expression(self, column: Any) -> Any:
        return sa.func.substr(sa.type_coerce(column, sa.String), 3)


class Base(DeclarativeBase):
    pass


safe_text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30)
json_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | safe_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(safe_text, inner, max_size=3),
    max_leaves=5,
)
naive = st.datetimes(datetime(1, 1, 1), datetime(9999, 1, 1))
COLUMNS: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "big_integer": (sa.BigInteger, st.integers(-(2**63), 2**63 - 1)),
    "boolean": (sa.Boolean, st.booleans()),
    "date": (sa.Date, st.dates()),
    "date_time": (sa.DateTime, naive),
    "enum": (sa.Enum(Mood), st.sampled_from(Mood)),
    "enum_text": (sa.Enum("x", "y", native_enum=False), st.sampled_from(["x", "y"])),
    "double": (sa.Double, st.floats()),
    "float": (sa.Float, st.floats(width=32, allow_nan=False)),
    "integer": (sa.Integer, st.integers(-(2**31), 2**31 - 1)),
    "interval": (sa.Interval, st.timedeltas(timedelta(days=-3000), timedelta(days=3000))),
    "large_binary": (sa.LargeBinary, st.binary(max_size=30)),
    "numeric": (sa.Numeric(30, 6), st.decimals(-(10**20), 10**20, places=6, allow_nan=False)),
    "numeric_rounded": (sa.Numeric(10, 2), st.decimals(-1000, 1000, places=5, allow_nan=False)),
    "numeric_float": (sa.Numeric(10, 2, asdecimal=False), st.floats(-1000, 1000)),
    "pickle": (sa.PickleType, st.lists(st.integers())),
    "small_integer": (sa.SmallInteger, st.integers(-(2**15), 2**15 - 1)),
    "string": (sa.String, safe_text),
    "text": (sa.Text, safe_text),
    "time": (sa.Time, st.times()),
    "unicode": (sa.Unicode, safe_text),
    "unicode_text": (sa.UnicodeText, safe_text),
    "uuid": (sa.Uuid, st.uuids()),
    "uuid_chars": (sa.Uuid(native_uuid=False), st.uuids()),
    "uuid_text": (sa.Uuid(as_uuid=False), st.uuids().map(str)),
    "json": (sa.JSON, json_value),
    "json_null": (sa.JSON(none_as_null=True), json_value),
    "shouting": (Shouting, safe_text),
}
POSTGRES = {
    "shouting_variant": (Shouting().with_variant(pg.JSONB(), "postgresql"), json_value),
    "aware": (sa.DateTime(timezone=True), naive.map(lambda at: at.replace(tzinfo=UTC))),
    "jsonb": (pg.JSONB, json_value),
    "array": (pg.ARRAY(sa.String), st.lists(st.none() | safe_text, max_size=3)),
    "array_shouting": (pg.ARRAY(Shouting), st.lists(safe_text, max_size=2)),
    "array_integer": (pg.ARRAY(sa.Integer, dimensions=2), st.just([[1, 2], [3, 4]]) | st.just([])),
    "array_numeric": (pg.ARRAY(sa.Numeric), st.lists(st.decimals(-100, 100, places=3), max_size=3)),
    "array_uuid": (pg.ARRAY(sa.Uuid), st.lists(st.uuids(), max_size=2)),
    "array_enum": (pg.ARRAY(sa.Enum(Mood, name="mood")), st.lists(st.sampled_from(Mood), max_size=2)),
    "array_json": (pg.ARRAY(pg.JSONB), st.lists(st.just({"a": [1]}), max_size=2)),
    "pg_uuid": (pg.UUID, st.uuids()),
    "inet": (pg.INET, st.just("10.0.0.1/24")),
    "int_range": (pg.INT4RANGE, st.just(pg.Range(1, 5))),
    "hstore": (pg.TSVECTOR, st.just("'a':1 'b':2")),
    "bit": (pg.BIT(4), st.just("1010")),
    "money_interval": (pg.INTERVAL, st.just(timedelta(days=3, seconds=5))),
}


def model(name: str, columns: dict[str, Any]) -> type[Any]:
    body: dict[str, Any] = {
        "__tablename__": name,
        "id": mapped_column(sa.Integer, primary_key=True),
        "label": mapped_column(sa.String, default="x"),
        "__annotations__": {"id": Mapped[int]},
        **{key: mapped_column(key, type_, nullable=True) for key, (type_, _) in columns.items()},
    }
    return type(name.title(), (Base,), body)


BY_NO_TRIGGER = {"array_numeric", "array_uuid"}
"""Types that triggers refuse."""
GENERIC = {
    "session": model("generic", COLUMNS),
    "trigger": model("generic_triggered", COLUMNS),
}
ONLY_POSTGRES = {
    "session": model("postgres_only", {**COLUMNS, **POSTGRES}),
    "trigger": model(
        "postgres_triggered",
        {name: column for name, column in {**COLUMNS, **POSTGRES}.items() if name not in BY_NO_TRIGGER},
    ),
}
both_ways = pytest.mark.parametrize("capture", ["session", "trigger"])


def stored(connection: Any, table: str) -> list[Any]:
    """The rows in the server's own text form."""
    if connection.dialect.name == "postgresql":
        return [row[0] for row in connection.execute(text(f"SELECT CAST({table} AS TEXT) FROM {table}"))]
    names = [row[1] for row in connection.execute(text(f"PRAGMA table_info({table})"))]
    quoted = ", ".join(f'typeof("{name}"), quote("{name}")' for name in names)
    return [tuple(row) for row in connection.execute(text(f"SELECT {quoted} FROM {table}"))]


AS_TEXT = {"array_json", "inet", "int_range", "hstore", "bit"}
"""Types whose values history shows in the server's text form."""


def same(name: str, shown: Any, loaded: Any) -> bool:
    if loaded is None or name in AS_TEXT:
        return (shown is None) == (loaded is None)
    return type(shown) is type(loaded) and (shown == loaded or shown != shown)  # NaN


def check(engine: Engine, models: dict[str, Any], capture: Any, values: dict[str, Any]) -> None:
    """Delete and change a row, undo both, and compare the server's bytes."""
    model = models[capture]
    values = {name: value for name, value in values.items() if hasattr(model, name)}
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(model, text="label", capture=capture)
    if not inspect(engine).has_table(model.__tablename__):
        model.__table__.create(engine)
        memory.create_tables(engine)
    sessions = sessionmaker(engine)
    memory.attach(sessions)
    table = model.__tablename__
    with sessions() as session:
        session.execute(text(f"DELETE FROM {table}"))
        session.commit()
        session.add(model(id=1, **values))
        session.commit()
        before = stored(session.connection(), table)
        loaded = dict(session.execute(select(model.__table__)).mappings().one())
        after = memory.history(session, model, 1)[-1].after
        assert list(after or {}) == list(loaded)
        [image] = session.scalars(select(log.c.image).order_by(log.c.id.desc()).limit(1))
        [row] = memory._registry.of(model).columns_for(engine.dialect).read(session.connection(), [(1,)]).values()
        assert capture == "session" or decode_image(image).items() >= decode_image(row).items() or "double" in values
        wrong = {name: (after[name], loaded[name]) for name in loaded if not same(name, after[name], loaded[name])}
        assert wrong == {}
        session.rollback()
        session.delete(session.get(model, 1))
        session.commit()
        assert stored(session.connection(), table) == []
        memory.rollback(session)
        session.commit()
        assert stored(session.connection(), table) == before
        session.get(model, 1).label = "y"
        for name in values:
            setattr(session.get(model, 1), name, sa.null())
        session.commit()
        memory.rollback(session)
        session.commit()
        assert stored(session.connection(), table) == before


def rows(columns: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: values | st.none() for name, (_, values) in columns.items()})


@pytest.fixture
def prepared(engine: Engine) -> Engine:
    Memory(InMemoryIndex(), embedder=HashEmbedder()).create_tables(engine)
    return engine


@both_ways
@pytest.mark.parametrize("examples", sizes(6, 25))
def test_generic_types_round_trip(prepared: Engine, capture: str, examples: int) -> None:
    """Every generic type of SQLAlchemy, on both databases."""

    @explore(examples, values=rows(COLUMNS))
    def survives(values: dict[str, Any]) -> None:
        check(prepared, GENERIC, capture, values)


@pytest.fixture
def prepared_postgres(postgres_engine: Engine) -> Engine:
    Memory(InMemoryIndex(), embedder=HashEmbedder()).create_tables(postgres_engine)
    return postgres_engine


@both_ways
@pytest.mark.parametrize("examples", sizes(6, 25))
def test_postgres_types_round_trip(prepared_postgres: Engine, capture: str, examples: int) -> None:
    """JSONB, ARRAY, UUID, timestamptz, and types that travel as the server's own text."""

    @explore(examples, values=rows(POSTGRES))
    def survives(values: dict[str, Any]) -> None:
        check(prepared_postgres, ONLY_POSTGRES, capture, values)


INTERVALS = {
    "1 mon": timedelta(30),
    "1 year 2 mons": timedelta(425),
    "24:00:00": timedelta(1),
    "-1 years -2 mons +3 days -04:05:06.000007": timedelta(-422, microseconds=-14_706_000_007),
    "-01:00:00": timedelta(hours=-1),
    "-3 days +23:00:00": timedelta(-3, hours=23),
}


@both_ways
def test_intervals_are_undone_to_the_month(prepared_postgres: Engine, capture: Any) -> None:
    """A month is not 30 days, and a day is not 24 hours. The history shows the values that psycopg reads."""

    class Local(DeclarativeBase):
        pass

    class Plan(Local):
        __tablename__ = "plan"
        id: Mapped[int] = mapped_column(primary_key=True)
        label: Mapped[str]
        period = mapped_column("every %", pg.INTERVAL)
        generic: Mapped[timedelta | None] = mapped_column(sa.Interval)

    app = make_app(prepared_postgres, Plan, text="label", capture=capture)
    with app.session() as session:
        for number, period in enumerate(INTERVALS):
            values = {name: sa.cast(period, pg.INTERVAL) for name in ("period", "generic")}
            session.execute(sa.insert(Plan).values(id=number, label="p", **values))
        session.commit()
        before = sorted(stored(session.connection(), "plan"))
        for change in (sa.delete(Plan), sa.update(Plan).values(period=None, generic=None)):
            session.execute(change)
            session.commit()
            app.memory.rollback(session)
            session.commit()
            assert sorted(stored(session.connection(), "plan")) == before
        images = {change.key: change.after or {} for change in app.memory.history(session, Plan)}
        read = {plan.id: plan.period for plan in session.scalars(select(Plan))}
    periods = list(INTERVALS.values())
    assert read == dict(enumerate(periods))
    assert {key: (row["every %"], row["generic"]) for key, row in images.items()} == {
        number: (period, period) for number, period in enumerate(periods)
    }
    assert app.memory.doctor(prepared_postgres).healthy


UNREADABLE = [
    ("infinity", "-infinity", "infinity", "24:00"),
    ("0044-03-15 BC", "0044-03-15 12:00:00.5 BC", "0044-03-15 12:00:00+02 BC", "12:00"),
    ("20000-01-01", "20000-01-01", "20000-01-01 00:00:00.000001+00", "23:59:59.999999"),
    ("9999-12-31", "0001-01-01", "9999-12-31 12:00:00+00", "24:00"),
]


@both_ways
def test_times_that_python_cannot_hold_are_kept_as_text(prepared_postgres: Engine, capture: Any) -> None:
    """The application's statement succeeds, the history shows the text, and an undo writes it back."""

    class Local(DeclarativeBase):
        pass

    class Price(Local):
        __tablename__ = "price"
        id: Mapped[int] = mapped_column(primary_key=True)
        label: Mapped[str]
        day = deferred(mapped_column(sa.Date))
        at = deferred(mapped_column("at %", sa.DateTime))
        until = deferred(mapped_column(sa.DateTime(timezone=True)))
        hour = deferred(mapped_column(sa.Time))

    app = make_app(prepared_postgres, Price, text="label", capture=capture)
    names = ("day", "at", "until", "hour")
    with app.session() as session:
        session.execute(text("SET TimeZone = 'Asia/Kolkata'"))
        for number, row in enumerate(UNREADABLE):
            typed = zip(names, row, strict=True)
            values = {name: sa.cast(text(f"'{value}'"), getattr(Price, name).type) for name, value in typed}
            session.add(Price(id=number, label="p", **values))
        session.commit()
        before = sorted(stored(session.connection(), "price"))
        for change in (sa.delete(Price), sa.update(Price).values(dict.fromkeys(names, sa.null()))):
            session.execute(change)
            session.commit()
            app.memory.rollback(session)
            session.commit()
            assert sorted(stored(session.connection(), "price")) == before
        images = {change.key: change.after or {} for change in app.memory.history(session, Price)}
    shown = [tuple(images[number].values())[2:] for number in range(len(UNREADABLE))]
    assert shown == [
        ("infinity", "-infinity", "infinity", "24:00:00"),
        ("0044-03-15 BC", "0044-03-15 12:00:00.500000 BC", "0044-03-15 10:00:00.000000+00 BC", time(12)),
        ("20000-01-01", "20000-01-01 00:00:00.000000", "20000-01-01 00:00:00.000001+00", time(23, 59, 59, 999999)),
        (date(9999, 12, 31), datetime(1, 1, 1), datetime(9999, 12, 31, 12, tzinfo=UTC), "24:00:00"),
    ]
    assert app.memory.doctor(prepared_postgres).healthy


BY_ASYNCPG = {
    "int_range": (pg.INT4RANGE, pg.Range(1, 5)),
    "oid": (pg.OID, 5),
    "inet": (pg.INET, "10.0.0.1/24"),
    "array_enum": (pg.ARRAY(sa.Enum(Mood, name="mood")), [Mood.good, Mood.bad]),
    "jsonb": (pg.JSONB, {"a": 1}),
    "integer": (sa.Integer, 7),
    "interval": (pg.INTERVAL, timedelta(40, 5)),
    "months": (pg.INTERVAL, sa.text("interval '14 months'")),
    "aware": (sa.DateTime(timezone=True), datetime(2024, 1, 2, tzinfo=UTC)),
}


@both_ways
async def test_types_round_trip_by_asyncpg(prepared_postgres: Engine, capture: Any) -> None:
    """asyncpg reads the same values as psycopg, and accepts logged values, also those in the server's text form."""
    pytest.importorskip("asyncpg")
    model_ = model(f"by_asyncpg_{capture}", BY_ASYNCPG)
    app = make_app(prepared_postgres, model_, text="label", capture=capture)
    by_asyncpg = create_async_engine(prepared_postgres.url.set(drivername="postgresql+asyncpg"))
    sessions = async_sessionmaker(by_asyncpg)
    app.memory.attach(sessions)
    async with sessions() as session:
        session.add(model_(id=1, **{name: value for name, (_, value) in BY_ASYNCPG.items()}))
        await session.commit()
    with prepared_postgres.connect() as connection:
        before = stored(connection, model_.__tablename__)
    assert app.memory.doctor(prepared_postgres).healthy
    for change in (sa.delete(model_), sa.update(model_).values(dict.fromkeys(BY_ASYNCPG))):
        async with sessions() as session:
            await session.execute(change)
            await session.commit()
            await session.run_sync(app.memory.rollback)
            await session.commit()
        with prepared_postgres.connect() as connection:
            assert stored(connection, model_.__tablename__) == before
    assert app.memory.doctor(prepared_postgres).healthy
    await by_asyncpg.dispose()


@pytest.mark.parametrize("name", sorted(BY_NO_TRIGGER))
def test_types_that_a_trigger_cannot_log_are_refused(prepared_postgres: Engine, name: str) -> None:
    """It is refused before anything is installed. The error names the column."""
    refused = model(f"refused_{name}", {name: POSTGRES[name]})
    refused.__table__.create(prepared_postgres)
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(refused, text="label", capture="trigger")
    with pytest.raises(MemstateError, match=rf"Cannot capture refused_{name}\.{name} by triggers: .* ARRAY"):
        memory.create_tables(prepared_postgres)


@both_ways
def test_nul_and_nan_in_the_application_do_not_fail_its_commit(prepared: Engine, capture: str) -> None:
    """The log accepts every value that the application's own columns accept."""
    values = {"double": float("nan"), "large_binary": b"\x00\xff", "json": {"half": [0.5]}}
    if prepared.dialect.name == "sqlite":
        values |= {"text": "a\x00b", "double": float("inf")}
    check(prepared, GENERIC, capture, values)


@both_ways
def test_null_and_json_null_are_told_apart(prepared: Engine, capture: str) -> None:
    """A JSON column may hold 'null' or nothing. Undo restores the right one."""
    check(prepared, GENERIC, capture, {"json": None, "json_null": None})
    check(prepared, GENERIC, capture, {"json": sa.null(), "json_null": sa.JSON.NULL})


KEYS = {
    "string": (sa.String(50), "a b", "ü"),
    "uuid": (sa.Uuid, uuid.UUID(int=5), uuid.UUID(int=2**100)),
    "uuid_chars": (sa.Uuid(native_uuid=False), uuid.UUID(int=5), uuid.UUID(int=2**100)),
    "datetime": (sa.DateTime, datetime(2024, 1, 2, 3, 4, 5, 6), datetime(1999, 1, 1)),
    "date": (sa.Date, date(2024, 1, 2), date(1999, 1, 1)),
    "time": (sa.Time, time(3, 4), time(5)),
    "numeric": (sa.Numeric(10, 2), Decimal("1.50"), Decimal("-2.25")),
    "enum": (sa.Enum(Mood), Mood.good, Mood.bad),
    "aware": (sa.DateTime(timezone=True), datetime(2024, 1, 2, tzinfo=UTC), datetime(1999, 1, 1, tzinfo=UTC)),
}


@both_ways
@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_any_type_work_from_insert_to_undo(engine: Engine, kind: str, capture: Any) -> None:
    """Single keys of every usual type, from insert to search to undo."""
    type_, first, second = KEYS[kind]
    if (capture, kind, engine.dialect.name) == ("trigger", "numeric", "sqlite"):
        capture = "session"  # see test_a_float_is_no_key_for_a_trigger

    class Local(DeclarativeBase):
        pass

    class Thing(Local):
        __tablename__ = "thing"
        id: Mapped[Any] = mapped_column(type_, primary_key=True, autoincrement=False)
        label: Mapped[str]

    app = make_app(engine, Thing, text="label", capture=capture)
    with app.session() as session:
        session.add_all([Thing(id=first, label="green tea"), Thing(id=second, label="snow")])
        session.commit()
        relay = app.memory.relay(engine)
        relay.drain()
        first = session.scalars(select(Thing).where(Thing.label == "green tea")).one().id
        hit = app.memory.search(session, "green tea", Thing, limit=1)[0]
        assert (hit.fact.id, hit.fact.label) == (first, "green tea")
        assert app.memory.search(session, "snow", select(Thing).where(Thing.id == first))[0].fact.id == first
        session.delete(session.get(Thing, first))
        session.commit()
        relay.drain()
        assert [hit.fact.label for hit in app.memory.search(session, "green tea", Thing)] == ["snow"]
        app.memory.rollback(session)
        session.commit()
        relay.drain()
        assert {thing.label for thing in session.scalars(select(Thing))} == {"green tea", "snow"}
        assert [change.op for change in app.memory.history(session, Thing, first)] == ["insert", "delete", "insert"]
        assert app.memory.verify(engine).clean
        relay.stop()


@pytest.mark.parametrize("type_", [sa.Float, sa.Numeric(10, 2), sa.Double])
def test_a_float_is_no_key_for_a_trigger(sqlite_engine: Engine, type_: Any) -> None:
    """It has more than one text form. SQLite stores decimals as floats."""

    class Local(DeclarativeBase):
        pass

    class Thing(Local):
        __tablename__ = "thing"
        id: Mapped[Any] = mapped_column(type_, primary_key=True)
        label: Mapped[str]

    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Thing, text="label", capture="trigger")
    Local.metadata.create_all(sqlite_engine)
    with pytest.raises(MemstateError, match="cannot log a primary key of"):
        memory.create_tables(sqlite_engine)


def things(engine: Engine, type_: Any) -> tuple[Memory, sessionmaker[Session], Any]:
    """A tracked class with keys of *type_*."""

    class Local(DeclarativeBase):
        pass

    class Thing(Local):
        __tablename__ = "thing"
        id: Mapped[Any] = mapped_column(type_, primary_key=True, autoincrement=False)
        label: Mapped[str]

    app = make_app(engine, Thing, text="label")
    return app.memory, app.sessions, Thing


@pytest.mark.parametrize(
    ("type_", "given", "stored"),
    [
        (sa.Numeric(10, 2), Decimal("1.5"), Decimal("1.50")),
        pytest.param(
            sa.CHAR(5),
            "ab",
            "ab   ",
            marks=pytest.mark.skipif(
                sa.__version__ < "2.1", reason="SQLAlchemy 2.0 itself does not find this row again"
            ),
        ),
    ],
)
def test_key_stored_in_another_form_is_one_key(postgres_engine: Engine, type_: Any, given: Any, stored: Any) -> None:
    """The object keeps the value that it was given. The log has one key, the stored one."""

    memory, sessions, Thing = things(postgres_engine, type_)  # noqa: N806
    with sessions() as session:
        thing = Thing(id=given, label="one")
        session.add(thing)
        session.flush()
        thing.label = "two"
        session.flush()
        session.delete(thing)
        session.commit()
        changes = memory.history(session, Thing)
        assert [(c.op, str(c.key)) for c in changes] == [(op, str(stored)) for op in ("insert", "update", "delete")]


@pytest.mark.parametrize(
    ("type_", "stored", "given"),
    [
        (sa.Numeric(10, 2), Decimal("1.50"), Decimal("1.5")),
        (sa.Numeric(10, 2), Decimal("2.00"), Decimal(2)),
        (sa.CHAR(5), "ab   ", "ab"),
        (pg.TIMESTAMP(precision=0), datetime(2024, 1, 2), datetime(2024, 1, 2, 0, 0, 0, 5)),
    ],
    ids=["decimal", "whole", "padded", "rounded"],
)
def test_history_is_found_by_a_key_in_another_form(engine: Engine, type_: Any, stored: Any, given: Any) -> None:
    """The log is queried in its own form: for current rows, older rows and deleted rows."""
    if engine.dialect.name == "sqlite" and not isinstance(type_, sa.Numeric):
        pytest.skip("SQLite stores texts unchanged")

    memory, sessions, Thing = things(engine, type_)  # noqa: N806

    def read() -> tuple[list[str], Any]:
        with sessions() as session:
            ops = [change.op for change in memory.history(session, Thing, given)]
            now = memory.as_of(session, Thing, given, datetime.now(UTC))
        return ops, now and now["label"]

    with engine.begin() as connection:
        connection.execute(sa.insert(Thing.__table__).values(id=stored, label="old"))
    assert read() == ([], "old")
    with sessions() as session:
        thing = session.scalars(select(Thing)).one()
        thing.label = "new"
        session.commit()
        assert read() == (["baseline", "update"], "new")
        session.delete(thing)
        session.commit()
        assert read() == (["baseline", "update", "delete"], None)
        assert memory.erase(session, Thing, given) == 3
    memory.close()


def test_history_of_an_impossible_key_is_empty(engine: Engine) -> None:
    """No row has the key, and the transaction goes on."""

    class Local(DeclarativeBase):
        pass

    class Thing(Local):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)

    app = make_app(engine, Thing, text=None)
    with app.session() as session:
        session.add(Thing(id=1))
        session.flush()
        for key in ("five", datetime(2024, 1, 2), 10**30):
            if engine.dialect.name == "postgresql" or isinstance(key, str):
                assert app.memory.history(session, Thing, key) == []
        session.commit()
        assert session.get(Thing, 1) is not None
    app.memory.close()


def test_a_key_that_the_database_changes_is_not_silently_lost(postgres_engine: Engine) -> None:
    """A row that is not found under its given key cannot be logged, so it is not written."""

    class Local(DeclarativeBase):
        pass

    class Thing(Local):
        __tablename__ = "thing"
        id: Mapped[Any] = mapped_column(sa.Numeric(10, 2), primary_key=True, autoincrement=False)
        label: Mapped[str]

    app = make_app(postgres_engine, Thing, text="label")
    with app.session() as session:
        session.add_all([Thing(id=Decimal("1.00"), label="fine"), Thing(id=Decimal("2.345"), label="rounded")])
        with pytest.raises(UntrackedWrite, match="not found under their keys"):
            session.commit()
        session.rollback()
        assert session.scalars(select(Thing)).all() == []


@both_ways
def test_columns_read_by_an_expression_are_logged_as_stored(engine: Engine, capture: Any) -> None:
    """Undo writes the same value back. Only the database can read it as the application does."""

    class Own(DeclarativeBase):
        pass

    class Said(Own):
        __tablename__ = "said"
        id: Mapped[int] = mapped_column(primary_key=True)
        word: Mapped[str] = mapped_column(Prefixed)

    app = make_app(engine, Said, text=None, capture=capture)
    app.write(Said(id=1, word="one"))
    with app.session() as session:
        session.get_one(Said, 1).word = "two"
        session.commit()
        assert [(change.after or {})["word"] for change in app.memory.history(session, Said)] == ["x:one", "x:two"]
        app.memory.rollback(session)
        session.commit()
        assert session.get_one(Said, 1).word == "one"
    assert app.memory.doctor(engine).healthy

"""A table with a metadata column of every kind of type, and criteria on each of them."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Self
from uuid import UUID

import numpy as np
from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Date,
    DateTime,
    Engine,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    PickleType,
    SmallInteger,
    String,
    Text,
    Time,
    TypeDecorator,
    UnicodeText,
    Uuid,
    and_,
    bindparam,
    func,
    or_,
    select,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import UserDefinedType

from memstate_sa import Memory
from memstate_sa.indexes import VectorIndex
from tests.support.apps import make_app


class Role(enum.StrEnum):
    TIP = "tip"
    NOTE = "note"


class OldRole(str, enum.Enum):  # noqa: UP042  # older programs do this
    TIP = "tip"
    NOTE = "note"


class OddRole(str, enum.Enum):  # noqa: UP042  # its value is not its text
    TIP = "other"

    def __new__(cls, _value: str) -> Self:
        made = str.__new__(cls, "tip")
        made._value_ = "other"
        return made


class Rank(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Bits(enum.IntFlag):
    LOW = 1


class Words(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another form"


class Count(int):
    pass


class Upper(TypeDecorator[str]):
    """Stored in another form than the given one."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value.upper()


class Shifted(Integer):
    """A subclass with its own processors."""

    cache_ok = True

    def bind_processor(self, dialect: Any) -> Any:
        return lambda value: None if value is None else value + 100

    def result_processor(self, dialect: Any, coltype: Any) -> Any:
        return lambda value: None if value is None else value - 100


class Lowered(UserDefinedType[str]):
    """Lowered by the database itself."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "VARCHAR"

    def bind_expression(self, bindvalue: Any) -> Any:
        return func.lower(bindvalue)


class Base(DeclarativeBase):
    pass


class Everything(Base):
    __tablename__ = "everything"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str]
    short: Mapped[str | None] = mapped_column(String(40))
    long: Mapped[str | None] = mapped_column(Text)
    wide: Mapped[str | None] = mapped_column(UnicodeText)
    whole: Mapped[int | None] = mapped_column(Integer)
    small: Mapped[int | None] = mapped_column(SmallInteger)
    big: Mapped[int | None] = mapped_column(BigInteger)
    either: Mapped[int | None] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"))
    flag: Mapped[bool | None] = mapped_column(Boolean)
    role: Mapped[OldRole | None] = mapped_column(Enum(OldRole, values_callable=lambda kind: [m.value for m in kind]))
    rank: Mapped[Rank | None] = mapped_column(Enum(Rank, native_enum=False))
    upper: Mapped[str | None] = mapped_column(Upper)
    variant: Mapped[str | None] = mapped_column(String().with_variant(Upper(), "sqlite", "postgresql"))
    shifted: Mapped[int | None] = mapped_column(Shifted)
    lowered: Mapped[str | None] = mapped_column(Lowered)
    ratio: Mapped[float | None] = mapped_column(Float)
    price: Mapped[Decimal | None] = mapped_column(Numeric(10, 2))
    day: Mapped[date | None] = mapped_column(Date)
    at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    hour: Mapped[time | None] = mapped_column(Time)
    lasts: Mapped[timedelta | None] = mapped_column(Interval)
    uuid: Mapped[UUID | None] = mapped_column(Uuid)
    data: Mapped[bytes | None] = mapped_column(LargeBinary)
    pickled: Mapped[Any | None] = mapped_column(PickleType)


NAMES = tuple(Everything.__mapper__.columns.keys())[2:]
_FIRST: dict[str, Any] = {
    "short": "tip",
    "long": "tip",
    "wide": "tip",
    "whole": 1,
    "small": 1,
    "big": 1,
    "either": 1,
    "flag": True,
    "role": OldRole.TIP,
    "rank": Rank.LOW,
    "upper": "tip",
    "variant": "tip",
    "shifted": 1,
    "lowered": "tip",
    "ratio": 1.5,
    "price": Decimal("1.50"),
    "day": date(2026, 1, 1),
    "at": datetime(2026, 1, 1, tzinfo=UTC),
    "hour": time(1),
    "lasts": timedelta(hours=1),
    "uuid": UUID(int=1),
    "data": b"one",
    "pickled": ["one"],
}
_SECOND: dict[str, Any] = {
    **dict.fromkeys(("short", "long", "wide", "upper", "variant", "lowered"), "note"),
    **dict.fromkeys(("whole", "small", "big", "either", "shifted"), 2),
    "flag": False,
    "role": OldRole.NOTE,
    "rank": Rank.HIGH,
    "ratio": 2.5,
    "price": Decimal("2.50"),
    "day": date(2026, 1, 2),
    "at": datetime(2026, 1, 2, tzinfo=UTC),
    "hour": time(2),
    "lasts": timedelta(hours=2),
    "uuid": UUID(int=2),
    "data": b"two",
    "pickled": ["two"],
}


def criteria() -> Iterator[ColumnElement[bool]]:
    """Criteria on each column by its values, and on plain columns by every other type that a driver takes for them."""
    for name in NAMES:
        column, first, second = getattr(Everything, name), _FIRST[name], _SECOND[name]
        yield from (column == first, column.in_([first, second]), column.in_([second]))
        yield and_(column == first, Everything.short == Role.TIP)
    texts: list[Any] = [Role.TIP, OldRole.TIP, OddRole.TIP, Words("tip"), np.str_("tip")]
    for column in (Everything.short, Everything.long, Everything.wide):
        for value in texts:
            yield from (column == value, column.in_([value]), column.in_(["note", value]), value == column)
    for column in (Everything.whole, Everything.small, Everything.big, Everything.either):
        for number in (Rank.LOW, Bits.LOW, Count(1)):
            yield column.in_([number])
        for low in (Rank.LOW, Count(1)):
            yield from (column == low, column > low, column <= low, low < column)
        yield from (column == np.float64(1.0), column == 1.0, column < Decimal("1.5"))
    yield or_(Everything.short == OldRole.NOTE, Everything.whole == Rank.LOW)
    yield Everything.flag.in_([np.True_])
    # The parameter has its own type.
    yield Everything.short == bindparam(None, "TIP", Lowered())
    yield Everything.upper == bindparam(None, "tip", Upper())
    yield Everything.variant == bindparam(None, "TIP", String())
    yield Everything.whole == bindparam(None, -99, Shifted())


def assert_agrees_with_sql(engine: Engine, index: VectorIndex, more: Iterable[Any] = ()) -> None:
    """Assert that a search with each of the criteria, and of *more*, finds the rows of a SELECT."""
    app = make_app(engine, Everything, index=index, text="content", metadata=NAMES)
    with app.session() as session:
        session.add_all(
            [
                Everything(id=1, content="one", **_FIRST),
                Everything(id=2, content="two", **_SECOND),
                Everything(id=3, content="three"),
            ]
        )
        session.commit()
        app.memory.relay(engine).drain()
        found = [(str(criterion), _difference(app.memory, session, criterion)) for criterion in (*criteria(), *more)]
    app.memory.close()
    assert [(criterion, difference) for criterion, difference in found if difference is not None] == []


def _difference(memory: Memory, session: Session, criterion: ColumnElement[bool]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLAlchemy warns about decimals on SQLite
        rows = sorted(session.scalars(select(Everything.id).where(criterion)))
        hits = memory.search(session, "one", select(Everything).where(criterion))
    found = sorted(hit.fact.id for hit in hits)
    return None if (found, hits.complete) == (rows, True) else (rows, found, hits.complete)

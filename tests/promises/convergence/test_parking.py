"""Parked keys: a key that is parked again keeps the parts of its first row that still apply."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, and_, bindparam, case, create_engine, delete, false, not_, or_, select, true
from sqlalchemy.dialects.sqlite import insert

from memstate_sa.db.codec import FactKey
from memstate_sa.db.tables import metadata, parked
from memstate_sa.log.positions import slot_of
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.ledger import park_all
from memstate_sa.relay.plan import Parked, ParkedRow, ParkedState, merge
from tests.support import World, beside

INDEX = IndexKey("memory", "1")
COLUMNS = (parked.c.attempts, parked.c.next_at, parked.c.state, parked.c.error, parked.c.mark, parked.c.repeat)


def rows(connection: Connection) -> dict[FactKey, ParkedRow]:
    found = connection.execute(select(parked.c.entity, parked.c.key, *COLUMNS)).all()
    return {(entity, key): ParkedRow(*values) for entity, key, *values in found}


# -- compared with the SQL that `merge` replaced -----------------------------------------------------------------------


def park_by_sql(connection: Connection, new: Parked, now: datetime, version: str) -> None:
    """Park with the SQL statement that `merge` has replaced."""
    statement = insert(parked)
    row = statement.excluded
    lands_later = and_(parked.c.state == ParkedState.AGAIN, parked.c.next_at > row.next_at, not_(row.repeat))
    kept = {name: case((lands_later, parked.c[name]), else_=row[name]) for name in ("state", "next_at", "error")}
    still_repeats = and_(parked.c.repeat, or_(row.state != ParkedState.AGAIN, row.next_at <= now))
    repeat = case((or_(still_repeats, row.repeat), true()), (lands_later, parked.c.repeat), else_=false())
    expected: Any = bindparam("expected_version", new.expected_version, type_=parked.c.mark.type)
    values = {"attempts": new.attempts, "state": new.state, "error": new.error, "mark": version}
    connection.execute(
        statement.values(
            **INDEX.values(), entity="tag", key='["a"]', slot=slot_of("tag", '["a"]'), repeat=new.deliver_again,
            next_at=now + timedelta(seconds=new.delay_s), **values,
        ).on_conflict_do_update(
            index_elements=list(parked.primary_key.columns),
            set_={"attempts": row.attempts, "mark": row.mark, "repeat": repeat, **kept},
            where=or_(expected.is_(None), parked.c.mark == expected),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    metadata.create_all(engine, [parked])
    with engine.connect() as made:
        yield made
    engine.dispose()


STATES = list(product((0.0, 0.5, 30.0), ParkedState, (False, True)))


@pytest.mark.parametrize("passed_s", [0.0, 1.0])
def test_merging_agrees_with_the_sql_that_did_it(connection: Connection, passed_s: float) -> None:
    """Each kind of parking follows each other kind. A third one would find the row of the second."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    later = begin + timedelta(seconds=passed_s)
    for (delay_s, state, again), expected, earlier in product(STATES, (None, "first", "another"), STATES):
        first = Parked(1, earlier[0], earlier[1], "once", earlier[2])
        second = Parked(2, delay_s, state, "twice", again, expected)
        connection.execute(delete(parked))
        park_by_sql(connection, first, begin, "first")
        park_by_sql(connection, second, later, "second")
        row = merge(None, first, begin, "first")
        assert rows(connection) == {("tag", '["a"]'): merge(row, second, later, "second") or row}, (first, second)


# -- both databases ----------------------------------------------------------------------------------------------------

LANDS_LATE = Parked(0, 30.0, ParkedState.AGAIN, "may land late")
REFUSED = Parked(2, 0.5, ParkedState.PARKED, "refused")


def fact(n: int) -> FactKey:
    return "tag", f'["t{n}"]'


def test_new_and_known_keys_are_parked_together(engine: Engine) -> None:
    World(engine)
    with engine.begin() as connection:
        park_all(connection, INDEX, {fact(n): LANDS_LATE for n in (2, 0)})
        before = rows(connection)
    stale = REFUSED._replace(expected_version="another")
    with engine.begin() as connection:
        park_all(connection, INDEX, {fact(0): REFUSED, fact(1): REFUSED, fact(2): stale})
        after = rows(connection)
    assert after[fact(0)] == before[fact(0)]._replace(attempts=2, version=after[fact(0)].version)
    assert after[fact(0)].version == after[fact(1)].version != before[fact(0)].version
    assert after[fact(1)][2:4] == (ParkedState.PARKED, "refused")
    assert after[fact(2)] == before[fact(2)]


def test_key_that_another_relay_is_parking_is_merged_with_it(postgres_engine: Engine) -> None:
    """This relay cannot see the other relay's row yet, and must not overwrite it."""
    World(postgres_engine)

    def park_beside() -> None:
        with postgres_engine.begin() as connection:
            park_all(connection, INDEX, {fact(n): REFUSED for n in range(3)})

    with postgres_engine.begin() as connection:
        park_all(connection, INDEX, {fact(1): LANDS_LATE})
        with beside(postgres_engine, park_beside) as parking:
            connection.commit()
            parking.result()
    with postgres_engine.connect() as connection:
        after = rows(connection)
    assert {key: row.state for key, row in after.items()} == {
        fact(0): ParkedState.PARKED,
        fact(1): ParkedState.AGAIN,
        fact(2): ParkedState.PARKED,
    }
    assert after[fact(1)].attempts == 2

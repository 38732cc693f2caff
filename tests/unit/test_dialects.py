"""Recognising a database, and the error for an unknown one."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.dialects import mysql, postgresql, sqlite

from memstate_sa.db.dialects import BY_NAME, POSTGRESQL, SQLITE, database_of, find_database
from memstate_sa.db.sqlite import configure
from memstate_sa.errors import MemstateError


def test_engines_connections_and_dialects_give_the_same_object() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        assert database_of(engine) is database_of(connection) is database_of(sqlite.dialect()) is SQLITE
    engine.dispose()
    assert database_of(postgresql.dialect()) is BY_NAME["postgresql"] is POSTGRESQL


def test_another_database_is_refused_by_name() -> None:
    other: Any = mysql.dialect()
    assert find_database(other) is None
    with pytest.raises(MemstateError, match=r"Cannot use a database of the dialect 'mysql'\. .*PostgreSQL and SQLite"):
        database_of(other)


def test_configure_leaves_the_engine_of_another_database_as_it_is() -> None:
    class Engine:
        dialect = mysql.dialect()

    engine = Engine()
    assert configure(engine) is engine and vars(engine) == {}

"""Roles of PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, text

from tests.support import World


def values(engine: Engine, statement: str) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.exec_driver_sql(statement, execution_options={"no_parameters": True}).scalars())


Role = Callable[..., Engine]


@pytest.fixture
def role(postgres_engine: Engine) -> Iterator[Role]:
    """A function that makes a role with these rights, and returns an engine that connects as this role."""
    engines: dict[str, Engine] = {}

    def make(*rights: str, attributes: str = "") -> Engine:
        name = f"memstate_{uuid4().hex[:12]}"
        sql(postgres_engine, f"CREATE ROLE {name} {attributes}", f"GRANT USAGE ON SCHEMA public TO {name}")
        sql(postgres_engine, *(f"GRANT {right} TO {name}" for right in rights))
        engines[name] = create_engine(postgres_engine.url, connect_args={"options": f"-c role={name}"})
        return engines[name]

    yield make
    for name, engine in engines.items():
        engine.dispose()
        sql(postgres_engine, f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}")


def database(world: World) -> Any:
    return values(world.engine, "SELECT quote_ident(current_database())")[0]


def name_of(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(connection.scalar(text("SELECT current_user")))


def sql(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})

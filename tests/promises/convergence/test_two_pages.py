"""Two pages at a time: while one is sent to a server index, the next is read and embedded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
from numpy.typing import NDArray
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

from memstate_sa import DeliveryRejected, DeliveryRetryable
from memstate_sa.indexes import InMemoryIndex, Point
from memstate_sa.relay import Relay, RetryPolicy
from memstate_sa.testing import HashEmbedder
from tests.support import Tag, assert_index_holds, connections_of_this_thread
from tests.support.apps import App

pytestmark = pytest.mark.sa20
LONG_S = 60


class Server(InMemoryIndex):
    """An index that declares itself as remote. *during* is called in each upsert."""

    in_process = False

    def __init__(self) -> None:
        super().__init__(max_batch=10)
        self.during: Callable[[], object] = lambda: None
        self.batches: list[list[str]] = []

    def upsert(self, points: Sequence[Point]) -> None:
        self.batches.append([point.text or point.id for point in points])
        self.during()
        super().upsert(points)


class Embedder(HashEmbedder):
    """*during* is called in each embedding. Embedding the text "m3" of the second page sets an event."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.during: Callable[[Sequence[str]], object] = lambda texts: None
        self.second_page = threading.Event()

    def embed(self, texts: Sequence[str]) -> NDArray:
        self.texts += texts
        if "m3" in texts:
            self.second_page.set()
        self.during(texts)
        return super().embed(texts)


class Pages(App):
    """Tags m0, m1 … in pages of three. The first upsert calls `meanwhile` when the second page is embedded."""

    index: Server
    embedder: Embedder

    def __init__(self, engine: Engine, index: Server | None = None) -> None:
        super().__init__(engine, Tag, index=index or Server(), embedder=Embedder(), text="meaning")
        self.courier: Relay = self.memory.relay(engine, page_size=3, policy=RetryPolicy(delay_s=0.01))
        self.were_beside: list[bool] = []
        self.index.during = self._during_the_first
        self.meanwhile: Callable[[], object] = lambda: None

    def _during_the_first(self) -> None:
        if not self.were_beside:
            self.were_beside.append(self.embedder.second_page.wait(LONG_S))
            self.meanwhile()

    def begin(self) -> None:
        """Register the empty index, so that later rows arrive by the outbox."""
        self.courier.drain()

    def say(self, *names: str, meaning: str = "") -> None:
        for name in names:
            with self.session() as session:
                session.merge(Tag(name=name, meaning=meaning or name.replace("t", "m")))
                session.commit()

    def holds(self, **meanings: str) -> None:
        assert_index_holds(self.index, HashEmbedder(), {f'tag["{name}"]': text for name, text in meanings.items()})


SIX = tuple(f"t{n}" for n in range(6))
MEANINGS = {name: name.replace("t", "m") for name in SIX}


@pytest.fixture
def app(engine: Engine) -> Pages:
    return Pages(engine)


@pytest.mark.parametrize("source", ["outbox", "refill"])
def test_next_page_is_embedded_while_one_is_written(app: Pages, source: str) -> None:
    """No transaction is open during an embedding."""
    held, open_during = connections_of_this_thread(app.engine), list[int]()
    app.embedder.during = lambda texts: open_during.append(len(held))
    if source == "outbox":
        app.begin()
    app.say(*SIX)
    app.courier.drain()
    assert app.were_beside == [True]
    assert app.embedder.texts == list(MEANINGS.values())
    assert set(open_during) == {0}
    app.holds(**MEANINGS)


def test_rest_of_a_page_is_embedded_while_its_first_part_is_written(app: Pages) -> None:
    app.begin()
    app.courier = app.memory.relay(app.engine, page_size=6)
    app.index._max_batch = 3
    app.say(*SIX)
    app.courier.drain()
    assert app.were_beside == [True]
    app.holds(**MEANINGS)


def test_index_in_the_process_is_called_by_the_thread_of_the_relay(engine: Engine) -> None:
    index, threads = Server(), set[int]()
    index.in_process = True
    app = Pages(engine, index)
    index.during = lambda: threads.add(threading.get_ident())
    app.say(*SIX)
    app.courier.drain()
    assert threads == {threading.get_ident()}
    app.holds(**MEANINGS)


def test_row_that_changes_after_it_was_read_ahead_is_delivered(app: Pages) -> None:
    app.begin()
    app.say(*SIX)
    app.meanwhile = lambda: app.say("t4", meaning="changed")
    app.courier.drain()
    app.holds(**{**MEANINGS, "t4": "changed"})


def test_key_of_both_pages_is_written_once(app: Pages) -> None:
    """The second page was read before the first was recorded, but knows its delivered keys."""
    app.begin()
    app.say("t0", "t1", "t2", "t0", "t3", "t4")
    app.say("t0", meaning="last")
    app.courier.drain()
    assert app.were_beside == [True]
    written = [id_ for batch in app.index.batches for id_ in batch]
    assert sorted(written) == sorted(set(written))


def test_refill_does_not_undo_a_delivery_from_the_outbox(app: Pages) -> None:
    """A refill page is read ahead. Then its row changes, and the change is delivered before that page."""
    app.say(*SIX)
    app.meanwhile = lambda: app.say("t4", meaning="changed")
    app.courier.drain()
    assert app.were_beside == [True]
    app.holds(**{**MEANINGS, "t4": "changed"})


def test_failed_write_loses_nothing(app: Pages) -> None:
    """The page that was read ahead is dropped, but its vectors are kept."""
    app.begin()
    app.say(*SIX)

    def fail() -> None:
        raise DeliveryRetryable("down")

    app.meanwhile = fail
    app.courier.drain()
    assert app.were_beside == [True]
    assert sorted(app.embedder.texts) == sorted(MEANINGS.values())
    app.holds(**MEANINGS)


@pytest.mark.parametrize("error", [DeliveryRetryable("down"), DeliveryRejected("refused")], ids=["down", "refused"])
def test_failure_to_embed_the_next_page_is_left_to_its_turn(app: Pages, error: Exception) -> None:
    def embed(texts: Sequence[str]) -> None:
        if "m4" in texts:
            raise error

    app.begin()
    app.say(*SIX)
    app.embedder.during = embed
    assert app.courier.run_once() == 3
    app.holds(**{name: MEANINGS[name] for name in SIX[:3]})
    if isinstance(error, DeliveryRetryable):
        with pytest.raises(DeliveryRetryable):
            app.courier.run_once()
        app.embedder.during = lambda texts: None
        app.courier.drain()
        app.holds(**MEANINGS)
    else:
        app.courier.drain()
        app.holds(**{name: meaning for name, meaning in MEANINGS.items() if meaning != "m4"})


def test_text_that_is_refused_ahead_is_not_asked_for_beside_each_write(app: Pages) -> None:
    """It is embedded once ahead, then in its batch, then in halves. Retries are not part of this test."""
    app.courier = app.memory.relay(app.engine, page_size=3, policy=RetryPolicy(delay_s=3600))

    asked = threading.Event()

    def embed(texts: Sequence[str]) -> None:
        if "m4" in texts:
            asked.set()
            raise DeliveryRejected("refused")

    def write() -> None:
        asked.clear()
        if len(app.index.batches) <= 3:  # the first page: beside its later batches there should be no call
            asked.wait(0.3)

    app.begin()
    app.index._max_batch = 1
    app.index.batches.clear()
    app.say(*SIX)
    app.embedder.during = embed
    app.index.during = write
    app.courier.drain()
    assert app.embedder.texts.count("m4") <= 3
    app.holds(**{name: meaning for name, meaning in MEANINGS.items() if meaning != "m4"})


def test_failure_of_the_database_beside_a_write_is_left_to_the_next_page(app: Pages) -> None:
    """The page in the index call is still delivered."""
    app.begin()
    app.say(*SIX)
    is_called, has_failed = threading.Event(), threading.Event()

    def fail_once(*_: object) -> None:
        if is_called.is_set() and not has_failed.is_set():
            has_failed.set()
            raise OperationalError("SELECT", {}, Exception("the database is away"))

    def call() -> None:
        is_called.set()
        assert has_failed.wait(LONG_S)

    app.index.during = call
    event.listen(app.engine, "before_cursor_execute", fail_once)
    app.courier.drain()
    app.holds(**MEANINGS)


def test_interrupt_waits_for_the_call_and_loses_nothing(app: Pages) -> None:
    """Ctrl-C while the next page is embedded: the running call ends before the relay does."""
    app.begin()
    app.say(*SIX)

    def interrupt(texts: Sequence[str]) -> None:
        if "m3" in texts:
            app.embedder.during = lambda texts: None
            raise KeyboardInterrupt

    app.embedder.during = interrupt
    with pytest.raises(KeyboardInterrupt):
        app.courier.drain()
    app.holds(**{name: MEANINGS[name] for name in SIX[:3]})
    app.memory.relay(app.engine).drain()
    app.holds(**MEANINGS)

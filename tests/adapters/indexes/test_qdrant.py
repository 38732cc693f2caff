"""QdrantIndex against qdrant-client's local mode, in memory and in a folder, and against the engine of a server."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.local.persistence import CollectionPersistence
from sqlalchemy import Engine, select

from memstate_sa.errors import DeliveryRejected, DeliveryRetryable, IndexMismatch, MemstateError, MissingExtra
from memstate_sa.indexes import QdrantIndex, VectorIndex
from memstate_sa.testing import IndexConformance
from memstate_sa.testing.churn import EMBEDDER
from memstate_sa.testing.points import X, Y, contents, fingerprints, ids_where, point, vector
from tests.adapters.indexes.qdrant_engine import EngineClient
from tests.support import Person, World

SECRET = "XYZZY-the-user-is-allergic-to-peanuts"


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off syncing: a folder commits each point separately, and tests kill processes, not machines.

    Deleted content stays in the file, as with most builds of SQLite.
    """
    prepare = CollectionPersistence._ensure_table

    def unsynced(self: CollectionPersistence) -> None:
        self.storage.execute("PRAGMA synchronous = OFF")
        self.storage.execute("PRAGMA secure_delete = OFF")
        prepare(self)

    monkeypatch.setattr(CollectionPersistence, "_ensure_table", unsynced)


@pytest.fixture
def name() -> str:
    return f"memory-{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def in_memory() -> Iterator[QdrantClient]:
    client = QdrantClient(":memory:")
    yield client
    client.close()


@contextmanager
def folder(path: Path) -> Iterator[QdrantClient]:
    client = QdrantClient(path=str(path))
    try:
        yield client
    finally:
        client.close()


@contextmanager
def engine_client(*, optimise: bool = False) -> Iterator[Any]:
    # Use a folder in memory if there is one, because a new shard waits for the disk again and again.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        client = EngineClient(Path(root), optimise=optimise)
        yield client
        client.close()


def opened(client: QdrantClient, name: str = "memory", **options: Any) -> QdrantIndex:
    index = QdrantIndex(client, name, **options)
    index.open(embedder=EMBEDDER, dimension=3)
    return index


# -- the suite --------------------------------------------------------------------------------------------------------


class TestQdrantInMemory(IndexConformance):
    marked = True
    shared = True  # index objects with the same client see the same points
    fenced = True
    purgeable = True

    @pytest.fixture
    def make(self, in_memory: QdrantClient, name: str) -> Callable[[], VectorIndex]:
        return lambda: QdrantIndex(in_memory, name)


class TestQdrantFolder(IndexConformance):
    marked = True
    persistent = True
    shared = True
    fenced = True
    purgeable = True

    @pytest.fixture
    def make(self, tmp_path: Path) -> Iterator[Callable[[], VectorIndex]]:
        with folder(tmp_path / "qdrant") as client:
            yield lambda: QdrantIndex(client)

    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        return tmp_path / "qdrant"

    @pytest.fixture
    def program(self, tmp_path: Path) -> str:
        return f"""
from qdrant_client import QdrantClient
from memstate_sa.indexes import QdrantIndex
index = QdrantIndex(QdrantClient(path={str(tmp_path / "killed")!r}))
"""


class TestQdrantEngine(IndexConformance):
    marked = True
    shared = True
    remote = True
    fenced = True
    optimise = False

    @pytest.fixture
    def make(self) -> Iterator[Callable[[], VectorIndex]]:
        with engine_client(optimise=self.optimise) as client:
            self.outage = client.unreachable
            yield lambda: QdrantIndex(client)


class TestQdrantGraph(TestQdrantEngine):
    """The same suite, on the engine's HNSW graph."""

    recall = 0.95
    optimise = True


# -- collections ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["in memory", "in a folder", "engine"])
def client(request: pytest.FixtureRequest, in_memory: QdrantClient, tmp_path: Path) -> Iterator[QdrantClient]:
    if request.param == "in memory":
        yield in_memory
        return
    if request.param == "in a folder":
        with folder(tmp_path / "qdrant") as made:
            yield made
        return
    with engine_client() as engine:
        yield engine


def test_deleted_collection_gets_a_new_incarnation(client: QdrantClient, name: str) -> None:
    """The next call reports the loss. The call after it works on a new, empty collection."""
    index = opened(client, name)
    calls: list[Callable[[], object]] = [
        lambda: index.query(vector(*X), 1),
        lambda: index.query(vector(*X), 1, ids=["a"]),
        lambda: index.get(["a"]),
        lambda: index.upsert([point("a")]),
        lambda: index.delete(["a"]),
        lambda: index.delete(["a"], epoch=2),
    ]
    for call in calls:
        index.upsert([point("b")])
        before = index.incarnation
        client.delete_collection(name)
        with pytest.raises(DeliveryRetryable, match="was deleted"):
            call()
        call()
        assert index.incarnation != before
        assert "b" not in fingerprints(index)


def test_replaced_collection_gets_a_new_incarnation(client: QdrantClient, name: str) -> None:
    """Another object deletes it and makes it again between two calls of this one."""
    index = opened(client, name)
    index.upsert([point(f"p{n}") for n in range(6)])
    before = index.incarnation
    assert len(index.scan(None, 2)) == 2
    client.delete_collection(name)
    opened(client, name).upsert([point("p9")])
    assert index.incarnation != before
    assert [entry.id for entry in index.scan("p1", 10)] == ["p9"]


def test_existing_collection_is_adopted(client: QdrantClient, name: str) -> None:
    """A fitting collection is adopted. Points of other programs are left alone, and not found."""
    client.create_collection(name, models.VectorParams(size=3, distance=models.Distance.COSINE), metadata={"mine": 1})
    theirs = [models.PointStruct(id=n, vector=list(X), payload={"role": "tip"}) for n in range(40)]
    client.upsert(name, points=theirs)
    index = opened(client, name)
    index.upsert([point("a", Y, metadata={"role": "tip"})])
    assert [match.id for match in index.query(vector(*X), 1)] == ["a"]
    assert ids_where(index, {"role": {"$eq": "tip"}}) == {"a"}
    assert fingerprints(index) == {"a": "f"}
    index.delete(["a"])
    assert client.count(name).count == 40
    assert client.get_collection(name).config.metadata["mine"] == 1
    with pytest.raises(IndexMismatch, match=r"suite:3.*other"):
        QdrantIndex(client, name).open(embedder="other", dimension=3)


@pytest.mark.parametrize(
    ("vectors", "told"),
    [
        (models.VectorParams(size=4, distance=models.Distance.COSINE), "4 dimensions and Cosine"),
        (models.VectorParams(size=3, distance=models.Distance.DOT), "3 dimensions and Dot"),
        ({"text": models.VectorParams(size=3, distance=models.Distance.COSINE)}, "named vectors"),
    ],
    ids=["dimension", "distance", "named"],
)
def test_a_collection_that_does_not_fit_is_refused(client: QdrantClient, name: str, vectors: Any, told: str) -> None:
    """The error describes it, and the collection gets no mark."""
    client.create_collection(name, vectors)
    with pytest.raises(IndexMismatch, match=told):
        opened(client, name)
    assert not client.get_collection(name).config.metadata


def test_deleted_points_do_not_crowd_out_others(client: QdrantClient, name: str) -> None:
    """Any number of them leaves searches, listings and filters complete. They are forgotten after a day."""
    index = opened(client, name)
    index.upsert([point("opposite", (-1, 0, 0), metadata={"v": 1})])
    gone = [f"p{n}" for n in range(50)]
    index.delete(gone, epoch=3)
    assert [match.id for match in index.query(vector(*X), 1)] == ["opposite"]
    assert [match.id for match in index.query(vector(*X), 5, ids=[*gone, "opposite"])] == ["opposite"]
    assert (fingerprints(index), index.get(gone)) == ({"opposite": "f"}, [])
    assert client.count(name).count == 51
    index._forgot_at = 0.0
    old = {"epoch": 3, "deleted_at": 0}
    client.set_payload(
        name, {"memstate": old}, points=models.Filter(must=[models.HasIdCondition(has_id=tombstones(client, name))])
    )
    index.delete(["p0"], epoch=4)
    assert client.count(name).count == 2
    index.upsert([point("p0", epoch=3)])
    assert fingerprints(index) == {"opposite": "f"}


def tombstones(client: QdrantClient, name: str) -> list[Any]:
    records, _ = client.scroll(name, limit=100)
    return [record.id for record in records if "id" not in record.payload["memstate"]]


def test_the_text_is_stored_only_when_asked(client: QdrantClient, name: str) -> None:
    """The relay passes the text. Other programs can read the metadata."""
    opened(client, name).upsert([point("a", text=SECRET, metadata={"role": "tip"})])
    [record] = client.scroll(name)[0]
    assert SECRET not in str(record.payload)
    assert record.payload["metadata"] == {"role": "tip"}
    opened(client, name, store_text=True).upsert([point("a", text=SECRET)])
    [record] = client.scroll(name)[0]
    assert record.payload["text"] == SECRET


@pytest.mark.parametrize("bad", [point("a", metadata={"v": object()}), point("\ud800")], ids=["object", "surrogate"])
def test_points_that_cannot_be_stored_are_rejected(client: QdrantClient, name: str, bad: Any) -> None:
    """The point is named, and nothing is written."""
    index = opened(client, name)
    with pytest.raises(DeliveryRejected):
        index.upsert([point("good"), bad])
    assert fingerprints(index) == {}


def test_closed_client_is_retryable(tmp_path: Path) -> None:
    """A relay that outlives the client for a moment must not declare its facts dead."""
    with folder(tmp_path) as client:
        index = opened(client)
    with pytest.raises(DeliveryRetryable):
        index.upsert([point("a")])


# -- a folder ---------------------------------------------------------------------------------------------------------


@pytest.mark.deep
def test_folder_belongs_to_one_process(tmp_path: Path) -> None:
    """qdrant-client itself refuses a second process, and suggests a server. A kill frees the folder."""
    make = f"from qdrant_client import QdrantClient; QdrantClient(path={str(tmp_path)!r})"
    with folder(tmp_path) as client:
        index = opened(client)
        index.upsert([point("a", Y)])
        other = subprocess.run([sys.executable, "-c", make], capture_output=True, text=True, check=False)
        assert "use Qdrant server instead" in other.stderr
        before = index.incarnation
    with subprocess.Popen(
        [sys.executable, "-c", f"{make}; print('made', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        killed.kill()
    with folder(tmp_path) as client:
        index = opened(client)
        assert (index.incarnation, contents(index, ["a"])) == (before, {"a": ("f", [0, 1, 0])})


def test_purge_rewrites_the_folder(tmp_path: Path) -> None:
    """Deleted content is in its file until then."""
    with folder(tmp_path) as client:
        index = opened(client)
        index.upsert([point("a", Y), point("gone", metadata={"secret": SECRET * 1000})])
        index.delete(["gone"])
        assert [path.name for path in tmp_path.rglob("*") if holds_secret(path)] == ["storage.sqlite"]
        index.purge()
        assert [path for path in tmp_path.rglob("*") if holds_secret(path)] == []
        assert contents(index, ["a", "gone"]) == {"a": ("f", [0, 1, 0])}


def holds_secret(path: Path) -> bool:
    return path.is_file() and SECRET.encode() in path.read_bytes()


def test_a_deleted_folder_is_noticed(tmp_path: Path) -> None:
    """With a live client every call reports it. A new client starts with an empty index."""
    with folder(tmp_path / "qdrant") as client:
        index = opened(client)
        before = index.incarnation
        shutil.rmtree(tmp_path / "qdrant")
        calls: list[Callable[[], object]] = [
            lambda: index.query(vector(*X), 1),
            lambda: index.upsert([point("b")]),
            lambda: index.open(embedder=EMBEDDER, dimension=3),
            lambda: index.incarnation,
        ]
        for call in calls:
            with pytest.raises(DeliveryRetryable, match="deleted or replaced"):
                call()
    with folder(tmp_path / "qdrant") as client:
        index = opened(client)
        assert index.incarnation != before
        assert fingerprints(index) == {}


def test_a_forked_child_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It inherits an open index, and would write beside its parent."""
    with folder(tmp_path) as client:
        index = opened(client)
        with monkeypatch.context() as child:
            child.setattr("memstate_sa.indexes.qdrant.os.getpid", lambda: -1)
            with pytest.raises(MemstateError, match="fork"):
                index.upsert([point("a")])
        assert fingerprints(index) == {}


# -- a server's errors; no real server is available here ---------------------------------------------------------------


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], QdrantClient]]:
    """A client of an HTTP server that always answers the same."""
    answer: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(answer["status"])
            self.send_header("retry-after", "7")
            self.send_header("content-length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"])

        do_GET = do_PUT = do_POST = reply  # noqa: N815  # names that http.server calls

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        clients: list[QdrantClient] = []

        def make(status: int, body: bytes) -> QdrantClient:
            answer.update(status=status, body=body)
            url = f"http://127.0.0.1:{server.server_port}"
            clients.append(QdrantClient(url=url, check_compatibility=False))
            return clients[-1]

        yield make
        for client in clients:
            client.close()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "expected", "retry_after_s"),
    [
        (429, b'{"status":{"error":"slow down"}}', DeliveryRetryable, 7.0),
        (503, b"<html>", DeliveryRetryable, None),
        (500, b'{"status":{"error":"x"}}', DeliveryRetryable, None),
        (401, b"", DeliveryRetryable, None),
        (400, b'{"status":{"error":"x"}}', DeliveryRejected, None),
        (413, b"too large", DeliveryRejected, None),
        (200, b"<html>a login page</html>", DeliveryRetryable, None),
    ],
)
def test_errors_are_told_apart_by_status(
    answering: Callable[[int, bytes], QdrantClient],
    status: int,
    body: bytes,
    expected: type[Exception],
    retry_after_s: float | None,
) -> None:
    """The server or a gateway answers a write with an error. Its pause is passed on if it names one."""
    index = QdrantIndex(answering(status, body))
    index._opened = opened(QdrantClient(":memory:"))._opened
    with pytest.raises(expected) as caught:
        index.upsert([point("a")])
    assert caught.value.__cause__ is not None
    assert getattr(caught.value, "retry_after_s", None) == retry_after_s


def test_unreachable_server_is_retryable(answering: Callable[[int, bytes], QdrantClient]) -> None:
    """No write can have landed."""
    client = QdrantClient(url="http://127.0.0.1:1", check_compatibility=False)
    index = QdrantIndex(client)
    with pytest.raises(DeliveryRetryable) as caught:
        index.open(embedder=EMBEDDER, dimension=3)
    assert not caught.value.may_land
    assert not index.in_process
    with pytest.raises(MemstateError, match=r"open\(\) first"):
        index.upsert([point("a")])
    with pytest.raises(MemstateError, match="server"):
        index.purge()
    client.close()


# -- the relay --------------------------------------------------------------------------------------------------------


def people(world: World, numbers: range, about: str) -> None:
    with world.session() as session:
        for number in numbers:
            session.merge(Person(id=number, name=f"n{number % 3}", about=f"{about} {number}"))
        session.commit()


def test_a_relay_converges(engine: Engine, client: QdrantClient, name: str) -> None:
    """Index == f(tables) after inserts, updates, deletes and a rollback. A search finds the rows of SQL."""
    world = World(engine, QdrantIndex(client, name))
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


def test_a_lost_collection_is_refilled(engine: Engine, client: QdrantClient, name: str) -> None:
    """It is refilled in full, by the same relay and index objects."""
    world = World(engine, QdrantIndex(client, name))
    people(world, range(30), "remembers")
    world.relay.drain()
    client.delete_collection(name)
    people(world, range(3), "forgets")
    for _ in range(10):
        try:
            world.assert_in_step()
            break
        except DeliveryRetryable:
            continue
    world.assert_in_step()
    assert world.memory.verify(engine).clean
    world.memory.close()


@pytest.mark.parametrize("absent", ["qdrant_client.models"])
def test_a_missing_package_names_its_extra(
    absent: str, monkeypatch: pytest.MonkeyPatch, in_memory: QdrantClient
) -> None:
    """Constructing the index without qdrant-client names the package to install."""
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtra, match=r"memstate-sa\[qdrant\]"):
        QdrantIndex(in_memory)

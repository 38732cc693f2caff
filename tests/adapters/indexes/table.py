"""The table in docs/how-to/indexes.md, made from the suite: ``python -m tests.adapters.indexes.table``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from memstate_sa.testing import IndexConformance

DOCUMENT = Path(__file__).parents[3] / "docs" / "how-to" / "indexes.md"
BEGIN, END = "<!-- the table begins -->\n", "<!-- the table ends -->\n"

ROWS = {
    "`InMemoryIndex`": "test_indexes.TestInMemory",
    "`ChromaIndex`, `EphemeralClient`": "test_indexes.TestChromaEphemeral",
    "`ChromaIndex`, `PersistentClient`": "test_indexes.TestChromaPersistent",
    "`ChromaIndex`, `HttpClient`": "test_indexes.TestChromaServer",
    "`QdrantIndex`, `:memory:`": "test_qdrant.TestQdrantInMemory",
    "`QdrantIndex`, `path=`": "test_qdrant.TestQdrantFolder",
    "`FaissIndex`": "test_faiss.TestFaiss",
    "`PgVectorIndex`, up to 5,000 points": "test_pgvector.TestPgVector",
    "`PgVectorIndex`, by its graph": "test_pgvector.TestPgVectorByItsGraph",
    "`PgVectorIndex`, `exact=True`": "test_pgvector.TestPgVectorExact",
    "`RedisIndex`, up to 5,000 points": "test_redis.TestRedis",
    "`RedisIndex`, by its graph": "test_redis.TestRedisGraph",
}
HEAD = ("", "search", "a kill", "used by", "late writes refused", "erasure", "a query beside a write")


def table() -> str:
    lines = [HEAD, ("---",) * len(HEAD)]
    for title, name in ROWS.items():
        module, _, suite = name.partition(".")
        lines.append((title, *_cells(getattr(import_module(f"tests.adapters.indexes.{module}"), suite))))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(suite: type[IndexConformance]) -> tuple[str, ...]:
    shared = "any number of processes" if suite.remote else "any number of objects of one process"
    return (
        "exact" if suite.recall == 1 else f"approximate, at least {suite.recall:.0%}",
        "nothing is lost" if suite.persistent else "filled again",
        shared if suite.shared else "one object",
        "yes" if suite.fenced else "no",
        "yes" if suite.purgeable else "nothing to erase" if not suite.persistent else "by its operator",
        "of one write" if suite.atomic else "may be of two",
    )


def written() -> str:
    """The document with an up-to-date table."""
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(written())

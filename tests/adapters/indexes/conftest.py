"""Every index passes the whole suite. `make test` runs one kind of each index, and kills one program."""

from __future__ import annotations

import pytest

KILL = "test_acknowledged_writes_outlive_a_kill"
KILLED_EACH_TIME = "TestFaiss"
OTHER_KINDS = {
    *("TestChromaServer", "TestPgVectorExact", "TestPgVectorByItsGraph", "TestQdrantFolder", "TestQdrantGraph"),
    *("TestRedisGraph", "TestFlaky"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.cls is not None:
            name = item.cls.__name__
            if name in OTHER_KINDS or (item.originalname == KILL and name != KILLED_EACH_TIME):
                item.add_marker(pytest.mark.deep)

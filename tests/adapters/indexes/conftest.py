"""Every index does what the whole suite asks; the deep run alone kills the program of each of them."""

from __future__ import annotations

import pytest

KILL = "test_acknowledged_writes_outlive_a_kill"
KILLED_EACH_TIME = "TestFaiss"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_kill = isinstance(item, pytest.Function) and item.originalname == KILL and item.cls is not None
        if is_kill and item.cls.__name__ != KILLED_EACH_TIME:
            item.add_marker(pytest.mark.deep)

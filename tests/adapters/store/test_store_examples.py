"""The examples in the docstrings of the stores run as they are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest

from memstate_sa import AsyncMemoryStore, Fact, MemoryStore
from memstate_sa.indexes import InMemoryIndex
from tests.adapters.store.facts import note, opened

EXAMPLE = re.compile(r"^::\n\n((?:    .*\n|\n)+)", re.MULTILINE)


def examples(store: type) -> Iterator[Any]:
    """The examples of a class and of the methods that it defines or inherits."""
    documented = {store.__name__: store, **dict(inspect.getmembers(store, inspect.isfunction))}
    for name, described in documented.items():
        for code in EXAMPLE.findall(f"{inspect.getdoc(described) or ''}\n"):
            yield pytest.param(dedent(code), id=f"{store.__name__}.{name}")


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names that the examples use."""
    monkeypatch.chdir(tmp_path)
    with opened("sqlite:///other.db", background=True) as store:
        ids = [store.commit(note(f"likes tea {n}")) for n in range(3)]
        yield {
            "Fact": Fact,
            "MemoryStore": MemoryStore,
            "AsyncMemoryStore": AsyncMemoryStore,
            "InMemoryIndex": InMemoryIndex,
            "store": store,
            "id": ids[0],
            "ids": ids,
            "old_id": ids[1],
        }


@pytest.mark.parametrize("code", [*examples(MemoryStore)])
def test_example_of_the_sync_store_runs(code: str, names: dict[str, Any]) -> None:
    exec(code, names)  # an example of ours


async def test_examples_of_the_async_store_run(names: dict[str, Any]) -> None:
    """Its own examples. The awaited methods have those of MemoryStore."""
    own = [AsyncMemoryStore, AsyncMemoryStore.run_sync, AsyncMemoryStore.transaction]
    codes = [code for described in own for code in EXAMPLE.findall(f"{inspect.getdoc(described) or ''}\n")]
    assert len(codes) == len(own)
    async with AsyncMemoryStore("sqlite:///other.db", InMemoryIndex(), background=False) as store:
        for code in codes:
            scope = {**names, "store": store}
            exec(f"async def example():\n{indent(dedent(code), '    ')}", scope)  # an example of ours
            await scope["example"]()

"""LangGraph's whole conformance suite for checkpointers. The suite's level proves little, so the tests that ran are
counted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine

pytest.importorskip("langgraph.checkpoint.conformance")

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from memstate_sa.integrations.langgraph import MemStateCheckpointer

TESTS = {
    "put": 17,
    "put_writes": 10,
    "get_tuple": 10,
    "list": 16,
    "delete_thread": 5,
    "delete_for_runs": 7,
    "copy_thread": 8,
    "prune": 8,
}


class ThroughAsync(BaseCheckpointSaver[str]):
    """A saver whose async methods call our sync ones, because the suite calls only async methods."""

    def __init__(self, saver: MemStateCheckpointer) -> None:
        super().__init__(serde=saver.serde)
        self._saver = saver

    def get_next_version(self, current: str | None, channel: None) -> str:
        return self._saver.get_next_version(current, channel)

    async def aput(self, *given: Any) -> Any:
        return self._saver.put(*given)

    async def aput_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        self._saver.put_writes(config, writes, task_id, task_path)

    async def aget_tuple(self, config: Any) -> Any:
        return self._saver.get_tuple(config)

    async def alist(self, config: Any, **given: Any) -> AsyncIterator[Any]:
        for found in self._saver.list(config, **given):
            yield found

    async def adelete_thread(self, thread_id: str) -> None:
        self._saver.delete_thread(thread_id)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        self._saver.delete_for_runs(run_ids)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        self._saver.copy_thread(source_thread_id, target_thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        self._saver.prune(thread_ids, strategy=strategy)


@pytest.fixture
def saver(engine: Engine) -> MemStateCheckpointer:
    made = MemStateCheckpointer(engine)
    made.setup()
    return made


@pytest.mark.parametrize("through", [lambda saver: saver, ThroughAsync], ids=["async", "sync"])
async def test_whole_conformance_suite_passes(saver: MemStateCheckpointer, through: Any) -> None:
    """81 tests ran, and none failed."""

    @checkpointer_test(name="MemStateCheckpointer")
    async def made() -> AsyncIterator[Any]:
        yield through(saver)

    report = await validate(made)
    assert {name: result.failures for name, result in report.results.items() if result.failures} == {}
    assert {name: result.tests_passed for name, result in report.results.items()} == TESTS
    assert sum(TESTS.values()) == 81


# -- from the suite's next version: delta channels, which store writes and only sometimes a value ----------------------


class Chain:
    """A chain of checkpoints. Each has values of channels, and then writes to them."""

    def __init__(self, saver: MemStateCheckpointer) -> None:
        self.saver, self.thread_id, self.configs = saver, str(uuid4()), []

    @property
    def head(self) -> Any:
        return self.configs[-1]

    def ids(self) -> list[str]:
        return [config["configurable"]["checkpoint_id"] for config in self.configs]

    def add(
        self, values: dict[str, Any], *writes: tuple[str, Any], counted: Sequence[str] = (), parent: int = -1
    ) -> Any:
        step = len(self.configs)
        conf = {"thread_id": self.thread_id, "checkpoint_ns": ""}
        if self.configs:
            conf["checkpoint_id"] = self.configs[parent]["configurable"]["checkpoint_id"]
        versions = dict.fromkeys(values, step + 1)
        checkpoint: Any = {
            "v": 4,
            "id": str(uuid6(clock_seq=step)),
            "ts": "2026-01-01T00:00:00+00:00",
            "channel_values": values,
            "channel_versions": versions,
            "versions_seen": {},
            "updated_channels": None,
        }
        metadata: Any = {"source": "loop", "step": step, "parents": {}}
        if counted:
            metadata["counters_since_delta_snapshot"] = dict.fromkeys(counted, (1, 1))
        self.configs.append(self.saver.put({"configurable": conf}, checkpoint, metadata, versions))
        if writes:
            self.saver.put_writes(self.head, writes, str(uuid4()))
        return self.head

    def history(self, *channels: str, of: Any = None) -> dict[str, tuple[Any, list[Any]]]:
        """The stored value (or "none") and the later writes of each channel. Sync and async must agree."""
        found = self.saver.get_delta_channel_history(config=of or self.head, channels=channels)
        assert found == BaseCheckpointSaver.get_delta_channel_history(
            self.saver, config=of or self.head, channels=channels
        )  # the base class reads one checkpoint after the other, and must agree
        shown = {}
        for channel, entry in found.items():
            seed = entry.get("seed", "none")
            shown[channel] = (getattr(seed, "value", seed), [value for _, _, value in entry["writes"]])
        return shown


@pytest.fixture
def chain(saver: MemStateCheckpointer) -> Chain:
    return Chain(saver)


def test_delta_writes_come_oldest_first(chain: Chain) -> None:
    chain.add({"ch": _DeltaSnapshot([])})
    for n in range(1, 5):
        chain.add({}, ("ch", n))
    assert chain.history("ch") == {"ch": ([], [1, 2, 3])}  # writes at the head are still to be applied


def test_delta_seed_is_the_nearest_value(chain: Chain) -> None:
    for n in range(6):
        chain.add({"ch": _DeltaSnapshot([n])} if n in (0, 3) else {}, ("ch", n))
    assert chain.history("ch") == {"ch": ([3], [3, 4])}


def test_delta_history_leaves_out_pending_writes(chain: Chain) -> None:
    chain.add({"ch": _DeltaSnapshot([0])})
    chain.add({}, ("ch", "extra"))
    assert chain.history("ch") == {"ch": ([0], [])}


def test_delta_channels_are_walked_each_to_its_own_value(chain: Chain) -> None:
    for n in range(5):
        values = {1: {"a": _DeltaSnapshot("A")}, 3: {"b": _DeltaSnapshot("B")}}.get(n, {})
        chain.add(values, ("a", n), ("b", n))
    assert chain.history("a", "b", "c") == {"a": ("A", [1, 2, 3]), "b": ("B", [3]), "c": ("none", [])}


def test_delta_history_of_no_channel_is_empty(chain: Chain) -> None:
    chain.add({"ch": _DeltaSnapshot([0])})
    assert chain.saver.get_delta_channel_history(config=chain.head, channels=[]) == {}


def test_delta_history_without_a_value_has_no_seed(chain: Chain) -> None:
    """No ancestor has a value, so there is no seed. The same kind: a thread or a checkpoint that does not exist."""
    for n in range(3):
        chain.add({}, ("ch", n))
    assert chain.history("ch") == {"ch": ("none", [0, 1])}
    nobody: Any = {"configurable": {"thread_id": "nobody", "checkpoint_ns": ""}}
    for config in (nobody, {"configurable": {**nobody["configurable"], "checkpoint_id": "none"}}):
        assert chain.saver.get_delta_channel_history(config=config, channels=["ch"]) == {"ch": {"writes": []}}


@pytest.mark.parametrize("plain", [[10, 20, 30], "short", None, True], ids=repr)
def test_delta_seed_may_be_plain(chain: Chain, plain: Any) -> None:
    """The channel was an ordinary one before. Its value is a blob, or small and inside the checkpoint."""
    chain.add({}, ("ch", "older"))
    chain.add({"ch": plain}, ("ch", "its own"))
    chain.add({}, ("ch", "later"))
    chain.add({}, ("ch", "pending"))
    assert chain.history("ch") == {"ch": (plain, ["its own", "later"])}


def test_delta_writes_of_one_step_come_by_path(chain: Chain) -> None:
    """They are ordered by path, not by the task's id, which is a hash. Writes without a path (a graph's input) come
    first.
    """
    chain.add({"ch": _DeltaSnapshot([])})
    chain.saver.put_writes(chain.head, [("ch", 3)], "00000000-0000-0000-0000-000000000000", "~pull, 02")
    chain.saver.put_writes(chain.head, [("ch", 2)], "ffffffff-ffff-ffff-ffff-ffffffffffff", "~pull, 01")
    chain.saver.put_writes(chain.head, [("ch", 0), ("ch", 1)], "eeeeeeee-ffff-ffff-ffff-ffffffffffff")
    chain.add({})
    assert chain.history("ch") == {"ch": ([], [0, 1, 2, 3])}


def test_delta_history_of_a_fork_is_its_own(chain: Chain) -> None:
    chain.add({"ch": _DeltaSnapshot([])}, ("ch", "both"))
    first = chain.add({}, ("ch", "first"))
    second = chain.add({}, ("ch", "second"), parent=0)
    chain.add({}, parent=1)
    assert chain.history("ch") == {"ch": ([], ["both", "first"])}
    chain.add({}, parent=2)
    assert chain.history("ch") == {"ch": ([], ["both", "second"])}
    assert chain.history("ch", of=first) == chain.history("ch", of=second) == {"ch": ([], ["both"])}


def test_distant_seed_is_found(chain: Chain) -> None:
    """The walk reads checkpoints in batches."""
    from memstate_sa.integrations.langgraph import checkpoint_queries

    chain.add({"ch": _DeltaSnapshot([])})
    for n in range(checkpoint_queries.CHAIN_LIMIT + 5):
        chain.add({}, ("ch", n))
    found = chain.saver.get_delta_channel_history(config=chain.head, channels=["ch"])["ch"]
    assert [value for _, _, value in found["writes"]] == list(range(checkpoint_queries.CHAIN_LIMIT + 4))
    assert found["seed"].value == []


def test_pruning_keeps_the_writes_of_a_delta_channel(chain: Chain) -> None:
    """It keeps checkpoints back to the nearest value of each channel, and none before it."""
    chain.add({"a": _DeltaSnapshot(["old"]), "b": _DeltaSnapshot(["old"])}, ("a", 0))
    chain.add({"a": _DeltaSnapshot([1])}, ("a", 1), ("b", 1), counted=["b"])
    chain.add({"b": _DeltaSnapshot([2])}, ("a", 2), ("b", 2), counted=["a"])
    chain.add({"a": _DeltaSnapshot([3])}, ("a", 3), ("b", 3), counted=["b"])
    chain.add({}, ("a", 4), ("b", 4), counted=["a", "b"])
    before = chain.history("a", "b")
    chain.saver.prune([chain.thread_id])
    kept = [found.checkpoint["id"] for found in chain.saver.list({"configurable": {"thread_id": chain.thread_id}})]
    assert kept == chain.ids()[:1:-1]
    assert chain.history("a", "b") == before == {"a": ([3], [3]), "b": ([2], [2, 3])}


def test_pruning_a_delta_channel_that_was_never_stored_keeps_all(chain: Chain) -> None:
    for n in range(3):
        chain.add({}, ("ch", n), counted=["ch"])
    chain.saver.prune([chain.thread_id])
    assert chain.history("ch") == {"ch": ("none", [0, 1])}


def test_copies_rebuild_delta_channels(chain: Chain) -> None:
    chain.add({"ch": _DeltaSnapshot([])})
    for n in range(3):
        chain.add({}, ("ch", n))
    chain.saver.copy_thread(chain.thread_id, "copy")
    chain.saver.delete_thread(chain.thread_id)
    copied: Any = {"configurable": {**chain.head["configurable"], "thread_id": "copy"}}
    assert chain.history("ch", of=copied) == {"ch": ([], [0, 1])}

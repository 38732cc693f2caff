"""Decisions of the relay: pure functions, so that every case can be tried."""

from __future__ import annotations

from hypothesis import given, strategies as st

from memstate_sa.db.statements import batches
from memstate_sa.errors import DeliveryRejected, DeliveryRetryable
from memstate_sa.relay.plan import Delivered, park, plan
from memstate_sa.relay.retry import RetryPolicy, classify, describe, halves
from memstate_sa.tracking.projection import Projection

keys = st.sampled_from([("person", f"[{n}]") for n in range(4)])
contents = st.sampled_from(["", "tea", "rain"])
versions = st.tuples(contents, st.sampled_from(["m", "n"]))


def projection(key: str, text: str, metadata: str) -> Projection:
    if not text:
        return Projection(key, None, {}, None, None)
    return Projection(key, text, {"m": metadata}, f"{text}/{metadata}", text)


def delivered(text: str, metadata: str) -> Delivered:
    return Delivered(f"{text}/{metadata}", text, False) if text else Delivered(None, None, True)


@given(
    dirty=st.lists(keys, unique=True),
    truth=st.dictionaries(keys, versions),
    index=st.dictionaries(keys, versions),
    told=st.sets(keys),
    settle=st.booleans(),
)
def test_a_plan_makes_the_index_agree(
    dirty: list[tuple[str, str]],
    truth: dict[tuple[str, str], tuple[str, str]],
    index: dict[tuple[str, str], tuple[str, str]],
    told: set[tuple[str, str]],
    settle: bool,
) -> None:
    """After the writes, any index holds the truth of every dirty key, and nothing else has changed.

    The ledger knows the index's content for the keys in *told*, and for others only when they are settled.
    """
    held = {key: value for key, value in index.items() if value[0]}
    ledger = {key: delivered(*value) for key, value in index.items() if key in told}
    if not settle:
        held = {key: value for key, value in held.items() if key in told}
    before = dict(held)
    rows = {key: projection(key[1], *value) for key, value in truth.items()}
    for write in plan(dirty, rows, ledger, dirty if settle else ()):
        if write.projection is None:
            held.pop(write.fact, None)
        else:
            assert not write.same_text or before[write.fact][0] == write.projection.text
            held[write.fact] = truth[write.fact]
    for key in dirty:
        assert held.get(key) == (truth[key] if truth.get(key, ("",))[0] else None)
    assert {k: v for k, v in held.items() if k not in dirty} == {k: v for k, v in before.items() if k not in dirty}


@given(dirty=st.lists(keys, unique=True), truth=st.dictionaries(keys, versions))
def test_a_second_delivery_writes_nothing(
    dirty: list[tuple[str, str]], truth: dict[tuple[str, str], tuple[str, str]]
) -> None:
    """Keys that the ledger confirms are skipped."""
    rows = {key: projection(key[1], *value) for key, value in truth.items()}
    ledger = {key: delivered(*value) for key, value in truth.items()}
    assert plan(dirty, rows, ledger) == []


@given(st.integers(1, 60), st.floats(0, 1))
def test_backoff_grows_to_its_bound(attempt: int, jitter: float) -> None:
    """A delay is never longer than the bound, and never shorter than half of its nominal time."""
    policy = RetryPolicy(delay_s=1, max_delay_s=60)
    full = min(2.0 ** (attempt - 1), 60)
    assert full / 2 <= policy.delay(attempt, lambda: jitter) <= full


def test_rejected_key_is_parked_until_dead() -> None:
    """Rejections are counted. The last one makes the key dead."""
    policy = RetryPolicy(max_attempts=2, delay_s=1)
    first = park(DeliveryRejected("no"), 1, policy, lambda: 1.0)
    assert (first.state, first.delay_s, first.error) == ("parked", 1.0, "DeliveryRejected: no")
    assert park(DeliveryRejected("no"), 2, policy, lambda: 1.0).state == "dead"


def test_failures_are_told_apart_by_type() -> None:
    """Connection errors and timeouts are tried again. A vendor's message is never repeated."""
    assert isinstance(classify(TimeoutError("x"), "the index"), DeliveryRetryable)
    assert isinstance(classify(ConnectionError("x"), "the index"), DeliveryRetryable)
    rejected = classify(ValueError("the secret"), "the index")
    assert isinstance(rejected, DeliveryRejected)
    assert "secret" not in describe(rejected) and "ValueError" in describe(rejected)


@given(st.lists(st.integers(), min_size=1), st.integers(1, 9))
def test_splitting_loses_nothing(items: list[int], size: int) -> None:
    """Batches and halves keep all items, in order."""
    assert [item for batch in batches(items, size) for item in batch] == items
    first, second = halves(items)
    assert [*first, *second] == items

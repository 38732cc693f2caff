"""What to do about a page of dirty keys, and about a failure. Pure: values and a clock in, decisions out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from memstate_sa._failures import delivery_error
from memstate_sa.changes import FactKey
from memstate_sa.errors import DeliveryRejected, MemstateError
from memstate_sa.facts import Projection
from memstate_sa.printable import printable

T = TypeVar("T")


class Delivered(NamedTuple):
    """What the ledger says that an index was last given for a key."""

    fingerprint: str | None
    text_fingerprint: str | None
    deleted: bool


class Write(NamedTuple):
    """One key to be written to an index: its projection, or None to delete it.

    ``same_text``: the index already holds the vector of this text, only metadata changed; it is there if the point's
    fingerprint is ``held``, or the projection's.
    """

    fact: FactKey
    projection: Projection | None
    same_text: bool = False
    held: str | None = None


def plan(
    facts: Iterable[FactKey],
    truth: Mapping[FactKey, Projection],
    ledger: Mapping[FactKey, Delivered],
    doubted: Collection[FactKey] = (),
) -> list[Write]:
    """The writes that make an index agree with *truth* for these *facts*.

    The ledger is not believed about *doubted* ones: an earlier holder, or an earlier attempt, may have written to the
    index without having been able to say so, and a row that has since changed back would look delivered.
    """
    writes = []
    for fact in facts:
        projection = truth.get(fact)
        if projection is not None and projection.fingerprint is None:
            projection = None
        doubt = fact in doubted
        known = None if doubt else ledger.get(fact)
        if projection is None:
            if doubt or (known is not None and not known.deleted):
                writes.append(Write(fact, None))
        elif known is None or known.deleted or known.fingerprint != projection.fingerprint:
            same_text = (
                known is not None and not known.deleted and (known.text_fingerprint == projection.text_fingerprint)
            )
            writes.append(
                Write(fact, projection, same_text, known.fingerprint if known is not None and same_text else None)
            )
    return writes


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    middle = len(items) // 2
    return items[:middle], items[middle:]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter on its upper half; ``max_attempts`` rejections make a key dead.

    Attempts at a key that was refused are up to ``max_delay_s`` apart, and so long is a provider's Retry-After heeded.
    What is merely unavailable is looked for every ``max_wait_s`` at least.
    """

    max_attempts: int = 8
    delay_s: float = 0.5
    max_delay_s: float = 300.0
    max_wait_s: float = 15.0

    def delay(self, attempt: int, jitter: Callable[[], float], longest: float | None = None) -> float:
        """Seconds to wait before attempt number ``attempt + 1``; *jitter* returns 0 to 1."""
        full = min(self.delay_s * 2.0 ** min(attempt - 1, 30), self.max_delay_s if longest is None else longest)
        return full * (0.5 + 0.5 * jitter())


AGAIN, PARKED, DEAD = "again", "parked", "dead"


class Parked(NamedTuple):
    """A key set aside: refused, so that the others go on, or to be delivered once more for some other reason."""

    attempts: int
    delay_s: float
    state: str
    error: str
    repeat: bool = False  # it has to be delivered once more after that: a call may yet land
    instead_of: str | None = None  # the mark of the parking that it replaces; None: of any


def park(error: MemstateError, attempts: int, policy: RetryPolicy, jitter: Callable[[], float]) -> Parked:
    """What becomes of a key that was rejected for the *attempts*-th time."""
    state = DEAD if attempts >= policy.max_attempts else PARKED
    return Parked(attempts, policy.delay(attempts, jitter), state, describe(error))


class Breaker:
    """Keeps an index that is unavailable from being asked all the time; one for each, so that it stops no other.

    Retry-After is heeded, up to the policy's longest delay.
    """

    def __init__(self, policy: RetryPolicy, jitter: Callable[[], float]) -> None:
        self.failures = 0  # since the last success
        self.open_until: float | None = None  # when the next attempt is due, while it is open
        self._policy = policy
        self._jitter = jitter

    def failed(self, error: Exception, now: float) -> float:
        """Open it; returns for how many seconds."""
        self.failures += 1
        asked: float | None = getattr(error, "retry_after_s", None)
        delay = self._policy.delay(self.failures, self._jitter, min(self._policy.max_wait_s, self._policy.max_delay_s))
        wait = delay if asked is None else min(max(asked, delay), self._policy.max_delay_s)
        self.open_until = now + wait
        return wait

    def succeeded(self) -> None:
        self.failures, self.open_until = 0, None

    def wait_s(self, now: float) -> float:
        """How long the index is to be left alone from *now*."""
        return 0.0 if self.open_until is None else max(0.0, self.open_until - now)


def describe(error: BaseException) -> str:
    """What an operator needs of *error*: types and our own message, never a vendor's text, which may quote the fact."""
    ours = printable(str(error)[:500]) if isinstance(error, MemstateError) else ""
    cause = error.__cause__
    kinds = type(error).__name__ + (f" from {type(cause).__name__}" if cause is not None else "")
    return f"{kinds}: {ours}" if ours else kinds


def guarded(call: Callable[[], T], where: str) -> T:
    """*call* on an index or embedder; whatever it raises becomes ours, chained."""
    try:
        return call()
    except Exception as error:
        ours = classify(error, where)
        if ours is error:
            raise
        raise ours from error


def classify(error: Exception, where: str) -> MemstateError:
    """*error* of an index or embedder as ours. Retryable or rejected is decided by type, never by text."""
    if isinstance(error, MemstateError):
        return error
    wrapped = delivery_error(error, where, unknown=DeliveryRejected)
    wrapped.__cause__ = error
    return wrapped

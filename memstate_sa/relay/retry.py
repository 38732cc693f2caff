"""The retry policy, the circuit breaker, and the classification of errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from memstate_sa.errors import DeliveryRejected, MemstateError
from memstate_sa.indexes.provider_errors import delivery_error
from memstate_sa.runtime.printable import printable

T = TypeVar("T")


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    middle = len(items) // 2
    return items[:middle], items[middle:]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff. The upper half of each delay is random. After ``max_attempts`` refusals, a key is dead.

    Attempts at a refused key are at most ``max_delay_s`` apart, even if a provider's Retry-After is longer. An
    unavailable index or embedder is tried again after ``max_wait_s`` at the latest.
    """

    max_attempts: int = 8
    delay_s: float = 0.5
    max_delay_s: float = 300.0
    max_wait_s: float = 15.0

    def delay(self, attempt: int, jitter: Callable[[], float], longest: float | None = None) -> float:
        """The seconds to wait before attempt number ``attempt + 1``. *jitter* returns a number from 0 to 1."""
        full = min(self.delay_s * 2.0 ** min(attempt - 1, 30), self.max_delay_s if longest is None else longest)
        return full * (0.5 + 0.5 * jitter())


class Breaker:
    """The circuit breaker of one index: it limits the attempts while the index is unavailable.

    The breaker obeys a Retry-After, up to the policy's longest delay.
    """

    def __init__(self, policy: RetryPolicy, jitter: Callable[[], float]) -> None:
        self.failures = 0  # the number of failures since the last success
        self.open_until: float | None = None  # the time of the next attempt, while the breaker is open
        self._policy = policy
        self._jitter = jitter

    def failed(self, error: Exception, now: float) -> float:
        """Open the breaker, and return the number of seconds until the next attempt."""
        self.failures += 1
        retry_after: float | None = getattr(error, "retry_after_s", None)
        delay = self._policy.delay(self.failures, self._jitter, min(self._policy.max_wait_s, self._policy.max_delay_s))
        wait = delay if retry_after is None else min(max(retry_after, delay), self._policy.max_delay_s)
        self.open_until = now + wait
        return wait

    def succeeded(self) -> None:
        self.failures, self.open_until = 0, None

    def wait_s(self, now: float) -> float:
        """The seconds from *now* until the next attempt."""
        return 0.0 if self.open_until is None else max(0.0, self.open_until - now)


def describe(error: BaseException) -> str:
    """The types of *error*, and our own message, for an operator. A vendor's text is left out: it may quote a fact."""
    message = printable(str(error)[:500]) if isinstance(error, MemstateError) else ""
    cause = error.__cause__
    kinds = type(error).__name__ + (f" from {type(cause).__name__}" if cause is not None else "")
    return f"{kinds}: {message}" if message else kinds


def guarded(call: Callable[[], T], where: str) -> T:
    """Run *call* on an index or embedder. Its exceptions are replaced by ours, and chained."""
    try:
        return call()
    except Exception as error:
        own_error = classify(error, where)
        if own_error is error:
            raise
        raise own_error from error


def classify(error: Exception, where: str) -> MemstateError:
    """Our exception for *error* of an index or embedder. Only its type, not its text, decides whether to retry."""
    if isinstance(error, MemstateError):
        return error
    wrapped = delivery_error(error, where, unknown=DeliveryRejected)
    wrapped.__cause__ = error
    return wrapped

"""When to try again: retry policy, circuit breaker, and the verdict on an error."""

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
    """Exponential backoff with full jitter on its upper half; ``max_attempts`` rejections make a key dead.

    Attempts at a refused key are up to ``max_delay_s`` apart. A longer Retry-After of a provider is cut to that. An
    unavailable index or embedder is tried every ``max_wait_s`` at least.
    """

    max_attempts: int = 8
    delay_s: float = 0.5
    max_delay_s: float = 300.0
    max_wait_s: float = 15.0

    def delay(self, attempt: int, jitter: Callable[[], float], longest: float | None = None) -> float:
        """Seconds to wait before attempt number ``attempt + 1``; *jitter* returns 0 to 1."""
        full = min(self.delay_s * 2.0 ** min(attempt - 1, 30), self.max_delay_s if longest is None else longest)
        return full * (0.5 + 0.5 * jitter())


class Breaker:
    """Keeps an unavailable index from being asked all the time. Each index has its own, so that it stops no other.

    Retry-After is heeded, up to the policy's longest delay.
    """

    def __init__(self, policy: RetryPolicy, jitter: Callable[[], float]) -> None:
        self.failures = 0  # since the last success
        self.open_until: float | None = None  # when the next attempt is due, while it is open
        self._policy = policy
        self._jitter = jitter

    def failed(self, error: Exception, now: float) -> float:
        """Open the breaker. Returns for how many seconds."""
        self.failures += 1
        retry_after: float | None = getattr(error, "retry_after_s", None)
        delay = self._policy.delay(self.failures, self._jitter, min(self._policy.max_wait_s, self._policy.max_delay_s))
        wait = delay if retry_after is None else min(max(retry_after, delay), self._policy.max_delay_s)
        self.open_until = now + wait
        return wait

    def succeeded(self) -> None:
        self.failures, self.open_until = 0, None

    def wait_s(self, now: float) -> float:
        """Seconds from *now* until the next attempt."""
        return 0.0 if self.open_until is None else max(0.0, self.open_until - now)


def describe(error: BaseException) -> str:
    """*error* for an operator: types and our own message, never a vendor's text, which may quote the fact."""
    ours = printable(str(error)[:500]) if isinstance(error, MemstateError) else ""
    cause = error.__cause__
    kinds = type(error).__name__ + (f" from {type(cause).__name__}" if cause is not None else "")
    return f"{kinds}: {ours}" if ours else kinds


def guarded(call: Callable[[], T], where: str) -> T:
    """Run *call* on an index or embedder. Its errors become ours, chained."""
    try:
        return call()
    except Exception as error:
        ours = classify(error, where)
        if ours is error:
            raise
        raise ours from error


def classify(error: Exception, where: str) -> MemstateError:
    """Our error for *error* of an index or embedder. Its type decides whether to retry, never its text."""
    if isinstance(error, MemstateError):
        return error
    wrapped = delivery_error(error, where, unknown=DeliveryRejected)
    wrapped.__cause__ = error
    return wrapped

"""Combine the store calls that coroutines make at the same time into one batch for the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy.exc import InterfaceError, OperationalError

from memstate_sa.errors import DeliveryRetryable

Batch: TypeAlias = Callable[[list[Any]], list[Any]]

_UNAVAILABLE = (OperationalError, InterfaceError, DeliveryRetryable)
"""Errors that would fail every call, so that retrying calls one by one is useless."""


class _StoreCall(NamedTuple):
    ops: Sequence[Any]
    outcome: asyncio.Future[list[Any]]


class Gathering:
    """Collects the calls of one iteration of an event loop, like LangGraph's own stores.

    Each call has a separate outcome. If one is refused, the others are made without it.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, list[_StoreCall]] = {}
        self._sent: set[asyncio.Task[None]] = set()

    async def call(self, batch: Batch, ops: Sequence[Any], batch_key: Hashable) -> list[Any]:
        """The results of *batch* for *ops*. A thread calls *batch* once for all calls with the same *batch_key*."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[list[Any]] = loop.create_future()
        key = (loop, batch_key)
        if key not in self._waiting:
            self._waiting[key] = []
            loop.call_soon(self._send, loop, batch, key)  # `_send` runs after all coroutines that are ready now
        self._waiting[key].append(_StoreCall(ops, outcome))
        return await outcome

    def _send(self, loop: asyncio.AbstractEventLoop, batch: Batch, key: Hashable) -> None:
        calls = [call for call in self._waiting.pop(key) if not call.outcome.done()]
        if calls:
            task = loop.create_task(self._run(batch, calls))
            self._sent.add(task)
            task.add_done_callback(self._sent.discard)

    async def _run(self, batch: Batch, calls: Sequence[_StoreCall]) -> None:
        try:
            outcomes = await asyncio.to_thread(_outcomes, batch, calls)
        except BaseException:  # the event loop is ending
            for call in calls:
                call.outcome.cancel()
            raise
        for call, result in zip(calls, outcomes, strict=True):
            if call.outcome.done():  # the caller was cancelled
                continue
            if isinstance(result, Exception):
                call.outcome.set_exception(result)
            else:
                call.outcome.set_result(result)


def _outcomes(batch: Batch, calls: Sequence[_StoreCall]) -> list[list[Any] | Exception]:
    """The results or the error of each call. A failed batch wrote nothing, so its halves can be tried again."""
    try:
        results = iter(batch([op for call in calls for op in call.ops]))
    except Exception as error:  # noqa: BLE001  # `Gathering.call` raises it
        if len(calls) == 1 or isinstance(error, _UNAVAILABLE):
            return [error] * len(calls)
        half = len(calls) // 2
        return _outcomes(batch, calls[:half]) + _outcomes(batch, calls[half:])
    return [[next(results) for _ in call.ops] for call in calls]

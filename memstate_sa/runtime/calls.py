"""Ways to make a slow call: directly, in a thread while the event loop runs, or in a thread beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Call(Protocol):
    """A way to call an index or an embedder."""

    def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...


def call_directly(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    return function(*args, **kwargs)


def call_in_thread(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call *function* in a thread, while the event loop runs other tasks. A cancelled task does not stop the call."""
    import asyncio

    from sqlalchemy.util import await_only

    return await_only(asyncio.to_thread(function, *args, **kwargs))


def call_beside(function: Callable[[], R], name: str) -> Future[R]:
    """Call *function* in a thread, while the caller does other work. The thread does not keep the process alive."""
    call: Future[R] = Future()

    def run() -> None:
        try:
            call.set_result(function())
        except BaseException as error:  # noqa: BLE001  # the caller gets it
            call.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return call

"""How to make a call that may take long: at once, in a thread while the event loop goes on, or beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Call(Protocol):
    """A way to call an index or an embedder."""

    def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...


def call_directly(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    return function(*args, **kwargs)


def call_in_thread(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call *function* in a thread, while the event loop goes on. A cancelled task does not stop the call."""
    import asyncio

    from sqlalchemy.util import await_only

    return await_only(asyncio.to_thread(function, *args, **kwargs))


class CallBeside(Generic[R]):
    """A call in a thread of its own, while the caller does other work. The thread does not keep a process alive."""

    def __init__(self, function: Callable[[], R], name: str) -> None:
        self._function = function
        self._result: R | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # noqa: BLE001  # the caller gets it
            self._error = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> R:
        """Wait for the call. Its error is raised here."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

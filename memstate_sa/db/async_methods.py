"""`AsyncMethod`: a method for an AsyncSession, made from the method for a Session."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial, wraps
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from memstate_sa.db.sessions import AwaitedSession, SyncSession, in_scope
from memstate_sa.errors import MemstateError

P = ParamSpec("P")
R = TypeVar("R")


class AsyncMethod(Generic[P, R]):
    """A method that awaits *method* in `AsyncSession.run_sync`. It takes the same arguments."""

    def __init__(self, method: Callable[Concatenate[Any, SyncSession, P], R]) -> None:
        self.__doc__ = f"`{method.__name__}` for an AsyncSession.\n\n{method.__doc__}"

        @wraps(method)
        async def awaited(instance: Any, session: AwaitedSession, /, *args: P.args, **kwargs: P.kwargs) -> R:
            run: Callable[..., R] = partial(method, instance)
            result: R = await awaited_session(session, method.__name__).run_sync(run, *args, **kwargs)
            return result

        awaited.__name__, awaited.__doc__ = f"a{method.__name__}", self.__doc__
        awaited.__qualname__ = f"{method.__qualname__.removesuffix(method.__name__)}{awaited.__name__}"
        self._awaited = awaited

    @overload
    def __get__(
        self, instance: None, owner: type
    ) -> Callable[Concatenate[Any, AwaitedSession, P], Coroutine[Any, Any, R]]: ...

    @overload
    def __get__(
        self, instance: object, owner: type
    ) -> Callable[Concatenate[AwaitedSession, P], Coroutine[Any, Any, R]]: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        return self._awaited if instance is None else MethodType(self._awaited, instance)


def awaited_session(session: Any, method: str) -> Any:
    """The AsyncSession behind *session*. Without one, raises MemstateError with the name of the sync *method*."""
    current = in_scope(session)
    if not hasattr(current, "run_sync"):
        kind = type(current).__name__
        raise MemstateError(f"Cannot use a {kind}: this call is for an AsyncSession. Use `memory.{method}(…)`.")
    return current

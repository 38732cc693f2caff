"""The errors of memstate_sa. The docstring of each is its default message."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from memstate_sa.runtime.printable import printable


class MemstateError(Exception):
    """memstate_sa could not do this."""

    def __init__(self, message: str | None = None) -> None:
        # A message may quote a key or a label, and a terminal may print it.
        super().__init__(printable(message or (type(self).__doc__ or "").strip(), keep="\n\t"))


class ValidationFailed(MemstateError):
    """The fact does not satisfy its schema. Nothing was written.

    ``errors`` is Pydantic's own error list, without the input values. A program can hand it back to a language model.
    """

    def __init__(self, message: str | None = None, *, errors: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.errors = list(errors)


class ConflictError(MemstateError):
    """Another change is in the way. Nothing was written.

    ``changes`` lists the `Change` objects that are in the way, if any.
    """

    def __init__(self, message: str | None = None, *, changes: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.changes = list(changes)


class NotFound(MemstateError):
    """No such fact."""


class HistoryMissing(MemstateError):
    """The log does not reach back that far."""


class UntrackedWrite(MemstateError):
    """A write to a tracked table would bypass the log and the index."""


class IndexMismatch(MemstateError):
    """The index was built with another embedder, dimension or distance."""


class DeliveryError(MemstateError):
    """The index could not be brought up to date."""


class DeliveryRetryable(DeliveryError):
    """The index or the embedder is unavailable. The same call may succeed later.

    ``retry_after_s`` is the delay in seconds that the provider asked for, or None. ``may_land`` is True when no answer
    came, so the call may still take effect. It is False when the provider refused the call, or was not reached.
    """

    def __init__(
        self, message: str | None = None, *, retry_after_s: float | None = None, may_land: bool = True
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.may_land = may_land


class IndexBroken(DeliveryRetryable):
    """The files of the index are damaged. `Memory.verify` with ``repair=True`` creates the index again and fills it."""


class DeliveryRejected(DeliveryError):
    """The index or the embedder refused these points, and would refuse them again."""


class MissingExtra(MemstateError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Run: pip install 'memstate-sa[{extra}]'")
        self.extra = extra


def require_module(module: str, extra: str, package: str | None = None) -> Any:
    """Import *module* and return it. Raises MissingExtra, which names *package*, when it is not installed.

    *package* is by default the first part of the module's name.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(package or module.partition(".")[0], extra) from error

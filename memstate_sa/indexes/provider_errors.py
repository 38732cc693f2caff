"""Decide from a vendor's error whether a retry may help: by its type and status, never by its text. Pure."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from memstate_sa.errors import DeliveryError, DeliveryRejected, DeliveryRetryable
from memstate_sa.indexes.provider_messages import phrase, words

_REFUSED_CALLER = frozenset({401, 403, 429})
"""Statuses of a refusal that does not depend on the content of the request, so the server's words do not quote it."""
# Refused credentials (401, 403) are retryable: the operator can fix them, and the points must not become dead.
_RETRYABLE_STATUS = frozenset({401, 403, 408, 409, 425, 429})


def retryable_status(status: int) -> bool:
    """Whether the same request may succeed later, after an answer with this HTTP status."""
    return status in _RETRYABLE_STATUS or status >= 500


def delivery_error(
    error: BaseException, message: str, *, unknown: type[DeliveryError], sent: Collection[str] | None = None
) -> DeliveryError:
    """The error to raise ``from`` *error*. Its class is *unknown* if no status and no type in the chain decides.

    Clients wrap errors. Chroma raises a plain Exception while handling httpx's error, and SDKs raise their own error
    from a socket's. So every error in the chain is examined, outermost first. An HTTP status is stronger evidence than
    a connection error.

    The message has the status, and the vendor's own words without quotations of the texts in *sent*. If *sent* is None,
    the texts of the request are unknown. Then the message has these words only if the server was not reached, or
    refused the caller. Otherwise only the chained error has them.
    """
    chain = list(_chain(error))
    text = f"{message}: {type(error).__name__}"
    is_unavailable = any(isinstance(link, _unavailable()) for link in chain)
    for link in chain:
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", getattr(link, "status_code", None))
        if isinstance(status, int):
            text += f": {phrase(status)}{_reason(chain, () if sent is None and status in _REFUSED_CALLER else sent)}"
            if retryable_status(status):
                retry_after_s = _retry_after_s(getattr(response, "headers", None))
                # After a 5xx from a gateway, the server behind it may still carry out the request.
                return DeliveryRetryable(text, retry_after_s=retry_after_s, may_land=status >= 500)
            return DeliveryRejected(text)
    text += _reason(chain, () if sent is None and is_unavailable else sent)
    if is_unavailable:
        return DeliveryRetryable(text, may_land=not any(isinstance(link, _unreached()) for link in chain))
    return unknown(text)


def _reason(chain: list[BaseException], sent: Collection[str] | None) -> str:
    vendor_words = "" if sent is None else words(chain, sent)
    return f": {vendor_words}" if vendor_words else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(20):  # a chain can be circular
        if link is None:
            return
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _unavailable() -> tuple[type[BaseException], ...]:
    # A JSONDecodeError means that a gateway sent an error page instead of an answer. httpx errors are not OSErrors.
    # Only imported clients matter, because others cannot have raised the error.
    clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, json.JSONDecodeError, *(client.TransportError for client in clients))


def _unreached() -> tuple[type[BaseException], ...]:
    clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (ConnectionRefusedError, *(kind for client in clients for kind in (client.ConnectError, client.PoolTimeout)))


def _retry_after_s(headers: Any) -> float | None:
    """The Retry-After header as seconds from now. It holds seconds or an HTTP date."""
    value = headers.get("retry-after") if headers is not None else None
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None

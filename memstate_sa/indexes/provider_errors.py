"""The verdict on a failure of a vendor's client: retry or not, by type and status, never by text. Pure."""

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

# Refused credentials are the operator's to mend, not a fault of the points: they must not end as dead letters.
_RETRYABLE_STATUS = frozenset({401, 403, 408, 409, 425, 429})


def retryable_status(status: int) -> bool:
    """Whether a request answered with this HTTP status may succeed later, unchanged."""
    return status in _RETRYABLE_STATUS or status >= 500


def delivery_error(
    error: BaseException, message: str, *, unknown: type[DeliveryError], sent: Collection[str] | None = None
) -> DeliveryError:
    """The error to raise ``from`` *error*; *unknown* where neither a status nor a type along its chain tells.

    Clients wrap: Chroma raises a bare Exception while handling httpx's error, SDKs raise their own from a socket's. So
    the whole chain is asked, outermost first; an HTTP status outranks a connection error.

    The message has the status. It has the vendor's own words where it is known what was *sent*: they may quote that,
    and are shown without it. Otherwise they are left to the chained error.
    """
    chain = list(_chain(error))
    text = f"{message}: {type(error).__name__}"
    said = "" if sent is None else words(chain, sent)
    said = f": {said}" if said else ""
    for link in chain:
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", getattr(link, "status_code", None))
        if isinstance(status, int):
            text += f": {phrase(status)}{said}"
            if retryable_status(status):
                retry_after_s = _retry_after_s(getattr(response, "headers", None))
                # A gateway's 5xx says nothing about what the server behind it does.
                return DeliveryRetryable(text, retry_after_s=retry_after_s, may_land=status >= 500)
            return DeliveryRejected(text)
    text += said
    if any(isinstance(link, _unavailable()) for link in chain):
        return DeliveryRetryable(text, may_land=not any(isinstance(link, _unreached()) for link in chain))
    return unknown(text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(20):  # a chain can be made circular
        if link is None:
            return
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _unavailable() -> tuple[type[BaseException], ...]:
    # JSONDecodeError: a gateway's error page where an answer was due. httpx errors are no OSErrors; a client that was
    # never imported raised nothing.
    clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, json.JSONDecodeError, *(client.TransportError for client in clients))


def _unreached() -> tuple[type[BaseException], ...]:
    clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (ConnectionRefusedError, *(kind for client in clients for kind in (client.ConnectError, client.PoolTimeout)))


def _retry_after_s(headers: Any) -> float | None:
    """The Retry-After header, seconds or an HTTP date, as seconds from now."""
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

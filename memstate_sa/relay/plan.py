"""Decisions about a page of dirty keys, and about failures. This module is pure: it takes and returns values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

from memstate_sa.db.codec import FactKey
from memstate_sa.errors import MemstateError
from memstate_sa.relay.retry import RetryPolicy, describe
from memstate_sa.tracking.projection import Projection


class Delivered(NamedTuple):
    """The last delivery of a key to an index, from the ledger."""

    fingerprint: str | None
    text_fingerprint: str | None
    deleted: bool


class PlannedWrite(NamedTuple):
    """A key to write to an index, with its projection, or None to delete its point.

    ``same_text``: only metadata changed, so the index should have the vector of this text. The point has that vector if
    its fingerprint is ``ledger_fingerprint`` or the fingerprint of the projection.
    """

    fact: FactKey
    projection: Projection | None
    same_text: bool = False
    ledger_fingerprint: str | None = None


def plan(
    facts: Iterable[FactKey],
    truth: Mapping[FactKey, Projection],
    ledger: Mapping[FactKey, Delivered],
    doubted: Collection[FactKey] = (),
) -> list[PlannedWrite]:
    """The writes that make an index agree with *truth* for these *facts*.

    Do not trust the ledger for *doubted* keys. An earlier owner or an earlier attempt may have written them without
    recording it. If such a row has since changed back, the ledger would make it look delivered.
    """
    writes = []
    for fact in facts:
        projection = truth.get(fact)
        if projection is not None and projection.fingerprint is None:
            projection = None
        is_doubted = fact in doubted
        delivered = None if is_doubted else ledger.get(fact)
        if projection is None:
            if is_doubted or (delivered is not None and not delivered.deleted):
                writes.append(PlannedWrite(fact, None))
        elif delivered is None or delivered.deleted:
            writes.append(PlannedWrite(fact, projection))
        elif delivered.fingerprint != projection.fingerprint:
            same_text = delivered.text_fingerprint == projection.text_fingerprint
            writes.append(PlannedWrite(fact, projection, same_text, delivered.fingerprint if same_text else None))
    return writes


class ParkedState(StrEnum):
    """The reason why a key is parked. The values are stored.

    - ``AGAIN``: it must be delivered once more.
    - ``PARKED``: an index refused it, and it is tried again.
    - ``DEAD``: an index refused it too often.
    """

    AGAIN = "again"
    PARKED = "parked"
    DEAD = "dead"


class Parked(NamedTuple):
    """A key that is parked, because an index refused it, or because it must be delivered once more.

    ``deliver_again``: it must be delivered once more after that, because an unanswered call may still land.
    ``expected_version``: the version of the parked row that this one replaces. None replaces any version.
    """

    attempts: int
    delay_s: float
    state: ParkedState
    error: str
    deliver_again: bool = False
    expected_version: str | None = None


class ParkedRow(NamedTuple):
    """A parked key in the database. It gets a new ``version`` whenever the key is parked again."""

    attempts: int
    next_at: datetime
    state: ParkedState
    error: str
    version: str
    deliver_again: bool


def merge(old: ParkedRow | None, new: Parked, now: datetime, version: str) -> ParkedRow | None:
    """The row of a key that was parked as *old* and is parked as *new* at *now*. None means that *old* stays."""
    next_at = now + timedelta(seconds=new.delay_s)
    row = ParkedRow(new.attempts, next_at, new.state, new.error, version, new.deliver_again)
    if old is None:
        return row
    if new.expected_version not in (None, old.version):
        return None
    if old.state == ParkedState.AGAIN and old.next_at > next_at and not new.deliver_again:
        # Keep the later time, because a call may land until then.
        return old._replace(attempts=new.attempts, version=version)
    # A refusal, or a delivery that is due now, does not replace the later delivery that is still required.
    still_again = old.deliver_again and (new.state != ParkedState.AGAIN or next_at <= now)
    return row._replace(deliver_again=new.deliver_again or still_again)


def park(error: MemstateError, attempts: int, policy: RetryPolicy, jitter: Callable[[], float]) -> Parked:
    """The parked row of a key that was rejected for the *attempts*-th time."""
    state = ParkedState.DEAD if attempts >= policy.max_attempts else ParkedState.PARKED
    return Parked(attempts, policy.delay(attempts, jitter), state, describe(error))

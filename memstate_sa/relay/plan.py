"""Decisions about a page of dirty keys, and about a failure. Pure: values and a clock in, decisions out."""

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
    """The last delivery of a key to an index, as the ledger has it."""

    fingerprint: str | None
    text_fingerprint: str | None
    deleted: bool


class PlannedWrite(NamedTuple):
    """One key to be written to an index: its projection, or None to delete it.

    ``same_text``: only metadata changed, so the index holds the vector of this text already. The vector is there if the
    point's fingerprint is ``ledger_fingerprint``, or the projection's.
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

    The ledger is not believed about *doubted* keys. An earlier owner, or an earlier attempt, may have written to the
    index without a record of it. A row that has since changed back would look delivered.
    """
    writes = []
    for fact in facts:
        projection = truth.get(fact)
        if projection is not None and projection.fingerprint is None:
            projection = None
        is_doubted = fact in doubted
        known = None if is_doubted else ledger.get(fact)
        if projection is None:
            if is_doubted or (known is not None and not known.deleted):
                writes.append(PlannedWrite(fact, None))
        elif known is None or known.deleted:
            writes.append(PlannedWrite(fact, projection))
        elif known.fingerprint != projection.fingerprint:
            same_text = known.text_fingerprint == projection.text_fingerprint
            writes.append(PlannedWrite(fact, projection, same_text, known.fingerprint if same_text else None))
    return writes


class ParkedState(StrEnum):
    """Why a key is set aside. The values are stored.

    ``AGAIN``: it is to be delivered once more. ``PARKED``: an index refused it, and it is tried again. ``DEAD``: it was
    refused too often.
    """

    AGAIN = "again"
    PARKED = "parked"
    DEAD = "dead"


class Parked(NamedTuple):
    """A key set aside: refused, so that the others go on, or to be delivered once more for some other reason.

    ``deliver_again``: it has to be delivered once more after that, as a call may yet land. ``expected_version``: the
    version of the parked row that this one replaces; None replaces any.
    """

    attempts: int
    delay_s: float
    state: ParkedState
    error: str
    deliver_again: bool = False
    expected_version: str | None = None


class ParkedRow(NamedTuple):
    """A parked key as it is stored. ``version`` is another one whenever the key is parked again."""

    attempts: int
    next_at: datetime
    state: ParkedState
    error: str
    version: str
    deliver_again: bool


def merge(old: ParkedRow | None, new: Parked, now: datetime, version: str) -> ParkedRow | None:
    """The row of a key that is parked as *new* at *now*, and was parked as *old*; None when *old* stays as it is."""
    next_at = now + timedelta(seconds=new.delay_s)
    row = ParkedRow(new.attempts, next_at, new.state, new.error, version, new.deliver_again)
    if old is None:
        return row
    if new.expected_version not in (None, old.version):
        return None
    if old.state == ParkedState.AGAIN and old.next_at > next_at and not new.deliver_again:
        # A call may land until then, whatever else is the matter with the key.
        return old._replace(attempts=new.attempts, version=version)
    # A key that has to be delivered again still has to be when it is refused, or is due at once.
    still_again = old.deliver_again and (new.state != ParkedState.AGAIN or next_at <= now)
    return row._replace(deliver_again=new.deliver_again or still_again)


def park(error: MemstateError, attempts: int, policy: RetryPolicy, jitter: Callable[[], float]) -> Parked:
    """The parked row of a key that was rejected for the *attempts*-th time."""
    state = ParkedState.DEAD if attempts >= policy.max_attempts else ParkedState.PARKED
    return Parked(attempts, policy.delay(attempts, jitter), state, describe(error))

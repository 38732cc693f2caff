"""What to do about a page of dirty keys, and about a failure. Pure: values and a clock in, decisions out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from memstate_sa.db.codec import FactKey
from memstate_sa.errors import MemstateError
from memstate_sa.relay.retry import RetryPolicy, describe
from memstate_sa.tracking.projection import Projection


class Delivered(NamedTuple):
    """What the ledger says that an index was last given for a key."""

    fingerprint: str | None
    text_fingerprint: str | None
    deleted: bool


class Write(NamedTuple):
    """One key to be written to an index: its projection, or None to delete it.

    ``same_text``: the index already holds the vector of this text, only metadata changed; it is there if the point's
    fingerprint is ``held``, or the projection's.
    """

    fact: FactKey
    projection: Projection | None
    same_text: bool = False
    held: str | None = None


def plan(
    facts: Iterable[FactKey],
    truth: Mapping[FactKey, Projection],
    ledger: Mapping[FactKey, Delivered],
    doubted: Collection[FactKey] = (),
) -> list[Write]:
    """The writes that make an index agree with *truth* for these *facts*.

    The ledger is not believed about *doubted* ones: an earlier holder, or an earlier attempt, may have written to the
    index without having been able to say so, and a row that has since changed back would look delivered.
    """
    writes = []
    for fact in facts:
        projection = truth.get(fact)
        if projection is not None and projection.fingerprint is None:
            projection = None
        doubt = fact in doubted
        known = None if doubt else ledger.get(fact)
        if projection is None:
            if doubt or (known is not None and not known.deleted):
                writes.append(Write(fact, None))
        elif known is None or known.deleted or known.fingerprint != projection.fingerprint:
            same_text = (
                known is not None and not known.deleted and (known.text_fingerprint == projection.text_fingerprint)
            )
            writes.append(
                Write(fact, projection, same_text, known.fingerprint if known is not None and same_text else None)
            )
    return writes


AGAIN, PARKED, DEAD = "again", "parked", "dead"


class Parked(NamedTuple):
    """A key set aside: refused, so that the others go on, or to be delivered once more for some other reason."""

    attempts: int
    delay_s: float
    state: str
    error: str
    repeat: bool = False  # it has to be delivered once more after that: a call may yet land
    instead_of: str | None = None  # the mark of the parking that it replaces; None: of any


def park(error: MemstateError, attempts: int, policy: RetryPolicy, jitter: Callable[[], float]) -> Parked:
    """What becomes of a key that was rejected for the *attempts*-th time."""
    state = DEAD if attempts >= policy.max_attempts else PARKED
    return Parked(attempts, policy.delay(attempts, jitter), state, describe(error))

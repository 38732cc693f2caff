"""A simulated database: an application's transactions and rows, and the relay's own tables, as plain dicts.

Each transaction request of the protocol is executed at once, with its meaning in `claims`, `ledger` and `outbox` on
PostgreSQL. The SQLite flavour has one writer at a time, one slot, and positions that are ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from memstate_sa.db.codec import FactKey
from memstate_sa.errors import DeliveryRejected, MemstateError
from memstate_sa.log.positions import Page, Position, Snapshot, slot_of
from memstate_sa.relay.plan import Delivered, Parked, ParkedState
from memstate_sa.relay.requests import (
    Acknowledge,
    Claim,
    Claimed,
    DatabaseState,
    HeldSlot,
    KeyPage,
    ListFacts,
    Look,
    PageState,
    ParkedKey,
    Read,
    ReadDue,
    ReadPage,
    ReadRefill,
    Redirty,
    Refill,
    Release,
    Renew,
    Request,
)
from memstate_sa.tracking.projection import Projection

SCAN = ""
UNREADABLE, REFUSED_BY_EMBEDDER, REFUSED_BY_INDEX = "unreadable", "unembeddable", "unstorable"
"""Texts that the embedder or the index always refuses."""


class Outage(Exception):
    """The database was not reached, or its answer was lost."""


class Violation(AssertionError):
    """The protocol broke one of its promises."""


class Row(NamedTuple):
    text: str | None
    meta: int

    @property
    def fingerprint(self) -> str | None:
        return None if self.text is None else f"{self.text}|{self.meta}"


@cache
def projection(key: str, row: Row) -> Projection:
    if row.text is None:
        return Projection(key, None, {}, None, None)
    return Projection(key, row.text, {"meta": row.meta}, row.fingerprint, f"text:{row.text}")


class Entry(NamedTuple):
    id: int
    fact: FactKey
    intent: bool


@dataclass(eq=False, slots=True)
class Transaction:
    """A transaction of the application. It has an xid once it has written, and locks its written rows."""

    name: int
    xid: int | None = None
    rows: dict[FactKey, Row | None] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    strict: bool = False


@dataclass(eq=False, slots=True)
class Cursor:
    at: Position
    owner: str | None = None
    epoch: int = 0


class Recorded(NamedTuple):
    epoch: int
    delivered: Delivered


class Waiting(NamedTuple):
    attempts: int
    next_at: float
    state: str
    error: str
    version: str
    deliver_again: bool


class Me(NamedTuple):
    """The owner that sends a request."""

    owner: str
    index: str
    incarnation: int
    entities: tuple[str, ...]
    in_process: bool


@dataclass(eq=False, slots=True)
class State:
    """The database's knowledge of one lifetime of one index."""

    cursors: dict[int, Cursor]
    paused: bool = False
    marked: bool = False
    leases: dict[str, float] = field(default_factory=dict)  # the end of each owner's lease
    refill: dict[tuple[str, int], tuple[str | None, bool]] = field(default_factory=dict)
    ledger: dict[FactKey, Recorded] = field(default_factory=dict)
    parked: dict[FactKey, Waiting] = field(default_factory=dict)


class Database:
    """The database. ``clock`` is the server's clock. ``ended`` are owners whose process has certainly ended."""

    def __init__(self, clock: Callable[[], float], *, slots: int, sqlite: bool, lease_s: float) -> None:
        self.sqlite = sqlite
        self.slots = slots
        self.facts: dict[FactKey, Row] = {}
        self.outbox: dict[int, list[Entry]] = {}
        self.running: dict[int, Transaction] = {}
        self.open: list[Transaction] = []
        self.states: dict[tuple[str, int], State] = {}
        self.ended: set[str] = set()
        self.may_go_back = False  # whether a position may: its record had no answer
        self.steps = 0  # a logical clock: the number of the relay's transactions
        self.granted: dict[
            tuple[Any, ...], tuple[str, int]
        ] = {}  # owner and step, by (index, incarnation, slot, epoch)
        self._clock = clock
        self._lease_s = lease_s
        self._next_xid = 10
        self._newest_ended = 9
        self._next_id = 1
        self._versions = 0
        self._begun = 0
        self._slots: dict[FactKey, int] = {}
        self._handlers: dict[type[Request[Any]], Callable[[Me, Any], Any]] = {
            Claim: self.claim,
            Renew: self.renew,
            Look: self.look,
            Release: self.release,
            ReadPage: self.read_page,
            ReadDue: self.read_due,
            ReadRefill: self.read_refill,
            ListFacts: self.list_facts,
            Read: self.read,
            Acknowledge: self.acknowledge,
            Redirty: self.redirty,
        }

    writing = frozenset({Claim, Renew, Release, Acknowledge, Redirty})

    def is_locked_for(self, request: Request[Any]) -> bool:
        """Whether another writer blocks *request*. SQLite has one writer."""
        return self.sqlite and type(request) in self.writing and any(tx.xid is not None for tx in self.open)

    def execute(self, me: Me, request: Request[Any]) -> Any:
        self.steps += 1
        reply = self._handlers[type(request)](me, request)
        if type(request) in self.writing and not self.sqlite:
            self._newest_ended = max(self._newest_ended, self._next_xid)
            self._next_xid += 1
        return reply

    def slot(self, fact: FactKey) -> int:
        slot = self._slots.get(fact)
        if slot is None:
            slot = self._slots[fact] = slot_of(*fact) % self.slots
        return slot

    def state(self, me: Me) -> State:
        """The state of this lifetime of the index. The state of an index that was emptied long ago is forgotten."""
        return self.states.get((me.index, me.incarnation)) or State({})

    # -- the application ---------------------------------------------------------------------------------------------

    def begin(self) -> Transaction:
        self._begun += 1
        tx = Transaction(self._begun)
        self.open.append(tx)
        return tx

    def may_write(self, tx: Transaction, fact: FactKey) -> bool:
        if self.sqlite:
            return all(other is tx or other.xid is None for other in self.open)
        return all(other is tx or fact not in other.rows for other in self.open)

    def write(self, tx: Transaction, fact: FactKey, row: Row | None) -> None:
        self._give_xid(tx)
        tx.rows[fact] = row
        tx.entries.append(self._entry(fact))

    def touch(self, tx: Transaction, fact: FactKey) -> None:
        self._give_xid(tx)
        tx.entries.append(self._entry(fact))

    def intend(self, tx: Transaction) -> None:
        """Commit an intent on another connection, under the xid of *tx*, which goes on."""
        assert tx.xid is not None
        tx.strict = True
        self.outbox.setdefault(tx.xid, []).extend(self._entry(fact, intent=True) for fact in tx.rows)

    def commit(self, tx: Transaction) -> None:
        for fact, row in tx.rows.items():
            if row is None:
                self.facts.pop(fact, None)
            else:
                self.facts[fact] = row
        if tx.xid is not None and tx.entries:
            entries = self.outbox.setdefault(tx.xid, [])
            entries.extend(tx.entries)
            entries.sort()
        self._end(tx)

    def rollback(self, tx: Transaction) -> None:
        self._end(tx)

    def _give_xid(self, tx: Transaction) -> None:
        if tx.xid is None:
            tx.xid = 0 if self.sqlite else self._next_xid
            self._next_xid += 1
            self.running[tx.xid] = tx

    def _entry(self, fact: FactKey, *, intent: bool = False) -> Entry:
        self._next_id += 1
        return Entry(self._next_id, fact, intent)

    def _end(self, tx: Transaction) -> None:
        self.open.remove(tx)
        if tx.xid is not None:
            del self.running[tx.xid]
            self._newest_ended = max(self._newest_ended, tx.xid)

    def forget_delivered(self) -> None:
        """Delete old entries, as the relay does from time to time."""
        cursors = [cursor for state in self.states.values() for cursor in state.cursors.values()]
        if not cursors:
            return
        floor = min(cursor.at.floor for cursor in cursors)
        filling = {
            entity for state in self.states.values() for (entity, _), (_, done) in state.refill.items() if not done
        }
        if SCAN in filling:
            return
        for xid, entries in self.outbox.items():
            entries[:] = [e for e in entries if (xid, e.id) > floor or e.fact[0] in filling]

    # -- the lease ---------------------------------------------------------------------------------------------------

    def present(self) -> Position:
        if self.sqlite:
            return Position(Snapshot(0), 0, max((entry.id for entry in self.outbox.get(0, ())), default=0))
        xmax = self._newest_ended + 1
        return Position(Snapshot(xmax, tuple(sorted(xid for xid in self.running if xid < xmax))))

    def claim(self, me: Me, request: Claim) -> Claimed:
        now = self._clock()
        state = self._registered(me, now)
        present = self.present()
        state.leases[me.owner] = now + self._lease_s
        for owner, lease_until in list(state.leases.items()):
            if lease_until <= now or (me.in_process and owner in self.ended):
                del state.leases[owner]
        quota = -(-self.slots // len(state.leases))
        cursors = state.cursors
        kept = {
            slot: HeldSlot(cursor.epoch, cursor.at, fresh=False, settle=False)
            for slot, cursor in cursors.items()
            if cursor.owner == me.owner and request.epochs.get(slot) == cursor.epoch
        }
        strays = [slot for slot, cursor in cursors.items() if cursor.owner == me.owner and slot not in kept]
        free = [slot for slot, cursor in cursors.items() if cursor.owner not in state.leases]
        free.sort(key=lambda slot: cursors[slot].at.floor)
        taken = strays + free[: max(0, quota - len(kept) - len(strays))]
        fresh = {}
        if taken:
            epoch = max(int(now * 1000), *(cursors[slot].epoch + 1 for slot in taken))
            for slot in taken:
                cursor = cursors[slot]
                if cursor.owner is not None and any(
                    not done for (_, of), (_, done) in state.refill.items() if of == slot
                ):
                    # Its last owner may have written rows that no refill lists any more.
                    state.refill[SCAN, slot] = (None, False)
                fresh[slot] = HeldSlot(epoch, cursor.at, fresh=True, settle=cursor.owner is not None)
                cursor.owner, cursor.epoch = me.owner, epoch
                self.granted[me.index, me.incarnation, slot, epoch] = (me.owner, self.steps)
        return Claimed({**kept, **fresh}, present, len(state.leases), quota, state.marked)

    def _registered(self, me: Me, now: float) -> State:
        state = self.states.get((me.index, me.incarnation))
        if state is None:
            paused = any(other.paused for (name, _), other in self.states.items() if name == me.index)
            for (name, incarnation), other in list(self.states.items()):
                if name == me.index and all(until <= now for until in other.leases.values()):
                    del self.states[name, incarnation]
            present = self.present()
            state = State({slot: Cursor(present) for slot in range(self.slots)}, paused)
            self.states[me.index, me.incarnation] = state
        known = {entity for entity, _ in state.refill}
        missing = {SCAN, *me.entities} - known
        # Earlier scans skipped the points of entities that were unknown then.
        for entity in {*missing, SCAN} if missing else ():
            state.refill.update({(entity, slot): (None, False) for slot in range(self.slots)})
        if len({SCAN, *known, *me.entities}) > 2 and not state.marked:
            state.marked = True
            # Do not trust an owner that is writing points without marks: it loses its slots.
            for cursor in state.cursors.values():
                cursor.epoch += 1
            for entity, slot in state.refill:
                if entity != SCAN:
                    state.refill[entity, slot] = (None, False)
            for fact, (epoch, given) in state.ledger.items():
                if not given.deleted:
                    state.ledger[fact] = Recorded(epoch, given._replace(fingerprint=None))
        return state

    def renew(self, me: Me, request: Renew) -> int:
        state = self.state(me)
        if me.owner not in state.leases:
            return 0
        state.leases[me.owner] = self._clock() + self._lease_s
        return sum(cursor.owner == me.owner for cursor in state.cursors.values())

    def look(self, me: Me, request: Look) -> DatabaseState:
        state, now = self.states.get((me.index, me.incarnation)), self._clock()
        if state is None:
            return DatabaseState(self.present(), 0, 0, free=False, due=False, paused=False)
        owners = [cursor.owner for cursor in state.cursors.values()]
        return DatabaseState(
            self.present(),
            owners=sum(until > now for until in state.leases.values()),
            own_slots=owners.count(me.owner),
            free=any(owner not in state.leases for owner in owners),
            due=bool(self._due(me, state, request.slots)),
            paused=state.paused,
        )

    def release(self, me: Me, request: Release) -> None:
        state = self.state(me)
        held = self._still_held(me, state, request.epochs)
        self._move(state, {slot: at for slot, at in request.positions.items() if slot in held})
        self._park(state, request.unsure)
        for slot in held.difference(request.unsettled):
            state.cursors[slot].owner = None
        if request.leave:
            state.leases.pop(me.owner, None)

    # -- sources of dirty keys -----------------------------------------------------------------------------------------

    def read_page(self, me: Me, request: ReadPage) -> Page:
        rows = self.entries(request.position, request.present, request.slots, request.limit)
        last = (rows[-1][0], rows[-1][1].id) if len(rows) == request.limit else None
        return Page([entry.fact for _, entry in rows], last, frozenset(entry.fact for _, entry in rows if entry.intent))

    def entries(
        self, at: Position, present: Position, slots: Collection[int], limit: int = 1 << 62
    ) -> list[tuple[int, Entry]]:
        """The entries that *present* has and *at* does not, oldest first: the two walks of `outbox.undelivered`."""
        rows: list[tuple[int, Entry]] = []
        if self.sqlite:
            rows = [(0, entry) for entry in self.outbox.get(0, ()) if at.id < entry.id <= present.id]
            return rows[:limit]
        now, xmax = present.snapshot, at.snapshot.xmax
        late = {xid for xid in at.snapshot.running if now.sees(xid)}
        for xid in sorted(self.outbox):
            if xid < xmax:
                if xid not in late:
                    continue
                begin = at.id if xid == at.xid else 0
            else:
                if not now.sees(xid):
                    continue
                begin = at.after(xmax) if xid == xmax else 0
            rows += [(xid, entry) for entry in self.outbox[xid] if entry.id > begin and self.slot(entry.fact) in slots]
            if len(rows) >= limit:
                break
        return rows[:limit]

    def _due(self, me: Me, state: State, slots: Collection[int]) -> list[FactKey]:
        now = self._clock()
        return [
            fact
            for fact, waiting in state.parked.items()
            if waiting.state in (ParkedState.AGAIN, ParkedState.PARKED)
            and waiting.next_at <= now
            and fact[0] in me.entities
            and (self.sqlite or self.slot(fact) in slots)
        ]

    def read_due(self, me: Me, request: ReadDue) -> list[FactKey]:
        state = self.state(me)
        return sorted(self._due(me, state, request.slots), key=lambda fact: (state.parked[fact].next_at, fact))[
            : request.limit
        ]

    def read_refill(self, me: Me, request: ReadRefill) -> Refill | None:
        undone = [
            (entity, position is not None, position or "", slot)
            for (entity, slot), (position, done) in self.state(me).refill.items()
            if not done and slot in request.slots and (entity == SCAN or entity in me.entities)
        ]
        if not undone:
            return None
        first = min(undone)
        return Refill(
            first[0], first[2] if first[1] else None, frozenset(row[3] for row in undone if row[:3] == first[:3])
        )

    def list_facts(self, me: Me, request: ListFacts) -> KeyPage:
        keys = sorted(key for entity, key in self.facts if entity == request.entity)
        keys = [key for key in keys if request.after is None or key > request.after][: request.limit]
        return KeyPage({(request.entity, key): None for key in keys}, keys[-1] if len(keys) == request.limit else None)

    # -- one page ------------------------------------------------------------------------------------------------------

    def read(self, me: Me, request: Read) -> PageState:
        state, now = self.state(me), self._clock()
        truth: dict[FactKey, Projection] = {}
        failed: dict[FactKey, MemstateError] = {}
        for fact in request.facts:
            row = self.facts.get(fact)
            if row is not None and row.text == UNREADABLE:
                failed[fact] = DeliveryRejected("the text callable: refused")
            elif row is not None:
                truth[fact] = projection(fact[1], row)
        ledger = {fact: state.ledger[fact].delivered for fact in request.facts if fact in state.ledger}
        stuck = {
            fact: ParkedKey(waiting.attempts, waiting.version, waiting.deliver_again)
            for fact in request.facts
            if (waiting := state.parked.get(fact)) is not None
            and (waiting.state != ParkedState.AGAIN or waiting.next_at <= now)
        }
        return PageState(truth, failed, ledger, stuck)

    def acknowledge(self, me: Me, request: Acknowledge) -> frozenset[int]:
        state = self.state(me)
        held = self._still_held(me, state, request.epochs)
        for fact, delivered in request.written.items():
            slot = self.slot(fact)
            if slot in held:
                self._record(state, fact, request.epochs[slot], delivered)
        self._resolve(state, {fact: version for fact, version in request.resolved.items() if self.slot(fact) in held})
        self._park(state, {fact: given for fact, given in request.parking.items() if self.slot(fact) in held})
        known = {entity for entity, _ in state.refill}
        passed_by = Parked(0, 0.0, ParkedState.AGAIN, "passed by")
        self._park(state, {fact: passed_by for fact in request.foreign if fact[0] in known})
        self._move(state, {slot: at for slot, at in request.positions.items() if slot in held})
        if request.refill is not None:
            step = request.refill
            for slot in step.slots & held:
                state.refill[step.entity, slot] = (step.position, step.done)
        return frozenset(request.epochs.keys() - held)

    def redirty(self, me: Me, request: Redirty) -> None:
        self._park(self.state(me), request.facts)

    def repair(self, state: State, fact: FactKey) -> None:
        """Repair a key that drifted, like `verify`."""
        self._park(state, {fact: Parked(0, 0.0, ParkedState.AGAIN, "drift")})

    def _still_held(self, me: Me, state: State, epochs: Mapping[int, int]) -> set[int]:
        mine = {slot: cursor.epoch for slot, cursor in state.cursors.items() if cursor.owner == me.owner}
        return {slot for slot, epoch in epochs.items() if mine.get(slot) == epoch}

    def _record(self, state: State, fact: FactKey, epoch: int, delivered: Delivered) -> None:
        known = state.ledger.get(fact)
        if known is None or known.epoch <= epoch:
            state.ledger[fact] = Recorded(epoch, delivered)

    def _resolve(self, state: State, resolved: Mapping[FactKey, str]) -> None:
        for fact, version in resolved.items():
            if fact in state.parked and state.parked[fact].version == version:
                del state.parked[fact]

    def _park(self, state: State, parking: Mapping[FactKey, Parked]) -> None:
        self._versions += 1
        for fact, given in parking.items():
            next_at = self._clock() + given.delay_s
            old = state.parked.get(fact)
            if old is not None and given.expected_version not in (None, old.version):
                continue
            still = old is not None and old.deliver_again and (given.state != ParkedState.AGAIN or given.delay_s <= 0)
            deliver_again = given.deliver_again or still
            new = Waiting(given.attempts, next_at, given.state, given.error, str(self._versions), deliver_again)
            if (
                old is not None
                and old.state == ParkedState.AGAIN
                and old.next_at > new.next_at
                and not new.deliver_again
            ):
                # Until then a call may land, even if the key has other problems.
                new = old._replace(attempts=new.attempts, version=new.version)
            state.parked[fact] = new

    def _move(self, state: State, positions: Mapping[int, Position]) -> None:
        for slot, at in positions.items():
            if not self.may_go_back and not at.snapshot.includes(state.cursors[slot].at.snapshot):
                raise Violation(f"slot {slot} goes back from {state.cursors[slot].at} to {at}")
            # Use the stored form.
            stored = Position(Snapshot.parse(str(at.snapshot)), at.xid, at.id)
            state.cursors[slot].at = stored

    # -- the end -------------------------------------------------------------------------------------------------------

    def left(self, state: State) -> str | None:
        """The work on an index that is not done."""
        present = self.present()
        for slot, cursor in state.cursors.items():
            if rows := self.entries(cursor.at, present, {slot}):
                return f"slot {slot}, at {cursor.at}, has not been given {rows}"
        if undone := sorted(row for row, (_, done) in state.refill.items() if not done):
            return f"the refill of {undone}"
        if waiting := {fact: w for fact, w in state.parked.items() if w.state != ParkedState.DEAD}:
            return f"parked: {waiting}"
        return None

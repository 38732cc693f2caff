"""The relay's protocol as a state machine: no database, no threads, every interleaving.

The model
    *Truth.* An application changes keys in transactions. A transaction takes its xid when it begins. Its outbox entry
    becomes visible when it commits, so a slow transaction appears behind entries with higher ids. A snapshot is the
    set of entries that it sees, as a bit mask: bit *i* is the entry of ``Config.changes[i]``.

    *Slots.* For each index and slot, the database holds a cursor, an epoch, a lease, a ledger and parked keys. The
    cursor is ``seen``, and the ``target`` of an open window. All other knowledge of a worker is in `Worker`, and dies
    with it.

    *Delivery.* claim → open a window → read a page → call the index → acknowledge. A page is one key's entries. Reading
    it also reads the truth and checks the lease. At every arrow others act, the lease expires, the worker crashes. A
    pause (SIGSTOP, garbage collection, a slow network) is a worker that takes no step for a time. An acknowledgement
    may leave the stored cursor unchanged, because checkpoints come about twice a second.

    *Calls* succeed, or fail with or without effect, or are reported as failed and take effect later. The index and its
    deployment decide how late writes are stopped: see `Landing`.

    *Strict writes.* The application itself writes the index before it commits.

Merged steps, and why they lose nothing
    Reading the parking, the truth and the ledger and checking the lease is one step. The lease is checked last, so a
    takeover comes after the reading. A page that needs no write is acknowledged at once, and no other step sees the
    difference. A refused acknowledgement and its re-dirtying are one step: a crash between them equals a crash before.
    An idle worker forgets a claim whose lease has expired, because it would notice this before its next call.

Bounds
    There are three changes. The last one restores the first content, which is the trap for a ledger that is trusted
    too long. Rollbacks make shorter histories of them. The faults are one crash, one expired lease of a living holder
    and one failed call. They give 141,536, 75,741 and 59,435 states in the order of `Landing`. A third worker
    gives the same numbers, because no more than two claims can be active. These graphs have no cycles.

The properties are in `violation` and `wrong`. A rule that is broken on purpose (``Config.broken``) must lead to one of
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

NO_ROW, A, B, C = range(4)  # contents of a row, an index or a ledger
FUTURE, OPEN, WRITTEN, COMMITTED, ROLLED_BACK = range(5)  # states of a change; WRITTEN is a strict one in the index
FREE, LIVE, EXPIRED = range(3)  # states of a lease; a FREE one was released cleanly, and has no owner
IDLE, READY, WROTE = range(3)  # states of a worker; WROTE is not yet acknowledged

_SHOWN = "-abc"


class Landing(Enum):
    """The promise of an index and its deployment about late writes."""

    FENCED = "at any time, even after a crash, but not over points or tombstones of a later claim"
    DEADLINE = "not after its own lease has expired, because calls have shorter timeouts"
    REPORTED = "at any time before the call returns, and the worker lives to see its acknowledgement refused"


class Rule(Enum):
    """The rules of the protocol. Each can be broken."""

    READ_BEFORE_ACK = "I1: only entries that were read are acknowledged"
    TRUTH_AFTER_CLAIM = "I2: the truth is read after the epoch was granted"
    FENCE_BY_EPOCH = "I3: the fence is the claim's epoch, not a sequence of the worker's own"
    SETTLE_ON_TAKEOVER = "I4: a takeover settles the possible writes of its predecessor"
    REDIRTY = "I5: a refused acknowledgement re-dirties its keys"
    NO_LOCK_IN_CALL = "I6: no database transaction is open during a call of the index"

    FENCE_TOMBSTONES = "the fence outlives deleted points"
    READ_COMMITTED = "the relay reads committed rows"
    LEASES_END = "a lease ends, also if its holder dies"
    SNAPSHOTS = "a cursor is a snapshot, not the highest id it has seen"
    CHECK_LEASE = "the lease is checked between reading and calling"
    CHECK_EPOCH = "an acknowledgement holds only under the slot's epoch"
    SETTLE_TO_PRESENT = "a takeover settles up to the present, also when a window is stored"
    SETTLE_ALL_PAGES = "a window is settled to its end, not for one page"
    RELEASE_SETTLED = "a worker that leaves before it has settled a takeover counts as dead"
    SETTLE_FAILED = "after a failed call the ledger is not trusted"
    SETTLE_PARKED = "for a parked key the ledger is not trusted"
    PARKING_VERSION = "delivering a parked key removes only the parking that was read"
    REPEAT_UNANSWERED = "a key whose call may land later is delivered again when it cannot land any more"
    WAIT_FOR_LEASE = "without a fence, even a dead process is succeeded only after its lease has expired"

    INTENT = "strict: an intent is durable before the index is written"
    INTENT_XID = "strict: the intent carries the xid of the transaction it announces"
    INTENT_SETTLES = "strict: for a key with an intent the ledger is not trusted"
    INTENT_AGAIN = "strict: a key with an intent is delivered again when no call of the application can land"


class Change(NamedTuple):
    """One transaction of the application, which changes one key."""

    content: int
    key: int = 0
    slow: bool = False  # others may begin and commit between its xid and its commit
    strict: bool = False


class Faults(NamedTuple):
    """The numbers of faults that are left. Only the expiries of living holders' leases count."""

    crashes: int = 0
    expiries: int = 0
    failures: int = 0
    releases: int = 0  # a clean release is no fault, but needs a bound too


NO_FAULTS = Faults()


@dataclass(frozen=True, eq=False)
class Config:
    """The bounds of a search. Configs are compared by identity, so that they are cheap keys for memoised helpers."""

    landing: Landing
    changes: tuple[Change, ...] = (Change(B, slow=True), Change(NO_ROW), Change(A))
    faults: Faults = NO_FAULTS
    slots: tuple[int, ...] = (0,)  # the slot of each key
    workers: int = 2
    indexes: int = 1
    late_calls: bool = True  # a call that was reported as failed, or whose caller died, may still land
    broken: Rule | None = None


class Worker(NamedTuple):
    """A worker's knowledge of one slot. If all values are zero, it knows nothing."""

    step: int = IDLE
    epoch: int = 0  # the epoch of its claim, or 0
    seen: int = 0  # its cursor, at or ahead of the stored one
    target: int = 0  # the target of the open window, or 0
    settle: bool = False  # the ledger is not trusted for this window
    key: int = 0  # the key of the current page
    content: int = 0  # the key's new content
    page: int = 0  # the page's entries, if it has any
    parking: int = 0  # the version of the parking, if the key was parked
    overtook: bool = False  # the write landed after another had claimed the slot
    sent: int = 0  # its own sequence, if FENCE_BY_EPOCH is broken
    remembered: tuple[int, ...] = ()  # the truth before the claim, if TRUTH_AFTER_CLAIM is broken


class Call(NamedTuple):
    """A write that may still land, although its caller no longer waits for it."""

    epoch: int  # the application's calls have 0
    key: int
    token: int  # the fence compares tokens
    content: int


class Slot(NamedTuple):
    """One slot of one index: the index's content, the relay's tables, and the workers' memory. Tuples are by key."""

    held: tuple[int, ...]  # the contents that the index has
    fence: tuple[int, ...]  # the tokens that the index remembers
    ledger: tuple[int, ...]
    parked: tuple[int, ...]  # the version of the parking, or 0 if the key is not parked
    again: tuple[bool, ...]  # the key is parked when no abandoned call for it can land
    seen: int
    target: int
    epoch: int
    lease: int
    calls: tuple[Call, ...]
    workers: tuple[Worker, ...]


class State(NamedTuple):
    changes: tuple[int, ...]
    truth: tuple[int, ...]  # the committed rows, by key
    slots: tuple[Slot, ...]
    faults: Faults


Label: TypeAlias = str
Step: TypeAlias = tuple[Label, State]
SlotStep: TypeAlias = tuple[Label, Slot, Faults]


class Violation(Enum):
    DIVERGED = "nothing is left to do, but the index does not hold the truth"
    GHOST = "the index holds rolled back content"
    BLOCKED = "a lease has expired, but no worker can claim the slot"
    STUCK = "nothing can happen, but work is left"


def initial(config: Config) -> State:
    """Everything is delivered and released: rows, ledgers and indexes all hold A."""
    assert config.indexes == 1 or not any(change.strict for change in config.changes), "a strict write has one index"
    keys = len(config.slots)
    zeros, all_a = (0,) * keys, (A,) * keys
    slot = Slot(all_a, zeros, all_a, zeros, (False,) * keys, 0, 0, 0, FREE, (), (Worker(),) * config.workers)
    count = config.indexes * len(set(config.slots))
    return State((FUTURE,) * len(config.changes), all_a, (slot,) * count, config.faults)


def successors(state: State, config: Config) -> Iterator[Step]:
    """Every possible next step of the application and the relay."""
    yield from _application(state, config)
    present = visible(state.changes, config)
    truth = state.truth
    if config.broken is Rule.READ_COMMITTED:
        for change, status in zip(config.changes, state.changes, strict=True):
            truth = _put(truth, change.key, change.content) if status == OPEN else truth
    for n, slot in enumerate(state.slots):
        where = f"slot {n}: " if len(state.slots) > 1 else ""
        view = View(present & slot_mask(n, config), truth, state.faults)
        for label, changed, faults in _slot_steps(slot, view, config):
            yield where + label, State(state.changes, state.truth, _put(state.slots, n, changed), faults)
    if state.faults.crashes:
        yield from _crashes(state, config)


# -- the application ---------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """A possible next move of the application in one of its transactions."""

    label: str
    change: int
    status: int


@cache
def _moves(statuses: tuple[int, ...], config: Config) -> tuple[Move, ...]:
    """The possible moves. Xids are taken in the order of changes. A strict change locks its row from write to end."""
    running = [change for change, status in zip(config.changes, statuses, strict=True) if status in (OPEN, WRITTEN)]
    locked = {change.key for change in running if change.strict}
    moves = []
    for n, (change, status) in enumerate(zip(config.changes, statuses, strict=True)):
        name, what = f"transaction {n + 1}", _what(change.key, change.content)
        if status in (COMMITTED, ROLLED_BACK):
            continue
        if change.strict and status == OPEN:
            moves.append(Move(f"{name} writes {what} to the index", n, WRITTEN))
        elif status == WRITTEN or change.key not in locked:
            if status == FUTURE and (change.slow or change.strict):
                intent = f", its intent for {what} is durable" if change.strict else ""
                moves.append(Move(f"{name} takes its xid{intent}", n, OPEN))
            else:
                moves.append(Move(f"{name} commits {what}", n, COMMITTED))
        moves.append(Move(f"{name} rolls back", n, ROLLED_BACK))
        if status == FUTURE:
            break
    return tuple(moves)


def _application(state: State, config: Config) -> Iterator[Step]:
    for label, n, status in _moves(state.changes, config):
        changes, truth, slots, faults = state
        ended = _put(changes, n, status)
        if status == WRITTEN:
            yield from _strict_write(state, n, label, config)
            continue
        if status == COMMITTED:
            truth = _put(truth, config.changes[n].key, config.changes[n].content)
        yield label, State(ended, truth, slots, faults)


def _strict_write(state: State, n: int, label: str, config: Config) -> Iterator[Step]:
    """Write the index under the epoch of the current claim, so that later claims' writes are not overwritten.

    A refusal by the fence does no harm, because the relay delivers the key anyway. A failed call does no harm either.
    It vetoes the commit, and the model has this as a rollback before or after the write.
    """
    changes, truth, slots, faults = state
    key, content = config.changes[n].key, config.changes[n].content
    at = config.slots[key]
    call = Call(0, key, slots[at].epoch, content)
    yield label, State(_put(changes, n, WRITTEN), truth, _put(slots, at, _land(slots[at], call, config)), faults)
    if config.late_calls and faults.crashes:
        sent = _put(slots, at, _send(slots[at], call, config))
        fewer = faults._replace(crashes=faults.crashes - 1)
        what = f"transaction {n + 1}'s application crashes in its call to the index"
        yield what, State(_put(changes, n, ROLLED_BACK), truth, sent, fewer)


# -- visibility --------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """The state outside a slot that its steps depend on."""

    present: int  # a snapshot, without entries of other slots
    truth: tuple[int, ...]
    faults: Faults


@cache
def visible(changes: tuple[int, ...], config: Config) -> int:
    """The entries that a snapshot taken now sees.

    An intent has the xid of its transaction, so a snapshot sees it when the transaction has ended, by commit
    or rollback. Without that xid, an intent would be a separate entry that is seen at once.
    """
    mask = 0
    for n, (change, status) in enumerate(zip(config.changes, changes, strict=True)):
        announced = change.strict and config.broken is not Rule.INTENT
        own_entry = config.broken is Rule.INTENT_XID
        if status == COMMITTED or (status == ROLLED_BACK and announced and not own_entry):
            mask |= 1 << n
        if announced and own_entry and status != FUTURE:
            mask |= 1 << n + len(changes)
    return mask


@cache
def intents(config: Config) -> int:
    """The entries that are intents."""
    if config.broken in (Rule.INTENT, Rule.INTENT_SETTLES):
        return 0
    shift = len(config.changes) if config.broken is Rule.INTENT_XID else 0
    return sum(1 << n + shift for n, change in enumerate(config.changes) if change.strict)


@cache
def key_mask(key: int, config: Config) -> int:
    """The entries of *key*."""
    count = len(config.changes)
    return sum(1 << n | 1 << n + count for n, change in enumerate(config.changes) if change.key == key)


@cache
def slot_mask(slot: int, config: Config) -> int:
    """The entries of the keys of *slot*. Slots are numbered index by index."""
    slot %= len(set(config.slots))
    return sum(key_mask(key, config) for key, its in enumerate(config.slots) if its == slot)


# -- the relay ---------------------------------------------------------------------------------------------------------


def _slot_steps(slot: Slot, view: View, config: Config) -> Iterator[SlotStep]:
    faults = view.faults
    for n, worker in enumerate(slot.workers):
        if n and worker == slot.workers[n - 1] and _is_symmetric(config):
            continue  # an equal worker has the same steps
        if worker.step == READY:
            yield from _call(slot, n, view, config)
        elif worker.step == WROTE:
            yield from _acknowledge(slot, n, worker, view, config)
        elif not worker.epoch:
            yield from _claim(slot, n, view, config)
        else:
            yield from _read(slot, n, view, config)
            if faults.releases and slot.epoch == worker.epoch:
                left = _with(slot, n, _forgotten(worker), config)
                unsettled = worker.settle and config.broken is not Rule.RELEASE_SETTLED
                released = left._replace(seen=worker.seen, target=0, lease=EXPIRED if unsettled else FREE)
                yield f"{_name(worker)} releases its claim", released, faults._replace(releases=faults.releases - 1)
    if slot.lease == LIVE:
        yield from _expire(slot, faults, config)
    for n, call in enumerate(slot.calls):
        landed = _land(slot._replace(calls=slot.calls[:n] + slot.calls[n + 1 :]), call, config)
        yield f"a call lands late: {_what(call.key, call.content)}", landed, faults
    for key, waiting in enumerate(slot.again):
        if waiting and not any(call.key == key for call in slot.calls):
            parked = slot._replace(again=_put(slot.again, key, False), parked=_park(slot, key))
            yield f"k{key} is due again", parked, faults


def _claim(slot: Slot, n: int, view: View, config: Config) -> Iterator[SlotStep]:
    """Resume a free slot, or take over a slot whose owner's lease has expired.

    A takeover settles all entries that the stored cursor has not seen, up to the present. The predecessor read all its
    running writes before now, because it checks the lease between reading and calling.
    """
    worker = slot.workers[n]
    if config.broken is Rule.TRUTH_AFTER_CLAIM and not worker.remembered:
        yield "a worker reads the truth", _with(slot, n, worker._replace(remembered=view.truth), config), view.faults
        return
    if slot.lease == LIVE or _is_locked(slot, config):
        return
    target = slot.target
    if slot.lease == EXPIRED and config.broken is not Rule.SETTLE_ON_TAKEOVER:
        target = view.present
        if config.broken is Rule.SETTLE_TO_PRESENT:
            target = slot.target or view.present
    if not view.present & target & ~slot.seen:
        target = 0
    settle = target != 0 and config.broken is not Rule.SETTLE_ON_TAKEOVER
    epoch = slot.epoch + 1
    claimed = worker._replace(epoch=epoch, seen=slot.seen, target=target, settle=settle)
    what = f"settles {_entries(target & ~slot.seen)}" if settle else "has nothing to settle"
    label = f"a worker takes over as holder {epoch} and {what}" if slot.lease else f"a worker claims as holder {epoch}"
    workers = tuple(_superseded(other, config) for other in slot.workers)
    claim = slot._replace(workers=workers, epoch=epoch, lease=LIVE, target=target)
    yield label, _with(claim, n, claimed, config), view.faults


def _read(slot: Slot, n: int, view: View, config: Config) -> Iterator[SlotStep]:
    """Open a window, or read its next page or a parked key, with the truth, and check the lease."""
    worker = slot.workers[n]
    stands = slot.lease == LIVE and slot.epoch == worker.epoch
    assert stands or config.broken in (Rule.CHECK_LEASE, Rule.CHECK_EPOCH), "an idle worker's claim stands"
    for key, version in enumerate(slot.parked):
        if version:
            settle = config.broken is not Rule.SETTLE_PARKED
            yield from _converge(slot, n, worker._replace(parking=version, key=key), settle, view, config)
    if not worker.target:
        target = view.present
        if config.broken is Rule.SNAPSHOTS:
            target = (1 << target.bit_length()) - 1
        if view.present & ~worker.seen:
            label = f"{_name(worker)} opens a window: {_entries(target & ~worker.seen)}"
            yield label, _with(slot, n, worker._replace(target=target), config), view.faults
        return
    undelivered = view.present & worker.target & ~worker.seen
    first = undelivered & -undelivered
    key = next(key for key in range(len(config.slots)) if first & key_mask(key, config))
    page = undelivered & key_mask(key, config)
    settle = worker.settle or bool(page & intents(config))
    yield from _converge(slot, n, worker._replace(page=page, key=key), settle, view, config)


def _converge(slot: Slot, n: int, worker: Worker, settle: bool, view: View, config: Config) -> Iterator[SlotStep]:
    content = worker.remembered[worker.key] if worker.remembered else view.truth[worker.key]
    source = "parked " if worker.parking else ""
    label = f"{_name(worker)} reads {source}{_what(worker.key, content)}"
    read = worker._replace(content=content, remembered=())
    if settle or slot.ledger[worker.key] != content:
        sent = worker.sent + 1 if config.broken is Rule.FENCE_BY_EPOCH else 0
        yield label, _with(slot, n, read._replace(step=READY, sent=sent), config), view.faults
        return
    for outcome, done, faults in _acknowledge(slot, n, read, view, config):
        yield f"{label}, which the ledger has; {outcome}", done, faults


def _call(slot: Slot, n: int, view: View, config: Config) -> Iterator[SlotStep]:
    """Call the index: it succeeds, or fails in one of three ways."""
    worker, faults = slot.workers[n], view.faults
    name, what = _name(worker), _what(worker.key, worker.content)
    stands = slot.lease == LIVE and slot.epoch == worker.epoch
    if config.landing is Landing.DEADLINE and not stands:
        yield f"{name}'s call has timed out", _give_up(slot, n, worker, config), faults
        return
    token = worker.sent if config.broken is Rule.FENCE_BY_EPOCH else worker.epoch
    call = Call(worker.epoch, worker.key, token, worker.content)
    landed = _land(slot, call, config)
    overtook = config.landing is Landing.REPORTED and slot.epoch != worker.epoch
    yield f"{name} writes {what}", _with(landed, n, worker._replace(step=WROTE, overtook=overtook), config), faults
    if not faults.failures:
        return
    left = faults._replace(failures=faults.failures - 1)
    yield f"{name} fails to write {what}", _failed(slot, n, stands, config), left
    yield f"{name} writes {what}, and is told that it failed", _failed(landed, n, stands, config), left
    if config.late_calls and config.landing is not Landing.REPORTED:
        sent = _send(slot, call, config)
        yield f"{name} sends {what}, and stops waiting", _timed_out(sent, n, stands, config), left


def _failed(slot: Slot, n: int, stands: bool, config: Config) -> Slot:
    """End a call that has failed. The worker tries again under the same claim if it still holds."""
    worker = slot.workers[n]
    if not stands:
        return _give_up(slot, n, worker, config)
    settle = worker.settle or (not worker.parking and config.broken is not Rule.SETTLE_FAILED)
    return _with(slot, n, _idle(worker)._replace(settle=settle), config)


def _timed_out(slot: Slot, n: int, stands: bool, config: Config) -> Slot:
    """Abandon a call that may still land after the next write. Under the same claim no fence stops it.

    So the key is delivered at once, and again when the call cannot land any more.
    """
    failed = _failed(slot, n, stands, config)
    if config.broken is Rule.REPEAT_UNANSWERED:
        return failed
    return failed._replace(again=_put(slot.again, slot.workers[n].key, True))


def _acknowledge(slot: Slot, n: int, worker: Worker, view: View, config: Config) -> Iterator[SlotStep]:
    """Commit one transaction: ledger, parking, lease, and perhaps the stored cursor. Refused if another has claimed."""
    name = _name(worker)
    stands = slot.epoch == worker.epoch
    if not stands and config.broken is not Rule.CHECK_EPOCH:
        yield f"{name}'s acknowledgement is refused", _give_up(slot, n, worker, config), view.faults
        return
    key = worker.key
    done = _idle(worker)
    parked, again = slot.parked, slot.again
    if worker.parking:
        if slot.parked[key] == worker.parking or config.broken is Rule.PARKING_VERSION:
            parked = _put(parked, key, 0)
    else:
        seen = worker.seen | worker.page
        target = worker.target
        if not view.present & target & ~seen:
            seen, target = seen | target, 0
        if config.broken is Rule.READ_BEFORE_ACK:
            seen, target = seen | view.present, 0
        settle = worker.settle and target != 0 and config.broken is not Rule.SETTLE_ALL_PAGES
        done = done._replace(seen=seen, target=target, settle=settle)
        if worker.page & intents(config) and config.late_calls and config.broken is not Rule.INTENT_AGAIN:
            again = _put(again, key, True)
    if not stands:
        done = _forgotten(done)
    recorded = _with(slot, n, done, config)._replace(
        ledger=_put(slot.ledger, key, worker.content), parked=parked, again=again, lease=LIVE
    )
    yield f"{name} acknowledges", recorded, view.faults
    if not worker.parking and (slot.seen, slot.target) != (done.seen, done.target):
        yield (
            f"{name} acknowledges, with a checkpoint",
            recorded._replace(seen=done.seen, target=done.target),
            view.faults,
        )


def _give_up(slot: Slot, n: int, worker: Worker, config: Config) -> Slot:
    """Give up a slot that another worker has claimed. Keys that were written, or perhaps were, are delivered again."""
    left = _with(slot, n, _forgotten(worker), config)
    if worker.step == IDLE or config.broken is Rule.REDIRTY:
        return left
    return left._replace(parked=_park(slot, worker.key))


# -- faults ------------------------------------------------------------------------------------------------------------


def _expire(slot: Slot, faults: Faults, config: Config) -> Iterator[SlotStep]:
    holds = any(worker.epoch == slot.epoch for worker in slot.workers)
    if (holds and not faults.expiries) or config.broken is Rule.LEASES_END:
        return
    expired, left = slot._replace(lease=EXPIRED), faults
    if holds:
        left = faults._replace(expiries=faults.expiries - 1)
    if config.landing is Landing.DEADLINE:
        expired = expired._replace(calls=tuple(call for call in slot.calls if call.epoch != slot.epoch))
    if config.broken is not Rule.CHECK_LEASE:
        workers = tuple(
            _forgotten(worker) if worker.epoch == slot.epoch and worker.step == IDLE else worker
            for worker in slot.workers
        )
        expired = expired._replace(workers=_ordered(workers, config))
    yield f"the lease of holder {slot.epoch} expires", expired, left


def _crashes(state: State, config: Config) -> Iterator[Step]:
    """Crash a worker. It loses its knowledge of every slot, and its calls are lost or land later."""
    faults = state.faults._replace(crashes=state.faults.crashes - 1)
    for n in range(config.workers):
        workers = [slot.workers[n] for slot in state.slots]
        if not any(worker.epoch for worker in workers) or any(worker.overtook for worker in workers):
            continue
        names = " and ".join(f"slot {at}'s {_name(worker)}" for at, worker in enumerate(workers) if worker.epoch)
        if len(workers) == 1:
            names = _name(workers[0])
        lost = tuple(_crash(slot, n, False, config) for slot in state.slots)
        yield f"{names} crashes", State(state.changes, state.truth, lost, faults)
        late = tuple(_crash(slot, n, True, config) for slot in state.slots)
        if late != lost:
            yield f"{names} crashes in its call", State(state.changes, state.truth, late, faults)


def _crash(slot: Slot, n: int, late: bool, config: Config) -> Slot:
    worker = slot.workers[n]
    stands = slot.lease == LIVE and slot.epoch == worker.epoch
    left = _with(slot, n, Worker(), config)
    may_land = config.landing is Landing.FENCED or (config.landing is Landing.DEADLINE and stands)
    if late and worker.step == READY and config.late_calls and may_land:
        token = worker.sent if config.broken is Rule.FENCE_BY_EPOCH else worker.epoch
        call = Call(worker.epoch, worker.key, token, worker.content)
        left = _send(left, call, config)
    if stands and config.broken is Rule.WAIT_FOR_LEASE:
        left = left._replace(lease=EXPIRED)
    return left


# -- helpers -----------------------------------------------------------------------------------------------------------


def _land(slot: Slot, call: Call, config: Config) -> Slot:
    """Let the index take a write, unless its fence is higher."""
    held = _put(slot.held, call.key, call.content)
    if config.landing is not Landing.FENCED:
        return slot._replace(held=held)
    if call.token < slot.fence[call.key]:
        return slot
    token = 0 if call.content == NO_ROW and config.broken is Rule.FENCE_TOMBSTONES else call.token
    calls = tuple(other for other in slot.calls if other.key != call.key or other.token >= token)
    return slot._replace(held=held, fence=_put(slot.fence, call.key, token), calls=calls)


def _send(slot: Slot, call: Call, config: Config) -> Slot:
    """Let a call land later. If the fence refuses the call now, it is lost, because a fence never gets lower."""
    if config.landing is Landing.FENCED and call.token < slot.fence[call.key]:
        return slot
    return slot._replace(calls=tuple(sorted((*slot.calls, call))))


def _park(slot: Slot, key: int) -> tuple[int, ...]:
    return _put(slot.parked, key, slot.parked[key] + 1)


def _idle(worker: Worker) -> Worker:
    """The worker without its page. The claim and the window go on."""
    return worker._replace(step=IDLE, key=0, content=0, page=0, parking=0, overtook=False)


def _forgotten(worker: Worker) -> Worker:
    return Worker(sent=worker.sent)


def _superseded(worker: Worker, config: Config) -> Worker:
    """The worker after the loss of its slot: it can only finish writing its page, and be refused."""
    if worker.step == IDLE or config.broken is Rule.CHECK_EPOCH:
        return worker
    content = worker.content if worker.step == READY else 0
    return worker._replace(seen=0, target=0, settle=False, content=content, page=0, parking=0)


def _with(slot: Slot, n: int, worker: Worker, config: Config) -> Slot:
    return slot._replace(workers=_ordered(_put(slot.workers, n, worker), config))


def _ordered(workers: tuple[Worker, ...], config: Config) -> tuple[Worker, ...]:
    return tuple(sorted(workers)) if _is_symmetric(config) else workers


@cache
def _is_symmetric(config: Config) -> bool:
    """Whether workers are interchangeable. With one slot, only their knowledge matters."""
    return config.indexes == 1 and len(set(config.slots)) == 1


def _is_locked(slot: Slot, config: Config) -> bool:
    """Whether a transaction holds the row of the cursor, from reading to acknowledging."""
    return config.broken is Rule.NO_LOCK_IN_CALL and any(worker.step != IDLE for worker in slot.workers)


def _put(values: tuple[T, ...], at: int, value: T) -> tuple[T, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _name(worker: Worker) -> str:
    return f"holder {worker.epoch}"


def _what(key: int, content: int) -> str:
    return f"k{key} = {_SHOWN[content]}"


def _entries(mask: int) -> str:
    return "entries " + ",".join(str(n + 1) for n in range(mask.bit_length()) if mask >> n & 1)


# -- the properties ----------------------------------------------------------------------------------------------------


def violation(state: State, config: Config) -> Violation | None:
    """The violated property of *state*, if any."""
    present = visible(state.changes, config)
    for n, slot in enumerate(state.slots):
        if slot.lease == EXPIRED and _is_locked(slot, config):
            return Violation.BLOCKED
        if slot.held == state.truth:
            continue
        entries = slot_mask(n, config)
        behind = [key for key, held in enumerate(slot.held) if held != state.truth[key]]
        keys = [key for key in behind if key_mask(key, config) & entries]
        if any(_is_ghost(key, slot.held[key], state.changes, config) for key in keys):
            return Violation.GHOST
        if keys and is_quiescent(slot, present & entries) and not _strict_under_way(state.changes, config):
            return Violation.DIVERGED
    return None


def wrong(state: State, is_last: bool, config: Config) -> Violation | None:
    """`violation`, or STUCK if work is left when nothing can happen.

    Faults and changes are bounded, so every run reaches such an end. This is the other half of convergence: all work is
    done once faults stop.
    """
    return violation(state, config) or (Violation.STUCK if is_last and not is_done(state, config) else None)


def is_quiescent(slot: Slot, present: int) -> bool:
    """Whether the relay has nothing to do: no step or call in progress, nothing parked, nothing undelivered."""
    if slot.calls or any(slot.parked) or any(slot.again) or slot.lease == EXPIRED:
        return False
    if any(worker.step != IDLE for worker in slot.workers):
        return False
    if slot.lease == FREE:
        return not present & ~slot.seen
    return any(worker.epoch == slot.epoch and not present & ~worker.seen for worker in slot.workers)


def is_done(state: State, config: Config) -> bool:
    """Whether the application has finished as well."""
    present = visible(state.changes, config)
    return all(status in (COMMITTED, ROLLED_BACK) for status in state.changes) and all(
        is_quiescent(slot, present & slot_mask(n, config)) for n, slot in enumerate(state.slots)
    )


@cache
def _strict_under_way(statuses: tuple[int, ...], config: Config) -> bool:
    return any(c.strict and status in (OPEN, WRITTEN) for c, status in zip(config.changes, statuses, strict=True))


@cache
def _is_ghost(key: int, content: int, statuses: tuple[int, ...], config: Config) -> bool:
    """Whether *content* was never committed for *key*. A strict write is in the index before its commit."""
    return content != A and not any(
        change.strict or status == COMMITTED
        for change, status in zip(config.changes, statuses, strict=True)
        if (change.key, change.content) == (key, content)
    )

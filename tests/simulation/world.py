"""The simulated surroundings of the relay's real protocol: clock, database, indexes, processes, and their faults.

One seed decides everything. Between any two requests of an owner the scheduler may let others run, move the clock, or
crash the owner. So every interleaving of transactions and calls can happen.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

from memstate_sa.db.codec import FactKey
from memstate_sa.errors import DeliveryRejected, DeliveryRetryable
from memstate_sa.indexes.base import Point, Stored
from memstate_sa.relay.plan import Delivered, ParkedState
from memstate_sa.relay.points import ENTITY
from memstate_sa.relay.protocol import SlotWorker
from memstate_sa.relay.requests import (
    Acknowledge,
    Claim,
    Embed,
    Embedded,
    Exchange,
    Fetch,
    KeyPage,
    ListFacts,
    PointWrite,
    Read,
    ReadPage,
    Redirty,
    Release,
    Remove,
    Request,
    Upsert,
)
from memstate_sa.relay.retry import Breaker, RetryPolicy
from tests.simulation.database import (
    REFUSED_BY_EMBEDDER,
    REFUSED_BY_INDEX,
    SCAN,
    UNREADABLE,
    Database,
    Me,
    Outage,
    Row,
    State,
    Transaction,
    Violation,
)

LEASE_S = 0.25  # about fifty requests take this long
POLICY = RetryPolicy(max_attempts=3, delay_s=0.02, max_delay_s=0.2)
POISON = (UNREADABLE, REFUSED_BY_EMBEDDER, REFUSED_BY_INDEX)
TEXTS = ("a", "b", "c", "a", "b", "c", None)
ENTITIES = ("fact", "note")
KEYS = ("[1]", "[2]", "[3]", "[4]")


FEW: Mapping[str, Any] = {"sqlite": False, "entities": ENTITIES[:1], "partial": False, "strict": False, "keys": 2}
STRANGERS: Mapping[str, Any] = {"sqlite": False, "entities": ENTITIES, "partial": True}
FENCED: Mapping[str, Any] = {"fenced": {"one": True}, "sqlite": False, "workers": 3}
LEASE_LOST = {"crash": 0.1, "clock leaps": 0.1}

THEMES: dict[str, Mapping[str, Any]] = {
    "takeovers": {"rates": LEASE_LOST},
    "takeovers, fenced": {**FENCED, "rates": {**LEASE_LOST, "pause": 0.2}},
    "takeovers, released": {**FEW, "rates": {**LEASE_LOST, "stops at once": 0.3}},
    "takeovers, scanning": {**FENCED, "strict": False, "keys": 2, "older": 0.7, "rates": {**LEASE_LOST, "fails": 0.4}},
    "late writers": {**FEW, "fenced": {"one": False}, "workers": 3, "rates": {"pause": 0.3}},
    "late calls": {"rates": {"lands late": 0.3}},
    "late calls, refused": {**FEW, "keys": 1, "texts": TEXTS + POISON, "rates": {"lands late": 0.3}},
    "late calls, reused": {**FEW, "rates": {"lands late": 0.5, "loses points": 0.05}},
    "repairs": {"rates": {"point is lost": 0.4, "times out": 0.2}},
    "outages": {**FEW, "rates": {"not executed": 0.3, "stop": 0.2}},
    "strict": {"sqlite": False, "strict": True, "rates": {"times out": 0.2}},
    "strict, refused": {"sqlite": False, "strict": True, "texts": TEXTS + POISON, "rates": {"times out": 0.3}},
    "strangers": {**STRANGERS, "rates": {"stop": 0.1}},
    "strangers, scanning": {**STRANGERS, "older": 0.5, "rates": {"stop": 0.1}},
    "strangers, strict": {**STRANGERS, "strict": True, "keys": 1, "rates": {"times out": 0.5, "stop": 0.1}},
}

AHEAD: Mapping[str, Any] = {
    **FEW,
    "keys": 4,
    "texts": TEXTS[:2],
    "workers": 1,
    "page_size": 2,
    "reads_ahead": True,
    "rates": {"index is emptied": 0.3, "answers wait": 0.5},
}
"""The theme of two concurrent pages. It is not in `THEMES`, so that seeds keep their histories."""


@dataclass(frozen=True)
class Config:
    """The parameters of a seed's history. ``rates``: its faults, and how often they happen."""

    seed: int
    sqlite: bool
    slots: int
    entities: tuple[str, ...]
    keys: int
    texts: tuple[str | None, ...]
    fenced: Mapping[str, bool]  # whether each index is fenced
    in_process: bool
    workers: int
    page_size: int
    max_batch: int
    save_every_s: float
    strict: bool
    partial: bool  # some workers do not know every entity
    ticks: int
    older: float  # the share of rows that an index has at the beginning
    rates: Mapping[str, float]
    reads_ahead: bool = False  # read the next page while a page is at the index

    FAULTS: ClassVar[Mapping[str, float]] = {
        # faults of a call
        "fails": 0.2,
        "times out": 0.2,
        "is half done": 0.15,
        "lands late": 0.15,
        "is told when to retry": 0.05,
        "is refused at first": 0.1,
        "is slow": 0.1,
        "loses points": 0.1,
        # faults of a transaction
        "not executed": 0.08,
        "answer lost": 0.08,
        # faults of a process
        "crash": 0.06,
        "pause": 0.08,
        "stop": 0.05,
        "clock leaps": 0.06,
        "answers wait": 0.3,
        "stops at once": 0.1,
        # faults by an operator, or by another process
        "index is paused": 0.02,
        "index is emptied": 0.012,
        "point is lost": 0.2,
    }

    HEALING: ClassVar = frozenset({"crash", "clock leaps", "index is emptied"})
    """Faults after which everything is delivered again, which hides earlier errors."""

    @classmethod
    def of(cls, seed: int) -> Config:
        rng = random.Random(seed)
        sqlite = rng.random() < 0.2
        names = ("one", "two") if rng.random() < 0.12 else ("one",)
        # Each history has only some of the faults, so that a rare fault is not always hidden by a frequent one.
        rates = {
            name: rng.choice((0.5, 1.0, 3.0)) * rate
            for name, rate in cls.FAULTS.items()
            if rng.random() < (0.25 if name in cls.HEALING else 0.5)
        }
        entities = ENTITIES if rng.random() < 0.6 else ENTITIES[:1]
        config = cls(
            seed=seed,
            sqlite=sqlite,
            slots=1 if sqlite else rng.choice((1, 2, 4)),
            entities=entities,
            keys=rng.choice((1, 2, 4)),
            texts=TEXTS + POISON if rng.random() < 0.4 else TEXTS,
            fenced={name: rng.random() < 0.5 for name in names},
            in_process=rng.random() < 0.3,
            workers=rng.choice((1, 2, 2, 2, 3)),
            page_size=rng.choice((2, 3, 4)),
            max_batch=rng.choice((1, 2, 4)),
            save_every_s=0.0 if sqlite else rng.choice((0.0, 0.03, 0.1)),
            strict=not sqlite and rng.random() < 0.2,
            partial=len(entities) > 1 and rng.random() < 0.4,
            ticks=rng.choice((80, 160, 240)),
            older=0.1,
            rates=rates,
        )
        return config.about(rng.choice(list(THEMES))) if rng.random() < 0.6 else config

    def about(self, theme: str) -> Config:
        """A history of a theme: certain things happen often, to few keys, and little else happens."""
        return replace(self, **(AHEAD if theme == "ahead" else THEMES[theme]))


@dataclass(eq=False)
class Index:
    """``fenced``: points written under a higher epoch are kept, also deleted ones."""

    name: str
    fenced: bool
    incarnation: int = 0
    points: dict[FactKey, Point] = field(default_factory=dict)
    epochs: dict[FactKey, int] = field(default_factory=dict)

    def write(self, write: PointWrite) -> None:
        if self.fenced and not self.passes(write):
            return
        if write.point is None:
            self.points.pop(write.fact, None)
        else:
            self.points[write.fact] = write.point

    def passes(self, write: PointWrite) -> bool:
        if write.epoch == 0:
            return True
        highest = self.epochs.get(write.fact, 0)
        self.epochs[write.fact] = max(highest, write.epoch)
        return write.epoch >= highest


@dataclass(eq=False)
class Worker:
    """A process with one owner. ``request`` is its next request, ``answer`` an answer that it has not got yet."""

    owner: str
    index: Index
    entities: tuple[str, ...]
    slot_worker: SlotWorker
    breaker: Breaker
    me: Me
    steps: Exchange[Any] | None = None
    doing: str = ""
    request: Request[Any] | None = None
    answer: tuple[Any, Exception | None] | None = None
    ahead: Exchange[None] | None = None  # the reading of the next page, beside an Upsert
    asks_ahead: Request[Any] | None = None
    rests: bool = False  # its last step found nothing to do
    paused_until: float = 0.0
    leaving: bool = False
    began: float = 0.0
    idle_until: float = 0.0
    settling: int = 0  # the number of next requests at which it may stop
    read: dict[FactKey, int] = field(default_factory=dict)  # the time of each reading, in steps of the database
    overtaken: set[FactKey] = field(default_factory=set)  # keys written after another had claimed the slot


class Landing(NamedTuple):
    """A call that has not reached the index yet. Without ``at`` it may do so at any time."""

    at: float | None
    worker: Worker | None
    index: Index
    incarnation: int
    writes: Sequence[PointWrite]


class World:
    """One history."""

    slot_worker_class: type[SlotWorker] = SlotWorker
    database_class: type[Database] = Database
    index_class: type[Index] = Index

    def __init__(self, config: Config, *, traced: bool = False) -> None:
        self.config = config
        self.rng = random.Random(config.seed + 1)
        self.trace: list[str] | None = [] if traced else None
        self.counts: Counter[str] = Counter()
        self.now = 1000.0
        self.rates = config.rates
        self.database = self.database_class(lambda: self.now, slots=config.slots, sqlite=config.sqlite, lease_s=LEASE_S)
        self.database.may_go_back = "answer lost" in config.rates
        self.indexes = [self.index_class(name, fenced) for name, fenced in config.fenced.items()]
        self.workers: list[Worker] = []
        self.landings: list[Landing] = []
        self.facts = [(entity, key) for entity in config.entities for key in KEYS[: config.keys]]
        self.hot: deque[FactKey] = deque(maxlen=4)  # keys that had errors: changes are likely to matter
        self.before: dict[FactKey, Row | None] = {}  # each row before its last change
        self.committed: dict[FactKey, set[str | None]] = {fact: set() for fact in self.facts}
        self._started = 0
        self._begin()

    # -- helpers -----------------------------------------------------------------------------------------------------

    def happens(self, fault: str) -> bool:
        rate = self.rates.get(fault)
        if rate is None or self.rng.random() >= rate:
            return False
        self.counts[fault] += 1
        return True

    def log(self, *words: object) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now - 1000:7.3f} " + " ".join(map(str, words)))

    # -- the whole run -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the history. Raises Violation when the protocol breaks a promise."""
        rng = self.rng
        for tick in range(self.config.ticks):
            chance = rng.random()
            # Later ticks change little, so that a new change does not hide an error of an earlier one.
            if chance < (0.3 if 2 * tick < self.config.ticks else 0.1):
                self.application()
            elif chance < 0.35:
                self.disturb()
            else:
                ready = [worker for worker in self.workers if worker.paused_until <= self.now]
                busy = [worker for worker in ready if worker.steps is not None or worker.idle_until <= self.now]
                if busy:
                    self.advance(rng.choice(busy))
                elif ready and chance < 0.6:
                    self.advance(rng.choice(ready))  # a commit wakes the worker
                else:
                    self.pass_time(rng.random() * LEASE_S / 4)
        self.converge()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for landing in self.landings[:]:
            if landing.at is not None and landing.at <= self.now:
                self.landings.remove(landing)
                self._land(landing)

    def _begin(self) -> None:
        """Add rows that are older than the outbox, and sometimes unknown points in an index."""
        rng = self.rng
        for fact in self.facts:
            if rng.random() < 0.4:
                row = self._row()
                self.database.facts[fact] = row
                self.committed[fact].add(row.fingerprint)
                self.log("older than the outbox:", fact, row)
        for index in self.indexes:
            for fact in self.facts:
                if rng.random() < self.config.older:
                    row = Row(rng.choice("abc"), rng.randrange(2))
                    index.points[fact] = point(fact, row)
                    self.committed[fact].add(row.fingerprint)
                    self.log("index", index.name, "holds from earlier", fact, row)
        for index in self.indexes:
            for n in range(self.config.workers if index is self.indexes[0] else 1):
                self.start(index, self.config.entities[:1] if self.config.partial and n == 0 else self.config.entities)

    def _row(self) -> Row:
        return Row(self.rng.choice(self.config.texts), self.rng.randrange(2))

    # -- the application ---------------------------------------------------------------------------------------------

    def application(self) -> None:
        rng, database = self.rng, self.database
        running = database.open
        if not running or (len(running) < 3 and rng.random() < 0.35):
            self._change(database.begin())
            return
        tx = rng.choice(running)
        chance = rng.random()
        if chance < 0.35 and not tx.strict:
            self._change(tx)
        elif chance < 0.5 and self.config.strict and tx.rows and not tx.strict and self._all_known():
            self._write_strictly(tx)
        elif chance < 0.85:
            self.commit(tx)
        else:
            self.log("application", tx.name, "rolls back")
            self.counts["rollback"] += 1
            database.rollback(tx)

    def _change(self, tx: Transaction) -> None:
        rng = self.rng
        facts = rng.sample(self.facts, min(rng.choice((1, 1, 2, 4)), len(self.facts)))
        if self.hot and rng.random() < 0.6:
            facts = [rng.choice(self.hot)]
        for fact in facts:
            if not self.database.may_write(tx, fact):
                continue
            chance = rng.random()
            if chance < 0.1:
                self.database.touch(tx, fact)
                self.log("application", tx.name, "touches", fact)
                continue
            before = tx.rows.get(fact, self.database.facts.get(fact))
            if before is not None and chance < 0.3:
                row = None
            elif chance < 0.5 and fact in self.before:
                row = self.before[fact]
            elif before is not None and chance < 0.6:
                row = before._replace(meta=1 - before.meta)
            else:
                row = self._row()
            self.database.write(tx, fact, row)
            self.log("application", tx.name, f"(xid {tx.xid})", "writes", fact, row)

    def commit(self, tx: Transaction) -> None:
        self.log("application", tx.name, f"(xid {tx.xid}) commits")
        for fact, row in tx.rows.items():
            self.committed[fact].add(None if row is None else row.fingerprint)
            self.before[fact] = self.database.facts.get(fact)
        self.database.commit(tx)

    def _write_strictly(self, tx: Transaction) -> None:
        """Write the index before the commit. The index may show this content although the transaction rolls back."""
        self.log("application", tx.name, "intends, and writes to the indexes", tx.rows)
        self.database.intend(tx)
        self.counts["strict"] += 1
        for index in self.indexes:
            writes = []
            for fact, row in tx.rows.items():
                if row is not None and row.text in POISON:
                    continue
                if row is None or row.text is None:
                    writes.append(PointWrite(fact, 0, Delivered(None, None, deleted=True), None))
                else:
                    self.committed[fact].add(row.fingerprint)
                    delivered = Delivered(row.fingerprint, None, deleted=False)
                    writes.append(PointWrite(fact, 0, delivered, point(fact, row, marked=self._marked(index))))
            landing = Landing(self.now, None, index, index.incarnation, writes)
            if self.happens("fails"):
                self.log("  index", index.name, "fails")
                self.database.rollback(tx)
                return
            if self.happens("times out"):
                self.log("  index", index.name, "times out")
                self._land_later(landing)
                self.database.rollback(tx)
                return
            self._land(landing)

    def _all_known(self) -> bool:
        """Whether each index has positions. An intent older than an index's positions is not delivered to it."""
        return all((index.name, index.incarnation) in self.database.states for index in self.indexes)

    def _marked(self, index: Index) -> bool:
        state = self.database.states.get((index.name, index.incarnation))
        return state is not None and state.marked

    # -- processes ---------------------------------------------------------------------------------------------------

    def start(self, index: Index, entities: tuple[str, ...]) -> Worker:
        self._started += 1
        owner = f"w{self._started}"
        slot_worker = self.slot_worker_class(
            entities,
            slots=self.config.slots,
            page_size=self.config.page_size,
            lease_s=LEASE_S,
            save_every_s=self.config.save_every_s,
            policy=POLICY,
            clock=lambda: self.now,
            jitter=self.rng.random,
        )
        slot_worker.max_batch = self.config.max_batch
        me = Me(owner, index.name, -1, entities, self.config.in_process)
        worker = Worker(owner, index, entities, slot_worker, Breaker(POLICY, self.rng.random), me)
        self.workers.append(worker)
        self.log(owner, "starts, for index", index.name, "and", entities)
        return worker

    def disturb(self) -> None:
        """Disturb a process, the clock, or an index."""
        rng = self.rng
        chance = rng.random()
        if chance < 0.2:
            self.database.forget_delivered()
            return
        for fault in ("crash", "pause", "stop", "clock leaps", "index is paused", "index is emptied", "point is lost"):
            # The rate is per tick, and a tenth of the ticks come here.
            if fault not in self.rates or rng.random() >= 2 * self.rates[fault]:
                continue
            worker = rng.choice(self.workers) if self.workers else None
            if fault == "clock leaps":
                self.counts[fault] += 1
                self.log("the clock leaps")
                self.pass_time(rng.choice((0.3, 0.6, 1.1, 2.5)) * LEASE_S)
            elif fault == "index is paused":
                self._toggle_pause(rng.choice(self.indexes))
            elif fault == "index is emptied":
                self._empty(rng.choice(self.indexes))
            elif fault == "point is lost":
                self._lose(rng.choice(self.indexes), rng.choice(self.facts))
            elif worker is not None:
                getattr(self, f"_{fault}")(worker)
        if len(self.workers) < self.config.workers and rng.random() < 0.8:
            self.start(rng.choice(self.indexes), self.config.entities)

    def _toggle_pause(self, index: Index) -> None:
        state = self.database.states.get((index.name, index.incarnation))
        if state is not None:
            state.paused = not state.paused
            self.counts["index is paused"] += state.paused
            self.log("index", index.name, "is", "paused" if state.paused else "no longer paused")

    def _empty(self, index: Index) -> None:
        self.counts["index is emptied"] += 1
        self.log("index", index.name, "is emptied")
        index.points.clear()
        index.epochs.clear()
        index.incarnation += 1
        self.landings = [landing for landing in self.landings if landing.index is not index]

    def _lose(self, index: Index, fact: FactKey) -> None:
        """Delete a point like another program, and let `verify` repair this."""
        state = self.database.states.get((index.name, index.incarnation))
        if state is not None and index.points.pop(fact, None) is not None:
            self.log("index", index.name, "has lost", fact, "and verify repairs it")
            self.database.repair(state, fact)

    def _pause(self, worker: Worker) -> None:
        if worker.paused_until <= self.now:
            self.counts["pause"] += 1
            worker.paused_until = self.now + self.rng.choice((0.3, 1.5, 3.0)) * LEASE_S
            self.log(
                worker.owner, f"stands still until {worker.paused_until - 1000:.3f}, before", _short(worker.request)
            )
            self._heat(worker.request)

    def _heat(self, request: Request[Any] | None) -> None:
        if isinstance(request, (Upsert, Remove)):
            self.hot.extend(write.fact for write in request.writes)
        elif isinstance(request, Acknowledge):
            self.hot.extend(request.written)

    def _stop(self, worker: Worker) -> None:
        if not worker.leaving:
            self.counts["stop"] += 1
            worker.leaving = worker.slot_worker.stopping = True
            self.log(worker.owner, "is asked to stop")

    def _crash(self, worker: Worker) -> None:
        index, request = worker.index, worker.request
        if not index.fenced and worker.overtaken:
            return  # no other worker could report the late writes: see docs/explanation/architecture.md
        self.counts["crash"] += 1
        self._heat(request)
        self.log(worker.owner, "crashes, before", _short(request))
        lands: list[Landing] = [landing for landing in self.landings if landing.worker is worker]
        if isinstance(request, (Upsert, Remove)) and worker.answer is None and self.rng.random() < 0.5:
            lands.append(Landing(None, None, index, worker.me.incarnation, request.writes))
        self.landings = [landing for landing in self.landings if landing.worker is not worker]
        state = self.database.state(worker.me)
        lease_until = state.leases.get(worker.owner, 0.0)
        if self.config.in_process:
            lands = []
            if self.rng.random() < 0.7:
                self.database.ended.add(worker.owner)
        for landing in lands:
            if index.fenced:
                at = None if self.rng.random() < 0.3 else self.now + self.rng.random() * 3 * LEASE_S
            elif lease_until > self.now:
                at = self.now + self.rng.random() * (lease_until - self.now)
            else:
                continue
            self.counts["lands after a crash"] += 1
            self.landings.append(landing._replace(worker=None, at=at))
        self._end(worker)

    def _end(self, worker: Worker) -> None:
        self.workers.remove(worker)

    # -- one worker, one request ---------------------------------------------------------------------------------------

    def advance(self, worker: Worker) -> None:
        """Execute one request, or pass one answer."""
        if worker.ahead is not None and self.rng.random() < 0.7:
            self._advance_ahead(worker, worker.ahead)
            return
        if worker.answer is not None:
            answer, worker.answer = worker.answer, None
            self._tell(worker, *answer)
            return
        if worker.steps is None:
            self._begin_steps(worker)
            if worker.request is None:
                return
        request = worker.request
        assert request is not None
        if self.database.is_locked_for(request):
            return
        if self._befalls(worker, request):
            return
        error: Exception | None = None
        reply: Any = None
        try:
            reply = self._execute(worker, request)
        except (Outage, DeliveryRetryable, DeliveryRejected) as raised:
            error = raised
        if self.trace is not None:
            self.log(worker.owner, _short(request), "->", _short(reply) if error is None else repr(error))
        self.counts["events"] += 1
        if self.happens("answers wait"):
            worker.answer = (reply, error)
        else:
            self._tell(worker, reply, error)

    def _advance_ahead(self, worker: Worker, ahead: Exchange[None]) -> None:
        """Execute one request beside a call of the index, which may not have landed yet."""
        request, reply, error = worker.asks_ahead, None, None
        if request is not None:
            if not isinstance(request, (ReadPage, ListFacts, Read, Embed)):
                raise Violation(f"{worker.owner} does more than read beside a call: {_short(request)}")
            try:
                reply = self._execute(worker, request)
            except (Outage, DeliveryRetryable, DeliveryRejected) as raised:
                error = raised
            self.log(worker.owner, "ahead:", _short(request), "->", _short(reply) if error is None else repr(error))
            self.counts["ahead"] += 1
        try:
            worker.asks_ahead = ahead.send(reply) if error is None else ahead.throw(error)
        except (StopIteration, Outage):
            worker.ahead = worker.asks_ahead = None

    def _befalls(self, worker: Worker, request: Request[Any]) -> bool:
        """Whether something keeps *worker* from this request. This happens more often where it matters most."""
        if isinstance(request, (Upsert, Remove, Acknowledge, Redirty, Release)):
            for fault, befall in (("crash", self._crash), ("pause", self._pause)):
                if self.rng.random() < self.rates.get(fault, 0.0):
                    befall(worker)
                    return True
        if isinstance(request, Acknowledge) and request.resolved and self.happens("point is lost"):
            self._lose(worker.index, self.rng.choice(list(request.resolved)))
        if worker.settling:
            worker.settling -= 1
            if not worker.leaving and self.happens("stops at once"):
                self._stop(worker)
        return False

    def _begin_steps(self, worker: Worker) -> None:
        slot_worker, index = worker.slot_worker, worker.index
        if worker.leaving:
            worker.doing = "release"
            worker.steps = slot_worker.release()
            if worker.me.incarnation < 0:
                self._end(worker)
                return
        else:
            if index.incarnation != worker.me.incarnation:
                slot_worker.reset()
                worker.overtaken.clear()
                worker.me = worker.me._replace(incarnation=index.incarnation)
            if worker.breaker.wait_s(self.now) > 0:
                worker.idle_until = self.now + min(worker.breaker.wait_s(self.now), LEASE_S / 4)
                if not slot_worker.epochs:
                    return
                worker.doing, worker.steps = "keep", slot_worker.keep()
            elif worker.doing == "step" and self.rng.random() < 0.2:
                worker.doing, worker.steps = "save", slot_worker.save()
            else:
                worker.doing, worker.steps, worker.began = "step", slot_worker.deliver(), self.now
                worker.rests = False
        self._resume_steps(worker, None, None)

    def _tell(self, worker: Worker, reply: Any, error: Exception | None) -> None:
        self._resume_steps(worker, reply, error)

    def _resume_steps(self, worker: Worker, reply: Any, error: Exception | None) -> None:
        assert worker.steps is not None
        worker.request = worker.ahead = worker.asks_ahead = None
        try:
            request = worker.request = worker.steps.send(reply) if error is None else worker.steps.throw(error)
            if self.config.reads_ahead and isinstance(request, Upsert) and request.meanwhile is not None:
                worker.ahead = request.meanwhile(lambda: worker.answer is None)
            return
        except StopIteration as end:
            worker.steps = None
            self._ended(worker, end.value)
        except (Outage, DeliveryRetryable, DeliveryRejected) as failure:
            worker.steps = None
            self.log(worker.owner, f"{worker.doing} ends with {failure!r}")
            wait = worker.breaker.failed(failure, self.now)
            worker.idle_until = self.now + wait
            if worker.doing == "release" and not worker.overtaken:
                self._end(worker)

    def _ended(self, worker: Worker, result: Any) -> None:
        self.log(worker.owner, f"{worker.doing} ends: {result}")
        if worker.doing == "release":
            if not self.rates or self.rng.random() < 0.5:
                self._end(worker)
            else:
                worker.leaving = worker.slot_worker.stopping = False
                worker.doing = ""
        elif worker.doing == "step":
            worker.breaker.succeeded()
            if result is None:
                worker.rests = True
                due_at = worker.slot_worker.due_at
                if due_at < worker.began:
                    raise Violation(f"{worker.owner} spins: it did nothing, and has been due since {due_at - 1000:.3f}")
                worker.idle_until = min(self.now + LEASE_S / 3, due_at)

    # -- the effects of requests ---------------------------------------------------------------------------------------

    def _execute(self, worker: Worker, request: Request[Any]) -> Any:
        self.pass_time(self.rng.random() * 0.01)
        if isinstance(request, (Upsert, Remove)):
            return self._write(worker, request)
        if isinstance(request, Embed):
            return self._embed(request)
        if isinstance(request, Fetch):
            return self._fetch(worker, request)
        if isinstance(request, ListFacts) and request.entity == SCAN:
            return self._scan(worker, request)
        if self.happens("not executed"):
            raise Outage("not executed")
        self._check(worker, request)
        reply = self.database.execute(worker.me, request)
        if isinstance(request, Read):
            worker.read.update(dict.fromkeys(request.facts, self.database.steps))
        elif isinstance(request, Claim) and any(held.settle for held in reply.slots.values()):
            worker.settling = 12
        elif isinstance(request, Redirty):
            worker.overtaken -= request.facts.keys()
        elif isinstance(request, Release):
            worker.overtaken -= request.unsure.keys()
        if type(request) in Database.writing and self.happens("answer lost"):
            raise Outage("executed, but the answer was lost")
        return reply

    def _check(self, worker: Worker, request: Request[Any]) -> None:
        """I2: recorded rows were read after their epoch was granted."""
        if isinstance(request, Acknowledge):
            for fact in (*request.written, *request.resolved):
                self._check_read(worker, fact, request.epochs[self.database.slot(fact)])

    def _check_read(self, worker: Worker, fact: FactKey, epoch: int) -> None:
        grant = (worker.me.index, worker.me.incarnation, self.database.slot(fact), epoch)
        owner, at = self.database.granted.get(grant, ("nobody", 0))
        if owner != worker.owner:
            raise Violation(f"{worker.owner} uses epoch {epoch} of {fact}, which is {owner}'s")
        if worker.read.get(fact, -1) < at:
            raise Violation(f"{worker.owner} read {fact} before epoch {epoch} was granted")

    def _reach(self, worker: Worker) -> None:
        """Fail a call that comes too late, or for another incarnation."""
        if self.happens("is slow"):
            self.pass_time(self.rng.choice((0.2, 0.6, 1.2, 2.5)) * LEASE_S)
        if worker.me.incarnation != worker.index.incarnation:
            raise DeliveryRetryable("the index has another incarnation", may_land=False)
        if self.happens("fails"):
            raise DeliveryRetryable("refused the connection", may_land=False)
        if self.happens("is told when to retry"):
            raise DeliveryRetryable("too many requests", retry_after_s=self.rng.random() * LEASE_S, may_land=False)

    def _embed(self, request: Embed) -> Embedded:
        if self.happens("fails"):
            raise DeliveryRetryable("the embedder is down", may_land=False)
        if REFUSED_BY_EMBEDDER in request.texts.values():
            raise DeliveryRejected("the embedder refuses a text")
        return Embedded(cast("Any", dict(request.texts)), len(request.texts))

    def _fetch(self, worker: Worker, request: Fetch) -> Mapping[FactKey, Stored]:
        self._reach(worker)
        points = worker.index.points
        found = {fact: points[fact] for fact in request.facts if fact in points}
        if self.happens("loses points"):
            found = {}
        return {fact: Stored("".join(fact), p.fingerprint, cast("Any", p.vector)) for fact, p in found.items()}

    def _scan(self, worker: Worker, request: ListFacts) -> KeyPage:
        self._reach(worker)
        facts = {"".join(fact): fact for fact in worker.index.points}
        ids = [id_ for id_ in sorted(facts) if request.after is None or id_ > request.after][: request.limit]
        return KeyPage(
            {facts[id_]: worker.index.points[facts[id_]].fingerprint for id_ in ids}, ids[-1] if ids else None
        )

    def _write(self, worker: Worker, request: Upsert | Remove) -> None:
        writes = request.writes
        for write in writes:
            self._check_read(worker, write.fact, write.epoch)
        self._reach(worker)
        landing = Landing(self.now, worker, worker.index, worker.me.incarnation, writes)
        half = landing._replace(writes=[write for write in writes if self.rng.random() < 0.5])
        if any(is_poison(write) for write in writes):
            self._land(half._replace(writes=[write for write in half.writes if not is_poison(write)]))
            raise DeliveryRejected("the index refuses a point")
        if len(writes) > 1 and self.happens("is refused at first"):
            raise DeliveryRejected("the index refuses this many points")
        if self.happens("lands late"):
            self._land_later(landing)
            raise DeliveryRetryable("timed out, and lands late")
        if self.happens("is half done"):
            self._land(half)
            self._heat(request)
            raise DeliveryRetryable("failed half way")
        self._land(landing)
        if self.happens("times out"):
            self._heat(request)
            raise DeliveryRetryable("timed out, but landed")

    def _land_later(self, landing: Landing) -> None:
        self.landings.append(landing._replace(at=self.now + self.rng.uniform(0.3, 1.0) * LEASE_S))
        self.hot.extend(write.fact for write in landing.writes)

    def _land(self, landing: Landing) -> None:
        index, worker = landing.index, landing.worker
        if landing.incarnation != index.incarnation:
            return
        state = self.database.states.get((index.name, index.incarnation))
        for write in landing.writes:
            given = write.point
            if given is not None:
                if given.fingerprint not in self.committed[write.fact]:
                    raise Violation(f"{write.fact} gets {given.fingerprint}, which was never committed")
                if given.fingerprint.partition("|")[0] != cast("Any", given.vector):
                    raise Violation(f"{write.fact} gets {given.fingerprint} with the vector of {given.vector}")
            index.write(write)
            if worker is not None and state is not None:
                slot = self.database.slot(write.fact)
                if state.cursors[slot].epoch != write.epoch:
                    worker.overtaken.add(write.fact)
        if self.trace is not None and (worker is None or landing.at != self.now):
            self.log("  lands late:", _short(landing.writes))

    # -- the end -----------------------------------------------------------------------------------------------------

    def converge(self) -> None:
        """Stop all faults. Raises Violation unless everything comes to rest, and the indexes hold the truth."""
        self.log("no more faults")
        self.rates = {}
        for state in self.database.states.values():
            state.paused = False
        for worker in self.workers[:]:
            worker.paused_until = 0.0
            if worker.entities != self.config.entities:
                self._stop(worker)
        for _ in range(6000):
            if not self._work_on():
                break
        else:
            raise Violation(f"does not come to rest: {self._left()}")
        self._compare()
        if more := [worker.owner for worker in self.workers if worker.slot_worker.more]:
            raise Violation(f"{more} say that they have more to do")
        last, self.landings = self.landings, []
        for landing in last:
            self._land(landing)
        if last:
            self._compare()

    def _work_on(self) -> bool:
        """Whether there was something to do."""
        if self.database.open and self.rng.random() < 0.1:
            tx = self.rng.choice(self.database.open)
            if self.rng.random() < 0.7:
                self.commit(tx)
            else:
                self.database.rollback(tx)
        for index in self.indexes:
            if not any(w.index is index and w.entities == self.config.entities for w in self.workers):
                self.start(index, self.config.entities)
        busy = [w for w in self.workers if w.steps is not None or w.answer is not None or w.idle_until <= self.now]
        if busy:
            self.advance(self.rng.choice(busy))
            return True
        are_done = all(worker.rests for worker in self.workers) and self._left() is None
        if are_done and not self.database.open and all(landing.at is None for landing in self.landings):
            return False
        self.pass_time(max(0.001, min(worker.idle_until for worker in self.workers) - self.now))
        return True

    def _left(self) -> str | None:
        """The work that is not done."""
        for index in self.indexes:
            state = self.database.states.get((index.name, index.incarnation))
            left = "everything" if state is None else self.database.left(state)
            if left is not None:
                return f"{index.name}: {left}"
        return None

    def _compare(self) -> None:
        facts = self.database.facts
        for index in self.indexes:
            state = self.database.states[index.name, index.incarnation]
            for fact in self.facts:
                row = facts.get(fact)
                waiting = state.parked.get(fact)
                if waiting is not None:
                    self._compare_dead(index, fact, row, waiting.error)
                    continue
                point = index.points.get(fact)
                wanted = None if row is None else row.fingerprint
                held = None if point is None else point.fingerprint
                if held != wanted:
                    raise Violation(f"index {index.name} holds {held} of {fact}, the truth is {wanted}")
                self._compare_ledger(state, fact, wanted)
                if point is not None and state.marked and ENTITY not in point.metadata:
                    raise Violation(f"index {index.name}: the point of {fact} does not carry its entity")
            if foreign := {fact: w for fact, w in state.parked.items() if w.state != ParkedState.DEAD}:
                raise Violation(f"index {index.name}: still parked {foreign}")

    def _compare_dead(self, index: Index, fact: FactKey, row: Row | None, error: str) -> None:
        if row is None or row.text not in POISON:
            raise Violation(f"index {index.name}: {fact} is dead, but its row is {row}")
        if not error.startswith("DeliveryRejected"):
            raise Violation(f"index {index.name}: {fact} is dead because of {error}")

    def _compare_ledger(self, state: State, fact: FactKey, wanted: str | None) -> None:
        recorded = state.ledger.get(fact)
        given = None if recorded is None or recorded.delivered.deleted else recorded.delivered.fingerprint
        if given != wanted:
            raise Violation(f"the ledger says {recorded} of {fact}, the truth is {wanted}")


def _short(value: Any) -> str:
    if isinstance(value, (Upsert, Remove)):
        return f"{type(value).__name__}({_short(value.writes)})"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], PointWrite):
        return ", ".join(
            f"{''.join(write.fact)}={None if write.point is None else write.point.fingerprint}@{write.epoch}"
            for write in value
        )
    return str(value)


def point(fact: FactKey, row: Row, *, marked: bool = False) -> Point:
    """The point of a row. Its vector is its text."""
    assert row.fingerprint is not None
    return Point("".join(fact), cast("Any", row.text), row.fingerprint, 0, {ENTITY: fact[0]} if marked else {}, None)


def is_poison(write: PointWrite) -> bool:
    return write.point is not None and write.point.text == REFUSED_BY_INDEX


class Told(NamedTuple):
    """A history, and the error in it, if any."""

    config: Config
    what: str | None
    trace: list[str]

    def __str__(self) -> str:
        outcome = f"seed {self.config.seed}: {self.what or 'nothing went wrong'}"
        return "\n".join((outcome, str(self.config), *self.trace, outcome))


def simulate(config: Config, world_class: type[World] = World, counts: Counter[str] | None = None) -> str | None:
    """Run a history. Returns its error, if any."""
    world = world_class(config)
    try:
        world.run()
    except Exception as error:
        return _named(error)
    finally:
        if counts is not None:
            counts.update(world.counts)
    return None


def explain(config: Config, world_class: type[World] = World) -> Told:
    """Run the history again, with a record of its events."""
    world = world_class(config, traced=True)
    what = None
    try:
        world.run()
    except Exception as error:
        what = _named(error)
    return Told(config, what, world.trace or [])


def _named(error: Exception) -> str:
    return str(error) if isinstance(error, Violation) else f"{type(error).__name__}: {error}"

"""Undo the writes of failed agent runs in a database with other runs, and prove that nothing of them is left.

``python examples/revoke_failed_runs.py [--data FOLDER] [--url URL] [--by run|transaction|all] [--chroma]``

200 recorded runs of an airline agent (tau-bench) are replayed into one database, one call of each run in turn. Then
``memory.revoke(session, session_id=…)`` undoes every run that earned no reward. Only the calls of the other runs are
replayed into a second database. Tables and vectors of both databases are compared, row by row. They may differ in
facts that the reports of ``revoke`` named, and in no others.

The design of the tables decides how much can be undone:

- One call replaces one whole row. A call replaces all flights of a reservation, or all of its passengers. So
  `Itinerary` and `Party` are separate rows: a later change of the passengers does not prevent the undo of the flights.
- Each payment is a separate row (`Payment`), which is added and never changed. Its undo never has a conflict. A balance
  that each call reads and writes (`PaymentMethod.amount`) is the opposite. After another run has spent from the card,
  restoring a row cannot undo an earlier charge, so `revoke` reports it. An application that sums up its payments has no
  such fact.
- `revoke` leaves a whole fact alone if another run's change is among the changes of the run. With one transaction at a
  time, the newest first (``--by transaction``), it also undoes the run's changes after that change. Then only balances
  differ.
- A row says which call wrote it last (`last_call`). Without it, a call that writes the present value would change
  nothing in the database. The undo of the first of two such calls would then undo both.

Each run was recorded on a separate database. So a replayed call writes the values of its recorded result. Ids that a
call made up get the name of its run. The balance of a card that several runs use may go below zero.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy import JSON, Engine, ForeignKey, create_engine, insert, inspect, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from memstate_sa import Memory, sqlite
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.testing import HashEmbedder

Fact: TypeAlias = tuple[str, Any]
"""A table, and a primary key in it."""

Granularity: TypeAlias = Literal["run", "transaction", "all"]
"""The changes that one call of `revoke` undoes. It leaves whole facts alone, so smaller calls undo more."""

console = Console(width=None if sys.stdout.isatty() else 120)


# -- the application: models -------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]
    membership: Mapped[str]


class PaymentMethod(Base):
    """A card or a certificate. A payment uses up a whole certificate."""

    __tablename__ = "payment_method"
    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey(User.id), index=True)
    source: Mapped[str]
    amount: Mapped[int | None]
    last_call: Mapped[str | None]

    def __str__(self) -> str:
        return f"{self.source} {self.id} of {self.user_id}" + ("" if self.amount is None else f", worth {self.amount}")


class Reservation(Base):
    __tablename__ = "reservation"
    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey(User.id), index=True)
    origin: Mapped[str]
    destination: Mapped[str]
    flight_type: Mapped[str]
    cabin: Mapped[str]
    insurance: Mapped[str]
    created_at: Mapped[str]
    total_baggages: Mapped[int]
    nonfree_baggages: Mapped[int]
    status: Mapped[str]
    last_call: Mapped[str | None]
    itinerary: Mapped[Itinerary] = relationship()
    party: Mapped[Party] = relationship()

    def __str__(self) -> str:
        return f"{self.user_id} flies {self.origin} to {self.destination} in {self.cabin}, {self.status}"


class Itinerary(Base):
    """The flights of a reservation. They are replaced together."""

    __tablename__ = "itinerary"
    reservation_id: Mapped[str] = mapped_column(ForeignKey(Reservation.id), primary_key=True)
    flights: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    last_call: Mapped[str | None]

    def __str__(self) -> str:
        return ", ".join(f"{f['flight_number']} {f['origin']}-{f['destination']} on {f['date']}" for f in self.flights)


class Party(Base):
    """The passengers of a reservation. They are replaced together."""

    __tablename__ = "party"
    reservation_id: Mapped[str] = mapped_column(ForeignKey(Reservation.id), primary_key=True)
    passengers: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    last_call: Mapped[str | None]

    def __str__(self) -> str:
        return ", ".join(f"{p['first_name']} {p['last_name']}, born {p['dob']}" for p in self.passengers)


class Payment(Base):
    """A payment for a reservation, or a refund. It is added, and never changed."""

    __tablename__ = "payment"
    id: Mapped[str] = mapped_column(primary_key=True)
    reservation_id: Mapped[str] = mapped_column(ForeignKey(Reservation.id), index=True)
    method_id: Mapped[str] = mapped_column(ForeignKey(PaymentMethod.id), index=True)
    amount: Mapped[int]

    def __str__(self) -> str:
        return f"{self.amount} by {self.method_id} for {self.reservation_id}"


TEXTS: dict[type[Base], Callable[[Any], str]] = {
    User: lambda user: f"{user.name}, {user.membership} member, {user.email}",
    PaymentMethod: str,
    Reservation: str,
    Itinerary: str,
    Party: str,
    Payment: str,
}
"""The text of each class to embed."""


# -- the application: the writes of the agent's tools ------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of a write tool that succeeded: its *arguments*, its *result*, and the payments it added."""

    run: str
    number: int
    tool: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    payments: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.run}/{self.number}"


def book_reservation(session: Session, call: Call) -> None:
    session.add(_reservation(call.result, last_call=call.name))
    session.flush()
    _pay(session, call)


def cancel_reservation(session: Session, call: Call) -> None:
    reservation = session.get_one(Reservation, call.result["reservation_id"])
    reservation.status, reservation.last_call = call.result["status"], call.name
    _pay(session, call, settled=False)


def update_reservation_flights(session: Session, call: Call) -> None:
    itinerary = session.get_one(Itinerary, call.result["reservation_id"])
    itinerary.flights, itinerary.last_call = call.result["flights"], call.name
    _pay(session, call)


def update_reservation_passengers(session: Session, call: Call) -> None:
    party = session.get_one(Party, call.result["reservation_id"])
    party.passengers, party.last_call = call.result["passengers"], call.name


def update_reservation_baggages(session: Session, call: Call) -> None:
    reservation = session.get_one(Reservation, call.result["reservation_id"])
    reservation.total_baggages = call.result["total_baggages"]
    reservation.nonfree_baggages = call.result["nonfree_baggages"]
    reservation.last_call = call.name
    _pay(session, call)


def send_certificate(session: Session, call: Call) -> None:
    to, amount = call.arguments["user_id"], call.arguments["amount"]
    certificate = call.result["certificate_id"]
    session.add(PaymentMethod(id=certificate, user_id=to, source="certificate", amount=amount, last_call=call.name))


def _pay(session: Session, call: Call, *, settled: bool = True) -> None:
    """Add the payments of *call*. Without *settled*, they are only announced, like refunds, and no balance changes."""
    reservation = call.result["reservation_id"]
    for number, payment in enumerate(call.payments):
        method = session.get_one(PaymentMethod, payment["payment_id"])
        session.add(Payment(id=f"{call.name}-{number}", reservation_id=reservation, method_id=method.id,
                            amount=payment["amount"]))  # fmt: skip
        if settled and method.amount is not None:
            method.amount = 0 if method.source == "certificate" else method.amount - payment["amount"]
            method.last_call = call.name


WRITE_TOOLS: dict[str, Callable[[Session, Call], None]] = {
    tool.__name__: tool
    for tool in (
        book_reservation,
        cancel_reservation,
        send_certificate,
        update_reservation_baggages,
        update_reservation_flights,
        update_reservation_passengers,
    )
}


def _reservation(record: dict[str, Any], last_call: str | None = None) -> Reservation:
    return Reservation(
        **_fields(record),
        last_call=last_call,
        itinerary=Itinerary(flights=record["flights"], last_call=last_call),
        party=Party(passengers=record["passengers"], last_call=last_call),
    )


def _fields(record: dict[str, Any]) -> dict[str, Any]:
    names = (
        "user_id", "origin", "destination", "flight_type", "cabin", "insurance", "created_at", "total_baggages",
        "nonfree_baggages",
    )  # fmt: skip
    fields = {name: record[name] for name in names}
    return {"id": record["reservation_id"], "status": record.get("status", "booked"), **fields}


# -- the recorded runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    id: str
    failed: bool
    calls: list[Call]


@dataclass(frozen=True)
class Recording:
    """The database at the start of the runs, and the runs."""

    users: dict[str, Any]
    reservations: dict[str, Any]
    runs: list[Run]

    @classmethod
    def read(cls, folder: Path) -> Recording:
        users, reservations, trajectories = (
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("users", "reservations", "trajectories")
        )
        runs = [
            Run(name, run["reward"] < 1, list(_calls(name, run["traj"], reservations)))
            for run in trajectories
            for name in [f"task{run['task_id']}-trial{run['trial']}"]
        ]
        return cls(users, reservations, runs)

    def calls(self, *, failed: bool | None = None) -> list[Call]:
        """The calls of all runs, or of the runs that *failed* or did not. One call of each run comes in turn."""
        wanted = [run.calls if failed in (None, run.failed) else [] for run in self.runs]
        return [call for turn in zip_longest(*wanted) for call in turn if call is not None]


def _calls(run: str, messages: list[dict[str, Any]], reservations: dict[str, Any]) -> Iterator[Call]:
    paid = {id_: len(each["payment_history"]) for id_, each in reservations.items()}
    answers = {(n, m["tool_call_id"]): m["content"] for n, m in enumerate(messages) if m["role"] == "tool"}
    asked = [(n, call) for n, message in enumerate(messages) for call in message.get("tool_calls") or ()]
    number = 0
    for position, asked_for in asked:
        tool, answer = asked_for["function"]["name"], answers.get((position + 1, asked_for["id"]), "Error")
        if tool not in WRITE_TOOLS or answer.startswith("Error"):
            continue
        arguments = json.loads(asked_for["function"]["arguments"])
        if tool == "send_certificate":  # "Certificate certificate_3221322 added to user …"
            yield Call(run, number, tool, arguments, {"certificate_id": f"{run}:{answer.split()[1]}"}, [])
        else:
            result = json.loads(answer)
            id_ = result["reservation_id"]
            history = result["payment_history"]
            added = history[paid.get(id_, 0) :]
            paid[id_] = len(history)
            if id_ not in reservations:  # HATHAT is the first booking of every run
                result["reservation_id"] = f"{run}:{id_}"
            yield Call(run, number, tool, arguments, result, added)
        number += 1


# -- a database and its memory -----------------------------------------------------------------------------------------


class Airline:
    """The application on one database, and its memory."""

    def __init__(self, engine: Engine, index: VectorIndex) -> None:
        self.engine = engine
        self.index = index
        self._transactions: dict[str, str | None] = {}  # the transaction of each call
        self.memory = Memory(index, embedder=HashEmbedder())
        for model, text in TEXTS.items():
            self.memory.track(model, text=text)
        self.sessions = sessionmaker(engine)
        self.memory.attach(self.sessions)
        Base.metadata.create_all(engine)
        self.memory.create_tables(engine)

    def load(self, recording: Recording) -> None:
        """Write the database at the start of the runs, in one transaction."""
        rows: dict[type[Base], list[dict[str, Any]]] = {model: [] for model in TEXTS}
        for id_, user in recording.users.items():
            name = f"{user['name']['first_name']} {user['name']['last_name']}"
            rows[User].append({"id": id_, "name": name, "email": user["email"], "membership": user["membership"]})
            rows[PaymentMethod] += [
                {"id": key, "user_id": id_, "source": method["source"], "amount": method.get("amount")}
                for key, method in user["payment_methods"].items()
            ]
        for id_, record in recording.reservations.items():
            rows[Reservation].append(_fields(record))
            rows[Itinerary].append({"reservation_id": id_, "flights": record["flights"]})
            rows[Party].append({"reservation_id": id_, "passengers": record["passengers"]})
            rows[Payment] += [
                {"id": f"{id_}-{n}", "reservation_id": id_, "method_id": paid["payment_id"], "amount": paid["amount"]}
                for n, paid in enumerate(record["payment_history"])
            ]
        with self.sessions() as session:
            for model, some in rows.items():
                session.execute(insert(model), some)
            session.commit()

    def replay(self, calls: Sequence[Call], title: str) -> None:
        """Make the calls, each in one transaction."""
        for call in track(calls, title, console=console, transient=True):
            with self.sessions() as session:
                self.memory.annotate(session, session_id=call.run, actor="agent", reason=call.tool)
                WRITE_TOOLS[call.tool](session, call)
                session.commit()
                self._transactions[call.name] = self.memory.token(session)

    def revoke(self, calls: Sequence[Call], by: Granularity = "run") -> Revoked:
        """Undo *calls*, the last one first. So a failed run is undone before an earlier failed run that it built on."""
        newest = list(reversed(calls))
        requests: dict[Granularity, list[dict[str, Any]]] = {
            "run": [{"session_id": run} for run in dict.fromkeys(call.run for call in newest)],
            "transaction": [{"tx": [self._transactions[call.name]]} for call in newest],
            "all": [{"tx": [self._transactions[call.name] for call in newest]}],
        }
        revoked = Revoked()
        for request in track(requests[by], "revoking", console=console, transient=True):
            with self.sessions() as session:
                revoked.add(self.memory.revoke(session, **request))
                session.commit()
        return revoked

    def deliver(self) -> None:
        self.memory.relay(self.engine).drain(timeout=600)

    def state(self) -> State:
        return State(self.rows(), self.vectors())

    def rows(self) -> dict[Fact, dict[str, Any]]:
        found: dict[Fact, dict[str, Any]] = {}
        with self.sessions() as session:
            for model in TEXTS:
                table = inspect(model).local_table
                [key] = inspect(model).primary_key
                found.update(
                    {
                        (model.__tablename__, row[key.name]): dict(row)
                        for row in session.execute(select(table)).mappings()
                    }
                )
        return found

    def vectors(self) -> dict[Fact, np.ndarray[Any, Any]]:
        found: dict[Fact, np.ndarray[Any, Any]] = {}
        after: str | None = None
        while entries := self.index.scan(after, 1000):
            after = entries[-1].id
            for stored in self.index.get([entry.id for entry in entries]):
                table, _, key = stored.id.partition("[")
                found[table, json.loads(f"[{key}")[0]] = stored.vector
        return found


@dataclass(frozen=True)
class State:
    """The content of a database and of its index."""

    rows: dict[Fact, dict[str, Any]]
    vectors: dict[Fact, np.ndarray[Any, Any]]


@dataclass
class Revoked:
    """The reports of `Memory.revoke`, added up."""

    reverted: int = 0
    kept: set[Fact] = field(default_factory=set)
    in_the_way: set[Fact] = field(default_factory=set)

    def add(self, report: Any) -> None:
        self.reverted += len(report.reverted)
        self.kept |= {(change.entity, change.key) for change in report.kept}
        self.in_the_way |= {(change.entity, change.key) for change in report.conflicts}

    @property
    def reported(self) -> set[Fact]:
        return self.kept | self.in_the_way


# -- the proof ---------------------------------------------------------------------------------------------------------


@dataclass
class Proof:
    """The changes that were undone, and the differences from a replay of the other runs alone."""

    revoked: Revoked
    differing_rows: set[Fact]
    differing_vectors: set[Fact]
    facts: int
    seconds: dict[str, float]

    @property
    def holds(self) -> bool:
        return self.differing_rows | self.differing_vectors <= self.revoked.reported


def replay_the_others(recording: Recording, airline: Airline) -> State:
    """Replay only the runs that did not fail, and return the expected state."""
    airline.load(recording)
    airline.replay(recording.calls(failed=False), "the other runs alone")
    airline.deliver()
    return airline.state()


def prove(recording: Recording, airline: Airline, expected: State, by: Granularity = "run") -> Proof:
    """Replay all runs in *airline*, revoke the failed runs, and compare the result with *expected*."""
    seconds: dict[str, float] = {}

    def timed(what: str, action: Callable[[], Any]) -> Any:
        start = perf_counter()
        result = action()
        seconds[what] = perf_counter() - start
        return result

    timed("load", lambda: airline.load(recording))
    timed("replay", lambda: airline.replay(recording.calls(), "all runs"))
    timed("deliver", airline.deliver)
    revoked = timed("revoke", lambda: airline.revoke(recording.calls(failed=True), by))
    timed("deliver what was revoked", airline.deliver)
    found = airline.state()
    rows, vectors = found.rows.keys() | expected.rows.keys(), found.vectors.keys() | expected.vectors.keys()
    none = np.empty(0)
    return Proof(
        revoked,
        {fact for fact in rows if found.rows.get(fact) != expected.rows.get(fact)},
        {
            fact
            for fact in vectors
            if not np.array_equal(found.vectors.get(fact, none), expected.vectors.get(fact, none))
        },
        len(found.rows),
        seconds,
    )


def show(recording: Recording, proof: Proof) -> None:
    table = Table(title="Failed runs, revoked", title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in (
        ("runs", len(recording.runs)),
        ("write calls", len(recording.calls())),
        ("runs revoked", sum(run.failed for run in recording.runs)),
        ("  their write calls", len(recording.calls(failed=True))),
        ("changes reverted", proof.revoked.reverted),
        ("facts of which a change was kept", len(proof.revoked.kept)),
        ("facts that others had changed since (conflicts)", len(proof.revoked.in_the_way)),
        ("facts in the database", proof.facts),
        ("facts that differ from a clean replay", len(proof.differing_rows)),
        ("vectors that differ", len(proof.differing_vectors)),
        ("  of both, not reported", len((proof.differing_rows | proof.differing_vectors) - proof.revoked.reported)),
    ):
        table.add_row(label, f"{value:,}")
    for label, seconds in proof.seconds.items():
        table.add_row(f"seconds: {label}", f"{seconds:.2f}")
    console.print(table)
    for name, key in sorted(proof.differing_rows):
        console.print(f"  differs, as reported: {name} {key}")
    console.print("[green]proved[/]" if proof.holds else "[red]differs where nothing was reported[/]")


# -- the command -------------------------------------------------------------------------------------------------------


def shared_data() -> Path:
    beside = Path(__file__).parent.parent.parent / "shared" / "data"
    return Path(os.environ.get("MEMSTATE_SHARED_DATA", beside)) / "tau_bench_airline"


def open_engine(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    return engine


def _index(home: Path, name: str, *, chroma: bool) -> VectorIndex:
    if not chroma:
        return InMemoryIndex()
    import chromadb

    from memstate_sa.indexes import ChromaIndex

    return ChromaIndex(chromadb.PersistentClient(str(home / name)), "memory")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=shared_data(), help="the folder tau_bench_airline")
    parser.add_argument("--url", help="an empty database (default: a temporary SQLite file)")
    parser.add_argument("--by", choices=get_args(Granularity), default="run", help="what one call of revoke takes back")
    parser.add_argument("--chroma", action="store_true", help="two persistent Chroma indexes instead of arrays")
    given = parser.parse_args()
    if not (given.data / "trajectories.json").is_file():
        parser.error(f"no trajectories.json in {given.data}; MEMSTATE_SHARED_DATA names the folder above it")
    recording = Recording.read(given.data)
    with TemporaryDirectory(prefix="revoke-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        engines = [
            open_engine(given.url or f"sqlite:///{home / 'all.db'}"),
            open_engine(f"sqlite:///{home / 'good.db'}"),
        ]
        if inspect(engines[0]).get_table_names():
            parser.error("the database is not empty")
        airline, other = (
            Airline(engine, _index(home, name, chroma=given.chroma))
            for engine, name in zip(engines, ("all", "good"), strict=True)
        )
        try:
            proof = prove(recording, airline, replay_the_others(recording, other), given.by)
        finally:
            for each in (airline, other):
                each.memory.close()
                each.engine.dispose()
    show(recording, proof)
    return 0 if proof.holds else 1


if __name__ == "__main__":
    sys.exit(main())

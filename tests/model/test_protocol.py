"""The relay's protocol, checked in every interleaving that its bounds allow.

The model states the promises of the protocol. Breaking a rule shows that the rule is needed.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from tests.model.explore import Found, Model, exhaust, walk
from tests.model.protocol import (
    NO_FAULTS,
    NO_ROW,
    A,
    B,
    C,
    Change,
    Config,
    Faults,
    Landing,
    Rule,
    State,
    Violation,
    initial,
    successors,
    wrong,
)
from tests.support import PATIENCE_S, sizes

# MEMSTATE_FAULTS=2,1,1,1 (see `Faults`) and MEMSTATE_WALKS=5000 search more. MEMSTATE_SEED takes other walks.
BOUNDS = [Faults(crashes=1, expiries=1, failures=1), Faults(expiries=1, releases=1)]
if given := os.environ.get("MEMSTATE_FAULTS"):
    BOUNDS = [Faults(*map(int, given.split(",")))]
WALKS = int(os.environ.get("MEMSTATE_WALKS", "50"))
SEED = int(os.environ.get("MEMSTATE_SEED", "11"))

STRICT = (Change(B, strict=True), Change(A))


def model(config: Config) -> Model[State]:
    return Model(initial(config), partial(successors, config=config), partial(wrong, config=config))


def search(landing: Landing, **options: Any) -> Found:
    return exhaust(model(Config(landing, **options)))


# -- the whole protocol ------------------------------------------------------------------------------------------------


@pytest.mark.deep
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("faults", BOUNDS, ids=str)
@pytest.mark.parametrize("landing", Landing, ids=lambda landing: landing.name)
def test_every_interleaving_converges(landing: Landing, faults: Faults) -> None:
    """One key, two workers: with any faults, the index ends with the truth, and never holds uncommitted content."""
    found = search(landing, faults=faults)
    assert found.violation is None, str(found)
    assert found.states > 5_000


@pytest.mark.deep
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("landing", Landing, ids=lambda landing: landing.name)
def test_strict_writes_converge(landing: Landing) -> None:
    """The application writes the index itself, and dies or rolls back anywhere, while the slot changes hands."""
    faults = BOUNDS[0] if given else Faults(crashes=1, expiries=1, releases=1)
    found = search(landing, changes=STRICT, faults=faults)
    assert found.violation is None, str(found)
    assert found.states > 5_000


@pytest.mark.parametrize("landing", Landing, ids=lambda landing: landing.name)
def test_every_interleaving_of_one_crash_converges(landing: Landing) -> None:
    """The small version of the searches above."""
    for faults, changes in ((Faults(crashes=1), {}), (Faults(expiries=1), {"changes": STRICT[:1]})):
        found = search(landing, faults=faults, **changes)
        assert found.violation is None, str(found)
        assert found.states > 300


# -- each rule is needed -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The conditions under which breaking a rule shows."""

    broken: Rule
    landing: Landing = Landing.DEADLINE
    faults: Faults = NO_FAULTS
    options: dict[str, Any] = field(default_factory=dict)
    ends: Violation = Violation.DIVERGED

    def __str__(self) -> str:
        return f"{self.broken.name}-{self.landing.name}"


ONE_STRICT = {"changes": (Change(B, strict=True),)}
TWO_CHANGES = {"changes": (Change(B), Change(A))}
TWO_KEYS = {"changes": (Change(B, key=0), Change(B, key=1), Change(A, key=1)), "slots": (0, 0)}

CASES = [
    Case(Rule.READ_BEFORE_ACK),
    Case(Rule.TRUTH_AFTER_CLAIM),
    Case(Rule.FENCE_BY_EPOCH, Landing.FENCED, Faults(crashes=1)),
    Case(Rule.FENCE_BY_EPOCH, Landing.FENCED, Faults(expiries=1)),
    Case(Rule.FENCE_TOMBSTONES, Landing.FENCED, Faults(crashes=1)),
    Case(Rule.SETTLE_ON_TAKEOVER, faults=Faults(crashes=1)),
    Case(Rule.SETTLE_ON_TAKEOVER, Landing.FENCED, Faults(crashes=1)),
    Case(Rule.SETTLE_ON_TAKEOVER, Landing.REPORTED, Faults(crashes=1)),
    Case(Rule.REDIRTY, Landing.REPORTED, Faults(expiries=1)),
    Case(Rule.NO_LOCK_IN_CALL, faults=Faults(expiries=1), ends=Violation.BLOCKED),
    Case(Rule.READ_COMMITTED, ends=Violation.GHOST),
    Case(Rule.LEASES_END, faults=Faults(crashes=1), ends=Violation.STUCK),
    Case(Rule.SNAPSHOTS),
    Case(Rule.CHECK_LEASE, Landing.FENCED, Faults(crashes=1, expiries=1), TWO_CHANGES),
    Case(Rule.CHECK_EPOCH, Landing.REPORTED, Faults(expiries=1)),
    Case(Rule.SETTLE_TO_PRESENT, faults=Faults(crashes=1, expiries=1), options=TWO_KEYS),
    Case(Rule.SETTLE_ALL_PAGES, faults=Faults(crashes=1), options=TWO_KEYS),
    Case(Rule.RELEASE_SETTLED, faults=Faults(crashes=1, releases=1)),
    Case(Rule.RELEASE_SETTLED, Landing.FENCED, Faults(crashes=1, releases=1)),
    Case(Rule.SETTLE_FAILED, faults=Faults(failures=1)),
    Case(Rule.SETTLE_PARKED, Landing.REPORTED, Faults(expiries=1), TWO_CHANGES),
    Case(Rule.PARKING_VERSION, Landing.REPORTED, Faults(expiries=2), TWO_CHANGES),
    Case(Rule.REPEAT_UNANSWERED, faults=Faults(failures=1)),
    Case(Rule.REPEAT_UNANSWERED, Landing.FENCED, Faults(failures=1)),
    Case(Rule.WAIT_FOR_LEASE, faults=Faults(crashes=1)),
    Case(Rule.INTENT, options=ONE_STRICT),
    Case(Rule.INTENT_XID, options={**ONE_STRICT, "late_calls": False}),
    Case(Rule.INTENT_SETTLES, options=ONE_STRICT),
    Case(Rule.INTENT_AGAIN, faults=Faults(crashes=1), options=ONE_STRICT),
    Case(Rule.INTENT_AGAIN, Landing.FENCED, Faults(crashes=1), ONE_STRICT),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_rule_can_be_left_out(case: Case) -> None:
    """With the rule nothing goes wrong. Without it, the shortest way to a violation ends as expected."""
    config = Config(case.landing, faults=case.faults, **case.options)
    whole = exhaust(model(config))
    assert whole.violation is None, str(whole)
    found = exhaust(model(replace(config, broken=case.broken)))
    assert found.violation is case.ends, f"{case.broken.value}: {found}"
    assert found.trace


def test_every_rule_has_a_case() -> None:
    """A rule that no case needs is not a rule."""
    assert {case.broken for case in CASES} == set(Rule)


def test_a_counterexample_can_be_read() -> None:
    """The shortest counterexample: a cursor that is an id passes a transaction that commits late."""
    found = search(Landing.FENCED, changes=(Change(B, slow=True), Change(NO_ROW)), broken=Rule.SNAPSHOTS)
    assert str(found).splitlines() == [
        "Violation.DIVERGED after 8 steps:",
        "  1 transaction 1 takes its xid",
        "  2 transaction 2 commits k0 = -",
        "  3 a worker claims as holder 1",
        "  4 holder 1 opens a window: entries 1,2",
        "  5 holder 1 reads k0 = -",
        "  6 holder 1 writes k0 = -",
        "  7 holder 1 acknowledges",
        "  8 transaction 1 commits k0 = b",
    ]


# -- walks through spaces that are too large ---------------------------------------------------------------------------

RARE = {
    "rolls back": 0.1,
    "crashes": 0.2,
    "releases": 0.2,
    "the lease of": 0.3,
    "lands late": 0.3,
    "fail": 0.5,
    "transaction": 0.5,
}


def weight(label: str) -> float:
    """The weight of a move: the relay is fast, and faults and rollbacks are rare. Other walks end before trouble."""
    return next((weight for part, weight in RARE.items() if part in label), 1.0)


def random_walk(seed: int, landing: Landing, slots: tuple[int, ...], broken: Rule | None = None) -> Found:
    """Walk through a space of two keys, three workers, two indexes, twelve transactions and many faults."""
    choose = random.Random(seed)
    changes = tuple(
        Change(choose.choice((NO_ROW, A, B, C)), key=choose.randrange(2), slow=choose.random() < 0.3) for _ in range(12)
    )
    faults = Faults(crashes=3, expiries=5, failures=4, releases=3)
    config = Config(landing, changes, faults, slots, workers=3, indexes=2, broken=broken)
    return walk(model(config), seed, weight)


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("walks", sizes(4, WALKS))
@pytest.mark.parametrize("slots", [(0, 1), (0, 0)], ids=["two-slots", "one-slot"])
@pytest.mark.parametrize("landing", Landing, ids=lambda landing: landing.name)
def test_random_walks_converge(landing: Landing, slots: tuple[int, ...], walks: int) -> None:
    """Every walk ends with two indexes that hold the truth."""
    for seed in range(SEED, SEED + walks):
        found = random_walk(seed, landing, slots)
        assert found.violation is None, f"seed {seed}: {found}"


@pytest.mark.parametrize(
    ("broken", "landing"),
    [
        (Rule.READ_BEFORE_ACK, Landing.DEADLINE),
        (Rule.TRUTH_AFTER_CLAIM, Landing.DEADLINE),
        (Rule.FENCE_BY_EPOCH, Landing.FENCED),
        (Rule.SETTLE_ON_TAKEOVER, Landing.DEADLINE),
        (Rule.NO_LOCK_IN_CALL, Landing.DEADLINE),
        (Rule.REPEAT_UNANSWERED, Landing.FENCED),
    ],
    ids=lambda value: value.name,
)
def test_random_walks_find_a_broken_protocol(broken: Rule, landing: Landing) -> None:
    """Walks of the same kind find the violations of a broken protocol."""
    assert any(random_walk(seed, landing, (0, 1), broken).violation for seed in range(60))


def test_a_walk_can_be_repeated() -> None:
    """The seed alone decides the walk."""
    first, second = (random_walk(7, Landing.FENCED, (0, 1), Rule.READ_BEFORE_ACK) for _ in range(2))
    assert first == second

"""The consequences of leaving a fact out of an undo."""

from __future__ import annotations

from hypothesis import given, strategies as st

from memstate_sa.db.codec import FactKey
from memstate_sa.undo.constraints import Constraints, FactsByValue, Reference, Uniqueness

_FACTS = [("fact", str(n)) for n in range(6)]
_values = st.one_of(st.none(), st.integers(0, 3))
_states = st.lists(st.tuples(_values, _values, _values, _values), min_size=len(_FACTS), max_size=len(_FACTS))


def _side(now: list[int | None], then: list[int | None]) -> FactsByValue:
    facts = FactsByValue()
    for fact, before, after in zip(_FACTS, now, then, strict=True):
        facts.add(fact, before, after)
    return facts


@given(states=_states, out=st.sets(st.sampled_from(_FACTS)))
def test_facts_that_are_not_left_out_keep_the_constraints(
    states: list[tuple[int | None, ...]], out: set[FactKey]
) -> None:
    """No row gets a missing value or another row's value. No row loses a value that is referred to."""
    own, own_then, refers, refers_then = ([state[n] for state in states] for n in range(4))
    unique = Uniqueness(_side(own, own_then))
    reference = Reference(_side(refers, refers_then), _side(own, own_then))
    blocked = Constraints([unique, reference]).blocked_facts(out)
    assert blocked.keys().isdisjoint(out)
    left_out = out | blocked.keys()
    value_of = [n if fact in left_out else t for fact, n, t in zip(_FACTS, own, own_then, strict=True)]
    refers_to = [n if fact in left_out else t for fact, n, t in zip(_FACTS, refers, refers_then, strict=True)]
    for n, fact in enumerate(_FACTS):
        if fact not in left_out:
            if own_then[n] is not None and own_then[n] != own[n]:
                assert value_of.count(own_then[n]) == 1
            if refers_then[n] is not None and refers_then[n] != refers[n]:
                assert refers_then[n] in value_of
            if own[n] is not None and own[n] not in value_of:
                assert own[n] not in refers_to
    assert Constraints([unique, reference]).blocked_facts(left_out) == {}


def test_a_chain_is_left_out_whole_and_a_bystander_is_not() -> None:
    """Each link stays because the next one refers to it. The last link stays because of another's row."""
    referring, referred = FactsByValue(), FactsByValue()
    for n in range(1, 4):
        referring.add(("node", str(n)), n - 1 or None, None)
        referred.add(("node", str(n)), n, None)
    referring.add(("node", "theirs"), 3, 3)
    referred.add(("node", "9"), 9, None)
    assert Constraints([Reference(referring, referred)]).blocked_facts(()) == {
        ("node", "3"): ("node", "theirs"),
        ("node", "2"): ("node", "3"),
        ("node", "1"): ("node", "2"),
    }

"""Search a state space: all of it, breadth first, or by seeded walks if it is too large."""

from __future__ import annotations

import gc
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)


class Found(NamedTuple):
    """The result of a search: the number of states, and the shortest way to a violation, if there is one."""

    states: int
    violation: object = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.violation is None:
            return f"no violation in {self.states} states"
        steps = "\n".join(f"{n:3} {label}" for n, label in enumerate(self.trace, 1))
        return f"{self.violation} after {len(self.trace)} steps:\n{steps}"


class Model(NamedTuple, Generic[S]):
    """A state space, and its forbidden states. ``wrong`` also gets whether the state has no successor."""

    initial: S
    successors: Callable[[S], Iterable[tuple[str, S]]]
    wrong: Callable[[S, bool], object]


def exhaust(model: Model[S]) -> Found:
    """Visit every reachable state. Stop at the first violation, which has the shortest way."""
    came_from: dict[S, S | None] = {model.initial: None}
    queue = deque([model.initial])
    with _no_garbage_collection():
        while queue:
            state = queue.popleft()
            is_last = True
            for _, successor in model.successors(state):
                is_last = False
                if successor not in came_from:
                    came_from[successor] = state
                    queue.append(successor)
            if wrong := model.wrong(state, is_last):
                return Found(len(came_from), wrong, _trace(model, came_from, state))
    return Found(len(came_from))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Stop the garbage collector in this block. It takes a quarter of the time, but states have no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def walk(model: Model[S], seed: int, weight: Callable[[str], float] = lambda label: 1.0) -> Found:
    """Take random steps until nothing can happen, or something is wrong. A seed always gives the same walk."""
    choose = random.Random(seed)
    state, labels = model.initial, list[str]()
    while True:
        steps = list(model.successors(state))
        if wrong := model.wrong(state, not steps):
            return Found(len(labels) + 1, wrong, tuple(labels))
        if not steps:
            return Found(len(labels) + 1)
        label, state = choose.choices(steps, [weight(label) for label, _ in steps])[0]
        labels.append(label)


def _trace(model: Model[S], came_from: dict[S, S | None], state: S) -> tuple[str, ...]:
    """The labels of the way to *state*, computed again. Stored labels would need more room than the states."""
    labels = []
    while (before := came_from[state]) is not None:
        labels.append(next(label for label, successor in model.successors(before) if successor == state))
        state = before
    return tuple(reversed(labels))

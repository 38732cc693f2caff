"""A misspelt option is an error that names the closest option."""

from __future__ import annotations

from collections.abc import Callable
from inspect import iscoroutinefunction, signature
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from memstate_sa import Memory
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Person

MISSPELT: dict[str, tuple[Callable[..., Any], str]] = {
    "Memory": (lambda memory, session, **_: Memory(InMemoryIndex(), embeder=HashEmbedder()), "embedder"),
    "track": (lambda memory, session: memory.track(Person, text="about", immutabel=True), "immutable"),
    "search": (lambda memory, session: memory.search(session, "tea", Person, consistancy="fresh"), "consistency"),
    "search's limit": (lambda memory, session: memory.search(session, "tea", Person, limt=3), "limit"),
    "history": (lambda memory, session: memory.history(session, Person, lmit=2), "limit"),
    "relay": (lambda memory, session: memory.relay(session.bind, pagesize=3), "page_size"),
    "rollback": (lambda memory, session: memory.rollback(session, dryrun=True), "dry_run"),
    "rollback's session_id": (lambda memory, session: memory.rollback(session, sesion_id="run-1"), "session_id"),
    "rollback's steps": (lambda memory, session: memory.rollback(session, stesp=2), "steps"),
    "revoke": (lambda memory, session: memory.revoke(session, acter="ann"), "actor"),
    "search session": (lambda memory, session: memory.search(session, "tea", Person, limt=3, session="t"), "limit"),
    "rollback session": (lambda memory, session: memory.rollback(session, session="t"), "session_id"),
    "revoke session": (lambda memory, session: memory.revoke(session, session="t"), "session_id"),
    "backfill": (lambda memory, session: memory.backfill(session.bind, batchsize=3), "batch_size"),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_option_names_the_close_match(case: str) -> None:
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    call, meant = MISSPELT[case]
    function = case.replace("'", " ").split(maxsplit=1)[0]
    with pytest.raises(TypeError, match=rf"{function}\(\) has no option '\w+'\. Did you mean '{meant}'\?"):
        call(memory, Session(create_engine("sqlite://")))


def test_an_option_that_resembles_none_lists_them_all() -> None:
    with pytest.raises(TypeError, match=r"has no option 'xyz'\. The options are page_size, lease_s, poll_s"):
        Memory(InMemoryIndex(), embedder=HashEmbedder()).relay(create_engine("sqlite://"), xyz=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["history", "as_of", "diff", "rollback", "revoke", "erase"])
def test_an_async_method_has_the_signature_of_its_sync_method(name: str) -> None:
    asynchronous = getattr(Memory, f"a{name}")
    assert signature(asynchronous) == signature(getattr(Memory, name))
    assert iscoroutinefunction(asynchronous)
    assert asynchronous.__name__ == f"a{name}"
    assert asynchronous.__doc__.startswith(f"`{name}` for an AsyncSession.")

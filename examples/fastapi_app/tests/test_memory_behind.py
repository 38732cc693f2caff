"""Searches while no relay runs: the index is outdated, but no answer is."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from conftest import Join
from httpx import AsyncClient
from sqlalchemy import update
from test_memory import contact, found, in_index, note, sent

from crm.database import Sessions, engine
from crm.memory import memory
from crm.models import Note


@pytest.fixture
async def running() -> AsyncIterator[None]:
    """Run the service without its lifespan, which would start a relay."""
    yield
    await engine.dispose()


async def deliver() -> None:
    await asyncio.to_thread(memory.relay(engine).drain)


async def test_a_deleted_note_is_not_found_by_its_vector(join: Join, ada: AsyncClient) -> None:
    colleague = await join(ada)
    tomas = await contact(ada)
    lisbon, violin = await note(ada, tomas, "Flies to Lisbon"), await note(ada, tomas, "Plays the violin")
    await deliver()
    assert await found(ada, "a trip to Portugal") == ["Flies to Lisbon", "Plays the violin"]
    await sent(ada, "DELETE", f"/notes/{lisbon}")
    assert f"note[{lisbon}]" in await in_index()
    assert await found(ada, "a trip to Portugal") == ["Plays the violin"]
    # On SQLite the next note gets the id of the deleted one, and its vector with it.
    await note(colleague, tomas, "Opens at five")
    for question in ("a trip to Portugal", "Flies to Lisbon"):
        assert await found(colleague, question) == ["Opens at five"]
        assert await found(ada, question) == ["Plays the violin"]
    await deliver()
    assert f"note[{violin}]" in await in_index()
    assert await found(colleague, "a trip to Portugal") == ["Opens at five"]


async def test_a_note_is_found_by_what_it_says_now(ada: AsyncClient) -> None:
    """A stale vector does not hide a note. It does not let a search find the note by its old text."""
    tomas = await contact(ada)
    changing = await note(ada, tomas, "Flies to Lisbon on Monday")
    await note(ada, tomas, "Works from home on Tuesday")
    await deliver()
    await sent(ada, "PATCH", f"/notes/{changing}", json={"body": "Plays the violin in an orchestra"})
    assert (await found(ada, "classical music concert"))[0] == "Plays the violin in an orchestra"
    before = await sent(ada, "GET", "/search/notes", params={"q": "classical music concert"})
    await deliver()
    after = await sent(ada, "GET", "/search/notes", params={"q": "classical music concert"})
    assert [hit["fact"] for hit in before] == [hit["fact"] for hit in after]
    assert [hit["distance"] for hit in before] == pytest.approx([hit["distance"] for hit in after], abs=1e-5)


async def test_what_was_moved_to_another_owner_is_its(join: Join, ada: AsyncClient) -> None:
    """The index still has the earlier owner, and the select() decides."""
    colleague = await join(ada)
    mine = await note(ada, await contact(ada), "Flies to Lisbon")
    await deliver()
    new_owner = (await sent(colleague, "GET", "/users/me"))["id"]
    async with Sessions() as session:
        await session.execute(update(Note).where(Note.id == mine).values(owner_id=new_owner))
        await session.commit()
    assert await found(ada, "a trip to Portugal") == []
    assert await found(colleague, "a trip to Portugal") == ["Flies to Lisbon"]

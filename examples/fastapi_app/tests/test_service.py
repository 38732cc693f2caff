"""The service itself, with a memory or without one."""

import asyncio
from typing import Any

from alembic import command
from alembic.config import Config
from conftest import Join
from httpx import AsyncClient


async def contact(user: AsyncClient, **given: Any) -> int:
    made = await user.post("/contacts", json={"name": "Tomas", **given})
    assert made.status_code == 201, made.text
    return made.json()["id"]


async def test_who_has_no_key_is_nobody(ada: AsyncClient) -> None:
    for authorization in ("", "Bearer ", "Bearer guessed", "Basic YTpi", b"Bearer \xff"):
        answer = await ada.get("/users/me", headers={"Authorization": authorization})
        assert answer.status_code == 401, authorization
    me = (await ada.get("/users/me")).json()
    assert (await ada.post("/users", json={"name": "Again", "email": me["email"]})).status_code == 409


async def test_contacts_are_shared_in_an_account_alone(join: Join, ada: AsyncClient) -> None:
    colleague, stranger = await join(ada), await join()
    tomas = await contact(ada, company="Bakery")
    changed = await colleague.patch(f"/contacts/{tomas}", json={"about": "bakes at night"})
    assert changed.json() == {"id": tomas, "name": "Tomas", "company": "Bakery", "about": "bakes at night"}
    assert (await ada.get("/contacts")).json() == [changed.json()]
    assert (await stranger.get("/contacts")).json() == []
    for answer in (
        await stranger.get(f"/contacts/{tomas}"),
        await stranger.patch(f"/contacts/{tomas}", json={"name": "Mine"}),
        await stranger.delete(f"/contacts/{tomas}"),
        await stranger.post("/notes", json={"contact_id": tomas, "body": "spy"}),
    ):
        assert answer.status_code == 404
    assert (await ada.get(f"/contacts/{tomas}")).json() == changed.json()


async def test_notes_are_their_writers(join: Join, ada: AsyncClient) -> None:
    colleague = await join(ada)
    tomas = await contact(ada)
    given = {"contact_id": tomas, "body": "likes rye", "tags": ["bread", "bread"]}
    note = (await ada.post("/notes", json=given)).json()
    assert (note["body"], note["tags"]) == ("likes rye", ["bread"])
    assert (await ada.post("/notes", json={"contact_id": tomas, "body": "likes oats"})).json()["tags"] == []
    changed = (await ada.patch(f"/notes/{note['id']}", json={"tags": ["bread", "grain"]})).json()
    assert changed["body"] == "likes rye" and sorted(changed["tags"]) == ["bread", "grain"]
    for method, payload in (("GET", None), ("PATCH", {"body": "mine"}), ("DELETE", None)):
        assert (await colleague.request(method, f"/notes/{note['id']}", json=payload)).status_code == 404
    assert (await colleague.get("/notes")).json() == []
    assert [each["id"] for each in (await ada.get("/notes", params={"tag": "grain"})).json()] == [note["id"]]
    assert (await ada.get("/notes", params={"tag": "fruit"})).json() == []
    assert (await ada.delete(f"/notes/{note['id']}")).status_code == 204
    assert [each["body"] for each in (await ada.get("/notes")).json()] == ["likes oats"]


async def test_a_contact_goes_with_its_notes(join: Join, ada: AsyncClient) -> None:
    colleague = await join(ada)
    tomas = await contact(ada)
    for user in (ada, colleague):
        made = await user.post("/notes", json={"contact_id": tomas, "body": "a note", "tags": ["one"]})
        assert made.status_code == 201
    assert (await ada.delete(f"/contacts/{tomas}")).status_code == 204
    assert (await ada.get("/notes")).json() == (await colleague.get("/notes")).json() == []


async def test_what_makes_no_sense_is_refused(ada: AsyncClient) -> None:
    tomas = await contact(ada)
    for answer in (
        await ada.post("/contacts", json={"name": ""}),
        await ada.patch(f"/contacts/{tomas}", json={"name": None}),
        await ada.post("/notes", json={"contact_id": tomas, "body": ""}),
        await ada.post("/notes", json={"contact_id": tomas, "body": "x", "tags": [""]}),
    ):
        assert answer.status_code == 422


async def test_the_migrations_lead_to_the_models(database: Config) -> None:
    """`alembic revision --autogenerate` would write nothing now."""
    await asyncio.to_thread(command.check, database)

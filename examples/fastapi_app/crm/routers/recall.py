"""The endpoints of the memory: notes and contacts by their meaning, undo, and the history of a note."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, status
from pydantic import BaseModel

from crm.auth import CurrentUser, actor_of
from crm.database import DatabaseSession
from crm.memory import memory
from crm.models import Note
from crm.routers.contacts import OurContacts
from crm.routers.notes import MyNotes
from crm.schemas import ContactOut, FromRow, NoteOut
from memstate_sa import Change, ConflictError

router = APIRouter(tags=["memory"])

Question = Annotated[str, Query(alias="q", min_length=1, max_length=1000)]
Limit = Annotated[int, Query(ge=1, le=50)]


class NoteHit(FromRow):
    fact: NoteOut
    distance: float


class ContactHit(FromRow):
    fact: ContactOut
    distance: float


class Changed(FromRow):
    """A change without its values, because undo may also restore notes of other users about a contact."""

    entity: str
    key: Any
    op: str


class NoteChange(Changed):
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    at: datetime
    session_id: str | None


class Conflict(BaseModel):
    message: str = "Cannot undo: another user has changed these facts since, or uses them."
    facts: list[str]


@router.get("/search/notes", response_model=list[NoteHit])
async def search_notes(question: Question, session: DatabaseSession, mine: MyNotes, limit: Limit = 5) -> Any:
    """Search with the select() that lists the caller's notes: each hit is a row of it."""
    return await memory.asearch(session, question, mine, limit=limit)


@router.get("/search/contacts", response_model=list[ContactHit])
async def search_contacts(question: Question, session: DatabaseSession, ours: OurContacts, limit: Limit = 5) -> Any:
    return await memory.asearch(session, question, ours, limit=limit)


@router.post("/undo", response_model=list[Changed], responses={status.HTTP_409_CONFLICT: {"model": Conflict}})
async def undo(
    session: DatabaseSession,
    user: CurrentUser,
    steps: Annotated[int, Query(ge=1, le=20)] = 1,
    session_id: str | None = None,
) -> Any:
    """Undo the last request of the caller, or several (*steps*), or only requests with one X-Session-ID."""
    try:
        changes = await memory.arollback(session, steps, actor=actor_of(user), session_id=session_id)
    except ConflictError as error:
        facts = sorted({f"{change.entity} {change.key}" for change in error.changes})
        raise HTTPException(status.HTTP_409_CONFLICT, Conflict(facts=facts).model_dump()) from error
    await session.commit()
    return changes


@router.get("/notes/{note_id}/history", response_model=list[NoteChange])
async def read_history(note_id: int, session: DatabaseSession, user: CurrentUser) -> Any:
    """The changes of a note while it belonged to the caller. The note may be deleted.

    We check the owner before and after each change. SQLite gives the id of a deleted note to the next one, which may
    belong to another user. Also, the owner of a note may change.
    """

    def mine(image: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        return image if image and image.get("owner_id") == user.id else None

    def seen(change: Change) -> Change:
        session_id = change.session_id if change.actor == actor_of(user) else None
        return replace(change, before=mine(change.before), after=mine(change.after), session_id=session_id)

    changes = map(seen, await memory.ahistory(session, Note, note_id))
    found = [change for change in changes if change.before or change.after]
    if not found:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such note")
    return found

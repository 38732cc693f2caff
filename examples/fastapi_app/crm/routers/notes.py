"""Notes: each belongs to one user, and only that user sees it."""

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, status
from sqlalchemy import Select, select

from crm.auth import CurrentUser
from crm.database import DatabaseSession
from crm.models import Note, NoteTag, Tag, User
from crm.routers.contacts import OurContacts, get_contact
from crm.schemas import NoteChange, NoteIn, NoteOut

router = APIRouter(prefix="/notes", tags=["notes"])


def get_mine(user: CurrentUser, contact_id: int | None = None, tag: str | None = None) -> Select[Any]:
    """The notes that the caller may see. The query can restrict them to one contact or one tag."""
    notes = select(Note).where(Note.owner_id == user.id)
    if contact_id is not None:
        notes = notes.where(Note.contact_id == contact_id)
    if tag is not None:
        notes = notes.where(Note.links.any(NoteTag.tag.has(Tag.name == tag)))
    return notes


MyNotes = Annotated[Select[Any], Depends(get_mine)]


async def get_note(note_id: int, session: DatabaseSession, user: CurrentUser) -> Note:
    note: Note | None = await session.scalar(get_mine(user).where(Note.id == note_id))
    if note is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such note")
    return note


OneNote = Annotated[Note, Depends(get_note)]


@router.get("", response_model=list[NoteOut])
async def list_notes(session: DatabaseSession, mine: MyNotes) -> Any:
    return (await session.scalars(mine.order_by(Note.id))).all()


@router.post("", response_model=NoteOut, status_code=status.HTTP_201_CREATED)
async def create_note(given: NoteIn, session: DatabaseSession, user: CurrentUser, ours: OurContacts) -> Any:
    contact = await get_contact(given.contact_id, session, ours)
    note = Note(owner_id=user.id, contact_id=contact.id, body=given.body)
    note.links = [NoteTag(tag=tag) for tag in await _tags(session, user, given.tags)]
    session.add(note)
    await session.commit()
    return note


@router.get("/{note_id}", response_model=NoteOut)
async def read_note(note: OneNote) -> Any:
    return note


@router.patch("/{note_id}", response_model=NoteOut)
async def change_note(given: NoteChange, note: OneNote, session: DatabaseSession, user: CurrentUser) -> Any:
    if "body" in given.model_fields_set:
        note.body = given.body
    if "tags" in given.model_fields_set:
        note.tags = await _tags(session, user, given.tags)
    await session.commit()
    return note


@router.delete("/{note_id}", status_code=status.HTTP_204_NO_CONTENT)
async def delete_note(note: OneNote, session: DatabaseSession) -> None:
    await session.delete(note)
    await session.commit()


async def _tags(session: DatabaseSession, user: User, names: Iterable[str]) -> list[Tag]:
    """The account's tags of these names. Tags that the account does not have yet are added."""
    names = list(dict.fromkeys(names))
    found = await session.scalars(select(Tag).where(Tag.account_id == user.account_id, Tag.name.in_(names)))
    known = {tag.name: tag for tag in found}
    return [known.get(name) or Tag(account_id=user.account_id, name=name) for name in names]

"""Contacts: all users of an account share them."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, status
from sqlalchemy import Select, select

from crm.auth import CurrentUser
from crm.database import DatabaseSession
from crm.models import Contact
from crm.schemas import ContactChange, ContactIn, ContactOut

router = APIRouter(prefix="/contacts", tags=["contacts"])


def get_ours(user: CurrentUser) -> Select[Any]:
    """The contacts that the caller may see."""
    return select(Contact).where(Contact.account_id == user.account_id)


OurContacts = Annotated[Select[Any], Depends(get_ours)]


async def get_contact(contact_id: int, session: DatabaseSession, ours: OurContacts) -> Contact:
    contact: Contact | None = await session.scalar(ours.where(Contact.id == contact_id))
    if contact is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such contact")
    return contact


OneContact = Annotated[Contact, Depends(get_contact)]


@router.get("", response_model=list[ContactOut])
async def list_contacts(session: DatabaseSession, ours: OurContacts) -> Any:
    return (await session.scalars(ours.order_by(Contact.name, Contact.id))).all()


@router.post("", response_model=ContactOut, status_code=status.HTTP_201_CREATED)
async def create_contact(given: ContactIn, session: DatabaseSession, user: CurrentUser) -> Any:
    contact = Contact(account_id=user.account_id, **given.model_dump())
    session.add(contact)
    await session.commit()
    return contact


@router.get("/{contact_id}", response_model=ContactOut)
async def read_contact(contact: OneContact) -> Any:
    return contact


@router.patch("/{contact_id}", response_model=ContactOut)
async def change_contact(given: ContactChange, contact: OneContact, session: DatabaseSession) -> Any:
    for name, value in given.model_dump(exclude_unset=True).items():
        setattr(contact, name, value)
    await session.commit()
    return contact


@router.delete("/{contact_id}", status_code=status.HTTP_204_NO_CONTENT)
async def delete_contact(contact: OneContact, session: DatabaseSession) -> None:
    """Delete the contact, with the notes of all users about it."""
    await session.refresh(contact, ["notes"])
    await session.delete(contact)
    await session.commit()

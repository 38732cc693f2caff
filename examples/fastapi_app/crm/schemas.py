"""The bodies of requests and answers."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=100)]
Email = Annotated[str, Field(max_length=254, pattern=r"^[^@\s]+@[^@\s]+$")]
Body = Annotated[str, Field(min_length=1, max_length=10_000)]


def _name(tag: Any) -> Any:
    return getattr(tag, "name", tag)


TagName = Annotated[str, BeforeValidator(_name), Field(min_length=1, max_length=40)]


class FromRow(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class UserIn(BaseModel):
    name: Name
    email: Email


class AccountIn(UserIn):
    account: Name


class UserOut(FromRow):
    id: int
    account_id: int
    name: str
    email: str


class NewUserOut(UserOut):
    key: str
    """The service shows the key only once, because it stores only a digest of the key."""


class ContactIn(BaseModel):
    name: Name
    company: Name | None = None
    about: Body | None = None


class ContactChange(BaseModel):
    name: Name = ""
    company: Name | None = None
    about: Body | None = None


class ContactOut(FromRow):
    id: int
    name: str
    company: str | None
    about: str | None


class NoteIn(BaseModel):
    contact_id: int
    body: Body
    tags: list[TagName] = []


class NoteChange(BaseModel):
    body: Body = ""
    tags: list[TagName] = []


class NoteOut(FromRow):
    id: int
    contact_id: int
    body: str
    tags: list[TagName]
    created_at: datetime
    updated_at: datetime

"""`Fact`, the ready-made model of `MemoryStore`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import Boolean, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa.db.tables import StoredJson, UTCDateTime, metadata, utcnow
from memstate_sa.errors import MemstateError


class OwnBase(DeclarativeBase):
    metadata = metadata


class Fact(OwnBase):
    """A fact for applications without models of their own: a type and a JSON payload."""

    __tablename__ = "memstate_fact"

    if TYPE_CHECKING:  # the ORM's own __init__, for type checkers: they refuse a misspelt or missing argument

        def __init__(
            self,
            *,
            type: str,
            payload: Mapping[str, Any],
            id: str = ...,
            session_id: str | None = ...,
            ephemeral: bool = ...,
            created_at: datetime = ...,
            updated_at: datetime = ...,
            expires_at: datetime | None = ...,
        ) -> None: ...

    id: Mapped[str] = mapped_column(String(64), primary_key=True, default=lambda: uuid4().hex)
    type: Mapped[str] = mapped_column(String(128), index=True)
    payload: Mapped[dict[str, Any]] = mapped_column(StoredJson)
    session_id: Mapped[str | None] = mapped_column(Text, index=True)
    ephemeral: Mapped[bool] = mapped_column(Boolean(create_constraint=False), default=False)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=utcnow)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime, default=utcnow, onupdate=utcnow)
    expires_at: Mapped[datetime | None] = mapped_column(UTCDateTime, index=True)

    def __repr__(self) -> str:
        return f"Fact(id={self.id!r}, type={self.type!r}, payload={self.payload!r})"


def expiry_after(ttl: Any) -> datetime:
    """The ``expires_at`` of a fact that ends after *ttl*."""
    if not isinstance(ttl, timedelta) or ttl <= timedelta():
        raise MemstateError(f"ttl={ttl!r} is not a positive timedelta. Give, for example, timedelta(hours=1).")
    try:
        return utcnow() + ttl
    except OverflowError as error:
        raise MemstateError(f"ttl={ttl!r} ends after the year 9999. Give a shorter timedelta.") from error

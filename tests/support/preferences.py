"""A model with a schema."""

from __future__ import annotations

from pydantic import BaseModel, Field, field_validator, model_validator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Preference(Base):
    __tablename__ = "preference"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str | None]
    strength: Mapped[int] = mapped_column(default=5)
    low: Mapped[int] = mapped_column(server_default="1")


class PreferenceSchema(BaseModel):
    content: str = Field(min_length=3)
    strength: int = Field(ge=0, le=10)
    low: int

    @field_validator("content")
    @classmethod
    def no_shouting(cls, value: str) -> str:
        if value.isupper():
            raise ValueError("no shouting")
        return value

    @model_validator(mode="after")
    def ordered(self) -> PreferenceSchema:
        if self.low > self.strength:
            raise ValueError("low is above strength")
        return self

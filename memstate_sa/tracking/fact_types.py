"""The types of a MemoryStore's facts: their declarations by `register_schema`, and the checks of payloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from memstate_sa.db.codec import is_text
from memstate_sa.errors import MemstateError, ValidationFailed
from memstate_sa.tracking.payloads import check_payload, invalid, unique_text
from memstate_sa.tracking.validation import read_names, to_validation_failed


@dataclass(frozen=True)
class FactType:
    """A declared type of facts."""

    model: type[BaseModel]
    unique_by: tuple[tuple[str, ...], ...]
    """For each field, the names under which the model reads it from a payload."""
    immutable: bool


class FactTypes:
    """The declared types. With *strict*, a fact of another type is not valid."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._types: dict[str, FactType] = {}

    def register(self, name: str, model: Any, unique_by: str | Sequence[str] | None, *, immutable: bool) -> None:
        """Declare a type. Raises MemstateError when *model* is no Pydantic model, or lacks a field of *unique_by*."""
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise MemstateError(f"model={model!r} is not a Pydantic model class. Give one.")
        check_texts(type=name)
        fields = (unique_by,) if isinstance(unique_by, str) else tuple(unique_by or ())
        unknown = [field for field in fields if field not in model.model_fields]
        if unknown:
            raise MemstateError(
                f"unique_by={unknown[0]!r} is not a field of {model.__name__}. "
                f"Choose from: {', '.join(model.model_fields)}."
            )
        self._types[name] = FactType(model, tuple(_unique_names(model, field) for field in fields), immutable)

    def name_of(self, model: type[BaseModel]) -> str:
        """The name of the type with this *model*. Raises MemstateError when there is none."""
        name = next((name for name, fact_type in self._types.items() if fact_type.model is model), None)
        if name is None:
            raise MemstateError(f"{model.__name__} is not registered. Call register_schema() first.")
        return name

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise ValidationFailed, or Pydantic's ValidationError, unless a fact may have these values."""
        if "type" not in values or "payload" not in values:
            return  # an attribute is not loaded; the row is checked later
        name, payload = values["type"], values["payload"]
        fact_type = self._types.get(name) if isinstance(name, str) else None
        if fact_type is None:
            if self._strict:
                raise invalid("type", f"Unknown fact type {name!r}. Declare it with register_schema().")
        else:
            fact_type.model.model_validate(payload)
        for column, limit in (("id", 64), ("type", 128), ("session_id", None)):
            value = values.get(column)
            if value is None and column != "type":
                continue
            if not is_text(value) or (limit is not None and not 1 <= len(value) <= limit):
                expected = "a string" if limit is None else f"a string of 1 to {limit} characters"
                raise invalid(column, f"It must be {expected}, without NUL or lone surrogates.")
        check_payload(payload)

    def require_valid(self, values: Mapping[str, Any]) -> None:
        """Raise ValidationFailed unless a fact may have these values."""
        try:
            self.check(values)
        except ValidationError as error:
            raise to_validation_failed("Fact", error) or ValidationFailed() from error

    def unique_values(self, values: Mapping[str, Any]) -> Sequence[Any] | None:
        """The values that no two facts may share: the type and its ``unique_by`` fields. None when one is missing."""
        fact_type = self._types.get(values["type"])
        if fact_type is None or not fact_type.unique_by:
            return None
        payload = values["payload"]
        fields = [next((payload[name] for name in names if name in payload), None) for names in fact_type.unique_by]
        return None if None in fields else [values["type"], *map(unique_text, fields)]

    def is_immutable(self, values: Mapping[str, Any]) -> bool:
        """Whether a fact with these values may only be added and deleted."""
        fact_type = self._types.get(values["type"])
        return fact_type is not None and fact_type.immutable


def check_texts(**values: Any) -> None:
    """Raise MemstateError unless each value is None or a string that both databases can hold.

    A driver would refuse such a value only when the transaction ends, with an unclear message.
    """
    for name, value in values.items():
        if value is not None and not is_text(value):
            raise MemstateError(f"{name}={value!r} is not valid. Give a string without NUL or lone surrogates.")


def check_id(id_: Any) -> None:
    """Raise MemstateError unless *id_* can be the id of a fact."""
    if not is_text(id_):
        raise MemstateError(f"id={id_!r} is not a fact's id. Give the string that commit() returned.")


def _unique_names(model: type[BaseModel], field: str) -> tuple[str, ...]:
    aliases = read_names(model, field)
    names = tuple(name for name in aliases if isinstance(name, str))
    if names != aliases:
        raise MemstateError(
            f"Cannot use unique_by={field!r}: its alias is a path (AliasPath) into the payload. Give it an alias that "
            "is a name."
        )
    return names

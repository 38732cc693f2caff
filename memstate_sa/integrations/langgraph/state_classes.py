"""The classes that are allowed in a graph's state: the classes in its schemas, and the classes in ``allow=``.

For a value of another class, LangGraph's serializer returns a dict or a string. Ours raises an error.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from enum import Enum
from functools import partial, wraps
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from weakref import WeakSet

import ormsgpack
from langgraph.checkpoint.serde import jsonplus
from langgraph.checkpoint.serde._msgpack import SAFE_MSGPACK_TYPES
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.pregel import Pregel
from langgraph.types import Send
from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError
from typing_extensions import is_typeddict

from memstate_sa.errors import MemstateError

Name = tuple[str, ...]
"""The module and the name of a class. LangGraph stores them with a value."""

_OPTIONS = ormsgpack.OPT_NON_STR_KEYS
_BY_KEYWORDS, _BY_METHOD = jsonplus.EXT_CONSTRUCTOR_KW_ARGS, jsonplus.EXT_METHOD_SINGLE_ARG
_MODELS = (jsonplus.EXT_PYDANTIC_V1, jsonplus.EXT_PYDANTIC_V2)


class StateSerializer(JsonPlusSerializer):
    """LangGraph's msgpack serializer, restricted to allowed classes. Raises MemstateError for other classes."""

    def __init__(self, allow: Iterable[Any] = ()) -> None:
        """*allow* holds classes and schemas. A schema stands for all classes in its fields."""
        super().__init__(allowed_msgpack_modules=None)
        annotations = [*allow, SecretStr, SecretBytes]
        # None means that only the name is known. The class is imported when a value is read.
        self._known: dict[Name, type[Any] | None] = {_name(cls): cls for cls in annotations if isinstance(cls, type)}
        self._known.update(named_by(annotations))
        self._graphs: WeakSet[Any] = WeakSet()

    def learn(self, graph: Any) -> None:
        """Allow the classes in the schemas of *graph*."""
        if graph not in self._graphs:
            self._known.update(named_by(_schemas(graph)))
            self._graphs.add(graph)

    def with_msgpack_allowlist(self, extra_allowlist: Iterable[Name | type]) -> JsonPlusSerializer:
        """Allow further classes, and return this serializer itself, so that the checkpointer keeps it."""
        for name_or_class in extra_allowlist:
            if isinstance(name_or_class, type):
                self._known[_name(name_or_class)] = name_or_class
            else:
                self._known.setdefault(name_or_class, None)
        return self

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        if data[0] != "msgpack":
            return super().loads_typed(data)
        errors: list[Exception] = []  # ormsgpack would replace these errors by its own
        try:
            return ormsgpack.unpackb(data[1], ext_hook=partial(self._unpacked, errors), option=_OPTIONS)
        except ValueError:
            if errors:
                raise errors[0]  # noqa: B904  # the first error has the reason, and its own cause
            raise

    def _unpacked(self, errors: list[Exception], code: int, data: bytes) -> Any:
        if code == jsonplus.EXT_NUMPY_ARRAY:
            return self._unpack_ext_hook(code, data)
        # This call is outside the try, because a nested `_unpacked` has already added its error.
        content = ormsgpack.unpackb(data, ext_hook=partial(self._unpacked, errors), option=_OPTIONS)
        if code == jsonplus.EXT_DELTA_SNAPSHOT:
            return _DeltaSnapshot(content)
        try:
            name, stored, method = tuple(content[:2]), content[2], content[3] if code == _BY_METHOD else None
            cls = self._allowed(name)
            with _explained(name):
                return _built(cls, code, stored, method)
        except Exception as error:
            errors.append(error)
            raise

    def _reviver(self, value: dict[str, Any]) -> Any:
        """Build an object from JSON, which LangGraph used before msgpack."""
        *module, class_name = value.get("id") or ("",)
        name = (".".join(module), class_name)
        is_object = value.get("lc") == 2 and value.get("type") == "constructor"
        if not is_object or name in SAFE_MSGPACK_TYPES or name[0] == "builtins":
            return super()._reviver(value)
        cls = self._allowed(name)
        with _explained(name):
            return cls(*(value.get("args") or ()), **(value.get("kwargs") or {}))

    def _allowed(self, name: Name) -> Any:
        if name not in self._known and name not in SAFE_MSGPACK_TYPES:
            raise MemstateError(
                f"Cannot read a value of the graph's state: its class {'.'.join(name)} is not allowed. It is in no "
                f"schema of the graph. Pass the class to the checkpointer: allow=[{name[-1]}]."
            )
        return self._known.get(name) or _imported(name)


def _imported(name: Name) -> Any:
    module, class_name = name
    try:
        return getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise MemstateError(
            f"Cannot read a value of the graph's state: its class {module}.{class_name} does not exist any more. "
            "Define it there again, for example as an alias."
        ) from error


@contextmanager
def _explained(name: Name) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Leave the error's own text out, because it may show the stored value.
        raise MemstateError(
            f"Cannot read a value of the graph's state: {'.'.join(name)} does not accept the stored value "
            f"({type(error).__name__}). Change the class so that it accepts it."
        ) from error


def _built(cls: Any, code: int, stored: Any, method: str | None) -> Any:
    if code in _MODELS:
        return _model(cls, stored)
    if code == _BY_METHOD:
        if method != "fromisoformat" or not issubclass(cls, datetime):
            raise TypeError(method)
        return cls.fromisoformat(stored)
    if code == _BY_KEYWORDS:
        return _dataclass(cls, stored) if dataclasses.is_dataclass(cls) else cls(**stored)
    if code == jsonplus.EXT_CONSTRUCTOR_POS_ARGS:
        return cls(*stored[:2], timeout=stored[2]) if cls is Send and len(stored) > 2 else cls(*stored)
    return cls(stored)


def _model(cls: Any, stored: Any) -> Any:
    """A model with the stored fields, without validation if they are not valid any more."""
    try:
        # A RootModel may hold any value, not only a mapping.
        return cls(**stored) if isinstance(stored, Mapping) else cls.model_validate(stored)
    except (ValidationError, ValueError, TypeError):
        if not isinstance(stored, Mapping):
            raise
        return getattr(cls, "model_construct" if issubclass(cls, BaseModel) else "construct")(**stored)


def _dataclass(cls: Any, stored: Mapping[str, Any]) -> Any:
    """A dataclass, even if ``__init__`` does not take all its fields."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    instance = cls(**{name: value for name, value in stored.items() if name not in fields or fields[name].init})
    for name, value in stored.items():
        if name in fields and not fields[name].init:
            object.__setattr__(instance, name, value)
    return instance


# -- classes in a graph's schemas -------------------------------------------------------------------------------------


def _schemas(graph: Any) -> Iterator[Any]:
    for channel in graph.channels.values():
        yield from (getattr(channel, name, None) for name in ("ValueType", "UpdateType"))
    yield getattr(graph, "context_schema", None)
    builder = getattr(graph, "builder", None)
    if builder is None:  # an entrypoint, whose channels may have annotations as strings
        for node in graph.nodes.values():
            bound = getattr(node, "bound", None)
            yield from _hints(getattr(bound, "func", None) or getattr(bound, "afunc", None))
    else:
        yield from (builder.state_schema, builder.input_schema, builder.output_schema)
        yield from (node.input_schema for node in builder.nodes.values())
        yield from (branch.input_schema for branches in builder.branches.values() for branch in branches.values())


def named_by(annotations: Iterable[Any]) -> dict[Name, type[Any]]:
    """The data classes in *annotations*, and in the fields of these classes."""
    classes: dict[Name, type[Any]] = {}
    seen: set[Any] = set()
    stack = list(annotations)
    while stack:
        annotation = stack.pop()
        try:
            if annotation in seen:
                continue
            seen.add(annotation)
        except TypeError:  # an Annotated may contain an unhashable object
            pass
        if isinstance(annotation, type) and _is_data(annotation):
            classes[_name(annotation)] = annotation
        stack += _parts(annotation)
    return classes


def _name(cls: type[Any]) -> Name:
    return cls.__module__, cls.__name__


def _is_data(cls: type[Any]) -> bool:
    return (
        _is_model(cls)
        or dataclasses.is_dataclass(cls)
        or issubclass(cls, (Enum, SecretStr, SecretBytes))
        or (issubclass(cls, tuple) and hasattr(cls, "_fields"))
    )


def _is_model(cls: type[Any]) -> bool:
    return issubclass(cls, BaseModel) or hasattr(cls, "__fields__")


def _parts(annotation: Any) -> Iterable[Any]:
    """The annotations inside *annotation*."""
    if isinstance(annotation, TypeVar):
        return (annotation.__bound__, *annotation.__constraints__)
    for alias in ("__value__", "__supertype__"):  # `type X = …` and NewType
        if hasattr(annotation, alias):
            return (getattr(annotation, alias),)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return map(type, arguments)
    if origin is Annotated:
        return arguments[:1]
    if origin is not None:
        return (origin, *arguments)
    if isinstance(annotation, list):  # a Callable has its parameters in a list
        return annotation
    if not isinstance(annotation, type):
        return ()
    if issubclass(annotation, BaseModel):
        return [field.annotation for field in annotation.model_fields.values()]
    if _is_model(annotation):
        return [field.outer_type_ for field in getattr(annotation, "__fields__").values()]  # noqa: B009  # Pydantic 1
    return _hints(annotation) if _is_data(annotation) or is_typeddict(annotation) else ()


def _hints(annotated: Any) -> Iterable[Any]:
    try:
        return get_type_hints(annotated, include_extras=True).values()
    except Exception:  # noqa: BLE001  # an annotation may have a name that only type checkers know
        return ()


def _with_learning(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """LangGraph's *apply*, which also teaches the checkpointer's serializer the graph's schemas."""

    @wraps(apply)
    def apply_and_learn(graph: Any, checkpointer: Any) -> Any:
        graph_checkpointer = apply(graph, checkpointer)
        serde = getattr(graph_checkpointer, "serde", None)
        if isinstance(serde, StateSerializer):
            serde.learn(graph)
        return graph_checkpointer

    return apply_and_learn


# LangGraph passes the graph's schemas to a checkpointer only with LANGGRAPH_STRICT_MSGPACK, which makes all
# checkpointers of the process strict. But each graph gets its checkpointer by this method, so we see the graph here. If
# a version of LangGraph lacks the method, reading a value raises an error that tells what to pass as allow=.
_METHOD = "_apply_checkpointer_allowlist"
if hasattr(Pregel, _METHOD):
    setattr(Pregel, _METHOD, _with_learning(getattr(Pregel, _METHOD)))

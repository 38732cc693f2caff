"""The classes that values in a graph's state may have: those that its schemas name, and those in ``allow=``.

LangGraph's serializer returns a dict or a string for a value whose class is not allowed. Ours raises.
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
"""A class's module and name, as LangGraph stores them with a value."""

_OPTIONS = ormsgpack.OPT_NON_STR_KEYS
_BY_KEYWORDS, _BY_METHOD = jsonplus.EXT_CONSTRUCTOR_KW_ARGS, jsonplus.EXT_METHOD_SINGLE_ARG
_MODELS = (jsonplus.EXT_PYDANTIC_V1, jsonplus.EXT_PYDANTIC_V2)


class StateSerializer(JsonPlusSerializer):
    """LangGraph's msgpack, which builds classes that are allowed and raises MemstateError for a value of another."""

    def __init__(self, allow: Iterable[Any] = ()) -> None:
        """*allow* holds classes, and schemas: these stand for all classes that their fields name."""
        super().__init__(allowed_msgpack_modules=None)
        annotations = [*allow, SecretStr, SecretBytes]
        # None: a class that is known by its name alone, and imported when a value of it is read.
        self._known: dict[Name, type[Any] | None] = {_name(cls): cls for cls in annotations if isinstance(cls, type)}
        self._known.update(named_by(annotations))
        self._graphs: WeakSet[Any] = WeakSet()

    def learn(self, graph: Any) -> None:
        """Allow the classes that the schemas of *graph* name."""
        if graph not in self._graphs:
            self._known.update(named_by(_schemas(graph)))
            self._graphs.add(graph)

    def with_msgpack_allowlist(self, extra_allowlist: Iterable[Name | type]) -> JsonPlusSerializer:
        """Allow these as well: this serializer does from now on, so a checkpointer stays the one that it was."""
        for name_or_class in extra_allowlist:
            if isinstance(name_or_class, type):
                self._known[_name(name_or_class)] = name_or_class
            else:
                self._known.setdefault(name_or_class, None)
        return self

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        if data[0] != "msgpack":
            return super().loads_typed(data)
        errors: list[Exception] = []  # ormsgpack raises another one in their place
        try:
            return ormsgpack.unpackb(data[1], ext_hook=partial(self._unpacked, errors), option=_OPTIONS)
        except ValueError:
            if errors:
                raise errors[0]  # noqa: B904  # the first one knows why, and has its own cause
            raise

    def _unpacked(self, errors: list[Exception], code: int, data: bytes) -> Any:
        if code == jsonplus.EXT_NUMPY_ARRAY:
            return self._unpack_ext_hook(code, data)
        # An error in here has been noted already, where it arose.
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
        """JSON is how LangGraph stored values before msgpack."""
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
                f"Cannot read a value of the graph's state: its class {'.'.join(name)} is not allowed. No schema of "
                f"the graph names it. Pass the class to the checkpointer: allow=[{name[-1]}]."
            )
        return self._known.get(name) or _imported(name)


def _imported(name: Name) -> Any:
    module, class_name = name
    try:
        return getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise MemstateError(
            f"Cannot read a value of the graph's state: its class {module}.{class_name} does not exist any more. "
            "Define it again there, by an alias for example."
        ) from error


@contextmanager
def _explained(name: Name) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Without the error's own text, which may show what was stored.
        raise MemstateError(
            f"Cannot read a value of the graph's state: {'.'.join(name)} does not accept what was stored "
            f"({type(error).__name__}). Change the class so that it does."
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
    """A model, as its fields were: what was valid when it was stored may not be valid now."""
    try:
        return cls(**stored) if isinstance(stored, Mapping) else cls.model_validate(stored)  # the latter a RootModel
    except (ValidationError, ValueError, TypeError):
        if not isinstance(stored, Mapping):
            raise
        return getattr(cls, "model_construct" if issubclass(cls, BaseModel) else "construct")(**stored)


def _dataclass(cls: Any, stored: Mapping[str, Any]) -> Any:
    """A dataclass, also where ``__init__`` does not take each of its fields."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    instance = cls(**{name: value for name, value in stored.items() if name not in fields or fields[name].init})
    for name, value in stored.items():
        if name in fields and not fields[name].init:
            object.__setattr__(instance, name, value)
    return instance


# -- what a graph's schemas name --------------------------------------------------------------------------------------


def _schemas(graph: Any) -> Iterator[Any]:
    for channel in graph.channels.values():
        yield from (getattr(channel, name, None) for name in ("ValueType", "UpdateType"))
    yield getattr(graph, "context_schema", None)
    builder = getattr(graph, "builder", None)
    if builder is None:  # of an entrypoint, whose channels may have the annotations as strings
        for node in graph.nodes.values():
            bound = getattr(node, "bound", None)
            yield from _hints(getattr(bound, "func", None) or getattr(bound, "afunc", None))
    else:
        yield from (builder.state_schema, builder.input_schema, builder.output_schema)
        yield from (node.input_schema for node in builder.nodes.values())
        yield from (branch.input_schema for branches in builder.branches.values() for branch in branches.values())


def named_by(annotations: Iterable[Any]) -> dict[Name, type[Any]]:
    """The classes that *annotations* name, directly or by their fields, and that stand for plain data."""
    classes: dict[Name, type[Any]] = {}
    seen: set[Any] = set()
    stack = list(annotations)
    while stack:
        annotation = stack.pop()
        try:
            if annotation in seen:
                continue
            seen.add(annotation)
        except TypeError:  # Annotated, with something that has no hash
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
    """The annotations that *annotation* is made of."""
    if isinstance(annotation, TypeVar):
        return (annotation.__bound__, *annotation.__constraints__)
    for alias in ("__value__", "__supertype__"):  # of `type X = …`, and of a NewType
        if hasattr(annotation, alias):
            return (getattr(annotation, alias),)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return map(type, arguments)
    if origin is Annotated:
        return arguments[:1]
    if origin is not None:
        return (origin, *arguments)
    if isinstance(annotation, list):  # a Callable's parameters
        return annotation
    if not isinstance(annotation, type):
        return ()
    if issubclass(annotation, BaseModel):
        return [field.annotation for field in annotation.model_fields.values()]
    if _is_model(annotation):
        return [field.outer_type_ for field in getattr(annotation, "__fields__").values()]  # noqa: B009  # of Pydantic 1
    return _hints(annotation) if _is_data(annotation) or is_typeddict(annotation) else ()


def _hints(annotated: Any) -> Iterable[Any]:
    try:
        return get_type_hints(annotated, include_extras=True).values()
    except Exception:  # noqa: BLE001  # a name that exists only for type checkers: reading such a value says what to do
        return ()


def _with_learning(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """LangGraph's *apply*, after which the serializer of the checkpointer knows the graph's schemas."""

    @wraps(apply)
    def apply_and_learn(graph: Any, checkpointer: Any) -> Any:
        graph_checkpointer = apply(graph, checkpointer)
        serde = getattr(graph_checkpointer, "serde", None)
        if isinstance(serde, StateSerializer):
            serde.learn(graph)
        return graph_checkpointer

    return apply_and_learn


# LangGraph gives a checkpointer the graph's schemas only where all checkpointers of the process are strict, by
# LANGGRAPH_STRICT_MSGPACK. Each graph gets its checkpointer by this method, so we learn of the graph here. Without the
# method we learn of none, and reading a value says what to pass as allow=.
_METHOD = "_apply_checkpointer_allowlist"
if hasattr(Pregel, _METHOD):
    setattr(Pregel, _METHOD, _with_learning(getattr(Pregel, _METHOD)))

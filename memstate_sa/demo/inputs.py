"""Parse the demo's input, a conversation log (JSON lines) or a MemoryBank file, into turns of actions. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from memstate_sa.errors import MemstateError

Text: TypeAlias = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class InputError(MemstateError):
    """The demo cannot read this input."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    turn: Annotated[int, Field(ge=1)]
    day: str | None = None
    fact: Text


class Remember(_Line):
    op: Literal["remember"] = "remember"
    user: Text
    role: Text
    text: Text


class Correct(_Line):
    op: Literal["correct"] = "correct"
    text: Text


class Forget(_Line):
    op: Literal["forget"] = "forget"


Action: TypeAlias = Remember | Correct | Forget


class Turn(NamedTuple):
    """All actions on the memory in one exchange with the assistant. They are one transaction."""

    number: int
    day: str | None
    actions: tuple[Action, ...]


class _Chat(BaseModel):
    query: str
    response: str = ""


class _BankUser(BaseModel):
    history: dict[str, list[_Chat]]


_action: TypeAdapter[Action] = TypeAdapter(Annotated[Action, Field(discriminator="op")])
_bank: TypeAdapter[dict[str, _BankUser]] = TypeAdapter(dict[str, _BankUser])


def parse(text: str) -> list[Turn]:
    """The turns in *text*, in order of time. There are two formats.

    JSON lines, with one action a line, and the actions of a turn together::

        {"turn": 1, "op": "remember", "fact": "f1", "user": "ana", "role": "preference", "text": "Likes tea"}
        {"turn": 2, "op": "correct", "fact": "f1", "text": "Likes coffee"}
        {"turn": 3, "op": "forget", "fact": "f1"}

    MemoryBank: ``{user: {"history": {date: [{"query": …, "response": …}]}}}``.

    Raises InputError, which names the line (or the path in the document) and the field.
    """
    if not text.strip():
        raise InputError("The input is empty.")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if not _looks_like_lines(text):
            raise InputError(f"line {error.lineno}: not JSON: {error.msg}") from error
        return _conversation(text)
    if isinstance(document, dict) and not document.keys() & {"op", "turn", "fact"}:
        return _memory_bank(document)
    return _conversation(text)


def _looks_like_lines(text: str) -> bool:
    first = next(line for line in text.splitlines() if line.strip())
    try:
        json.loads(first)
    except json.JSONDecodeError:
        return '"op"' in first  # this is a damaged action, so the error should name its line
    return True


def _conversation(text: str) -> list[Turn]:
    actions: list[Action] = []
    live: set[str] = set()
    seen: set[str] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        action = _parse_action(line, number)
        if actions and action.turn < actions[-1].turn:
            raise InputError(f'line {number}, field "turn": {action.turn} comes after {actions[-1].turn}')
        if isinstance(action, Remember):
            if action.fact in seen:
                raise InputError(f'line {number}, field "fact": {action.fact!r} was remembered before')
            seen.add(action.fact)
            live.add(action.fact)
        elif action.fact not in live:
            raise InputError(f'line {number}, field "fact": {action.fact!r} is not remembered here')
        if isinstance(action, Forget):
            live.remove(action.fact)
        actions.append(action)
    return _turns(actions)


def _parse_action(line: str, number: int) -> Action:
    try:
        return _action.validate_python(json.loads(line))
    except json.JSONDecodeError as error:
        raise InputError(f"line {number}: not JSON: {error.msg} at column {error.colno}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        path = [str(part) for part in problem["loc"] if part not in ("remember", "correct", "forget")]
        if problem["type"].startswith("union_tag"):
            path = ["op"]
        where = f', field "{".".join(path)}"' if path else ""
        raise InputError(f"line {number}{where}: {problem['msg']}") from error


def _memory_bank(document: dict[str, Any]) -> list[Turn]:
    """One turn for each exchange, which remembers the query and the response. The days of all users are interleaved."""
    try:
        users = _bank.validate_python(document)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f'field "{".".join(map(str, problem["loc"]))}": {problem["msg"]}') from error
    chats = [
        (day, name.strip(), chat) for name, user in users.items() for day, day_ in user.history.items() for chat in day_
    ]
    chats.sort(key=lambda chat: chat[0])  # this sort is stable, so the order of the file remains within a day
    actions: list[Action] = []
    for turn, (day, user, chat) in enumerate(chats, start=1):
        for role, text in (("user", chat.query), ("assistant", chat.response)):
            if text.strip():
                actions.append(Remember(turn=turn, day=day, fact=f"{turn}-{role}", user=user, role=role, text=text))
    return _turns(actions)


def _turns(actions: Iterable[Action]) -> list[Turn]:
    turns = [
        Turn(number, together[0].day, together)
        for number, together in ((n, tuple(group)) for n, group in groupby(actions, key=lambda action: action.turn))
    ]
    if len(turns) < 2:
        raise InputError("The demo needs at least two turns: one before the crash, and one after it.")
    return turns

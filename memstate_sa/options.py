"""The option sets of public methods. Each is declared once, for `Memory`, its async methods and `MemoryStore`.

Every option may be left out. The text below an option names its default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from pydantic import BaseModel

    from memstate_sa.embedders import Embedder
    from memstate_sa.log.history import Moment
    from memstate_sa.relay.progress import ProgressOption
    from memstate_sa.relay.retention import Retention
    from memstate_sa.relay.retry import RetryPolicy
    from memstate_sa.tracking.tracked import UniqueValues, Upgrade


class MemoryOptions(TypedDict, total=False):
    """The options of `Memory` and `MemoryStore`."""

    embedder: Embedder | Mapping[str, Embedder] | None
    """The embedder of all indexes, or one for each index by its name. Default: `WordLlamaEmbedder`."""

    delivery: Literal["relay", "strict"]
    """With "relay" (the default) a commit writes the database alone, and a relay brings the indexes up to date.

    With "strict" the indexes are written before COMMIT. A failure raises DeliveryError, and the transaction rolls back.
    Run a relay too: it repairs the index after a crash or a rollback.
    """

    embedding_cache: int
    """The number of vectors that the application's database keeps (default: 100,000). 0 keeps none.

    A rollback, a repeated text and a new index then cost no embedding.
    """

    successors: Mapping[str, str] | None
    """``{"memory": "memory_v2"}``: the second index will replace the first one. Both get the same facts.

    See `Memory.reindex`. Default: none.
    """


class StoreOptions(MemoryOptions, total=False):
    """The options of `MemoryStore` and `AsyncMemoryStore`."""

    background: bool
    """Run a relay in a background thread (default: True). Without it, run one elsewhere: see ``memstate-sa relay``.

    An in-memory SQLite has no such thread. There, each commit delivers to the index.
    """

    strict_types: bool
    """Refuse a fact whose type has no schema, see `MemoryStore.register_schema`. Default: False."""


class Labels(TypedDict, total=False):
    """The labels of a transaction of a `MemoryStore`. History shows them. Undo selects transactions by them."""

    session_id: str | None
    """The session, conversation or thread that the facts belong to."""

    actor: str | None
    """The user or agent that changes the facts."""

    reason: str | None
    """The reason of the change."""


class TrackOptions(TypedDict, total=False):
    """The options of `Memory.track`."""

    metadata: Sequence[str]
    """Column attributes that an index stores beside the vector. Searches filter by them in the index. Default: none."""

    schema: type[BaseModel] | Callable[[Mapping[str, Any]], None] | None
    """A Pydantic model that every write must satisfy, or a function that raises ValidationError. Default: none."""

    entity: str | None
    """The name of the class in our tables. Default: the full name of its table."""

    index: str | Sequence[str] | None
    """The index, or indexes, that get the facts. Default: all."""

    unique_by: Sequence[str] | UniqueValues
    """Column attributes. No two rows may have the same values in all of them. Default: none."""

    immutable: bool | Callable[[Mapping[str, Any]], bool]
    """Whether rows can be added and deleted, but not changed. A function decides for each row. Default: False."""

    on_untracked: Literal["raise", "warn"]
    """The reaction to a write that cannot be captured. Default: "raise"."""

    capture: Literal["session", "trigger"]
    """Capture by the events of Sessions (the default), or by triggers, which see the writes of other programs too.

    `Memory.create_tables` installs the triggers.
    """

    expires: str | None
    """A column attribute with the time when a row expires. Relays call `Memory.sweep`, which deletes expired rows.

    Default: none. The column needs a time zone. A Session refuses a naive time in it (ValidationFailed).
    """

    version: int
    """The number of the class's present shape (default: 1). Add one with each migration that changes its columns."""

    upgrade: Mapping[int, Upgrade] | None
    """A function for each older version. It turns the columns of that version into the columns of the next version.

    Default: none. The function gets a dict of driver-level values, by column name. History from before a migration is
    shown and undone through the function. A value that it passes on stays a driver-level value. The ORM converts a
    value that the function makes, and None is always NULL.
    """

    text_version: int
    """A number to change when a function *text* begins to return other texts (default: 1).

    Relays then deliver every row again. They notice by themselves when *text* is another attribute, or *metadata*
    changes. Until all rows are delivered, `Hits.complete` is False.
    """

    exclude: Sequence[str]
    """Column attributes that the log leaves out: secrets, large files, counters. Default: none.

    A change of these columns alone is no change. History and export do not show them. Undo leaves them as they are. A
    deleted row that undo brings back has their defaults, or NULL. A function *text* cannot read them.
    """


class SearchOptions(TypedDict, total=False):
    """The options of `Memory.search`, beside ``limit``."""

    max_distance: float | None
    """The largest cosine distance of a hit, from 0 (identical) to 2 (opposite). Default: no bound."""

    consistency: Literal["fresh", "eventual"]
    """With "fresh" (the default), undelivered changes are found too, also the changes of this open transaction.

    With "eventual", only delivered changes are found, and the search embeds only its query.
    """

    index: str | None
    """The index to search. Default: the first index of the class."""

    as_of: Moment | None
    """Search the facts as they were at this moment: an aware datetime, or a transaction (``Change.tx``).

    The search is exact, and embeds the texts whose vectors are no longer known. The facts of its hits are detached.
    Default: now.
    """


class HistoryOptions(TypedDict, total=False):
    """The options of `Memory.history`."""

    actor: str | None
    """Only changes of this actor."""

    session_id: str | None
    """Only changes with this session_id."""

    limit: int | None
    """Only the newest changes, at most this number. Default: no bound."""


class RelayOptions(TypedDict, total=False):
    """The options of `Memory.relay`. All times are in seconds."""

    page_size: int
    """The number of keys that are delivered together. Default: 2000."""

    lease_s: float
    """The time that other relays wait for a relay that was killed. Default: 30.

    Choose more than the longest call of an index or embedder takes.
    """

    poll_s: tuple[float, float] | None
    """The shortest and the longest wait between two reads of an idle database.

    Default: 0.002 to 0.05 on SQLite, 0.05 to 5 on PostgreSQL. A commit in the same process is seen at once.
    """

    policy: RetryPolicy | None
    """The delays and the number of attempts after a failure. Default: ``RetryPolicy()``."""

    retention: Retention | None
    """The time for which the log and the ledger are kept. Default: for ever."""


class UndoOptions(TypedDict, total=False):
    """The options that `Memory.rollback` and `Memory.revoke` share."""

    actor: str | None
    """Undo only transactions of this actor."""

    model: type[Any] | None
    """Undo only changes of this tracked class."""

    on_conflict: Literal["raise", "skip", "force"]
    """The reaction to a fact that another transaction has changed since.

    "raise" raises ConflictError, "skip" leaves the fact as it is, "force" overwrites the later change.
    `Memory.rollback` raises by default, `Memory.revoke` skips.
    """

    dry_run: bool
    """Write nothing, and return the entries that would be written. Default: False."""


class RollbackOptions(UndoOptions, total=False):
    """The options of `Memory.rollback`, beside ``session_id``."""

    to: Moment | None
    """Undo everything since this moment, instead of a number of steps."""

    tx: str | None
    """Undo this one transaction (``Change.tx``). The transaction of a rollback redoes the undone changes."""


class RevokeOptions(UndoOptions, total=False):
    """The options of `Memory.revoke`. Give an actor, a session_id, or transactions."""

    session_id: str | None
    """Undo only transactions of this session_id."""

    tx: Sequence[str]
    """Undo these transactions (``Change.tx``)."""


class BackfillOptions(TypedDict, total=False):
    """The options of `Memory.backfill`."""

    batch_size: int
    """The number of rows in one transaction. Default: 1000."""

    rate: float | None
    """The greatest number of rows per second that this call checks. Default: no bound."""

    limit: int | None
    """The greatest number of rows that this call checks. 0 only prepares the work. Default: no bound."""

    restart: bool | None
    """True starts all classes again. False starts no finished class again. By default, finished classes do."""

    progress: ProgressOption
    """A function of the number of rows that all callers have checked, and of the total. True shows a progress bar."""


def require_options(function: Callable[..., object], options: Mapping[str, object], declared: type) -> None:
    """Raise TypeError for an option that is not *declared*, with the name that is closest to it.

    The message also knows the optional parameters of *function* itself.
    """
    for name in options:
        if name not in declared.__annotations__:
            from difflib import get_close_matches

            names = [*_optional_parameters(function), *declared.__annotations__]
            close = get_close_matches(name, names, 1)
            hint = f"Did you mean {close[0]!r}?" if close else f"The options are {', '.join(names)}."
            raise TypeError(f"{function.__name__}() has no option {name!r}. {hint}")


def _optional_parameters(function: Callable[..., object]) -> list[str]:
    from inspect import signature

    return [name for name, parameter in signature(function).parameters.items() if parameter.default != parameter.empty]

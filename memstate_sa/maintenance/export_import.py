"""Export facts with their history as JSON lines, and import them into another database.

A file has these lines:

1. A header.
2. The labels of transactions, in the order of their ids.
3. The entries of the log, in its order, then baselines of rows that the log does not have.
4. A closing line with the number of lines before it. It shows that the file was not cut off between two lines.

Images and keys are written as in the log, in the form of the database's driver. The header names the database, so that
an import into another one can translate them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Annotated, Any, Literal, NamedTuple, TextIO, TypeAlias

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from sqlalchemy import Column, ColumnElement, Select, func, insert, select
from sqlalchemy.engine import Connection, Dialect, Engine, RowMapping, make_url
from sqlalchemy.exc import DBAPIError

from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.db import statements
from memstate_sa.db.codec import FactKey, Image, decode_image, decode_key, encode, encode_key, normalized, to_json
from memstate_sa.db.dialects import BY_NAME, Database, database_of
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.tables import log, transaction, unique, utcnow
from memstate_sa.errors import ConflictError, MemstateError
from memstate_sa.log import outbox, unlogged
from memstate_sa.log.absent_keys import require_absent
from memstate_sa.log.changes import REDACTED, Op, new_tx
from memstate_sa.relay.progress import Progress
from memstate_sa.tracking.inheritance import image_name
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked, unique_value
from memstate_sa.undo.restore import read_facts, restore

FORMAT = 1

_PAGE = 1000
# JSON does not escape these characters, but some readers end a line at them.
_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


# -- lines -------------------------------------------------------------------------------------------------------------


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


_Tx = Annotated[str, Field(min_length=1, max_length=32)]


class _Header(_Line):
    line: Literal["header"] = "header"
    format: int = FORMAT
    dialect: Literal["sqlite", "postgresql"]
    entities: dict[str, int]  # the version of each entity's newest images
    expected: int  # the approximate number of lines that follow


class _Labels(_Line):
    line: Literal["transaction"] = "transaction"
    tx: _Tx
    at: AwareDatetime
    actor: str | None = None
    reason: str | None = None
    session_id: str | None = None


class _LoggedEntry(_Line):
    line: Literal["entry"] = "entry"
    tx: _Tx
    at: AwareDatetime
    entity: str
    key: str
    op: Op
    image: dict[str, Any] | None = None
    version: int
    reverts: _Tx | None = None
    step: bool


class _End(_Line):
    line: Literal["end"] = "end"
    lines: int


_AnyLine: TypeAlias = Annotated[_Header | _Labels | _LoggedEntry | _End, Field(discriminator="line")]
_any_line: TypeAdapter[_Header | _Labels | _LoggedEntry | _End] = TypeAdapter(_AnyLine)
_keys = unnest_strings("keys")


# -- export ------------------------------------------------------------------------------------------------------------


def export_facts(engine: Engine, tracked: Sequence[Tracked], file: TextIO, progress: Progress | None = None) -> int:
    """Write all facts of the classes *tracked*, from one snapshot, and return the number of entries."""
    entries = 0
    with database_of(engine).snapshot(engine) as connection:
        entities = {one.entity: one.version for one in tracked}
        of_entities = _of(entities)
        expected = sum(
            connection.execute(select(func.count()).select_from(statement.subquery())).scalar_one()
            for statement in (_labels(of_entities), select(log.c.id).where(of_entities))
        )
        _write(file, _Header(dialect=database_of(engine).name, entities=entities, expected=expected))  # type: ignore[arg-type]
        number = 1
        for number, line in enumerate(_lines(connection, tracked, of_entities), start=2):
            _write(file, line)
            entries += isinstance(line, _LoggedEntry)
            if progress is not None and number % _PAGE == 0:
                progress(number, max(number, expected))
        _write(file, _End(lines=number))
    if progress is not None:
        progress(number, number)
    return entries


def _write(file: TextIO, line: _Line) -> None:
    values = line.model_dump(exclude_none=True)
    if "at" in values:
        values["at"] = values["at"].isoformat()
    if "image" in values:  # JSONB does not keep the order
        values["image"] = {name: normalized(data) for name, data in sorted(values["image"].items())}
    file.write(to_json(values).translate(_BREAKS) + "\n")


def _of(entities: Iterable[str]) -> ColumnElement[bool]:
    return log.c.entity.in_(list(entities))


def _labels(of_entities: ColumnElement[bool]) -> Select[Any]:
    return select(transaction).where(select(log.c.id).where(log.c.tx == transaction.c.tx, of_entities).exists())


def _lines(
    connection: Connection, tracked: Sequence[Tracked], of_entities: ColumnElement[bool]
) -> Iterator[_Labels | _LoggedEntry]:
    for row in _pages(connection, _labels(of_entities), transaction.c.tx, ""):
        yield _Labels.model_construct(**row)
    for row in _pages(connection, select(log).where(of_entities), log.c.id, 0):
        yield _LoggedEntry.model_construct(
            **{name: value for name, value in row.items() if name in _LoggedEntry.model_fields}
        )
    tx, at = new_tx(), utcnow()
    for one in tracked:
        for images in unlogged.unlogged_rows(connection, one):
            for key, image in images.items():
                yield _LoggedEntry.model_construct(
                    tx=tx,
                    at=at,
                    entity=one.entity,
                    key=key,
                    op="baseline",
                    image=image,
                    version=one.version,
                    step=False,
                )


def _pages(connection: Connection, statement: Select[Any], by: Column[Any], after: Any) -> Iterator[RowMapping]:
    """The rows of *statement* in the order of its column *by*, beginning after *after*. They are read in pages."""
    statement = statement.order_by(by).limit(_PAGE)
    while rows := connection.execute(statement.where(by > after)).mappings().all():
        yield from rows
        after = rows[-1][by.name]


# -- import ------------------------------------------------------------------------------------------------------------


def import_facts(
    engine: Engine, registry: Registry, capture: SessionCapture, file: Iterable[str], progress: Progress | None = None
) -> int:
    """Import a file of `export_facts` in one transaction, and return the number of entries. An error writes nothing."""
    # REPEATABLE READ: the snapshot hides other transactions, so new entries in the log are those of this import.
    with statements.writing(engine, "REPEATABLE READ") as connection:
        return _Import(connection, registry, capture).run(file, progress)


class _Import:
    def __init__(self, connection: Connection, registry: Registry, capture: SessionCapture) -> None:
        self._connection = connection
        self._registry = registry
        self._capture = capture
        self._tx, self._at = new_tx(), utcnow()
        self._since = connection.execute(select(func.coalesce(func.max(log.c.id), 0))).scalar_one()
        self._translations: dict[str, _EntryTranslation] = {}
        self._highest: dict[str, int] = {}  # the highest integer key of each entity
        self._deleted: dict[str, list[str]] = {}  # keys that have no row at the end, by entity

    def run(self, file: Iterable[str], progress: Progress | None) -> int:
        lines = _read(file)
        header = self._begin(next(lines)[1])
        entries = 0
        for batch in _batches(lines):
            labels = [line for _, line in batch if isinstance(line, _Labels)]
            logged = [(number, line) for number, line in batch if isinstance(line, _LoggedEntry)]
            self._add_labels(labels)
            self._add_entries([self._row(number, line, header) for number, line in logged])
            entries += len(logged)
            if progress is not None:
                progress(batch[-1][0], max(header.expected + 1, batch[-1][0]))
        for group in _parents_first([self._registry.by_entity[entity] for entity in header.entities]):
            pages = (page for tracked in group.members for page in self._last_entries(tracked))
            for page in [list(chain.from_iterable(pages))] if group.is_circular else pages:
                self._write_rows(page)
        for entity, keys in self._deleted.items():
            require_absent(self._connection, self._registry.by_entity[entity], keys)
        for entity, highest in self._highest.items():
            table = self._registry.by_entity[entity].table
            database_of(self._connection).skip_keys(self._connection, table, highest)
        return entries

    def _begin(self, header: _Header) -> _Header:
        if unknown := sorted(header.entities.keys() - self._registry.by_entity.keys()):
            raise MemstateError(
                f"line 1: unknown entities: {', '.join(unknown)}. Track their classes before the import."
            )
        for entity, version in header.entities.items():
            if version > (ours := self._registry.by_entity[entity].version):
                raise MemstateError(
                    f"line 1: {entity} has version {version} in the file, but only version {ours} here. Import it "
                    "with the newer application."
                )
        source = BY_NAME[header.dialect]
        if source is not database_of(self._connection):
            for entity in header.entities:
                tracked = self._registry.by_entity[entity]
                self._translations[entity] = _EntryTranslation(tracked, source, self._connection.dialect)
        return header

    # -- log -----------------------------------------------------------------------------------------------------------

    def _row(self, number: int, entry: _LoggedEntry, header: _Header) -> dict[str, Any]:
        """*entry* as a row of the log. Raises MemstateError if the entry cannot be decoded."""
        newest_version = header.entities.get(entry.entity)
        if newest_version is None:
            raise MemstateError(f"line {number}: the header does not name the entity {entry.entity!r}")
        if not REDACTED <= entry.version <= newest_version or (entry.image is None) is not (
            entry.op == "delete" or entry.version == REDACTED
        ):
            raise MemstateError(f"line {number}: op, image and version contradict each other")
        row = {name: value for name, value in entry if name != "line"}
        try:
            is_key = encode_key(decode_key(entry.key)) == entry.key
            decode_image(entry.image or {})
            if entry.entity in self._translations:
                row |= self._translations[entry.entity].translate(entry)
        except Exception as error:  # the application's upgrade function, or a broken value, may raise anything
            raise MemstateError(f"line {number}: {error!r}") from error
        if not is_key:
            raise MemstateError(f"line {number}: {entry.key!r} is not a key in the form of the log")
        [first, *others] = decode_key(row["key"])
        if isinstance(first, int) and not others:
            self._highest[entry.entity] = max(first, self._highest.get(entry.entity, 0))
        return row

    def _add_labels(self, labels: Sequence[_Labels]) -> None:
        txs = [line.tx for line in labels]
        self._require_new(select(transaction.c.tx).where(transaction.c.tx.in_(select(_keys.c.value))), txs)
        if len(set(txs)) < len(txs):
            raise MemstateError("The file has two lines of labels for one transaction.")
        if labels:
            rows = [{name: value for name, value in line if name != "line"} for line in labels]
            self._connection.execute(insert(transaction), rows)

    def _add_entries(self, rows: Sequence[dict[str, Any]]) -> None:
        keys: dict[str, set[str]] = {}
        for row in rows:
            keys.setdefault(row["entity"], set()).add(row["key"])
        older = log.c.id <= self._since
        self._require_new(select(log.c.tx).where(log.c.tx.in_(select(_keys.c.value)), older), [r["tx"] for r in rows])
        for entity, entity_keys in keys.items():
            logged = select(log.c.key).where(log.c.entity == entity, log.c.key.in_(select(_keys.c.value)), older)
            known_keys = set(self._connection.scalars(logged, {"keys": as_array(entity_keys)}))
            present = read_facts(self._connection, self._registry, [(entity, key) for key in entity_keys])
            known_keys |= {key for (_, key), image in present.items() if image is not None}
            if known_keys:
                raise ConflictError(
                    f"Cannot import {entity} {min(known_keys)}: this database has or had such a fact. Import into a "
                    "database without these facts."
                )
        if rows:
            self._connection.execute(insert(log), list(rows))

    def _require_new(self, statement: Select[Any], txs: Sequence[str]) -> None:
        if known_txs := set(self._connection.scalars(statement, {"keys": as_array(txs)})):
            raise ConflictError(
                f"Cannot import transaction {min(known_txs)}: this database already has it. Perhaps this file was "
                "imported before. If not, import it into another database."
            )

    # -- tables --------------------------------------------------------------------------------------------------------

    def _last_entries(self, tracked: Tracked) -> Iterator[Sequence[RowMapping]]:
        """The last imported entries of all keys, in pages."""
        newest = (
            select(func.max(log.c.id))
            .where(log.c.entity == tracked.entity, log.c.id > self._since)
            .group_by(log.c.key)
            .order_by(log.c.key)
            .limit(_PAGE)
        )
        after = ""
        last = select(log).order_by(log.c.key)
        while (
            rows := self._connection.execute(last.where(log.c.id.in_(newest.where(log.c.key > after)))).mappings().all()
        ):
            yield rows
            after = rows[-1]["key"]

    def _write_rows(self, page: Sequence[RowMapping]) -> None:
        connection, dialect = self._connection, self._connection.dialect
        outbox.add(connection, (), [(row["entity"], row["key"]) for row in page], self._tx, self._at, {})
        last = {(row["entity"], row["key"]): row for row in page if row["image"] is not None}
        for fact in page:
            if fact["image"] is None:
                self._deleted.setdefault(fact["entity"], []).append(fact["key"])
        final: dict[FactKey, Image] = {
            (entity, key): self._registry.by_entity[entity].upcast(row["image"], row["version"], dialect)
            for (entity, key), row in last.items()
        }
        try:
            with self._capture.undoing(connection, self._tx, final):
                present = restore(connection, self._registry, final)
            self._add_unique(present)
        except (ConflictError, DBAPIError) as error:
            cause = error if isinstance(error, DBAPIError) else error.__cause__
            names = ", ".join(sorted({entity for entity, _ in final}))
            raise ConflictError(f"Cannot import rows of {names}: {getattr(cause, 'orig', error)}") from error
        amended = []
        for (entity, key), image in final.items():
            now = present[entity, key]
            if now is None:
                raise MemstateError(f"Cannot import {entity} {key}: its last image is a row with another key.")
            if self._differs(entity, image, now):
                row = {name: value for name, value in last[entity, key].items() if name in _LoggedEntry.model_fields}
                # Log this change under the tx of the last entry, so that the two are undone together.
                amended.append({**row, "op": "update", "image": now, "version": self._registry.versions[entity]})
        if amended:
            connection.execute(insert(log), amended)

    def _differs(self, entity: str, image: Image, now: Image) -> bool:
        """Whether the database has changed a value while storing it, so that the log must have another image."""
        columns = self._registry.by_entity[entity].columns_for(self._connection.dialect)
        names = [name for name in image if name in now and image[name] != now[name]]
        one, other = (columns.values({name: row[name] for name in names}) for row in (image, now))
        return one != other

    def _add_unique(self, present: Mapping[FactKey, Image | None]) -> None:
        rows = []
        for (entity, key), image in present.items():
            tracked = self._registry.by_entity[entity]
            if tracked.unique_values is not None and image is not None:
                value = unique_value(tracked, tracked.columns_for(self._connection.dialect).values(dict(image)))
                rows += [] if value is None else [{"entity": entity, "value": value, "key": key}]
        if rows:
            self._connection.execute(insert(unique), rows)


def _read(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """The header, labels and entries of a file. Raises MemstateError if the file is not whole."""
    number, is_ended = 0, False
    try:
        for number, text in enumerate(file, start=1):
            line = _parse(number, text)
            if is_ended or isinstance(line, _Header) is (number > 1):
                problem = "it follows the closing line" if is_ended else "a second header"
                raise MemstateError(f"line {number}: {problem}")
            is_ended = isinstance(line, _End)
            if isinstance(line, _End) and line.lines != number - 1:
                raise MemstateError(
                    f"line {number}: the file should have {line.lines} lines before this one, and has {number - 1}"
                )
            if not is_ended:
                yield number, line
    except UnicodeDecodeError as error:
        raise MemstateError(f"line {number + 1}: not UTF-8") from error
    if not is_ended:
        raise MemstateError(
            f"line {number + 1}: missing. The file was cut off: it has no closing line. Export the facts again."
        )


def _parse(number: int, text: str) -> Any:
    if number == 1:
        try:
            written = json.loads(text)["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise MemstateError("line 1: not an export of facts") from error
        if written != FORMAT:
            raise MemstateError(f"line 1: the file has format {written!r}, but this release reads format {FORMAT}")
    try:
        return _any_line.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"][1:]))
        raise MemstateError(f"line {number}: {where + ': ' if where else ''}{first['msg']}") from error


def _batches(lines: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    while batch := list(islice(lines, _PAGE)):
        yield batch


# -- which rows come first ---------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Classes that are written together.

    *is_circular*: their rows refer to each other, so all of them must be written at once.
    """

    members: list[Tracked]
    is_circular: bool


def _parents_first(tracked: Sequence[Tracked]) -> list[_Group]:
    """The classes in groups, in an order in which referred rows are written before the rows that refer to them."""
    reached = {one: frozenset(_referred(one, tracked)) for one in tracked}
    for _ in tracked:
        reached = {one: parents.union(*(reached[other] for other in parents)) for one, parents in reached.items()}
    groups: list[_Group] = []
    circular: dict[frozenset[Tracked], _Group] = {}
    # A class reaches itself and all that it refers to, directly or not. So it reaches more classes than any class that
    # it refers to, except within a circle: there, all classes reach the same.
    for one in sorted(tracked, key=lambda one: len(reached[one] | {one})):
        is_circular = one in reached[one]
        if is_circular and reached[one] in circular:
            circular[reached[one]].members.append(one)
            continue
        groups.append(_Group([one], is_circular))
        if is_circular:
            circular[reached[one]] = groups[-1]
    return groups


def _referred(tracked: Tracked, among: Sequence[Tracked]) -> set[Tracked]:
    referred: set[Tracked] = set()
    for table in tracked.tables:
        for fk in table.foreign_key_constraints:
            is_inheritance = fk.referred_table is not table and set(fk.columns) == set(table.primary_key.columns)
            if fk.referred_table not in tracked.tables or not is_inheritance:
                referred.update(one for one in among if fk.referred_table in one.tables)
    return referred


# -- from one database's driver to another's ---------------------------------------------------------------------------


class _EntryTranslation:
    """Translates the entries of a class: from driver-level values of one database to those of another."""

    def __init__(self, tracked: Tracked, source: Database, target: Dialect) -> None:
        self._tracked = tracked
        # Use a copy with its own caches. They are kept by dialect name, and the dialect below is another one.
        self._source = replace(tracked, hydrations={}, _columns={})
        self._dialect = make_url(f"{source.blocking_driver}://").get_dialect()()
        self._target = tracked.columns_for(target)
        of_table = self._target.of_table
        self._zoned = {
            image_name(column, tracked.table)
            for table in tracked.tables
            for column in table.columns
            if getattr(of_table[table].implementation(column), "timezone", False)
        }

    def translate(self, entry: _LoggedEntry) -> dict[str, Any]:
        source, target = self._source.columns_for(self._dialect), self._target
        changes: dict[str, Any] = {"key": target.encode_key(target.raw_key(source.identity(entry.key)))}
        if entry.image is not None:
            # Upgrade before translating: upgrade functions expect values in the form of the source's driver.
            image = dict(self._source.upcast(entry.image, entry.version, self._dialect))
            values = source.values(image)
            changes["image"] = {name: encode(self._raw(name, image[name], value)) for name, value in values.items()}
            changes["version"] = self._tracked.version
        return changes

    def _raw(self, name: str, encoded: Any, value: Any) -> Any:
        if encoded is None:  # SQL NULL: a JSON type would write the JSON value 'null'
            return None
        raw = self._target.to_raw(name, value)
        if name in self._zoned and isinstance(raw, datetime) and raw.tzinfo is None:
            return raw.replace(tzinfo=UTC)  # SQLite keeps no offset
        return raw

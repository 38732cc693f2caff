"""Redis 8 vector sets as a vector index.

The workarounds here were measured on Redis 8.2.3 with redis-py 8.1. A comment at each one says why it is needed.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from hashlib import sha1
from typing import TYPE_CHECKING, Any

import numpy as np

from memstate_sa.errors import DeliveryError, DeliveryRetryable, IndexMismatch, MemstateError, require_module
from memstate_sa.indexes._adapter import REMEMBERED_S, Adapter, OpenState, id_bytes
from memstate_sa.indexes._filters import canonical, matches
from memstate_sa.indexes._nearest import Answer, Candidate, nearest
from memstate_sa.indexes._tags import has_number, number_name, numbers, stored, tag, tags
from memstate_sa.indexes._units import at_length, clipped_distance, unit_rows
from memstate_sa.indexes.base import Entry, Filter, Match, Point, Stored, Vector, matrix
from memstate_sa.indexes.provider_errors import delivery_error

if TYPE_CHECKING:
    from redis import Redis

EXACT_UP_TO = 5_000
"""If there are at most this many points, a query compares all of them by default, in 2 ms at 256 dimensions."""
_EXPLORED = 200
"""The candidates of an approximate search (EF). Redis's own default is 100."""
_LARGEST_COUNT = 1 << 20
"""The largest COUNT. Beyond its integers, the server finds no points, or aborts."""
_PER_SCRIPT = 32
"""The number of points that one script changes. The script blocks the server for about 20 ms at 256 dimensions."""
_REWRITING = ("aof_rewrite_scheduled", "aof_rewrite_in_progress", "rdb_bgsave_in_progress")

# The keys: 1. The state of the index (a hash). 2. Points (a vector set). 3. Their ids (a sorted set). All ids have one
# score, so Redis sorts them by bytes, which in UTF-8 is by code point. 4. Epochs of deleted ids (a hash whose fields
# expire).
_RESOLVE = """#!lua flags=allow-oom
local was = redis.call('HMGET', KEYS[1], 'embedder', 'dimension', 'incarnation', 'count')
if was[1] and (was[1] ~= ARGV[1] or was[2] ~= ARGV[2]) then
  return {was[1], was[2], '', '', '0'}
end
local points = redis.call('VCARD', KEYS[2])
if not was[3] or tonumber(was[4]) ~= points or redis.call('ZCARD', KEYS[3]) ~= points then
  redis.call('UNLINK', KEYS[2], KEYS[3], KEYS[4])
  redis.call('HSET', KEYS[1], 'embedder', ARGV[1], 'dimension', ARGV[2], 'incarnation', ARGV[3], 'count', 0)
  was[3], points = ARGV[3], 0
end
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
return {ARGV[1], ARGV[2], was[3], run, tostring(points)}
"""
_FENCE = """
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 0 end
local function passes(id, epoch)
  local attributes = redis.call('VGETATTR', KEYS[2], id)
  local highest = attributes and string.match(attributes, '^{"e":(%d+)') or redis.call('HGET', KEYS[4], id)
  highest = tonumber(highest or 0)
  if epoch ~= 0 and epoch < highest then return nil end
  return string.format('%.0f', math.max(epoch, highest))
end
local function counted()
  redis.call('HSET', KEYS[1], 'count', redis.call('VCARD', KEYS[2]))
  return 1
end
"""
# The script removes a point before it adds the new one. A VADD that replaces a point is not written to the append-only
# file, nor sent to replicas.
_UPSERT = f"""#!lua
{_FENCE}
local replaced = 0
for i = 2, #ARGV, 4 do
  local id = ARGV[i]
  local epoch = passes(id, tonumber(ARGV[i + 1]))
  if epoch then
    replaced = replaced + redis.call('VREM', KEYS[2], id)
    redis.call('VADD', KEYS[2], 'FP32', ARGV[i + 2], id, 'NOQUANT', 'SETATTR', '{{"e":' .. epoch .. ARGV[i + 3])
    redis.call('ZADD', KEYS[3], 0, id)
    redis.call('HDEL', KEYS[4], id)
  end
end
if replaced > 0 then redis.call('HINCRBY', KEYS[1], 'replaced', replaced) end
return counted()
"""
_DELETE = f"""#!lua flags=allow-oom
{_FENCE}
for i = 3, #ARGV do
  local id = ARGV[i]
  local epoch = passes(id, tonumber(ARGV[2]))
  if epoch then
    redis.call('VREM', KEYS[2], id)
    redis.call('ZREM', KEYS[3], id)
    if epoch ~= '0' then
      redis.call('HSET', KEYS[4], id, epoch)
      redis.call('HEXPIRE', KEYS[4], {REMEMBERED_S}, 'FIELDS', 1, id)
    end
  end
end
return counted()
"""
# This is a script, so that vector and attributes come from the same write.
_GET = """#!lua flags=no-writes
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 0 end
local points = {}
for i = 2, #ARGV do
  local attributes = redis.call('VGETATTR', KEYS[2], ARGV[i])
  if attributes then
    points[#points + 1] = {ARGV[i], attributes, redis.call('VEMB', KEYS[2], ARGV[i], 'RAW')[2]}
  end
end
return points
"""
_SCAN = """#!lua flags=no-writes
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 0 end
local points = {}
for _, id in ipairs(redis.call('ZRANGEBYLEX', KEYS[3], ARGV[2], '+', 'LIMIT', 0, ARGV[3])) do
  points[#points + 1] = {id, redis.call('VGETATTR', KEYS[2], id)}
end
return points
"""
_READ_MARK = """#!lua flags=no-writes
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 0 end
return {redis.call('HGET', KEYS[1], 'mark')}
"""
_WRITE_MARK = """#!lua flags=allow-oom
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'mark', ARGV[2])
return 1
"""


class RedisIndex(Adapter):
    """A vector set on a Redis server, version 8 or later. *client* is a redis-py client or a URL.

    The index's keys begin with ``memstate:{name}:``. `close` closes only a client that was made from a URL. Vectors are
    stored in full precision (NOQUANT), without the fact's text. Writes are fenced by their epochs (`FencedIndex`). The
    epoch of a deleted id is remembered for a day.

    ``exact=True`` compares all points. ``exact=False`` searches the HNSW graph, which may miss a near point. The
    default compares all points if there are at most 5,000.

    ``incarnation`` changes with every start of the server and every failover. The server may then have lost
    acknowledged writes: all of them without a file, those of a second with ``appendfsync everysec``. The relay compares
    the index with the tables, and embeds only missing points again. ``incarnation`` also changes when a key of the
    index was deleted or evicted. To prevent eviction, set ``maxmemory-policy noeviction``.
    """

    fences = True
    _vendor = "Redis"

    def __init__(self, client: Redis | str, name: str = "memory", *, exact: bool | None = None) -> None:
        self._redis = require_module("redis", "redis")
        self._owned = isinstance(client, str)
        self._client: Redis = self._redis.Redis.from_url(client) if isinstance(client, str) else client
        if not isinstance(self._client, self._redis.Redis):
            raise MemstateError(
                f"Invalid client: RedisIndex needs a redis.Redis or a URL, not {type(client).__name__}."
            )
        self._name = name
        self._keys = [f"memstate:{{{name}}}:{part}" for part in ("index", "points", "ids", "deleted")]
        self._exact = exact
        self._size = 0  # the number of points at the last call

    @property
    def incarnation(self) -> str:
        opened = self._open_state
        return self._resolve(opened.embedder, opened.dimension)

    @property
    def max_batch(self) -> int:
        return 1000

    def open(self, *, embedder: str, dimension: int) -> None:
        if self._opened is None:
            self._require_vector_sets()
        self._resolve(embedder, dimension)

    def upsert(self, points: Sequence[Point]) -> None:
        vectors = matrix([point.vector for point in points], self._open_state.dimension, [point.id for point in points])
        rows = [
            (id_bytes(point.id), point.epoch, unit.tobytes(), _attributes(point, float(norm)))
            for point, unit, norm in zip(points, *unit_rows(vectors), strict=True)
        ]
        self._change(_UPSERT, "write to", [], rows)

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        self._change(_DELETE, "delete from", [epoch], [(id_bytes(id_),) for id_ in ids])

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        opened = self._open_state
        [query], _ = unit_rows(matrix([vector], opened.dimension, ["the query"]))
        condition = canonical(where or {})
        if condition is None or limit < 1:
            return []
        if ids is not None:
            candidates = self._among(query, ids)
            return [candidate.match for candidate in candidates if matches(condition, candidate.metadata)][:limit]
        return nearest(partial(self._nearest, query, condition), limit, condition, exact=self._compares)

    def get(self, ids: Sequence[str]) -> list[Stored]:
        return [
            Stored(id_, attributes["f"], at_length(unit, attributes["l"]))
            for id_, attributes, unit in self._read(ids, "read from")
        ]

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        start = b"-" if after is None else b"(" + id_bytes(after)
        page = self._run(_SCAN, "scan", start, limit)
        return [Entry(id_.decode(), json.loads(attributes)["f"]) for id_, attributes in page]

    def purge(self) -> None:
        """Let the server rewrite its files without deleted points, and wait for it. Backups may still hold them.

        For a day the server still knows the ids of deleted points, but nothing else of them.
        """
        with self._translated("purge"):
            self._rewritten(None)
            if self._client.info("persistence")["aof_enabled"]:
                self._client.bgrewriteaof()
                self._rewritten("aof_last_bgrewrite_status")
            if self._client.config_get("save")["save"]:
                self._client.bgsave()
                self._rewritten("rdb_last_bgsave_status")

    def read_mark(self) -> str | None:
        mark = self._run(_READ_MARK, "read the mark of")[0]
        return None if mark is None else _text(mark)

    def write_mark(self, mark: str) -> None:
        self._run(_WRITE_MARK, "mark", mark)

    def close(self) -> None:
        self._opened = None
        if self._owned:
            self._client.close()

    # -- the server ---------------------------------------------------------------------------------------------------

    @property
    def _compares(self) -> bool:
        """Whether a query compares all points."""
        return self._exact if self._exact is not None else self._size <= EXACT_UP_TO

    @property
    def _place(self) -> str:
        return f"index {self._name!r}"

    def _resolve(self, embedder: str, dimension: int) -> str:
        """Create the index, or open the existing one, and return its incarnation.

        An index that lost one of its keys is dropped and created again.
        """
        arguments = [embedder, dimension, uuid.uuid4().hex]
        answer: list[bytes] = self._evaluate(_RESOLVE, "open", arguments)
        theirs, size, incarnation, run, count = [part.decode() for part in answer]
        if (theirs, size) != (embedder, str(dimension)):
            raise IndexMismatch(
                f"Cannot use Redis index {self._name!r}. It was built with embedder {theirs!r} and {size} dimensions, "
                f"but this Memory needs {embedder!r} and {dimension} dimensions. Use another name, or delete the keys "
                f"{self._keys} to rebuild it."
            )
        # The server stores this incarnation. The returned one also has the id of the server's run.
        self._opened, self._size = OpenState(embedder, dimension, incarnation), int(count)
        return f"{incarnation}:{run}"

    def _require_vector_sets(self) -> None:
        with self._translated("identify", sends_facts=False):
            version = str(self._client.info("server")["redis_version"])
        if int(version.partition(".")[0]) < 8:
            raise MemstateError(f"Redis {version} is too old. RedisIndex needs vector sets. Use Redis 8 or later.")

    def _rewritten(self, outcome: str | None) -> None:
        """Wait until the server rewrites no file. Raises DeliveryRetryable if the field *outcome* of INFO is not ok."""
        while True:
            state = self._client.info("persistence")
            if not any(state[doing] for doing in _REWRITING):
                break
            time.sleep(0.02)
        if outcome is not None and state[outcome] != "ok":
            raise DeliveryRetryable(f"Redis could not rewrite its files: {outcome} is {state[outcome]!r}. See its log.")

    def _run(self, script: str, action: str, *arguments: Any) -> Any:
        """The answer of *script*. Raises DeliveryRetryable if the server's index is not the opened one any more."""
        opened = self._open_state
        answer = self._evaluate(script, action, [opened.incarnation, *arguments])
        if answer == 0:
            raise self._gone(opened)
        return answer

    def _change(self, script: str, action: str, arguments: Sequence[Any], rows: Sequence[tuple[Any, ...]]) -> None:
        """Run *script* on batches of *rows*, in one pipeline. Other clients' commands may run between the batches."""
        opened = self._open_state

        def send() -> list[Any]:
            pipeline: Any = self._client.pipeline(transaction=False)
            for start in range(0, len(rows), _PER_SCRIPT):
                batch = itertools.chain.from_iterable(rows[start : start + _PER_SCRIPT])
                pipeline.evalsha(_sha(script), len(self._keys), *self._keys, opened.incarnation, *arguments, *batch)
            answers: list[Any] = pipeline.execute()
            return answers

        with self._translated(action):
            try:
                answers = send()
            except self._redis.exceptions.NoScriptError:
                self._client.script_load(script)
                answers = send()
        if 0 in answers:
            raise self._gone(opened)

    def _gone(self, opened: OpenState) -> DeliveryRetryable:
        self._resolve(opened.embedder, opened.dimension)
        return DeliveryRetryable(
            f"Redis index {self._name!r} was lost. A new, empty index was created, and relays fill it."
        )

    def _evaluate(self, script: str, action: str, arguments: Sequence[Any]) -> Any:
        with self._translated(action):
            # Vectors are bytes, so nothing is decoded, even by a client with decode_responses=True.
            call: Any = partial(self._client.execute_command, NEVER_DECODE=True)
            parameters = (len(self._keys), *self._keys, *arguments)
            try:
                return call("EVALSHA", _sha(script), *parameters)
            except self._redis.exceptions.NoScriptError:
                return call("EVAL", script, *parameters)

    def _delivery_error(self, error: Exception, message: str, sent: Sequence[str] | None) -> DeliveryError:
        # The points were checked before, so other errors come from the server or the network.
        if isinstance(error, self._redis.exceptions.ConnectionError):  # an AuthenticationError is one, too
            sent = ()
        return delivery_error(error, message, unknown=DeliveryRetryable, sent=sent)

    # -- points -------------------------------------------------------------------------------------------------------

    def _nearest(self, query: Vector, condition: Mapping[str, Any], limit: int, exact: bool) -> Answer:
        opened = self._open_state
        search: list[Any] = ["VSIM", self._keys[1], "FP32", query.tobytes(), "WITHSCORES", "WITHATTRIBS"]
        search += [
            "COUNT",
            min(limit, _LARGEST_COUNT),
            *(["TRUTH"] if exact else ["EF", _EXPLORED, "FILTER-EF", 1_000_000]),
        ]
        if condition:
            search += ["FILTER", _expression(condition)]
        with self._translated("query"):
            (incarnation, count, replaced), answer, since = self._searched(search)
            if replaced != since:
                (incarnation, count, _), answer, _ = self._searched([*search, "NOTHREAD"])
        if incarnation is None or _text(incarnation) != opened.incarnation:
            raise self._gone(opened)
        self._size = int(count)
        if self._compares and not exact:  # there are now few enough points to compare all of them
            return self._nearest(query, condition, limit, True)
        rows, candidates = list(_rows(answer)), []
        for id_, score, text in rows:
            attributes = json.loads(text) if text else {}
            if "f" in attributes:  # memstate_sa wrote the point
                distance = clipped_distance(2.0 - 2.0 * float(score))
                candidates.append(Candidate(Match(_text(id_), distance, attributes["f"]), attributes["m"]))
        return Answer(candidates, is_short=len(rows) < limit)  # an answer has at most _LARGEST_COUNT rows

    def _searched(self, search: Sequence[Any]) -> tuple[Any, Any, Any]:
        """The state of the index, the answer of the search, and the number of replaced points after the search.

        Redis searches in a separate thread, perhaps during a script that has removed a point and not yet added it
        again. Then the two numbers of replaced points differ.
        """
        pipeline: Any = self._client.pipeline(transaction=False)
        pipeline.hmget(self._keys[0], "incarnation", "count", "replaced")
        pipeline.execute_command(*search)
        pipeline.hget(self._keys[0], "replaced")
        answers: tuple[Any, Any, Any] = tuple(pipeline.execute())
        return answers

    def _among(self, query: Vector, ids: Sequence[str]) -> list[Candidate]:
        """The stored points among *ids*, nearest first."""
        rows = list(self._read(ids, "query"))
        if not rows:
            return []
        distances = np.clip(1.0 - np.stack([unit for _, _, unit in rows]) @ query, 0.0, 2.0)
        return [
            Candidate(Match(rows[place][0], float(distances[place]), rows[place][1]["f"]), rows[place][1]["m"])
            for place in np.argsort(distances, kind="stable")
        ]

    def _read(self, ids: Sequence[str], action: str) -> Iterator[tuple[str, dict[str, Any], Vector]]:
        names = [id_bytes(id_) for id_ in dict.fromkeys(ids)]
        for start in range(0, len(names), self.max_batch):
            for id_, attributes, unit in self._run(_GET, action, *names[start : start + self.max_batch]):
                yield id_.decode(), json.loads(attributes), np.frombuffer(unit, dtype=np.float32)


def _attributes(point: Point, norm: float) -> str:
    """The point's attributes in JSON, without the beginning ``{"e":<epoch>``: the script adds it.

    The metadata comes last, because Redis searches for a field from the front.
    """
    metadata = stored(point.metadata, point.id)
    named = {number_name(key): value for key, value in numbers(metadata).items()}
    attributes = {"f": point.fingerprint, "l": norm, "t": tags(metadata), **named, "m": metadata}
    return "," + json.dumps(attributes, separators=(",", ":"))[1:]


def _expression(condition: Mapping[str, Any], *, sure: bool = True) -> str:
    """The canonical filter as a FILTER. It lets through every matching point, and perhaps others.

    If a point lacks a field of the expression, the whole expression is false, even in an ``or``. So in an ``or``, where
    *sure* is False, a comparison only checks that the point has a number under the key.
    """
    [(key, value)] = condition.items()
    if key in ("$and", "$or"):
        word = key[1:]
        return f" {word} ".join(f"({_expression(part, sure=sure and key == '$and')})" for part in value)
    [(name, operand)] = value.items()
    if name in ("$eq", "$in"):
        operands = [operand] if name == "$eq" else operand
        return " or ".join(f'"{operand_tag}" in .t' for operand_tag in dict.fromkeys(tag(key, o) for o in operands))
    if not sure:
        return f'"{has_number(key)}" in .t'
    # Include the bound, because its double may also be that of a neighbouring int. Quote it, because a number in an
    # expression cannot have an exponent.
    comparison = ">=" if name in ("$gt", "$gte") else "<="
    return f'.{number_name(key)} {comparison} "{float(operand)!r}"'


def _rows(answer: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The rows of an answer to VSIM, which is a flat list, or a map in RESP3."""
    if isinstance(answer, Mapping):
        for id_, (score, attributes) in answer.items():
            yield id_, score, attributes
    else:
        flat = iter(answer)
        yield from zip(flat, flat, flat, strict=True)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


@cache
def _sha(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()

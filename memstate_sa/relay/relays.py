"""`Relays`: the relays of one Memory."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from sqlalchemy.engine import Connection, Engine

from memstate_sa.db.dialects import database_of
from memstate_sa.db.sync_engines import SyncEngines
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import DeliveryError
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.options import RelayOptions
from memstate_sa.relay.backlog import Backlog, backlog
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.loop import Relay
from memstate_sa.relay.wakeup import Notifier
from memstate_sa.runtime import forks
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked


class Relays:
    """The relays of one Memory, on any number of databases. This object keeps no relay alive."""

    def __init__(
        self, registry: Registry, destinations: Mapping[str, Destination], engines: SyncEngines, notifier: Notifier
    ) -> None:
        self._registry = registry
        self._destinations = destinations
        self._engines = engines
        self._notifier = notifier
        self._relays: weakref.WeakSet[Relay] = weakref.WeakSet()
        self._make_lock()
        forks.in_child(self, Relays._make_lock)

    def _make_lock(self) -> None:
        # Without this lock, a commit would fail if a relay is made while the commit wakes the other relays.
        self._listing = threading.RLock()

    def make(
        self,
        engine: Engine,
        names: Iterable[str],
        sweep: Callable[[], int] | None = None,
        options: RelayOptions | None = None,
    ) -> Relay:
        """A relay from *engine*'s database to the indexes *names*. A commit does not wake it."""
        delivered = self._registry.delivered
        destinations = {name: (self._destinations[name], partial(delivered, name)) for name in names}
        return Relay(engine, destinations, notifier=self._notifier, sweep=sweep, **options or {})

    def add(self, engine: Engine, sweep: Callable[[], int], options: RelayOptions) -> Relay:
        """A relay from *engine*'s database to all indexes. *sweep* deletes expired facts."""
        relay = self.make(engine, self._destinations, sweep, options)
        with self._listing:
            self._relays.add(relay)
        return relay

    def all(self) -> list[Relay]:
        with self._listing:
            return list(self._relays)

    def by_index(self) -> dict[str, tuple[Destination, dict[str, Tracked]]]:
        """Each index, and the classes that it gets."""
        return {name: (destination, self._registry.published(name)) for name, destination in self._destinations.items()}

    # -- waking -----------------------------------------------------------------------------------------------

    def wake(self) -> None:
        for relay in self.all():
            relay.wake()

    def committed(self, engine: Engine) -> None:
        """Wake the relays, those of other processes too: something is committed in *engine*'s database."""
        self.wake()
        if not database_of(engine).runs_in_process:
            with contextlib.suppress(ImportError):  # relays of other processes poll if no blocking driver is installed
                self._notifier.committed(self._engines.for_threads(engine))

    # -- delivery ---------------------------------------------------------------------------------------------

    def backlogs(self, connection: Connection) -> Iterator[tuple[str, Backlog]]:
        """The backlog of each index, by name."""
        problems = {name: why for relay in self.all() for name, why in relay.problems().items()}
        for name, (destination, tracked) in self.by_index().items():
            pending = backlog(connection, IndexKey(name, destination.open()), list(tracked))
            yield name, replace(pending, problem=problems.get(name, pending.problem))

    def deliver(self, engine: Engine, relay: Relay, timeout: float) -> None:
        """Have the due keys delivered: by *relay*, or by the relay that holds the lease."""
        deadline = time.monotonic() + timeout
        self.wake()
        relay.drain(timeout)
        while self._is_due(engine):
            if time.monotonic() > deadline:
                raise DeliveryError(
                    f"The changes were not delivered within {timeout:g} s. See memory.status() for the reason."
                )
            relay.drain(timeout)
            time.sleep(0.02)

    def _is_due(self, engine: Engine) -> bool:
        with engine.connect() as connection:
            return any(pending.due for _, pending in list(self.backlogs(connection)))

    # -- the end --------------------------------------------------------------------------------------------------

    def stop(self, deadline: float) -> list[Relay]:
        """Stop all relays, and return them. *deadline* is a time of `time.monotonic`."""
        relays = self.all()
        for relay in relays:
            relay.stop(max(0.0, deadline - time.monotonic()))
        return relays


def close_after(relays: Sequence[Relay], name: str, index: VectorIndex) -> None:
    """Close *index* when none of *relays* uses it, so that no other process opens its folder during a late write."""
    if relays:
        relays[0].after_stop(name, partial(close_after, relays[1:], name, index))
    else:
        index.close()

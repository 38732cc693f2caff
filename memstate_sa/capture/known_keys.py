"""`KnownKeys`: keys that the log of one database is known to have an entry of."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from memstate_sa.capture.looks import RawKey

KnownKey = tuple[str, RawKey]
"""An entity, and a key as the driver has it."""


class KnownKeys:
    """The last used keys whose entries were seen, and committed: their rows need no look before they change.

    An entry once committed stays, but for the entries of rows that are gone (`Retention.log`), and of a log that was
    emptied or restored behind our back. So logging checks that there is one, and forgets all keys when there is none.
    """

    def __init__(self, limit: int = 16_384) -> None:
        self.limit = limit
        self._keys: OrderedDict[KnownKey, str] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, entity: str, keys: Iterable[RawKey]) -> dict[RawKey, str] | None:
        """The canonical key of each of *keys*; None where one of them is not known."""
        if not self._keys:
            return None
        found: dict[RawKey, str] = {}
        with self._lock:
            for key in keys:
                canonical = self._keys.get((entity, key))
                if canonical is None:
                    return None
                self._keys.move_to_end((entity, key))
                found[key] = canonical
        return found

    def add(self, keys: Mapping[KnownKey, str]) -> None:
        with self._lock:
            for key, canonical in keys.items():
                self._keys[key] = canonical
                self._keys.move_to_end(key)
            while len(self._keys) > self.limit:
                self._keys.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._keys.clear()

"""`KnownKeys`: keys that have an entry in the log of one database, as far as we know."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from memstate_sa.capture.looks import RawKey

KnownKey = tuple[str, RawKey]
"""An entity, and a key as the driver has it."""


class KnownKeys:
    """The most recently used keys with a committed entry. Their rows need no look before they change.

    A committed entry can only disappear with a deleted row (`Retention.log`), or when the log is emptied or restored.
    So logging checks that the entry is there, and forgets all keys when it is not.
    """

    def __init__(self, limit: int = 16_384) -> None:
        self.limit = limit
        self._keys: OrderedDict[KnownKey, str] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, entity: str, keys: Iterable[RawKey]) -> dict[RawKey, str] | None:
        """The canonical keys of *keys*, or None when one of them is not known."""
        if not self._keys:
            return None
        canonical_keys: dict[RawKey, str] = {}
        with self._lock:
            for key in keys:
                canonical = self._keys.get((entity, key))
                if canonical is None:
                    return None
                self._keys.move_to_end((entity, key))
                canonical_keys[key] = canonical
        return canonical_keys

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

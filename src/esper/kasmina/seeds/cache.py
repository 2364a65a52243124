"""``KernelCache``: the device tier, live kernels by least recent use, each loaded once however many ask.

Blocking and asyncio callers share one core: a key that is being loaded has an entry with a future, and
whoever asks meanwhile waits for that future. No lock is held while anything is loaded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from esper.errors import ConfigError
from esper.kasmina.seeds.nbytes import nbytes
from esper.kasmina.seeds.single_flight import SingleFlight, landed

V = TypeVar("V")
Key: TypeAlias = tuple[str, str]  # (kernel id, device)
Load: TypeAlias = Callable[[Key], V | Awaitable[V]]


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What happened since the cache was made, and what it holds now."""

    hits: int  # requests answered at once
    misses: int  # requests that had to wait, whoever loaded
    waits: int  # misses that joined a load already under way
    loads: int  # loads started
    failures: int  # loads that raised
    evictions: int  # values that made room for others
    refused: int  # values handed out but not kept: no room beside what is pinned
    count: int  # values kept
    bytes: int  # of values kept or pinned
    pinned_bytes: int

    @property
    def hit_rate(self) -> float | None:
        """Share of hits among all requests; None before the first."""
        requests = self.hits + self.misses
        return self.hits / requests if requests else None


@dataclass(slots=True, eq=False)
class Entry(Generic[V]):
    """One key's value, from the request that starts its load to its last use."""

    future: Future[V] = field(default_factory=Future)
    size: int = 0
    pins: int = 0
    kept: bool = False  # new requests find it
    counted: bool = False  # in the cache's sum of bytes: kept, or pinned and no longer kept


class KernelCache(Generic[V]):
    """Keeps live values up to a number of bytes and of values; thread-safe.

    A pinned value is never evicted and counts even beyond the limits, because its memory is in use; the cache
    is back within them once it is let go. A value that was only got may be evicted while its caller still
    holds it, and is no longer counted then.

    Args:
        load: Function that makes the value of a key; plain or ``async``. It runs in a thread of its
            own, an ``async`` one on an event loop of its own. It may get other keys, but never the one it
            loads.
        max_bytes: Bytes kept.
        max_count: Values kept; None is unlimited.
        size_of: Bytes a value takes.

    Raises:
        ConfigError: A limit is out of range.
    """

    def __init__(
        self,
        load: Load[V],
        max_bytes: int,
        max_count: int | None = None,
        size_of: Callable[[V], int] | None = None,
    ) -> None:
        self._load = load
        self._max_bytes, self._max_count = _checked(max_bytes, max_count)
        self._kept: OrderedDict[Key, Entry[V]] = OrderedDict()  # least recently used first
        self._loading: dict[Key, Entry[V]] = {}
        self._bytes = self._hits = self._waits = self._loads = 0
        self._failures = self._evictions = self._refused = 0
        self._lock = threading.RLock()  # re-entrant: an evicted value may call back as it dies
        self._flights = SingleFlight(size_of or nbytes)

    # -- fronts ----------------------------------------------------------------------------------------------

    def get(self, key: Key, load: Load[V] | None = None) -> V:
        """Return a key's value, loading it first if need be.

        Args:
            key: Kernel and device.
            load: Instead of the cache's own; a load that is already under way is joined all the same.

        Raises:
            KernelError: The load was cancelled, or the value does not say how many bytes it takes. Whatever
                else a load raises, every waiter gets it, and the next request loads anew.
        """
        return self._enter(key, load).future.result()

    async def aget(self, key: Key, load: Load[V] | None = None) -> V:
        """Await a key's value; a cancelled caller takes neither the load nor other waiters with it."""
        return await landed(self._enter(key, load).future)

    @contextmanager
    def use(self, key: Key, load: Load[V] | None = None) -> Iterator[V]:
        """Get a key's value and pin it for as long as the block runs."""
        entry = self._enter(key, load, pins=1)
        try:
            yield entry.future.result()
        finally:
            self._unpin(entry)

    @asynccontextmanager
    async def ause(self, key: Key, load: Load[V] | None = None) -> AsyncIterator[V]:
        """Get a key's value and pin it for as long as the block runs."""
        entry = self._enter(key, load, pins=1)
        try:
            yield await landed(entry.future)
        finally:
            self._unpin(entry)

    # -- upkeep ----------------------------------------------------------------------------------------------

    def invalidate(self, key: Key) -> bool:
        """Serve a key's value to nobody any more; whoever uses it or waits for it may go on.

        Returns:
            Whether there was one, loaded or being loaded.
        """
        with self._lock:
            loading, kept = self._loading.pop(key, None), self._kept.get(key)
            if kept is not None:
                self._drop(key, kept)
            return loading is not None or kept is not None

    def clear(self) -> None:
        """Invalidate every key."""
        with self._lock:
            for key in [*self._kept, *self._loading]:
                self.invalidate(key)

    def resize(self, max_bytes: int, max_count: int | None = None) -> None:
        """Set new limits and evict down to them.

        Raises:
            ConfigError: A limit is out of range.
        """
        limits = _checked(max_bytes, max_count)
        with self._lock:
            self._max_bytes, self._max_count = limits
            self._trim()

    def kept(self) -> list[Key]:
        """List the keys that are answered at once, least recently used first."""
        with self._lock:
            return list(self._kept)

    def statistics(self) -> CacheStatistics:
        """Return one consistent view of all figures."""
        with self._lock:
            return CacheStatistics(
                hits=self._hits,
                misses=self._waits + self._loads,
                waits=self._waits,
                loads=self._loads,
                failures=self._failures,
                evictions=self._evictions,
                refused=self._refused,
                count=len(self._kept),
                bytes=self._bytes,
                pinned_bytes=self._bytes - sum(entry.size for entry in self._loose()),
            )

    # -- the single-flight core ------------------------------------------------------------------------------

    def _enter(self, key: Key, load: Load[V] | None, pins: int = 0) -> Entry[V]:
        """Return a key's entry: kept, being loaded, or new with its load started."""
        with self._lock:
            entry = self._kept.get(key)
            if entry is not None:
                self._hits += 1
                self._kept.move_to_end(key)
            elif (entry := self._loading.get(key)) is not None:
                self._waits += 1
            if entry is not None:
                entry.pins += pins
                return entry
            self._loads += 1
            entry = self._loading[key] = Entry(pins=pins)
        work, name = load or self._load, f"kernel {key[0]} for {key[1]}"
        self._flights.start(name, entry.future, lambda: work(key), lambda size: self._land(key, entry, size))
        return entry

    def _land(self, key: Key, entry: Entry[V], size: int | None) -> None:
        """Keep what was loaded, if it is still wanted and fits; None is a load that failed."""
        with self._lock:
            wanted = self._loading.get(key) is entry  # not invalidated since
            if wanted:
                del self._loading[key]
            if size is None:
                self._failures += 1
                return
            entry.size = size
            entry.kept = wanted and (entry.pins > 0 or self._fits(size))
            entry.counted = entry.kept or entry.pins > 0
            self._refused += wanted and not entry.kept
            self._bytes += size * entry.counted
            if entry.kept:
                self._kept[key] = entry
            self._trim()

    # -- accounting, under the lock --------------------------------------------------------------------------

    def _loose(self) -> list[Entry[V]]:
        return [entry for entry in self._kept.values() if not entry.pins]

    def _fits(self, size: int) -> bool:
        """Tell whether there is room once everything that may go has gone."""
        loose = self._loose()
        staying, count = self._bytes - sum(entry.size for entry in loose), len(self._kept) - len(loose)
        return staying + size <= self._max_bytes and (self._max_count is None or count < self._max_count)

    def _unpin(self, entry: Entry[V]) -> None:
        with self._lock:
            entry.pins -= 1
            if not entry.pins:
                self._forget(entry)
                self._trim()

    def _over(self) -> bool:
        return self._bytes > self._max_bytes or (
            self._max_count is not None and len(self._kept) > self._max_count
        )

    def _trim(self) -> None:
        """Evict from the least recently used on until the limits hold or all that is left is pinned."""
        if not self._over():
            return
        for key, entry in list(self._kept.items()):
            if not entry.pins:
                self._evictions += 1
                self._drop(key, entry)
                if not self._over():
                    return

    def _drop(self, key: Key, entry: Entry[V]) -> None:
        del self._kept[key]
        entry.kept = False
        self._forget(entry)

    def _forget(self, entry: Entry[V]) -> None:
        """Take an entry out of the sum, unless it is kept or in use."""
        if entry.counted and not entry.kept and not entry.pins:
            self._bytes -= entry.size
            entry.counted = False


def _checked(max_bytes: int, max_count: int | None) -> tuple[int, int | None]:
    if max_bytes < 0 or (max_count is not None and max_count < 0):
        raise ConfigError(f"a cache's limits cannot be negative: {max_bytes} bytes, {max_count} values")
    return max_bytes, max_count

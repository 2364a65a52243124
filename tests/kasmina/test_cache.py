"""The device tier: what it keeps, what it counts, and that one load serves all who ask."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from esper.errors import ConfigError, KernelError
from esper.kasmina.seeds.cache import CacheStatistics, KernelCache, Key
from esper.kasmina.seeds.nbytes import nbytes


def key(name: object) -> Key:
    return (str(name), "cpu")


class Gated:
    """A load that counts itself and waits until it is let through."""

    def __init__(self, result: Callable[[Key], bytes] = lambda key: b"x" * 8) -> None:
        self.calls: Counter[Key] = Counter()
        self.started, self.gate, self.result = threading.Event(), threading.Event(), result

    def __call__(self, key: Key) -> bytes:
        self.calls[key] += 1
        self.started.set()
        assert self.gate.wait(30)
        return self.result(key)


def waits(cache: KernelCache[bytes], number: int) -> None:
    """Wait until that many requests have joined a load."""
    end = time.monotonic() + 30
    while cache.statistics().waits < number:
        assert time.monotonic() < end
        time.sleep(0.001)


# -- what is kept and counted: against a plain model ---------------------------------------------------------

SIZES = {key(i): size for i, size in enumerate((0, 1, 3, 5, 8, 13, 21))}
keys = st.sampled_from(sorted(SIZES))


class Accounts(RuleBasedStateMachine):
    """Any sequence of requests, pins, releases, invalidations and limits, beside a plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: tuple[int, int | None] = (30, 4)
        self.loaded: Counter[Key] = Counter()
        self.cache: KernelCache[bytes] = KernelCache(self.load, *self.limits)
        self.kept: OrderedDict[Key, list[int]] = OrderedDict()  # least recent first -> its pins, shared
        self.gone: list[tuple[Key, list[int]]] = []  # pinned, but no longer served
        self.held: list[tuple[ExitStack, Key, list[int]]] = []
        self.hits = self.requests = self.evictions = self.refused = 0

    def load(self, key: Key) -> bytes:
        self.loaded[key] += 1
        return b"x" * SIZES[key]

    def size(self) -> int:
        return sum(SIZES[k] for k in self.kept) + sum(SIZES[k] for k, pins in self.gone if pins[0])

    def trim(self) -> None:
        most, count = self.limits
        for k in list(self.kept):
            if self.size() <= most and (count is None or len(self.kept) <= count):
                return
            if not self.kept[k][0]:
                del self.kept[k]
                self.evictions += 1

    def request(self, k: Key, pin: int) -> list[int]:
        self.requests += 1
        if k in self.kept:
            self.hits += 1
            self.kept.move_to_end(k)
            self.kept[k][0] += pin
            return self.kept[k]
        pins, (most, count) = [pin], self.limits
        loose = [k for k, p in self.kept.items() if not p[0]]
        room = most - (self.size() - sum(SIZES[k] for k in loose))
        if pin or (SIZES[k] <= room and (count is None or len(self.kept) - len(loose) < count)):
            self.kept[k] = pins
            self.trim()
        else:
            self.refused += 1
        return pins

    @rule(k=keys, awaited=st.booleans())
    def get(self, k: Key, awaited: bool) -> None:
        value = asyncio.run(self.cache.aget(k)) if awaited else self.cache.get(k)
        assert len(value) == SIZES[k]
        self.request(k, 0)

    @rule(k=keys)
    def hold(self, k: Key) -> None:
        stack = ExitStack()
        assert len(stack.enter_context(self.cache.use(k))) == SIZES[k]
        self.held.append((stack, k, self.request(k, 1)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        stack, _, pins = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        stack.close()
        pins[0] -= 1
        if not pins[0]:
            self.trim()

    @rule(k=keys)
    def invalidate(self, k: Key) -> None:
        assert self.cache.invalidate(k) is (k in self.kept)
        if k in self.kept:
            self.gone.append((k, self.kept.pop(k)))

    @rule(most=st.integers(0, 60), count=st.one_of(st.none(), st.integers(0, 6)))
    def resize(self, most: int, count: int | None) -> None:
        self.limits = (most, count)
        self.cache.resize(most, count)
        self.trim()

    @invariant()
    def the_books_agree(self) -> None:
        found = self.cache.statistics()
        assert self.cache.kept() == list(self.kept)
        pinned = sum(SIZES[k] for k, pins in [*self.kept.items(), *self.gone] if pins[0])
        assert found == CacheStatistics(
            hits=self.hits,
            misses=self.requests - self.hits,
            waits=0,
            loads=sum(self.loaded.values()),
            failures=0,
            evictions=self.evictions,
            refused=self.refused,
            count=len(self.kept),
            bytes=self.size(),
            pinned_bytes=pinned,
        )
        assert self.requests - self.hits == found.loads
        most, count = self.limits
        if any(not pins[0] for pins in self.kept.values()):
            assert found.bytes <= most
            assert count is None or found.count <= count

    def teardown(self) -> None:
        for stack, _, _ in self.held:
            stack.close()
        found = self.cache.statistics()
        assert found.pinned_bytes == 0
        assert found.bytes <= self.limits[0]


Accounts.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_the_books_always_agree = Accounts.TestCase


def test_the_least_recently_used_goes_first_and_never_what_is_in_use() -> None:
    cache = KernelCache(lambda key: b"x" * 10, max_bytes=30)
    for name in "abc":
        cache.get(key(name))
    cache.get(key("a"))
    cache.get(key("d"))
    assert cache.kept() == [key("c"), key("a"), key("d")]
    with cache.use(key("c")):
        for name in "efgh":
            cache.get(key(name))
        assert key("c") in cache.kept()
        assert cache.statistics().pinned_bytes == 10
    assert cache.statistics().bytes == 30


def test_what_is_pinned_counts_beyond_the_limits_and_leaves_when_it_is_let_go() -> None:
    cache = KernelCache(lambda key: b"x" * 40, max_bytes=30)
    assert len(cache.get(key("a"))) == 40
    assert (cache.statistics().refused, cache.kept()) == (1, [])
    with cache.use(key("a")):
        assert (cache.statistics().bytes, cache.kept()) == (40, [key("a")])
    assert (cache.statistics().bytes, cache.kept()) == (0, [])


def test_an_invalidated_value_is_counted_until_its_last_user_lets_it_go() -> None:
    loads: Counter[Key] = Counter()

    def load(wanted: Key) -> bytes:
        loads[wanted] += 1
        return bytes(bytearray(10))  # a new object

    cache = KernelCache(load, max_bytes=100)
    with cache.use(key("a")) as first, cache.use(key("a")) as again:
        assert first is again
        assert cache.invalidate(key("a"))
        assert not cache.invalidate(key("a"))
        assert cache.get(key("a")) is not first
        assert cache.statistics().bytes == 20
    assert cache.statistics().bytes == 10
    cache.clear()
    assert (cache.statistics().bytes, loads) == (0, {key("a"): 2})


@pytest.mark.parametrize(("most", "count"), [(-1, None), (1, -1)])
def test_negative_limits_are_refused(most: int, count: int | None) -> None:
    with pytest.raises(ConfigError, match="cannot be negative"):
        KernelCache(lambda key: b"", most, count)
    cache = KernelCache(lambda key: b"", 1)
    with pytest.raises(ConfigError, match="cannot be negative"):
        cache.resize(most, count)


def test_what_is_no_longer_kept_is_freed() -> None:
    cache = KernelCache(lambda key: nn.Linear(2, 2), max_bytes=1000)
    kept = weakref.ref(cache.get(key("a")))
    gc.collect()
    assert kept() is not None
    cache.clear()
    gc.collect()
    assert kept() is None


# -- one load for all who ask --------------------------------------------------------------------------------


def both_kinds(load: Gated) -> list[Callable[[Key], object]]:
    async def awaited(key: Key) -> bytes:
        return await asyncio.to_thread(load, key)

    return [load, awaited]


@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "async"])
def test_fifty_threads_and_fifty_tasks_cause_one_load(kind: int) -> None:
    load = Gated()
    cache: KernelCache[bytes] = KernelCache(both_kinds(load)[kind], max_bytes=100)  # type: ignore[arg-type]

    async def tasks() -> list[bytes]:
        return await asyncio.gather(*(cache.aget(key("a")) for _ in range(50)))

    with ThreadPoolExecutor(51) as threads:
        blocking = [threads.submit(cache.get, key("a")) for _ in range(50)]
        awaiting = threads.submit(asyncio.run, tasks())
        waits(cache, 99)
        load.gate.set()
        values = [future.result(30) for future in blocking] + awaiting.result(30)
    assert load.calls == {key("a"): 1}
    assert len(values) == 100
    assert {id(value) for value in values} == {id(values[0])}
    found = cache.statistics()
    assert (found.hits, found.misses, found.waits, found.loads, found.hit_rate) == (0, 100, 99, 1, 0.0)
    cache.get(key("a"))
    assert cache.statistics().hits == 1


def test_no_lock_is_held_while_a_load_runs() -> None:
    slow = Gated()
    cache = KernelCache(lambda key: b"x", max_bytes=100)
    cache.get(key("a"))
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(cache.get, key("slow"), slow)
        assert slow.started.wait(30)
        assert cache.get(key("a")) == cache.get(key("b")) == b"x"
        assert not cache.invalidate(key("c"))
        cache.resize(50)
        slow.gate.set()
        assert waiting.result(30) == b"x" * 8


def test_a_load_may_get_other_keys_and_a_size_may_be_measured_at_leisure() -> None:
    def load(wanted: Key) -> bytes:
        depth = int(wanted[0])
        return cache.get(key(depth - 1)) + b"x" if depth else b""

    cache: KernelCache[bytes] = KernelCache(load, max_bytes=10**6, size_of=lambda value: len(cache.kept()))
    assert len(cache.get(key(100))) == 100
    assert cache.statistics().loads == 101


def test_an_error_reaches_all_waiters_and_is_not_kept() -> None:
    def fail(key: Key) -> bytes:
        raise OSError("no such kernel")

    load = Gated(fail)
    cache = KernelCache(load, max_bytes=100)

    async def tasks() -> list[bytes | BaseException]:
        return await asyncio.gather(*(cache.aget(key("a")) for _ in range(5)), return_exceptions=True)

    def pinned() -> None:
        with cache.use(key("a")):
            raise AssertionError("there is nothing to use")

    with ThreadPoolExecutor(7) as threads:
        blocking = [threads.submit(cache.get, key("a")) for _ in range(5)] + [threads.submit(pinned)]
        awaiting = threads.submit(asyncio.run, tasks())
        waits(cache, 10)
        load.gate.set()
        errors = [future.exception(30) for future in blocking] + awaiting.result(30)
    assert [str(error) for error in errors] == ["no such kernel"] * 11
    found = cache.statistics()
    assert (found.loads, found.failures, found.count, found.bytes, found.pinned_bytes) == (1, 1, 0, 0, 0)
    load.result = lambda key: b"good"
    assert cache.get(key("a")) == b"good"


@pytest.mark.parametrize("error", [StopIteration, SystemExit, asyncio.CancelledError, KeyboardInterrupt])
def test_an_error_that_would_end_a_waiter_is_told_as_one_of_ours(error: type[BaseException]) -> None:
    def load(key: Key) -> bytes:
        raise error("halt")

    cache = KernelCache(load, max_bytes=100)
    with pytest.raises(KernelError, match=rf"kernel a for cpu ended with {error.__name__}: halt"):
        cache.get(key("a"))
    with pytest.raises(KernelError, match="ended with"):
        asyncio.run(asyncio.wait_for(cache.aget(key("a")), 30))


def test_a_cancelled_awaiter_takes_nobody_with_it() -> None:
    load = Gated()
    cache = KernelCache(load, max_bytes=100)

    async def scene() -> bytes:
        first = asyncio.create_task(cache.aget(key("a")))
        others = [asyncio.create_task(cache.aget(key("a"))) for _ in range(3)]
        while cache.statistics().waits < 3:
            await asyncio.sleep(0.001)
        first.cancel()
        others[0].cancel()
        await asyncio.sleep(0.01)
        load.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        return (await asyncio.gather(*others[1:]))[0]

    assert asyncio.run(scene()) == b"x" * 8
    assert load.calls == {key("a"): 1}


def test_a_load_that_nobody_waits_for_any_more_is_kept_and_not_pinned() -> None:
    load = Gated()
    cache = KernelCache(load, max_bytes=100)

    async def scene() -> None:
        async def use() -> None:
            async with cache.ause(key("a")):
                raise AssertionError("cancelled before")

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(use(), 0.01)

    asyncio.run(scene())
    load.gate.set()
    assert cache.get(key("a")) == b"x" * 8
    found = cache.statistics()
    assert (found.loads, found.count, found.pinned_bytes) == (1, 1, 0)


def test_a_load_invalidated_under_way_reaches_its_waiters_but_is_not_kept() -> None:
    stale = Gated(lambda key: b"stale")
    cache = KernelCache(lambda key: b"fresh", max_bytes=100)

    def use() -> tuple[bytes, int]:
        with cache.use(key("a"), stale) as value:
            return value, cache.statistics().bytes

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(use)
        assert stale.started.wait(30)
        assert cache.invalidate(key("a"))
        assert cache.get(key("a")) == b"fresh"
        stale.gate.set()
        assert waiting.result(30) == (b"stale", 10)
    assert cache.get(key("a")) == b"fresh"
    assert cache.statistics().bytes == 5


def test_a_stale_load_leaves_the_one_that_replaced_it_alone() -> None:
    stale, fresh = Gated(lambda key: b"stale"), Gated(lambda key: b"fresh")
    cache = KernelCache(fresh, max_bytes=100)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(cache.get, key("a"), stale)
        assert stale.started.wait(30)
        cache.invalidate(key("a"))
        second = threads.submit(cache.get, key("a"))
        assert fresh.started.wait(30)
        stale.gate.set()
        assert first.result(30) == b"stale"
        third = threads.submit(cache.get, key("a"))
        waits(cache, 1)
        fresh.gate.set()
        assert second.result(30) is third.result(30)
    assert fresh.calls == {key("a"): 1}
    assert cache.get(key("a")) == b"fresh"


def test_a_blocking_get_inside_a_running_loop_works_with_an_async_load() -> None:
    async def load(key: Key) -> bytes:
        await asyncio.sleep(0)
        return b"x"

    cache: KernelCache[bytes] = KernelCache(load, max_bytes=100)

    async def notebook() -> tuple[bytes, bytes]:
        async with cache.ause(key("b")) as value:
            return cache.get(key("a")), value

    assert asyncio.run(notebook()) == (b"x", b"x")


def test_the_books_agree_after_many_threads_have_been_at_it() -> None:
    loaded: Counter[Key] = Counter()
    lock = threading.Lock()

    def load(key: Key) -> bytes:
        with lock:
            loaded[key] += 1
        return b"x" * (int(key[0]) % 7)

    cache = KernelCache(load, max_bytes=30, max_count=12)

    def work(seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        for number in torch.randint(0, 40, (150,), generator=stream).tolist():
            if number % 5 == 0:
                with cache.use(key(number)) as value:
                    assert len(value) == number % 7
            elif number % 11 == 0:
                cache.invalidate(key(number))
            else:
                assert len(cache.get(key(number))) == number % 7

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    found = cache.statistics()
    assert found.loads == sum(loaded.values())
    assert found.bytes == sum(int(name) % 7 for name, _ in cache.kept()) <= 30
    assert (found.count, found.pinned_bytes, found.failures) == (len(cache.kept()), 0, 0)
    assert found.count <= 12


# -- how many bytes a value takes ----------------------------------------------------------------------------


class Stated:
    nbytes = 100


def test_every_storage_is_weighed_once() -> None:
    weight = torch.zeros(4, 8)
    assert nbytes(weight) == 128
    assert nbytes([weight, weight[1:], weight.t(), {"more": torch.zeros(2, dtype=torch.float64)}]) == 144
    norm = nn.BatchNorm1d(4)
    assert nbytes(norm) == 4 * 4 * 4 + 8  # weight, bias, mean, variance, and a count in int64
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert nbytes(tied) == 64
    assert nbytes((Stated(), b"abc", nn.ReLU())) == 103
    with pytest.raises(KernelError, match="a function says nothing of its bytes"):
        nbytes([key])
    cache: KernelCache[object] = KernelCache(lambda wanted: key, max_bytes=10)
    with pytest.raises(KernelError, match="size_of"):
        cache.get(("a", "cpu"))

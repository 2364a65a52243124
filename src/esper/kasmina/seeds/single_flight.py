"""Single flight: one load for all who ask, in a thread of its own, whose end reaches every waiter."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from esper.errors import KernelError

V = TypeVar("V")


class SingleFlight(Generic[V]):
    """Runs loads for blocking and asyncio callers alike.

    A load belongs to none of its callers: one that is cancelled or interrupted takes nothing with it.

    Args:
        weigh: Returns the size of what was loaded; it runs where the load ran.
    """

    def __init__(self, weigh: Callable[[V], int]) -> None:
        self._weigh = weigh

    def start(
        self,
        name: str,
        future: Future[V],
        load: Callable[[], V | Awaitable[V]],
        land: Callable[[int | None], None],
    ) -> None:
        """Start a load that will fulfil ``future``.

        Args:
            name: Name of the load, for error messages.
            future: Future on which callers wait.
            load: Function that makes the value; what it returns is awaited on a new event loop, if it can be.
            land: Function that is told the size, in bytes, before any waiter hears of the value, or
                None where the load raised.
        """
        future.set_running_or_notify_cancel()  # from here on no waiter can cancel it

        def finish(done: Future[tuple[V, int]]) -> None:
            error = done.exception()
            if error is None:
                value, size = done.result()
                land(size)
                future.set_result(value)
            else:
                land(None)
                future.set_exception(tellable(name, error))

        own = ThreadPoolExecutor(
            1, "kernel-load"
        )  # a shared pool could queue it behind those who wait for it
        try:
            done = own.submit(self._run, load)
        except RuntimeError as error:  # the interpreter is shutting down
            done = Future()
            done.set_exception(error)
        done.add_done_callback(finish)
        own.shutdown(wait=False)

    def _run(self, load: Callable[[], V | Awaitable[V]]) -> tuple[V, int]:
        made = load()
        value = asyncio.run(_awaited(made)) if inspect.isawaitable(made) else made
        return value, self._weigh(value)


async def landed(future: Future[V]) -> V:
    """Await a load; at once where it has landed, without a turn of the event loop."""
    return future.result() if future.done() else await asyncio.wrap_future(future)


async def _awaited(value: Awaitable[V]) -> V:
    return await value


def tellable(name: str, error: BaseException) -> Exception:
    """Return an error that may be raised in a waiter: these others would end its task or never reach it."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration | FutureCancelled):
        return error
    told = KernelError(f"the load of {name} ended with {type(error).__name__}: {error}")
    told.__cause__ = error
    return told

"""``Forge``: kernels built and verified in the background, by processes that may not harm the training."""

from __future__ import annotations

import atexit
import heapq
import itertools
import os
import queue
import threading
import time as clock
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from esper.contracts import Event, Kernel, Observer, ignore
from esper.errors import ConfigError, EsperError, ForgeError
from esper.tezzeret import wire
from esper.tezzeret.limits import Limits
from esper.tezzeret.process import Death, Worker, WorkerProcess
from esper.tezzeret.ticket import Forged, State, Ticket

Build = Callable[..., Kernel]  # of a request, which is the build's own dataclass
BUILD, WARM = "esper.tezzeret.build:build", "esper.tezzeret.build:warm"


class Forge:
    """Takes requests and gives tickets; workers build one kernel at a time each.

    Making one costs nothing: threads and workers start with the first request, or by :meth:`start`. Use it
    with ``with``, or close it; at the end of the interpreter it closes itself. A parent that is killed takes
    its workers with it (Linux); their folders stay below the temporary directory.

    Args:
        build: Builder: a function a worker can import, or its ``"module:function"``.
        warm: Function a worker calls once before its first build, likewise; imports done there are not
            charged to a request.
        workers: Largest number of processes.
        limits: Limits of each process; None: the usual ones.
        retries: Number of further attempts after a worker died; a limit that was hit is not tried again.
        cache: Folder of Inductor's compiled code, shared by workers; without it each has its own, and it is
            lost with the worker.
        observe: Function told about workers that died, on the forge's own thread, once their ticket is final.

    Raises:
        ConfigError: A number is out of range.
        ForgeError: ``build`` cannot be imported by a worker.
    """

    def __init__(
        self,
        build: Build | str = BUILD,
        *,
        warm: Callable[[], object] | str | None = None,
        workers: int = 1,
        limits: Limits | None = None,
        retries: int = 1,
        cache: Path | None = None,
        observe: Observer = ignore,
    ) -> None:
        if workers < 1 or retries < 0:
            raise ConfigError(f"a forge needs workers >= 1 and retries >= 0, not {workers} and {retries}")
        self.build = build if isinstance(build, str) else wire.name_of(build)
        self.warm = wire.name_of(warm) if callable(warm) else warm
        if self.build == BUILD and warm is None:
            self.warm = WARM
        self.workers, self.retries, self.cache, self.observe = workers, retries, cache, observe
        self.limits = limits or Limits()
        self._owner = os.getpid()
        self._changed = threading.Condition()  # guards all below
        self._closed = False
        self._order = itertools.count()
        self._queue: list[tuple[int, int, Ticket]] = []  # a heap; tickets no longer queued are skipped
        self._tickets: weakref.WeakValueDictionary[str, Ticket] = weakref.WeakValueDictionary()
        self._running: dict[Ticket, Worker] = {}
        self._cancelled: set[Ticket] = set()  # running ones
        self._staff: list[Worker] = []
        self._threads: list[threading.Thread] = []  # the one that tells, then one for each worker
        self._idle = 0
        self._news: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    # -- from any thread -------------------------------------------------------------------------------------

    def submit(self, request: wire.Request, *, priority: int = 0, step: int = 0) -> Ticket:
        """Ask for a kernel; returns at once.

        Args:
            request: Frozen dataclass of JSON values; the same facts give the same ticket. A failed or
                cancelled one is forgotten, so asking again tries again.
            priority: Rank in the queue: higher goes first, equal ones in order; asking again can only raise
                it.
            step: Training step, for the forge's events.

        Raises:
            ForgeError: The forge is closed, or the request is too large or not JSON.
        """
        encoded = wire.encode_request(request, self.limits.request)
        with self._changed:
            self._usable()
            ticket = self._tickets.get(encoded.id)
            if ticket is None:
                ticket = self._tickets[encoded.id] = Ticket(encoded, priority, step, self._cancel)
            elif ticket.state != "queued" or priority <= ticket.priority:
                return ticket
            ticket.priority = priority
            heapq.heappush(self._queue, (-priority, next(self._order), ticket))
            if len(self._queue) > self._idle and len(self._threads) <= self.workers:
                self._start_thread()
            self._changed.notify()
        return ticket

    def start(self) -> None:
        """Start a worker in the background now, so that the first request finds it warm.

        Raises:
            ForgeError: The forge is closed.
        """
        with self._changed:
            self._usable()
            if not self._threads:
                self._start_thread()

    def close(self) -> None:
        """Cancel what is queued or running, kill the workers and wait until all of it is gone."""
        if (
            os.getpid() != self._owner
        ):  # a fork of the owner has neither its threads nor a right to its workers
            return
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for _, _, ticket in self._queue:
                if ticket.state == "queued":
                    self._finish(ticket, ForgeError("the forge was closed"), "cancelled", {})
            self._cancelled.update(self._running)
            for worker in self._staff:
                worker.stop("the forge was closed")
            self._changed.notify_all()
        here = threading.current_thread()  # a callback may close the forge
        for thread in self._threads[1:]:
            thread.join()
        self._news.put(None)
        if self._threads and self._threads[0] is not here:
            self._threads[0].join()
        atexit.unregister(self.close)

    def __enter__(self) -> Forge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def new_worker(self) -> Worker:
        """Make, not start, one worker; a forge of other workers says here of which."""
        return WorkerProcess(self.build, self.warm, self.limits, self.cache)

    def _usable(self) -> None:
        if self._closed or os.getpid() != self._owner:
            why = "closed" if self._closed else "made by the process this one was forked from"
            raise ForgeError(f"this forge was {why}; make a new Forge")

    def _cancel(self, ticket: Ticket) -> bool:
        with self._changed:
            worker = self._running.get(ticket)
            if worker is not None:
                self._cancelled.add(ticket)
                worker.stop("cancelled")
            elif ticket.state == "queued":
                self._finish(ticket, ForgeError("cancelled before it was begun"), "cancelled", {})
            else:
                return False
        return True

    def _start_thread(self) -> None:
        """Start the thread that tells, once, and one that keeps a worker; the caller holds the lock."""
        if not self._threads:
            atexit.register(self.close)
            self._threads.append(threading.Thread(target=self._tell, name="esper-forge", daemon=True))
            self._threads[0].start()
        worker = self.new_worker()
        self._staff.append(worker)
        keeper = threading.Thread(target=self._keep, args=(worker,), name="esper-forge-worker", daemon=True)
        self._threads.append(keeper)
        keeper.start()

    # -- on the thread that keeps a worker -------------------------------------------------------------------

    def _keep(self, worker: Worker) -> None:
        worker.start()  # if it fails, the first request tries again and hears of it
        while (ticket := self._next(worker)) is not None:
            self._forge(ticket, worker)
            del ticket  # or its kernel would be kept until the next one comes
        worker.close()

    def _next(self, worker: Worker) -> Ticket | None:
        """Wait for the first queued ticket and mark it running; None once the forge is closed."""
        with self._changed:
            while not self._closed:
                while self._queue:
                    _, _, ticket = heapq.heappop(self._queue)
                    if ticket.state == "queued":
                        ticket.state = "running"
                        self._running[ticket] = worker
                        worker.stop(None)
                        return ticket
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
        return None

    def _forge(self, ticket: Ticket, worker: Worker) -> None:
        """Build until there is an answer or no attempt is left."""
        waited, attempt = clock.monotonic() - ticket.asked, 1
        start = clock.monotonic()
        while isinstance(answer := worker.forge(ticket.frame), Death):
            self._warn(ticket, answer.reason)
            if not answer.again or attempt > self.retries:
                break
            attempt, start = attempt + 1, clock.monotonic()
        facts: Forged = {
            "seconds": clock.monotonic() - start,
            "waited": waited,
            "attempts": attempt,
            "peak_memory": worker.peak,
            "held": worker.held,
        }
        outcome = _read(answer, attempt)
        with self._changed:
            del self._running[ticket]
            cancelled = ticket in self._cancelled
            self._cancelled.discard(ticket)
            state: State = "done" if isinstance(outcome, Kernel) else "cancelled" if cancelled else "failed"
            self._finish(ticket, outcome, state, facts)

    def _finish(self, ticket: Ticket, outcome: Kernel | EsperError, state: State, facts: Forged) -> None:
        """Hand a ticket to the thread that tells; the caller holds the lock."""
        ticket.state = state
        if state != "done" and self._tickets.get(ticket.id) is ticket:
            del self._tickets[ticket.id]
        self._news.put(lambda: ticket.settle(outcome, state, facts))

    # -- on the thread that tells ----------------------------------------------------------------------------

    def _warn(self, ticket: Ticket, reason: str) -> None:
        event = Event("warning", ticket.step, {"message": f"forge: {reason}", "request": ticket.id})
        ticket.on_done(lambda _: self.observe(event))

    def _tell(self) -> None:
        """Settle tickets; callbacks run here, so a slow one delays only news. What one raises is logged."""
        while (news := self._news.get()) is not None:
            news()
            del news


def _read(answer: wire.Frame | Death, attempt: int) -> Kernel | EsperError:
    """Turn what an exchange came to into a kernel, or into the error that says why there is none."""
    if isinstance(answer, Death):
        return ForgeError(answer.reason if attempt == 1 else f"{answer.reason}\n({attempt} attempts)")
    try:
        return wire.decode_kernel(answer)
    except EsperError as error:
        return error

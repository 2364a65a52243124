"""``Ticket``: what a forge gives for a request, and where its kernel is collected."""

from __future__ import annotations

import asyncio
import time as clock
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal, TypedDict

from esper.contracts import Kernel
from esper.errors import EsperError
from esper.tezzeret.wire import Encoded

State = Literal["queued", "running", "done", "failed", "cancelled"]


class Forged(TypedDict, total=False):
    """What forging a kernel took; empty where the build was never begun."""

    seconds: float  # of the last attempt
    waited: float  # seconds before the first
    attempts: int
    peak_memory: int | None  # bytes; None: not measured
    held: dict[str, str]  # by which means each limit was in force


class Ticket:
    """A kernel to come.

    The same request gives the same ticket while anyone holds it, so cancelling it cancels it for everyone who
    asked. All methods may be called from any thread.

    Attributes:
        id: Digest of the request.
        priority: Higher goes first.
        step: Training step the request was made at; the forge's events carry it.
        state: State it is in; the last three are final.
        facts: Once final: ``seconds`` of the last attempt, ``waited`` before the first, ``attempts``,
            ``peak_memory`` in bytes (None: not measured), and ``held``: by which means each limit was in
            force. Empty where the build was never begun.
    """

    def __init__(self, request: Encoded, priority: int, step: int, cancel: Callable[[Ticket], bool]) -> None:
        self.id, self.priority, self.step = request.id, priority, step
        self.state: State = "queued"
        self.facts: Forged = {}
        self.frame, self.asked = request.frame, clock.monotonic()
        self._cancel = cancel
        self._answer: Future[Kernel] = Future()
        self._answer.set_running_or_notify_cancel()  # so that a cancelled waiter does not cancel the build

    def done(self) -> bool:
        """Tell whether the state is final."""
        return self._answer.done()

    def result(self, timeout: float | None = None) -> Kernel:
        """Return the kernel; wait for it at most ``timeout`` seconds.

        Raises:
            BlueprintError: The graph is not valid.
            CompileError: It could not be compiled, or what came out is wrong.
            ForgeError: The worker died, ran into its limits, or the ticket was cancelled.
            TimeoutError: It is not there yet; the build goes on.
        """
        return self._answer.result(timeout)

    async def wait(self) -> Kernel:
        """Return the kernel without blocking the event loop; raises what :meth:`result` raises."""
        return await asyncio.wrap_future(self._answer)

    def cancel(self) -> bool:
        """Take the request back: a queued one is removed, a running one's worker is killed and replaced.

        Returns:
            Whether it came in time.
        """
        return not self.done() and self._cancel(self)

    def on_done(self, callback: Callable[[Ticket], None]) -> None:
        """Call back on the forge's own thread once the state is final, or now and here if it is."""
        self._answer.add_done_callback(lambda _: callback(self))

    def settle(self, outcome: Kernel | EsperError, state: State, facts: Forged) -> None:
        """Make the state final; for the forge."""
        self.state, self.facts, self.frame = state, facts, b""
        if isinstance(outcome, Kernel):
            self._answer.set_result(outcome)
        else:
            self._answer.set_exception(outcome)

    def __repr__(self) -> str:
        return f"<Ticket {self.id[:12]} {self.state}>"

"""Work in the background, one piece at a time: of those that wait, only the newest is done."""

from __future__ import annotations

import threading
from collections.abc import Callable

Work = Callable[[], None]


class Writer:
    """Runs one piece of work at a time on a thread of its own, which ends when there is nothing to do.

    At most one is under way and one waits. A newer one takes the place of the one that waits: a snapshot that
    was overtaken has nothing to offer that the newer one does not have. The thread is not a daemon, so that a
    program that ends in the ordinary way ends after the last checkpoint.
    """

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.waiting: Work | None = None
        self.thread: threading.Thread | None = None
        self.overtaken = 0  # pieces that never ran

    def submit(self, work: Work) -> None:
        """Have a piece of work done soon; returns at once."""
        with self.condition:
            self.overtaken += self.waiting is not None
            self.waiting = work
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="esper-checkpoints")
                self.thread.start()

    @property
    def busy(self) -> bool:
        """Whether something is under way or waits."""
        with self.condition:
            return self.thread is not None

    def flush(self) -> None:
        """Wait until nothing is under way and nothing waits."""
        with self.condition:
            self.condition.wait_for(lambda: self.thread is None)

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                work()
                del work  # it holds a snapshot
        finally:
            self._end()  # where the work raised: nobody may wait for ever

    def _next(self) -> Work | None:
        with self.condition:
            work, self.waiting = self.waiting, None
            if work is None:
                self._end()
            return work

    def _end(self) -> None:
        with self.condition:
            if self.thread is threading.current_thread():
                self.thread = None
                self.condition.notify_all()

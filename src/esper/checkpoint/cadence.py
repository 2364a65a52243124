"""How often to save: from what a checkpoint was measured to cost, within a share of the run's time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TypeAlias

from esper.errors import ConfigError

Every: TypeAlias = "int | timedelta | None"

SHARE = 0.015  # of the run's time that checkpoints may take
GUESSED_RATE = (
    100e6  # bytes per second until a checkpoint was measured: copied, hashed twice, written, synced
)
GUESSED_START = 0.02  # seconds
FIRST = 0.25  # seconds of training after which the first checkpoint comes: a run may be killed again soon


class Cadence:
    """Says when a checkpoint is due.

    By default as often as loses least: with a cost C and one failure in M seconds, the best interval is
    √(2·C·M) (Young, 1974; Daly, 2006, refines it where C is not small). It is never shorter than what keeps
    all checkpoints together within 1.5 % of the run's time. C counts the stall of training and the processor
    time of the writing thread, which a busy machine takes from training too. Until then a checkpoint comes
    after ¼, ½, 1, 2, … seconds within that share, so that a run that is killed every few seconds gets on.

    Args:
        every: Optimizer steps, or a ``timedelta``, between checkpoints; None: as above.
        failure_every: Seconds between failures, M above.
        size: Bytes of a checkpoint, for a first guess of its cost.
        clock: Function that returns seconds, which only go forward.
        milestones: Whether one also comes soon after the beginning, and whenever the run has grown; None:
            only where ``every`` is None.

    Raises:
        ConfigError: ``every`` or ``failure_every`` is not positive.
    """

    def __init__(
        self,
        every: Every,
        failure_every: float,
        size: int,
        clock: Callable[[], float] = time.monotonic,
        milestones: bool | None = None,
    ) -> None:
        known = every is None or isinstance(every, int | timedelta)
        if not known or isinstance(every, bool) or not isinstance(failure_every, int | float):
            raise ConfigError(
                f"a checkpoint every {every!r}, a failure every {failure_every!r} s: every is a number of "
                "steps, a timedelta or None, failure_every a number of seconds"
            )
        seconds = every.total_seconds() if isinstance(every, timedelta) else every
        if (seconds is not None and seconds <= 0) or not failure_every > 0:
            raise ConfigError(
                f"a checkpoint every {every}, a failure every {failure_every} s: both must be positive"
            )
        self.every, self.failure_every, self.clock = every, failure_every, clock
        self.made = clock()
        self.begun: float | None = None  # when training did
        self.last: float | None = None
        self.last_step = self.size = 0
        self.milestones = every is None if milestones is None else milestones
        self.spent = 0.0  # seconds, by all checkpoints so far
        self.costs: deque[float] = deque(maxlen=5)
        self.guess = GUESSED_START + size / GUESSED_RATE

    @property
    def cost(self) -> float:
        """Seconds one checkpoint costs: the mean of the last five, a guess before the first."""
        return sum(self.costs) / len(self.costs) if self.costs else self.guess

    @property
    def interval(self) -> float:
        """Seconds between checkpoints that a run of any length keeps to."""
        if isinstance(self.every, timedelta):
            return self.every.total_seconds()
        return max(self.cost / SHARE, math.sqrt(2 * self.cost * self.failure_every))

    def due(self, step: int) -> bool:
        """Tell whether to save now; asked after every step."""
        now = self.clock()
        self.begun = now if self.begun is None else self.begun
        if self.milestones and self.last is None and now - self.begun >= FIRST:
            return True
        if isinstance(self.every, int):
            return step - self.last_step >= self.every
        if isinstance(self.every, timedelta):
            return now - (self.made if self.last is None else self.last) >= self.every.total_seconds()
        since = now - (self.begun if self.last is None else self.last)
        ran = now - self.begun
        soon = self.last is not None and self.milestones
        return since >= (min(self.interval, max(ran / 2, FIRST)) if soon else self.interval) and (
            self.spent + self.cost <= SHARE * ran
        )

    def grown(self, size: int) -> bool:
        """Tell whether to save because the run has grown, or was taken back, since it was asked last."""
        changed, self.size = size != self.size, size
        return changed and self.milestones

    def saved(self, step: int) -> None:
        """Note that a snapshot was taken."""
        self.last, self.last_step = self.clock(), step

    def measured(self, seconds: float) -> None:
        """Note what one checkpoint cost."""
        self.costs.append(seconds)
        self.spent += seconds

    def told(self) -> str:
        """Say how often, at what cost, and what a failure loses."""
        cost = f"a checkpoint costs {self.cost * 1e3:.3g} ms{'' if self.costs else ' (a guess)'}"
        if isinstance(self.every, int):
            return (
                f"{cost}; one every {self.every} steps; a failure loses {self.every / 2:.3g} steps on average"
            )
        interval = self.interval
        return (
            f"{cost}; one every {interval:.3g} s takes {self.cost / interval:.2%} of the run; "
            f"a failure loses {interval / 2 + self.cost:.3g} s on average"
        )

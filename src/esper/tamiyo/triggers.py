"""When to look for growth: an even schedule, brought forward when the loss stalls."""

from __future__ import annotations

import math
from collections import deque
from typing import TypedDict

import numpy as np

from esper.config import Schedule


class TriggerState(TypedDict):
    """What a trigger goes on with, as JSON values."""

    due: list[int]  # steps
    losses: list[float]


class Trigger:
    """Tells when a decision is due.

    Widening early and evenly is what the measured wins used; waiting for a plateau alone starts too late.

    Args:
        settings: Warm-up, end and stall test.
        steps: Number of optimizer steps of the run; None leaves only the stall test.
        decisions: Number of decisions to spread.
    """

    def __init__(self, settings: Schedule, steps: int | None, decisions: int) -> None:
        self.settings = settings
        self.warmup = math.ceil(settings.warmup * steps) if steps else 2 * settings.plateau_window
        self.due: list[int] = []
        if steps and decisions:
            last = max(settings.stop * steps, self.warmup)
            self.due = [self.warmup + round(i * (last - self.warmup) / decisions) for i in range(decisions)]
        self.interval = math.ceil((self.due[1] - self.due[0]) / 2) if len(self.due) > 1 else 0
        self.stop = settings.stop * steps if steps else math.inf
        self.losses: deque[float] = deque(maxlen=2 * settings.plateau_window)
        self.scheduled = bool(steps)

    def reason(self, step: int, loss: float) -> str | None:
        """Return why a decision is due at this step, or None."""
        self.losses.append(loss)
        if step < max(self.warmup, 1) or step > self.stop:
            return None
        if self.due and step >= self.due[0]:
            self.taken()
            return "scheduled"
        looked = step % (self.settings.plateau_window // 2) == 0
        if self.settings.plateau and looked and self.standing():
            if self.scheduled and not self.due:
                return None
            self.taken()
            return "the loss stalls"
        return None

    def taken(self) -> None:
        """Count a decision off the schedule and start watching afresh."""
        self.due = self.due[1:]
        self.losses.clear()

    def again(self, step: int) -> None:
        """Give a refused decision another chance half an interval later, unless one is due before."""
        retry = step + self.interval
        if self.interval and retry <= self.stop and not (self.due and self.due[0] <= retry):
            self.due.insert(0, retry)

    def stalled(self) -> bool:
        """Tell whether the later half of the window is no better than the earlier by one standard error."""
        losses = np.asarray(self.losses)
        old, new = np.split(losses, 2)
        error = math.sqrt(float(old.var(ddof=1) + new.var(ddof=1)) / len(new))
        return not float(new.mean()) < float(old.mean()) - error

    def standing(self) -> bool:
        """Tell whether the loss stands still; while too few losses were seen it does not."""
        return len(self.losses) == self.losses.maxlen and self.stalled()

    def state_dict(self) -> TriggerState:
        """Return what is still due and the losses seen."""
        return {"due": list(self.due), "losses": list(self.losses)}

    def load_state_dict(self, state: TriggerState) -> None:
        """Go on watching."""
        self.due = list(state["due"])
        self.losses = deque(state["losses"], maxlen=self.losses.maxlen)

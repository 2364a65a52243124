"""When events fall: at shares of the learning that the user's own schedule will do."""

from __future__ import annotations

import math
from typing import TypedDict

from torch.optim.lr_scheduler import LRScheduler

from esper.batches.examples import count_examples
from esper.tamiyo.early import placed
from esper.tamiyo.triggers import Trigger, TriggerState
from esper.tolaria.growth.early.rates import forecast, moves
from esper.tolaria.growth.evidence.evidence import RECENT, Evidence
from esper.tolaria.growth.run.state import RunState

UNMOVED = 2  # steps after which a scheduler that has not moved does not move by the step
LENGTH = 1000  # steps a run counts as whose length is not known
LATE = 2  # events that are in reserve: widths spend the budget before them
LAST = 0.85  # of the learning: after it no event is added, whatever the last one brought
FEWEST = 20  # steps of a run in which anything can be learned, grown and judged


class TimetableState(TypedDict):
    """What is still due, as a checkpoint keeps it."""

    due: list[int]
    settled: bool
    trigger: TriggerState | None
    repeated: int


class Timetable:
    """The steps of a run at which something is due.

    Args:
        run: What the run knows of itself.
        evidence: Which says how many examples an event reads.

    Attributes:
        due: Steps of events to come.
        wake: The step from which on batches are kept for the next event; before it nothing is asked.
    """

    def __init__(self, run: RunState, evidence: Evidence) -> None:
        self.run, self.parts, self.evidence = run, run.parts, evidence
        self.settings = run.config.early
        self.trigger = Trigger(run.config.schedule, None, 0) if self.parts.steps is None else None
        self.shares: dict[int, float] = {}  # of the learning, by the step at which it is done
        self.last = 0  # step after which no event is added
        self.due = self.planned()
        self.settled = not self.parts.schedulers  # whether how often the schedulers move is known
        self.wake: float = 0
        self.repeated = 0  # the step of the latest event that asked again

    @property
    def pending(self) -> bool:
        """Whether an event may still come."""
        return bool(self.due) or self.trigger is not None

    def planned(self) -> list[int]:
        """Place the events that are still to come by what the learning rate will do."""
        steps, now = self.parts.steps, self.run.steps
        if steps is None or steps < FEWEST:
            return []
        optimizer = next(iter(self.parts.optimizers.values()))
        rates = forecast(self.parts.schedulers, optimizer, steps, now)
        self.shares = placed(self.settings.shares, rates, steps)
        self.last = max(placed((LAST,), rates, steps), default=0)
        return sorted(step for step in self.shares if step > now)

    @property
    def learned(self) -> float:
        """The share of its learning that the run has done by its latest event; 1 where none was planned."""
        return max((share for step, share in self.shares.items() if step <= self.run.steps), default=1.0)

    def reason(self, now: int, loss: float, paused: bool = False) -> str | None:
        """Return why an event is due, or None; what is due while growth is paused waits for its end."""
        if not self.settled:
            self.settle(now)
        why = None if self.trigger is None else self.trigger.reason(now, loss)
        if paused:
            return None
        if self.due and now >= self.due[0]:
            why = why or "scheduled"
            self.due = [step for step in self.due if step > now]
        self.rest(now)
        return why

    def settle(self, now: int) -> None:
        """Look whether the schedulers move as was assumed: by the step, or once in an epoch."""
        moved = [moves(one) for one in self.parts.schedulers if isinstance(one, LRScheduler)]
        self.settled = not moved or min(moved) > 0
        if self.settled or now == UNMOVED:
            self.due = self.planned()

    def rest(self, now: int) -> None:
        """Sleep until batches for the next event must be kept."""
        if not self.settled or self.trigger is not None:
            return
        size = max(count_examples(self.run.batches[-1]), 1)
        needed = max(math.ceil(self.evidence.most / size) + 1, RECENT)
        self.wake = self.due[0] - needed if self.due else math.inf

    @property
    def late(self) -> int:
        """The last two events, or half of fewer: for blocks, and for what had no evidence before.

        A new block pays once the ones before it have learned something; widths are to be there by then.
        """
        return min(max(len(self.settings.shares) // 2, 1), LATE)

    def again(self, now: int) -> None:
        """Ask once more half-way to the next event, or half as far as the last one was."""
        if self.trigger is not None or self.repeated >= now:
            return
        following = self.due[0] if self.due else min(now + now // 2, self.parts.steps or now)
        self.repeated = (now + following) // 2
        if now < self.repeated < following:
            self.put_off(self.repeated)

    def further(self, now: int) -> None:
        """Ask once more at once, where the last event that was planned has paid."""
        if self.trigger is None and not self.due and now < self.last:
            self.put_off(now + 1)

    def put_off(self, step: int) -> None:
        """Let the event that is due wait until a step."""
        self.due, self.wake = sorted({step, *self.due}), 0

    def clear(self) -> None:
        """Expect no further event."""
        self.due = []
        if self.trigger is None:
            self.wake = math.inf

    def length(self, share: float) -> int:
        """Return a share of the run in steps."""
        return max(round(share * (self.parts.steps or LENGTH)), 1)

    def state_dict(self) -> TimetableState:
        """Return what is still due."""
        trigger = None if self.trigger is None else self.trigger.state_dict()
        return {"due": list(self.due), "settled": self.settled, "trigger": trigger, "repeated": self.repeated}

    def load_state_dict(self, state: TimetableState) -> None:
        """Go on."""
        self.due, self.settled = list(state["due"]), state["settled"]
        self.repeated = state["repeated"]
        if self.trigger is not None and state["trigger"] is not None:
            self.trigger.load_state_dict(state["trigger"])
        self.wake = 0

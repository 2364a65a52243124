"""What of a journal stands: a run that goes on from a checkpoint does the steps behind it again.

A process begins with ``run_started`` at step 0. One that goes on tells ``run_started``, then ``resumed``, at
the checkpoint's step, and what the killed process did beyond that step is undone: it is shown and counted
once, as the new process tells it. Lines are never rewritten; readers leave out what is undone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from esper.contracts import Event
from esper.nissa.run.facts import DecisionFacts, facts_of

BEGINS = ("run_started", "resumed")
LASTING = (*BEGINS, "ranks")  # befell the run, whatever became of the step they befell it at
KNOWN_AGAIN = ("warning", "fallback", "epoch", "stage", "outcome", "gate")  # told at the step of the resume


class Standing:
    """Takes a journal's events, one by one, and keeps those that stand.

    Attributes:
        events: Events that stand, in order.
        revision: Goes up whenever something that stood does not stand any more.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.revision = 0
        self._earlier: list[Event] = []  # while a process has begun and may still go on from one of them
        self._base = -1  # where the present process goes on from; -1: at the beginning
        self._half = False  # run_started has told of going on, resumed may follow

    def add(self, event: Event) -> Event | None:
        """Take one event in.

        Returns:
            The event as it stands; None where it says again what is known.
        """
        if event.kind == "run_started" and event.step == 0:
            self._begin()
        elif event.kind in BEGINS:
            event = self._go_on(event)
        elif event.step == self._base and event.kind in KNOWN_AGAIN and self._knows(event):
            return None
        self._half = self._half and event.step == self._base
        self.events.append(event)
        return event

    def _begin(self) -> None:
        if _moved(self.events):
            self._earlier = self.events
        self.revision += bool(self.events)
        self.events = list[Event]()
        self._base = -1

    def _go_on(self, event: Event) -> Event:
        """Undo what stands behind the event's step; the event learns how many steps are done again."""
        if event.kind == "resumed" and self._half and self._base == event.step:
            self._half = False
            return event
        opening = (
            list[Event]() if _moved(self.events) else self.events
        )  # what a process says before it goes on
        past = (self._earlier if opening else self.events) or opening
        self._base, self._half = event.step, event.kind == "run_started"
        self._earlier = []
        self.events = [item for item in past if _stands(item, event.step)]
        if past is opening:  # nothing is known of what was before
            return event
        self.events += [
            replace(item, step=event.step)
            for item in opening
            if item.kind not in BEGINS and not self._knows(item)
        ]
        self.revision += 1
        reached = max((item.step for item in past if item.kind not in LASTING), default=0)
        return replace(event, data={**event.data, "redone": max(0, reached - event.step)})

    def _knows(self, event: Event) -> bool:
        return any(item.kind == event.kind and item.data == event.data for item in self.events)


def decided_after(events: Iterable[Event], step: int) -> dict[int, DecisionFacts]:
    """Return the decisions that a run going on from ``step`` takes again as they were journalled.

    A later process's decision replaces an earlier one's of the same step, and a process that passed a step
    without deciding there has dropped what was decided there before.

    Returns:
        Data of decision events by their steps, in order.
    """
    found: dict[int, DecisionFacts] = {}
    earlier: dict[int, DecisionFacts] = {}
    nothing: dict[int, DecisionFacts] = {}
    base, mine, moved = 0, set[int](), True
    for event in events:
        if event.kind == "run_started" and event.step == 0:
            earlier = found if moved else earlier
            found, base, mine, moved = dict(nothing), 0, set(), False
        elif event.kind in BEGINS:
            found = found if moved else earlier
            earlier, base, mine, moved = found, event.step, set(), False
        elif event.step > base:
            moved = True
            for passed in [at for at in found if base < at < event.step and at not in mine]:
                del found[passed]
            if event.kind == "decision":
                found[event.step] = facts_of(event, DecisionFacts)
                mine.add(event.step)
    found = found if moved else earlier
    return {at: found[at] for at in sorted(found) if at > step}


def _stands(event: Event, step: int) -> bool:
    if event.kind == "checkpoint":  # told later, by a thread of its own
        return bool(event.data["step"] <= step)
    return event.kind in LASTING or (event.step <= step and event.kind != "run_finished")


def _moved(events: Iterable[Event]) -> bool:
    return any(event.step for event in events)

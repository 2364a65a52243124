"""Who hears of events: Esper's own, then the user's, whose errors are theirs and change nothing of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from esper.contracts import Event, Observer
from esper.surgery.isolation.surroundings import afterwards

RAISED = "raised by on_event:"  # begins the note of an error that is the user's own


class Observers:
    """Tells every event to several, in order.

    Args:
        own: Esper's: a journal, the logger.
        on_event: The user's. What it raises is held until the run is whole again, for an event is told in the
            midst of what it tells of: raised there, it would end an insertion.
    """

    def __init__(self, own: Sequence[Observer], on_event: Observer) -> None:
        self.each, self.on_event = (*own, self.pass_on), on_event
        self.held: list[Exception] = []

    def __call__(self, event: Event) -> None:
        """Tell one; what an observer writes lasts, though it be told in the midst of a pass."""
        for observer in self.each:
            afterwards(partial(observer, event))

    def pass_on(self, event: Event) -> None:
        """Tell the user's, and hold what it raises."""
        try:
            self.on_event(event)
        except Exception as error:  # it is the user's code that runs here: it raises what it likes
            error.add_note(f"{RAISED} it was told {event.kind!r} at step {event.step}")
            self.held.append(error)

    def settle(self) -> None:
        """Raise the first error that was held; the others were noted on it."""
        if self.held:
            first, *others = self.held
            self.held = []
            if others:
                first.add_note(f"{RAISED} {len(others)} more errors, the last {others[-1]!r}")
            raise first

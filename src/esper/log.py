"""What a user should hear of a run, though nobody listens to its events: the logger ``esper``.

Python shows a warning of a logger on standard error where nothing else was set up, and nothing raises there:
``warnings`` can be turned into errors, which would end the user's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from esper.contracts import Event
from esper.printable import printable

LOGGER = logging.getLogger("esper")


class Logged:
    """An observer that logs, once each, what a run warns of, and why it has grown nothing at its end."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Log an event that a user should hear of."""
        data = event.data
        match event.kind:
            case "warning":
                self.say(event.step, str(data["message"]), str(data["message"]))
            case "fallback":
                self.say(event.step, str(data["what"]), f"{data['what']}: {data['why']}")
            case "rolled_back":
                self.say(event.step, f"rolled back {event.step}", str(data["message"]))
            case "run_finished" if data.get("advice"):
                self.say(event.step, "nothing", "nothing has grown: " + "; ".join(data["advice"]))

    def say(self, step: int, topic: str, message: str) -> None:
        """Log a message, once for a topic."""
        if topic not in self.told:
            self.told.add(topic)
            LOGGER.warning("step %d: %s", step, printable(message))


@contextmanager
def shown_elsewhere() -> Iterator[None]:
    """Print no warnings on standard error while something else shows events; a user's own handlers stay."""
    handler = logging.NullHandler()
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)

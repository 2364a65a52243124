"""What goes wrong at an event stays there: it is told once, the event is skipped, and training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from esper.errors import ProcessError
from esper.kasmina.isolation import taught


class Mishaps:
    """Contains errors of one run's events.

    Args:
        growth: The conductor: ``tell``, ``peers``.
    """

    def __init__(self, growth: Any) -> None:
        self.growth = growth
        self.told: set[str] = set()

    @contextmanager
    def contained(self, what: str, skip: Callable[[str], None]) -> Iterator[None]:
        """Let an error end no more than this.

        Of several processes the others may be waiting for this one in the same call: there it is raised.

        Args:
            what: Is done meanwhile.
            skip: Called with the reason; leaves everything in order.
        """
        try:
            with taught():
                yield
        except ProcessError:
            raise
        except Exception as error:  # the user's model, loss and probe run here: they raise what they like
            if self.growth.peers.world > 1:
                raise
            reason = f"{type(error).__name__}: {error}"
            skip(reason)
            self.say(f"{what} was skipped, training goes on: {reason}")

    def say(self, message: str, topic: str = "") -> None:
        """Tell it, once; once for all messages on a topic where one is named."""
        if (topic or message) not in self.told:
            self.told.add(topic or message)
            self.growth.tell("warning", message=message)

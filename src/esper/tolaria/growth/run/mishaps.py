"""What goes wrong at an event stays there: it is told once, the event is skipped, and training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from esper.distributed.collectives import Peers
from esper.errors import ProcessError
from esper.surgery.isolation.contexts import taught
from esper.tolaria.growth.run.components import RunComponents


def replaced(names: Sequence[str]) -> str:
    """Say which parameters are other objects than before, why, and what to do; empty where none is."""
    if not names:
        return ""
    listed = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
    return (
        f"{listed} grew into new objects, because a graph or a weak reference held the old ones: optimizers "
        "follow, but lists of parameters made before, to clip gradients say, hold the old ones, and a "
        "backward() through what was computed before this step fails. Keep losses as loss.item(), so that no "
        "graph lives on after its step, make such lists anew from model.parameters(), and compute the next "
        "loss only behind growth.step"
    )


class Told(Protocol):
    """A run, as far as its mishaps go."""

    parts: RunComponents

    @property
    def peers(self) -> Peers:
        """The processes that train the model together."""

    def tell(self, kind: str, **data: object) -> None:
        """Emit an event."""


class Mishaps:
    """Contains errors of one run's events.

    Args:
        run: The run.
    """

    def __init__(self, run: Told) -> None:
        self.run = run
        self.told: set[str] = set()
        self.unsaid: list[str] = []  # what a config cannot say of the grown model

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
            if self.run.peers.world > 1:
                raise
            reason = f"{type(error).__name__}: {error}"
            skip(reason)
            self.say(f"{what} was skipped, training goes on: {reason}")

    def warn_replaced(self) -> None:
        """Warn once where parameters became other objects: what else holds the old ones is wrong by now."""
        if lost := replaced(self.run.parts.committer.replaced):
            self.say(lost, "replaced")

    def say(self, message: str, topic: str = "") -> None:
        """Tell it, once; once for all messages on a topic where one is named."""
        if (topic or message) not in self.told:
            self.told.add(topic or message)
            self.run.tell("warning", message=message)

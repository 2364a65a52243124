"""An event whose worth is still open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from esper.tolaria.growth.early.seeds import Decision
from esper.tolaria.growth.early.takeback import Before, BeforeState
from esper.tolaria.growth.run.account import EventRecord

WORTH = 0.01  # of the held-out loss, by which it must have fallen: a converged model's moves by less


class JudgedState(TypedDict):
    """A :class:`Judged` as a checkpoint keeps it."""

    before: BeforeState
    until: int
    held_out: float
    extended: bool
    decisions: list[list[Any]]  # the fields of each
    record: int  # its place among the records


@dataclass
class Judged:
    """What is needed to keep an event, or to take it back.

    Attributes:
        before: The run as it was.
        until: The step at which it is judged.
        held_out: Mean held-out loss before it.
        decisions: One per place that has grown.
        record: What is told of it.
        extended: It had not won by then, and has been given the same time again.
    """

    before: Before
    until: int
    held_out: float
    decisions: list[Decision]
    record: EventRecord
    extended: bool = False

    def won(self, now: float, partly: bool, than: float | None = None) -> bool:
        """Tell whether the held-out loss has fallen by what is worth it.

        Args:
            now: Mean held-out loss.
            partly: The run ends before the time is up: then the evidence stands unless the loss has risen.
            than: What the weights from before the event lose now; None: what they lost then.
        """
        before = self.held_out if than is None else than
        return now < before - (0.0 if partly else WORTH * abs(before))

    def told(self, then: float, now: float) -> str:
        """Say what was compared.

        Args:
            then: What the weights from before the event lose now.
            now: Mean held-out loss.
        """
        changed = "" if then == self.held_out else f" ({self.held_out:.4g} as the loss was at the event)"
        return f"held-out loss {then:.4g} → {now:.4g}{changed}"

    def state_dict(self, records: Sequence[EventRecord]) -> JudgedState:
        """Return what a checkpoint keeps."""
        return {
            "before": self.before.state_dict(),
            "until": self.until,
            "held_out": self.held_out,
            "extended": self.extended,
            "decisions": [list(one) for one in self.decisions],
            "record": records.index(self.record),
        }

    @classmethod
    def from_state(cls, state: JudgedState, records: Sequence[EventRecord]) -> Judged:
        """Read it back."""
        return cls(
            Before.from_state(state["before"]),
            state["until"],
            state["held_out"],
            [Decision(*one) for one in state["decisions"]],
            records[state["record"]],
            state["extended"],
        )

"""Decisions that a killed process journalled are taken again as they were.

A decision is on the disk before it is applied. The process that goes on decides for itself again, so that its
random streams move as they did; on a deterministic machine that is the same decision. Where it is not (a
wall-clock budget, other settings, another rounding) the journal has the last word, up to the last decision
that it holds: what a run decided once is not lost with the process that did.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from esper.contracts import Decision
from esper.errors import RunError
from esper.nissa.run.facts import DecisionFacts
from esper.nissa.run.journal import RunJournal
from esper.tolaria.growth.run.state import RunState

APPLIED = ("action", "site", "width", "start")
EXPLAINED = ("reason", "propensity", "predicted")


class Redo:
    """What is still to be taken again by one run.

    Args:
        run: What the run knows of itself.

    Attributes:
        journal: Where to read it; None where there is none, and in all processes but the first.
        ahead: Decisions to come, data by step; the same in every process.
    """

    def __init__(self, run: RunState) -> None:
        self.run = run
        self.journal: RunJournal | None = None
        self.ahead: dict[int, DecisionFacts] = {}

    def read(self) -> None:
        """Find what was journalled behind the step the run goes on from."""
        found: Mapping[int, DecisionFacts] = {}
        if self.journal is not None:
            try:
                found = self.journal.decided_after(self.run.steps)
            except RunError as error:  # the weights are sound: better to go on than to stop for the why
                self.run.tell("warning", message=f"what was decided behind the checkpoint is lost: {error}")
        peers = self.run.peers
        if peers.world > 1:
            found = {
                int(k): v for k, v in json.loads(peers.broadcast_bytes(json.dumps(found).encode())).items()
            }
        self.ahead = dict(found)

    def due(self, why: str | None) -> str | None:
        """Return why a decision is due now; only journalled ones are, as long as there are any ahead."""
        if not self.ahead:
            return why
        now = self.run.steps
        for step in [step for step in self.ahead if step < now]:
            self._miss(step, "another seed was awake, or growth was paused")
        if now in self.ahead:
            return why or "journalled"
        return None if self.ahead else why

    def journalled_or(self, own: Decision, free: Container[str]) -> Decision:
        """Return the decision to apply at this step.

        Args:
            own: What this process decided.
            free: The sites where a seed can be woken now.
        """
        data = self.ahead.get(self.run.steps)
        if data is None:
            return own
        if data["site"] is not None and data["site"] not in free:
            self._miss(self.run.steps, f"{data['site']} is not free")
            return own
        del self.ahead[self.run.steps]
        if all(data[name] == getattr(own, name) for name in APPLIED):
            return own
        facts: dict[str, Any] = {name: data[name] for name in (*APPLIED, *EXPLAINED)}
        decision = replace(own, **facts, arms=tuple(data["arms"]))
        said = f"decision {own.id} is taken as journalled, {_words(decision)}"
        self.run.tell("warning", message=f"{said}; this process would have chosen to {_words(own)}")
        return decision

    def _miss(self, step: int, why: str) -> None:
        data = self.ahead.pop(step)
        what = f"{data['action']} {data['site']}" if data["site"] else "do nothing"
        message = f"the decision journalled at step {step}, {what}, could not be taken again: {why}"
        self.run.tell("warning", message=message)


def _words(decision: Decision) -> str:
    if decision.site is None:
        return "do nothing"
    return f"{decision.action} {decision.site} by {decision.width} ({decision.start})"

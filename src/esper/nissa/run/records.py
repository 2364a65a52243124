"""The parts of a run's history: quantities over steps, lives of seeds, decisions, epochs, resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from esper.nissa.run.facts import DecisionFacts, GrownFacts, LookFacts, OutcomeFacts, RaceFacts, ReopenedFacts
from esper.nissa.run.journal import number


@dataclass(slots=True)
class Series:
    """A quantity over steps; None is "not measured"."""

    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def add(self, step: int, value: float | str | None) -> None:
        """Append a point."""
        self.steps.append(step)
        self.values.append(number(value))

    @property
    def last(self) -> float | None:
        """The newest value."""
        return self.values[-1] if self.values else None


@dataclass(slots=True)
class Span:
    """A seed's time in one stage; ``end`` is None while it is there."""

    stage: str
    start: int
    end: int | None
    reason: str


@dataclass(slots=True)
class SeedHistory:
    """The life of one seed."""

    seed: str
    site: str
    spans: list[Span] = field(default_factory=list)
    alpha: Series = field(default_factory=Series)
    vitals: Mapping[str, object] | None = None  # the last told: smoothed, with a score

    @property
    def stage(self) -> str:
        """Where the seed is now."""
        return self.spans[-1].stage if self.spans else "DORMANT"

    @property
    def lives(self) -> list[list[Span]]:
        """Its stages from each germination to what became of it: a seed's slot is used again and again."""
        found: list[list[Span]] = []
        for span in self.spans:
            if span.stage == "GERMINATED":
                found.append([])
            if found and span.stage not in ("EMBARGOED", "DORMANT"):
                found[-1].append(span)
        return found


@dataclass(slots=True)
class DecisionHistory:
    """One decision with everything that led to it and came of it, joined by its id."""

    id: int
    step: int
    survey: list[Mapping[str, object]] = field(default_factory=list)
    chosen: DecisionFacts = field(
        default_factory=DecisionFacts
    )  # the decision event; empty while only surveyed
    race: RaceFacts | None = None
    looks: list[LookFacts] = field(default_factory=list)  # of the gate, in order
    outcome: OutcomeFacts | None = None
    widened: GrownFacts | None = None  # or grafted: how it became part of the model
    widened_at: int | None = None  # step
    blocks: int = 0  # that came to a stack; each is told by an event of its own
    decided_at: int | None = None  # step of the outcome
    reopened: ReopenedFacts | None = None  # how the host was re-opened at the same step

    @property
    def action(self) -> str | None:
        """``widen`` or ``nothing``; None while only surveyed."""
        return self.chosen.get("action")

    @property
    def site(self) -> str | None:
        """Where it acts; None for nothing."""
        return self.chosen.get("site")

    @property
    def scored(self) -> bool:
        """Whether places had to pass one by one and none was chosen: there was no race."""
        return any("p_value" in look for look in self.looks)

    @property
    def units(self) -> int:
        """How many the model got: units, blocks of a stack, or one branch."""
        return 0 if self.widened is None else int(self.widened.get("units", max(self.blocks, 1)))

    @property
    def kept(self) -> bool | None:
        """Whether the growth stayed; None while it is being judged, or where there was none."""
        return None if self.outcome is None else bool(self.outcome["kept"])

    @property
    def verdict(self) -> str:
        """One word for tables."""
        if self.action not in ("widen", "graft"):
            return "waited" if self.action else "surveyed"
        if self.kept is False and self.widened is not None:
            return "taken back"
        return {True: "kept", False: "refused", None: "open"}[self.kept]


@dataclass(slots=True)
class Epoch:
    """Metrics at the end of an epoch."""

    epoch: int
    step: int
    metrics: dict[str, float | None]


@dataclass(slots=True)
class Resume:
    """A process that went on from a checkpoint."""

    step: int
    name: str | None  # of the checkpoint
    redone: int | None  # steps done again, as far as the journal knows: at least so many

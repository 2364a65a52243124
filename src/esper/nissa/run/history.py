"""What a run's events amount to: one fold, read by the live view, the report and ``esper why``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypedDict

from esper.contracts import Event, Refusal, Stage
from esper.nissa.run.facts import (
    DecisionFacts,
    GrownFacts,
    LookFacts,
    OutcomeFacts,
    RaceFacts,
    ReopenedFacts,
    RunFinished,
    RunStarted,
    facts_of,
)
from esper.nissa.run.journal import number
from esper.nissa.run.records import DecisionHistory, Epoch, Resume, SeedHistory, Series, Span
from esper.nissa.run.standing import Standing


class Wider(TypedDict):
    """A place that grew, in units."""

    site: str
    before: int
    after: int


class Totals(TypedDict):
    """A run in a few numbers; None is "not known"."""

    model: str | None
    growth: str | None
    limits: dict[str, object]
    finished: bool
    steps: int
    parameters_before: int | None
    parameters_after: int | None
    flops_before: int | None
    flops_after: int | None
    training_flops: float | None
    growth_flops: float | None
    seconds: float | None
    metrics: dict[str, float | None]
    survived: dict[str, int]
    decisions: int
    kept: int
    grown: list[Wider]


@dataclass(slots=True)
class RunHistory:
    """A run so far; ``add`` folds one more event into it."""

    started: RunStarted = field(default_factory=RunStarted)  # data of run_started
    restarted: RunStarted = field(default_factory=RunStarted)  # of one that went on, nothing known of before
    finished: RunFinished | None = None  # data of run_finished
    step: int = 0
    seconds: float | None = None
    loss: Series = field(default_factory=Series)
    parameters: Series = field(default_factory=Series)
    training_flops: Series = field(default_factory=Series)
    growth_flops: Series = field(default_factory=Series)
    epochs: list[Epoch] = field(default_factory=list)
    seeds: dict[tuple[str, str], SeedHistory] = field(default_factory=dict)  # by site and seed
    decisions: dict[int, DecisionHistory] = field(default_factory=dict)
    faults: list[Event] = field(default_factory=list)
    fallbacks: list[Event] = field(default_factory=list)
    compiled: list[Event] = field(default_factory=list)  # forms handed over, hosts compiled again
    warnings: list[Event] = field(default_factory=list)
    checkpoints: list[Event] = field(default_factory=list)  # written and verified
    resumes: list[Resume] = field(default_factory=list)
    alarms: list[Event] = field(default_factory=list)
    rollbacks: list[Event] = field(default_factory=list)
    ranks: list[Event] = field(default_factory=list)  # processes that joined, were lost or differed
    rewraps: list[Event] = field(default_factory=list)
    reopened: list[Event] = field(default_factory=list)  # hosts whose loss was satisfied
    taken_back: list[Event] = field(default_factory=list)  # events that did not pay
    _standing: Standing = field(default_factory=Standing, repr=False, compare=False)

    def add(self, event: Event) -> None:
        """Fold one event in; one that goes on from an earlier step undoes what was told beyond it."""
        revision, told = self._standing.revision, self._standing.add(event)
        if self._standing.revision != revision:
            self._stand(self._standing.events, self._standing)
        elif told is not None:
            self._fold(told)

    def _stand(self, events: Iterable[Event], standing: Standing | None = None) -> None:
        """Begin anew from a journal, or from what of it stands by now."""
        if standing is None:
            standing = Standing()
            for event in events:
                standing.add(event)
        fresh = RunHistory(_standing=standing)
        for name in RunHistory.__slots__:
            setattr(self, name, getattr(fresh, name))
        for event in standing.events:
            self._fold(event)

    def _fold(self, event: Event) -> None:
        self.step = event.step
        _FOLDS[event.kind](self, event)

    @property
    def grown(self) -> list[DecisionHistory]:
        """Decisions whose growth was kept, in order."""
        return [decision for decision in self.decisions.values() if decision.kept]

    @property
    def refused(self) -> list[Refusal]:
        """Places where nothing can grow, and why."""
        return [Refusal(place or "the model", reason) for place, reason in self.started.get("refused", ())]

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Units before and now, by site."""
        before = {site["name"]: int(site["width"]) for site in self.started.get("sites", ())}
        now = before | {site["name"]: int(site["width"]) for site in self.restarted.get("sites", ())}
        for decision in self.decisions.values():
            if decision.widened is not None and decision.kept is not False:
                site = decision.widened["site"]
                now[site] = now.get(site, 0) + decision.units
        return {site: (width, now[site]) for site, width in before.items()}

    @property
    def totals(self) -> Totals:
        """The run in a few numbers, for headlines and programs; None is "not known"."""
        return {
            "model": self.started.get("model"),
            "growth": self.started.get("growth"),  # the recipe
            "limits": dict(self.started.get("limits", {})),  # what the budget allows
            "finished": self.finished is not None,
            "steps": self.step,
            "parameters_before": self.started.get("parameters"),
            "parameters_after": int(self.parameters.last) if self.parameters.last is not None else None,
            "flops_before": self.started.get("flops"),  # forward, per example
            "flops_after": None if self.finished is None else self.finished.get("flops"),
            "training_flops": self.training_flops.last,
            "growth_flops": self.growth_flops.last,
            "seconds": self.seconds,
            "metrics": self.epochs[-1].metrics if self.epochs else {},
            "survived": self.survived,
            "decisions": len(self.decisions),
            "kept": len(self.grown),
            "grown": [
                {"site": site, "before": before, "after": after}
                for site, (before, after) in self.widths.items()
                if after != before
            ],
        }

    @property
    def survived(self) -> dict[str, int]:
        """What befell the run and did not end it, in numbers; steps redone are at least so many."""
        return {
            "checkpoints": len(self.checkpoints),
            "resumes": len(self.resumes),
            "steps_redone": sum(one.redone or 0 for one in self.resumes),
            "alarms": len(self.alarms),
            "rollbacks": len(self.rollbacks),
            "steps_rolled_back": sum(int(one.data["lost"]) for one in self.rollbacks),
            "taken_back": len(self.taken_back),
            "steps_taken_back": sum(int(one.data["lost"]) for one in self.taken_back),
            "faults": len(self.faults),
            "processes_told": len(self.ranks),
        }

    def _decision(self, event: Event) -> DecisionHistory:
        key = int(event.data["decision"])
        return self.decisions.setdefault(key, DecisionHistory(key, event.step))

    def _seed(self, event: Event) -> SeedHistory:
        key = (str(event.data["site"]), str(event.data["seed"]))
        return self.seeds.setdefault(key, SeedHistory(site=key[0], seed=key[1]))


def fold(events: Iterable[Event]) -> RunHistory:
    """Fold a journal's events into the history of its last run."""
    history = RunHistory()
    history._stand(events)
    return history


def _run_started(history: RunHistory, event: Event) -> None:
    if not history.started:
        history.started = facts_of(event, RunStarted)
        history.parameters.add(event.step, event.data["parameters"])
    if event.step:
        if "redone" not in event.data:  # what grew before was told elsewhere
            history.restarted = facts_of(event, RunStarted)
        history.resumes.append(Resume(event.step, None, event.data.get("redone")))


def _resumed(history: RunHistory, event: Event) -> None:
    last = history.resumes[-1] if history.resumes else None
    if last is not None and last.name is None and last.step == event.step:  # the same, told in two parts
        last.name = event.data["name"]
    else:
        history.resumes.append(Resume(event.step, event.data["name"], event.data.get("redone")))


def _progress(history: RunHistory, event: Event) -> None:
    history.loss.add(event.step, event.data["loss"])
    history.parameters.add(event.step, event.data["parameters"])
    history.training_flops.add(event.step, event.data["training_flops"])
    history.growth_flops.add(event.step, event.data["growth_flops"])
    history.seconds = number(event.data["seconds"])


def _epoch(history: RunHistory, event: Event) -> None:
    metrics = {name: number(value) for name, value in event.data["metrics"].items()}
    if history.epochs and history.epochs[-1].epoch == event.data["epoch"]:
        history.epochs.pop()  # a checkpoint at its last step ends it again
    history.epochs.append(Epoch(int(event.data["epoch"]), event.step, metrics))


def _survey(history: RunHistory, event: Event) -> None:
    history._decision(event).survey = list(event.data["sites"])


def _decision(history: RunHistory, event: Event) -> None:
    history._decision(event).chosen = facts_of(event, DecisionFacts)


def _stage(history: RunHistory, event: Event) -> None:
    seed = history._seed(event)
    if seed.spans:
        seed.spans[-1].end = event.step
    target = event.data["target"]
    stage = target if isinstance(target, str) else Stage(target).name
    seed.spans.append(Span(stage, event.step, None, str(event.data["reason"])))


def _alpha(history: RunHistory, event: Event) -> None:
    history._seed(event).alpha.add(event.step, event.data["alpha"])


def _vitals(history: RunHistory, event: Event) -> None:
    history._seed(event).vitals = event.data


def _race(history: RunHistory, event: Event) -> None:
    history._decision(event).race = facts_of(event, RaceFacts)


def _gate(history: RunHistory, event: Event) -> None:
    history._decision(event).looks.append(facts_of(event, LookFacts))


def _outcome(history: RunHistory, event: Event) -> None:
    decision = history._decision(event)
    decision.outcome, decision.decided_at = facts_of(event, OutcomeFacts), event.step


def _widened(history: RunHistory, event: Event) -> None:
    decision = history._decision(event)
    decision.widened, decision.widened_at = facts_of(event, GrownFacts), event.step
    history.parameters.add(event.step, event.data["parameters"])


def _deepened(history: RunHistory, event: Event) -> None:
    if event.data["decision"] is None:  # asked for by hand
        history.parameters.add(event.step, event.data["parameters"])
    else:
        _widened(history, event)
        history._decision(event).blocks += 1


def _reopened(history: RunHistory, event: Event) -> None:
    history.reopened.append(event)
    for decision in history.decisions.values():
        if decision.step == event.step and decision.site is not None:
            decision.reopened = facts_of(event, ReopenedFacts)


def _taken_back(history: RunHistory, event: Event) -> None:
    history.taken_back.append(event)
    history.parameters.add(event.step, event.data["parameters"])


def _run_finished(history: RunHistory, event: Event) -> None:
    history.finished = facts_of(event, RunFinished)
    history.parameters.add(event.step, event.data["parameters"])
    history.training_flops.add(event.step, event.data["training_flops"])
    history.growth_flops.add(event.step, event.data["growth_flops"])
    history.seconds = number(event.data["seconds"])


_FOLDS: dict[str, Callable[[RunHistory, Event], None]] = {
    "run_started": _run_started,
    "progress": _progress,
    "epoch": _epoch,
    "survey": _survey,
    "decision": _decision,
    "stage": _stage,
    "alpha": _alpha,
    "race": _race,
    "gate": _gate,
    "outcome": _outcome,
    "widened": _widened,
    "grafted": _widened,
    "deepened": _deepened,
    "compiled": lambda history, event: history.compiled.append(event),
    "recompiled": lambda history, event: history.compiled.append(event),
    "vitals": _vitals,
    "fault": lambda history, event: history.faults.append(event),
    "fallback": lambda history, event: history.fallbacks.append(event),
    "warning": lambda history, event: history.warnings.append(event),
    "checkpoint": lambda history, event: history.checkpoints.append(event),
    "resumed": _resumed,
    "alarm": lambda history, event: history.alarms.append(event),
    "rolled_back": lambda history, event: history.rollbacks.append(event),
    "ranks": lambda history, event: history.ranks.append(event),
    "reopened": _reopened,
    "taken_back": _taken_back,
    "rewrapped": lambda history, event: history.rewraps.append(event),
    "run_finished": _run_finished,
}

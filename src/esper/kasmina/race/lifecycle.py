"""The seeds that are awake, and their moves from stage to stage: all of them are made and told here."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import TypeVar

import torch

from esper.blueprints.kernel import GraphKernel
from esper.contracts import Event, Outcome, Stage
from esper.distributed.collectives import digest
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.guard import Guard, Unguarded
from esper.kasmina.race.needs import Services
from esper.kasmina.race.schedule import Timing
from esper.kasmina.race.selection import notes
from esper.kasmina.race.trial import Decaying, Exposed, Grafting, Judged, Key, Training, Trial
from esper.surgery.isolation.undisturbed import undisturbed

FAULTS = 3  # after which a seed is culled
Phase = TypeVar("Phase", bound=Trial)


class Lifecycle:
    """Moves the seeds of one model, and nobody else does.

    Args:
        model: Owner of sites, seeds and their state.
        services: What the run lends.
        timing: Steps per stage; a culled seed's site cools down for those of its embargo.

    Attributes:
        trials: Those under way, by site and slot, the oldest first.
        guard: Who must act when a seed moves.
        step: Of the run.
        lineage: A digest of all moves so far; the same in every process of a run.
        untold: Outcomes that whoever asked has not heard of.
        noted: Faults of kernels in this process that the others have not heard of.
        cool_until: The last step of the latest embargo.
    """

    def __init__(self, model: MorphableModel, services: Services, timing: Timing) -> None:
        self.model, self.services, self.timing = model, services, timing
        self.trials: dict[Key, Trial] = {}
        self.guard: Guard = Unguarded()
        self.step = self.lineage = 0
        self.cool_until = -1
        self.untold: list[Outcome] = []
        self.noted: dict[Key, list[str]] = {}

    # -- moves -----------------------------------------------------------------------------------------------

    def put(self, trial: Phase) -> Phase:
        """Let a phase take the place of the one before."""
        self.trials[trial.origin.key] = trial
        return trial

    def move(self, trial: Phase, target: Stage, reason: str) -> Phase:
        """Begin a phase: move its seed, and tell; returns it as it begins at this step."""
        trial = self.put(replace(trial, started=self.step))
        origin, layout = trial.origin, self.model.layout
        source = layout.stage_of(origin.seed)
        layout.move(origin.seed, source, target, self.step)
        self.note_move(origin.seed, target)
        names = {"source": source.name, "target": target.name}
        self.tell("stage", seed=origin.seed, site=origin.site, **names, reason=reason)
        self.guard.moved(origin.site, target, self.step)
        return trial

    def note_move(self, seed: int, target: Stage) -> None:
        """Go on with the digest of all moves."""
        self.lineage = digest(f"{self.lineage} {self.step} {seed} {target.name}")

    def stage_of(self, trial: Trial) -> Stage:
        """Return the stage of a trial's seed."""
        return self.model.layout.stage_of(trial.origin.seed)

    def set_alpha(self, trial: Trial, alpha: float) -> None:
        """Write α where the layer reads it, and tell."""
        self.model.layout.alpha[trial.origin.seed] = alpha
        trial.origin.layer.exposed = alpha > 0
        self.tell_alpha(trial, alpha)

    def ramp(self, trial: Exposed) -> None:
        """Let α go the way of its phase, a step at each tick of the layout."""
        up, down = isinstance(trial, Grafting), isinstance(trial, Decaying)
        self.model.layout.ramp(trial.origin.seed, (up - down) * self.timing.ramp)

    def turn_back(self, trial: Exposed, ending: str) -> None:
        """Let α go down to 0, and cull the seed then; the host keeps its progress.

        Args:
            trial: Its kernel has been found wanting.
            ending: Why.
        """
        self.ramp(self.put(trial.decaying(ending)))

    # -- ends ------------------------------------------------------------------------------------------------

    def doomed(self, trial: Trial) -> str:
        """Say why a trial cannot go on; "" where it can."""
        lost = trial.origin.lost(self.model.host)
        return lost or ("three faults" if self.stage_of(trial) is Stage.ERROR else "")

    @undisturbed()
    def cull(self, trial: Trial, reason: str) -> Outcome:
        """Drop a seed; before exposure the host never felt it."""
        self.tell_notes(trial)
        self.move(trial, Stage.CULLED, reason)
        outcome = self.conclude(trial, False, reason)
        self.retire(trial, Stage.EMBARGOED)
        return outcome

    def conclude(self, trial: Trial, kept: bool, reason: str) -> Outcome:
        """Sum up a trial, and tell."""
        made = outcome_of(trial, self.model, self.services.ledger.growth_flops, kept, reason)
        self.untold.append(made)
        self.tell("outcome", **asdict(made))
        return made

    def retire(self, trial: Trial, target: Stage) -> None:
        """Close the seams and forget the trial."""
        origin = trial.origin
        self.model.release(origin.site, origin.slot)
        self.model.layout.clear(origin.seed)
        self.move(trial, target, "")
        if target is Stage.EMBARGOED:
            self.cool_until = self.step + self.timing.embargo + 1
        del self.trials[origin.key]

    @undisturbed()
    def wake_embargoed(self, step: int) -> None:
        """EMBARGOED → DORMANT where the cool-down is over."""
        layout = self.model.layout
        for seed in torch.nonzero(layout.stage == int(Stage.EMBARGOED)).flatten().tolist():
            if step - int(layout.changed[seed]) >= self.timing.embargo:
                layout.move(seed, Stage.EMBARGOED, Stage.DORMANT, step)
                self.note_move(seed, Stage.DORMANT)
                site, reason = self.model.site_of(seed), "the cool-down is over"
                self.tell("stage", seed=seed, site=site, source="EMBARGOED", target="DORMANT", reason=reason)

    def cooling(self) -> bool:
        """Tell whether any site is cooling down; asked at every step, so no tensor is read."""
        return self.step <= self.cool_until

    def embargoed(self, site: str) -> bool:
        """Tell whether a site is cooling down."""
        return any(self.model.layout.stage_of(s) is Stage.EMBARGOED for s in self.model.seeds(site))

    # -- side by side ----------------------------------------------------------------------------------------

    @contextmanager
    def aside(self, own: Key | None, hidden: bool = False) -> Iterator[None]:
        """Run passes for one seed, or for none: they leave no trace in the others that are awake.

        Args:
            own: Whose passes they are.
            hidden: Whether the others' kernels, where exposed, have no part in them.
        """
        others = [trial for key, trial in self.trials.items() if key != own]
        with ExitStack() as stack:
            for trial in others:
                stack.enter_context(trial.origin.layer.aside(hidden))
            yield

    @contextmanager
    def paying(self, own: Key | None) -> Iterator[None]:
        """Do one seed's work, or a decision's: what it costs and adds to the model is none of the others'."""
        others = [trial.origin.baseline for key, trial in self.trials.items() if key != own]
        if not others:
            yield
            return
        ledger, model = self.services.ledger, self.model
        spent, parameters, flops = ledger.growth_flops, model.parameter_count(), model.flops
        try:
            yield
        finally:
            for baseline in others:
                baseline.spent += ledger.growth_flops - spent
                baseline.parameters += model.parameter_count() - parameters
                baseline.flops += model.flops - flops

    # -- faults ----------------------------------------------------------------------------------------------

    def faults_noted(self) -> list[int]:
        """Count the faults of each trial's kernel that the other processes have not heard of."""
        return [len(self.noted.get(key, ())) for key in self.trials]

    def share(self, faults: Sequence[int]) -> None:
        """Bring what the last step did to the seeds in each process together.

        Args:
            faults: Number of each trial's faults noted in all processes since the last time.
        """
        noted, self.noted = self.noted, dict[Key, list[str]]()
        for (key, trial), count in zip(list(self.trials.items()), faults, strict=True):
            if not isinstance(trial, Exposed):
                continue
            for error in [*noted.get(key, ()), *["in another process"] * count][: min(count, FAULTS)]:
                if self.stage_of(trial) is not Stage.ERROR:
                    self.count_fault(key, error)
            for parameter in trial.kernel.parameters():
                if parameter.grad is None:  # its pass failed here, not elsewhere
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in trial.kernel.parameters() if p.grad is not None]
            self.services.peers.all_reduce_mean(gradients)

    def fault(self, key: Key, error: str) -> None:
        """Note a fault of a kernel; among several processes it counts once all of them know."""
        if self.services.peers.world > 1:
            self.noted.setdefault(key, []).append(error)
        else:
            self.count_fault(key, error)

    def count_fault(self, key: Key, error: str) -> None:
        """Count a fault of a kernel; the third ends its seed at the next step."""
        trial = self.trials[key]
        origin = trial.origin
        count = self.model.layout.add_fault(origin.seed)
        self.tell("fault", seed=origin.seed, site=origin.site, error=error, count=count)
        self.tell("fallback", what="kernel", why=f"the host's own output was used: {error}")
        if isinstance(trial, Exposed) and isinstance(trial.kernel, GraphKernel):
            trial.kernel.swap(None, "eager")  # a compiled form may be what is at fault
        if count == FAULTS:
            origin.layer.exposed = False
            self.move(trial, Stage.ERROR, error)

    # -- telling ---------------------------------------------------------------------------------------------

    def tell_notes(self, trial: Trial) -> None:
        """Tell what of a race that is over went otherwise than planned."""
        for why in notes(trial.race, trial.origin.site) if isinstance(trial, Training) else []:
            self.tell("fallback", what="race", why=why)

    def tell_alpha(self, trial: Trial, alpha: float) -> None:
        """Tell how strong a kernel is by now."""
        self.tell("alpha", seed=trial.origin.seed, site=trial.origin.site, alpha=round(alpha, 6))

    def tell(self, kind: str, **data: object) -> None:
        """Emit an event."""
        self.services.observe(Event(kind, self.step, data))

    def table(self) -> list[dict[str, object]]:
        """List the seeds that are not dormant, as checkpoints show them: stage, α, evidence."""
        model, layout = self.model, self.model.layout
        decisions = {trial.origin.seed: trial.origin.decision for trial in self.trials.values()}
        found: list[dict[str, object]] = []
        for seed in range(len(layout.stage)):
            stage = layout.stage_of(seed)
            if stage is Stage.DORMANT:
                continue
            decision, gain = decisions.get(seed), float(layout.gain[seed])
            found.append(
                {
                    "seed": seed,
                    "site": model.site_of(seed),
                    "stage": stage.name,
                    "alpha": float(layout.alpha[seed]),
                    "gain": gain if math.isfinite(gain) else None,
                    "faults": int(layout.faults[seed]),
                    "decision": None if decision is None else decision.id,
                    "width": None if decision is None else decision.width,
                }
            )
        return found


class FaultReport:
    """Passes on a kernel's faults while whoever counts them lives: a user's model must not hold a run.

    Args:
        life: Who counts.
        key: Site and slot of the seed.
    """

    def __init__(self, life: Lifecycle, key: Key) -> None:
        self.life, self.key = weakref.ref(life), key

    def __call__(self, error: str) -> None:
        """Report one."""
        life = self.life()
        if life is not None:
            life.fault(self.key, error)


def outcome_of(trial: Trial, model: MorphableModel, spent: int, kept: bool, reason: str) -> Outcome:
    """Sum up a trial.

    Args:
        trial: As far as it came.
        model: What it has or has not grown.
        spent: Growth FLOPs of the run so far.
        kept: Whether its kernel is part of the model.
        reason: Why.
    """
    origin, baseline = trial.origin, trial.origin.baseline
    return Outcome(
        origin.decision.id,
        origin.layer.place.site.name,
        kept,
        trial.verdict.gain if isinstance(trial, Judged | Exposed) else None,
        model.parameter_count() - baseline.parameters if kept else 0,  # 0 too where it was folded in
        model.flops - baseline.flops if kept else 0,
        spent - baseline.spent,
        reason,
    )

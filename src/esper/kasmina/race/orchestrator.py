"""``SeedOrchestrator``: takes one seed at a time through its life, a decision boundary at a time.

It moves stages, and nobody else does. What it needs of other rooms is given to it: how to run the model, how
to make an optimizer like the host's, how to commit a widening.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict

import torch

from esper.batches.layout import Batch
from esper.blueprints.kernel import GraphKernel, LiveKernel
from esper.config import Config
from esper.contracts import Decision, Event, Outcome, Stage
from esper.distributed.collectives import digest
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.guard import Guard, Unguarded
from esper.kasmina.race.holding import weakly
from esper.kasmina.race.race import Race
from esper.kasmina.race.schedule import Lessons, Step, first, lined_up
from esper.kasmina.race.selection import ask, decide, notes, told
from esper.kasmina.race.survey import Measured, vitals
from esper.kasmina.race.trial import Given, Timing, Trial, step_kernel, summed, worse
from esper.surgery.isolation.contexts import same_randomness, untouched
from esper.surgery.isolation.undisturbed import undisturbed

FAULTS = 3  # after which a seed is culled
UNSEEN = 4  # batches the race is judged on, kept from the candidates
TREND = 20  # losses before exposure that a graft is compared with, at least


class SeedOrchestrator:
    """Applies decisions to the seeds of one model.

    Args:
        model: Owner of sites, seeds and their state.
        config: Settings of the run.
        timing: Steps per stage.
        given: Functions and settings from outside.
    """

    def __init__(self, model: MorphableModel, config: Config, timing: Timing, given: Given) -> None:
        self.model, self.config, self.timing, self.given = model, config, timing, given
        self.trial: Trial | None = None
        self.guard: Guard = Unguarded()
        self.losses: deque[float] = deque(maxlen=max(TREND, 2 * timing.evaluate))
        self.step = 0
        self.cool_until = -1  # the last step of the latest embargo
        self.examples = 0  # since the last step, for the cost of an exposed branch
        self.lineage = 0  # a digest of all moves so far; the same in every process of a run
        self.untold: Outcome | None = None  # the latest, until whoever asked has heard of it
        self.noted: list[str] = []  # faults of this process that the others have not heard of
        self.stages = {
            Stage.TRAINING: self.incubate,
            Stage.GRAFTING: self.graft,
            Stage.STABILISING: self.stabilise,
            Stage.EVALUATING: self.evaluate,
        }

    # -- from a decision to its outcome ----------------------------------------------------------------------

    @undisturbed()
    def germinate(self, decision: Decision, measured: Measured, step: int, examples: int = 0) -> None:
        """Wake a seed at the decided site and line up its candidates."""
        assert decision.site is not None and decision.start is not None
        self.step = step
        seed = next(
            s for s in self.model.seeds(decision.site) if self.model.layout.stage_of(s) is Stage.DORMANT
        )
        layer = self.model.layer(decision.site, weakly(self.fault))
        size = self.model.parameter_count(), self.model.flops
        self.trial = trial = Trial(
            decision, seed, layer, step, spent=self.given.ledger.growth_flops, size=size
        )
        self.move(Stage.GERMINATED, decision.reason)
        starts = lined_up(self.config.race, Step(self.model.flops, examples), decision.start)
        with same_randomness(self.given.streams.draw("initialisation")):
            seen, given = measured, self.given
            trial.race = Race(layer, decision.width, starts, seen.survey, seen.x, given.rate, given.peers)
            with self.given.ledger.growth("fit", decision.id):
                trial.race.fit(measured.x, measured.gradient, measured.scale)
        self.given.peers.broadcast_tensors([*trial.race.stack.values()])  # machines round differently
        layer.tap = trial.tap
        self.move(Stage.TRAINING, f"{len(starts)} candidates of {decision.width} units")

    def share(self, faults: int) -> None:
        """Bring what the last step did to the seed in each process together.

        Args:
            faults: Number of the kernel's faults noted in all processes since the last time.
        """
        noted, self.noted = self.noted, list[str]()
        trial, peers = self.trial, self.given.peers
        if trial is None or trial.kernel is None:
            return
        for error in [*noted, *["in another process"] * faults][: min(faults, FAULTS)]:
            if self.model.layout.stage_of(trial.seed) is not Stage.ERROR:
                self.count_fault(error)
        for parameter in trial.kernel.parameters():
            if parameter.grad is None:  # its pass failed here, not elsewhere
                parameter.grad = torch.zeros_like(parameter)
        peers.all_reduce_mean([p.grad for p in trial.kernel.parameters() if p.grad is not None])

    def advance(self, batches: Sequence[Batch], loss: float, step: int) -> Outcome | None:
        """Do one step's work; returns the outcome once there is one."""
        self.step = step
        if self.trial is None:
            self.losses.append(loss)
            self.examples = 0
            return None
        if why := self.trial.lost(self.model.host):
            return self.cull(why)
        self.trial.layer.told()
        stage = self.model.layout.stage_of(self.trial.seed)
        if stage is Stage.ERROR:
            return self.cull("three faults")
        if not self.trial.layer.exposed:
            self.losses.append(loss)
        outcome = self.stages[stage](batches, loss)
        self.examples = 0
        return outcome

    def incubate(self, batches: Sequence[Batch], loss: float) -> Outcome | None:
        """TRAINING: learn beside the host; at the end race, and ask the gate."""
        trial, race = self.current()
        age, total = self.step - trial.started, self.timing.incubate
        if age > total:  # batches that no candidate has learned from
            return self.judge(batches[total - age :]) if age >= total + UNSEEN else None
        lessons, size, ledger = self.lessons(trial), len(race.starts), self.given.ledger
        kind, seed = lessons.kind(age), self.given.streams.draw("evidence")
        fresh = kind == "tap" and self.given.peers.all_ranks(trial.tap.fresh())
        if kind == "shadow" or (kind == "tap" and lessons.tapped is None and not fresh):
            batch = first(batches[-1], lessons.examples)
            key = ("shadow", trial.decision.id, size, lessons.examples, self.examples)
            with self.given.wrapping.gathered(), untouched(self.model.host, seed), ledger.growth(*key):
                race.learn_from_shadow(lambda: self.given.passes.loss_of(batch))
        elif fresh:
            with same_randomness(seed), ledger.growth("tap", trial.decision.id, size, self.examples):
                race.learn_from_tap(trial.tap, lessons.tapped)
        following = age == total or lessons.kind(age + 1) == "tap"  # at the end, what the forge asks for
        trial.layer.tap = trial.tap if following else None
        if age in lessons.halvings and size > 1:
            race.halve()
        return None

    def judge(self, batches: Sequence[Batch]) -> Outcome | None:
        """Pick a winner on training batches and let the gate look at it."""
        trial, race = self.current()
        few = None if self.lessons(trial).examples is None else self.examples
        unseen = [first(batch, few) for batch in self.given.joins(batches)]
        with self.given.wrapping.gathered():
            final = decide(race, unseen, self.given, self.model.host, trial.decision.id, self.examples)
            verdict = None if final.kernel is None else ask(trial, final.kernel, batches, self.given)
        decision, site = trial.decision.id, trial.decision.site
        self.tell("race", decision=decision, site=site, **final.facts)
        if final.kernel is None or verdict is None:
            return self.cull("doing nothing won the race")
        self.tell_notes(trial)
        trial.race, trial.verdict = None, verdict
        self.tell("gate", decision=decision, site=site, **told(verdict))
        if not verdict.passed:
            return self.cull(verdict.reason)
        assert verdict.gain is not None
        self.model.layout.observe_gain(trial.seed, verdict.gain)
        self.expose(final.kernel)
        return None

    @undisturbed()
    def expose(self, kernel: LiveKernel) -> None:
        """TRAINING → GRAFTING: the kernel joins the pass, α starts at 0."""
        assert self.trial is not None
        trial, layer = self.trial, self.trial.layer
        trial.kernel, trial.before = kernel, list(self.losses)
        self.model.policy.make_room()
        layer.tap, layer.kernel = None, kernel
        layer.open()
        layer.alpha = self.model.layout.alpha[trial.seed]
        trial.optimizer = self.given.donor.like(kernel, layer.place)
        self.given.forging.file(kernel, layer.place, trial.decision.width, trial.tap.x)
        self.move(Stage.GRAFTING, "held-out evidence")
        self.set_alpha(1 / self.timing.ramp)

    def graft(self, batches: Sequence[Batch], loss: float) -> Outcome | None:
        """GRAFTING: α climbs; or falls, once the seed has been found wanting."""
        trial = self.train_kernel()
        alpha = float(self.model.layout.alpha[trial.seed])
        self.set_alpha(min(alpha + 1 / self.timing.ramp, 1.0))
        if alpha >= 1.0 - 1e-6:
            self.move(Stage.STABILISING, "α is 1")
        return None

    def stabilise(self, batches: Sequence[Batch], loss: float) -> Outcome | None:
        """STABILISING: the host's statistics settle."""
        trial = self.train_kernel()
        if self.step - trial.started >= self.timing.stabilise:
            self.move(Stage.EVALUATING, "settled")
        return None

    def evaluate(self, batches: Sequence[Batch], loss: float) -> Outcome | None:
        """EVALUATING: the loss must not be worse than before exposure; then the pair becomes wider."""
        trial = self.train_kernel()
        if trial.ending:
            return self.decay(trial)
        if trial.waiting:
            return None
        trial.after.append(loss)
        if len(trial.after) < self.timing.evaluate:
            return None
        if worse(trial.before, trial.after):
            trial.ending = "the loss is worse than before exposure"
            return None
        if self.given.wrapping.deferred:
            trial.waiting = True
            message = f"{trial.decision.site} has passed and stays a branch until growth.rewrap() is called"
            self.tell("warning", message=message)
            return None
        return self.fossilise()

    def commit_waiting(self) -> Outcome | None:
        """Make a kernel that has passed, and waits for it, part of the user's layers."""
        if self.trial is None or not self.trial.waiting:
            return None
        self.trial.waiting = False
        why = self.trial.lost(self.model.host)
        return self.cull(why) if why else self.fossilise()

    def decay(self, trial: Trial) -> Outcome | None:
        """Ramp α down; the host keeps its progress."""
        alpha = float(self.model.layout.alpha[trial.seed]) - 1 / self.timing.ramp
        if alpha <= 1e-6:
            return self.cull(trial.ending)
        self.set_alpha(alpha)
        return None

    @undisturbed()
    def fossilise(self) -> Outcome | None:
        """Make the kernel part of the user's layers."""
        trial = self.trial
        assert trial is not None and trial.kernel is not None and trial.optimizer is not None
        self.set_alpha(1.0)
        why = self.given.committer.keep(trial.kernel, trial.optimizer, trial.decision, self.step)
        if why:
            trial.ending = why
            return None
        self.guard.reshaped()
        self.move(Stage.FOSSILISED, "not worse than before exposure")
        outcome = self.outcome(True, "kept")
        self.retire(trial, Stage.FOSSILISED, Stage.DORMANT)
        return outcome

    @undisturbed()
    def cull(self, reason: str) -> Outcome:
        """Drop the seed; before exposure the host never felt it."""
        assert self.trial is not None
        trial = self.trial
        self.tell_notes(trial)
        self.move(Stage.CULLED, reason)
        outcome = self.outcome(False, reason)
        self.retire(trial, Stage.CULLED, Stage.EMBARGOED)
        return outcome

    def retire(self, trial: Trial, source: Stage, target: Stage) -> None:
        """Close the seams and forget the trial."""
        self.model.release(self.model.site_of(trial.seed))
        self.model.layout.clear(trial.seed)
        self.move(target, "")
        if target is Stage.EMBARGOED:
            self.cool_until = self.step + self.timing.embargo + 1
        self.trial = None

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

    def settle(self) -> Outcome | None:
        """End the run: an exposed seed is kept if held-out examples still gain by it, all else is dropped."""
        if self.trial is None:
            return None
        trial = self.trial
        why = trial.lost(self.model.host) or ("the run ended" if trial.kernel is None or trial.ending else "")
        if why or trial.kernel is None:
            return self.cull(why)
        seed = self.given.streams.draw("evidence")
        with self.given.wrapping.gathered():
            looked = self.given.gate.differences(trial.layer, trial.kernel, self.given.gate.probe, seed)
        if self.given.peers.broadcast_floats([float(looked[0].mean())])[0] <= 0:
            return self.cull("the run ended; no held-out gain")
        for stage, following in ((Stage.GRAFTING, Stage.STABILISING), (Stage.STABILISING, Stage.EVALUATING)):
            if self.model.layout.stage_of(trial.seed) is stage:
                self.move(following, "the run ended")
        return self.fossilise() or self.cull(trial.ending)

    # -- the small things ------------------------------------------------------------------------------------

    def current(self) -> tuple[Trial, Race]:
        """Return the trial and its race."""
        assert self.trial is not None and self.trial.race is not None
        return self.trial, self.trial.race

    def lessons(self, trial: Trial) -> Lessons:
        """Plan the race by what the host's step costs; the same at every step of it."""
        site, units = trial.layer.place.site, trial.decision.width
        step = Step(self.model.flops, self.examples)
        return Lessons.of(self.config.race, self.timing.incubate, step, site, units)

    def train_kernel(self) -> Trial:
        """Step the exposed kernel with the gradients the host's own backward pass left on it."""
        trial = self.trial
        assert trial is not None
        self.given.ledger.grow(3 * trial.decision.width * trial.layer.place.site.unit_flops * self.examples)
        norm = step_kernel(trial, self.given)
        if trial.layer.sample is not None:
            # Latency stays in the layout: the same seed tells the same events, on any machine.
            seen = vitals(self.model.layout, trial.seed, trial.layer.sample, norm)
            self.tell("vitals", seed=trial.seed, site=trial.decision.site, **seen)
            trial.layer.sample = None
        trial.layer.sampling = self.model.layout.due(self.step + 1)
        return trial

    def tell_notes(self, trial: Trial) -> None:
        """Tell what of a race that is over went otherwise than planned."""
        for why in notes(trial.race, str(trial.decision.site)) if trial.race is not None else []:
            self.tell("fallback", what="race", why=why)

    def set_alpha(self, alpha: float) -> None:
        """Write α where the layer reads it."""
        assert self.trial is not None
        self.model.layout.alpha[self.trial.seed] = alpha
        self.trial.layer.exposed = alpha > 0
        self.tell("alpha", seed=self.trial.seed, site=self.trial.decision.site, alpha=round(alpha, 6))

    def move(self, target: Stage, reason: str) -> None:
        """Move the present seed on and tell."""
        assert self.trial is not None
        trial, layout = self.trial, self.model.layout
        source = layout.stage_of(trial.seed)
        layout.move(trial.seed, source, target, self.step)
        trial.started = self.step
        self.note_move(trial.seed, target)
        names = {"source": source.name, "target": target.name}
        self.tell("stage", seed=trial.seed, site=trial.decision.site, **names, reason=reason)
        self.guard.moved(trial.decision.site or "", target, self.step)

    def note_move(self, seed: int, target: Stage) -> None:
        """Go on with the digest of all moves."""
        self.lineage = digest(f"{self.lineage} {self.step} {seed} {target.name}")

    def fault(self, error: str) -> None:
        """Note a fault of the kernel; among several processes it counts once all of them know."""
        if self.given.peers.world > 1:
            self.noted.append(error)
        else:
            self.count_fault(error)

    def count_fault(self, error: str) -> None:
        """Count a fault of the kernel; the third ends its seed at the next step."""
        assert self.trial is not None
        count = self.model.layout.add_fault(self.trial.seed)
        self.tell("fault", seed=self.trial.seed, site=self.trial.decision.site, error=error, count=count)
        self.tell("fallback", what="kernel", why=f"the host's own output was used: {error}")
        if isinstance(self.trial.kernel, GraphKernel):
            self.trial.kernel.swap(None, "eager")  # a compiled form may be what is at fault
        if count == FAULTS:
            self.trial.layer.exposed = False
            self.move(Stage.ERROR, error)

    def outcome(self, kept: bool, reason: str) -> Outcome:
        """Sum up the trial."""
        assert self.trial is not None
        made = self.untold = summed(self.trial, self.model, self.given.ledger, kept, reason)
        self.tell("outcome", **asdict(made))
        return made

    def tell(self, kind: str, **data: object) -> None:
        """Emit an event."""
        self.given.observe(Event(kind, self.step, data))

"""GRAFTING to EVALUATING: a winner is let into the host's output by degrees, and kept or taken back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from esper.blueprints.kernel import LiveKernel
from esper.contracts import Outcome, Stage
from esper.kasmina.race.lifecycle import Lifecycle
from esper.kasmina.race.needs import Services
from esper.kasmina.race.schedule import Timing
from esper.kasmina.race.survey import vitals
from esper.kasmina.race.trial import (
    Decaying,
    Evaluating,
    Exposed,
    Germinated,
    Grafting,
    Judged,
    Passed,
    Stabilising,
    Training,
    Trial,
)
from esper.kasmina.seeds.state import END
from esper.kasmina.widths.places import Place
from esper.kasmina.widths.widen import HostKernel
from esper.surgery.isolation.contexts import same_randomness
from esper.surgery.isolation.undisturbed import undisturbed


class Exposing:
    """Lets winners in.

    Args:
        life: The seeds that are awake.
        timing: Steps per stage.
    """

    def __init__(self, life: Lifecycle, timing: Timing) -> None:
        self.life, self.model, self.timing = life, life.model, timing

    @property
    def services(self) -> Services:
        """What the run lends."""
        return self.life.services

    @undisturbed()
    def expose(self, trial: Judged, losses: Sequence[float]) -> None:
        """TRAINING → GRAFTING: the kernel joins the pass, α starts at 0.

        Args:
            trial: It has passed the gate.
            losses: The host's latest, ahead of the exposure.
        """
        origin, kernel = trial.origin, trial.kernel
        layer = origin.layer
        self.model.policy.make_room()
        layer.tap, layer.kernel = None, kernel
        layer.open()
        layer.alpha = self.model.layout.alpha[origin.seed]
        optimizer = self.services.donor.like(kernel, layer.place)
        self.services.forging.file(kernel, layer.place, origin.decision.width, trial.tap.x)
        grafting = trial.grafting(optimizer, list(losses))
        grafting = self.life.move(grafting, Stage.GRAFTING, "held-out evidence")
        self.life.set_alpha(grafting, 1 / self.timing.ramp)
        self.life.ramp(grafting)

    def step(self, trial: Exposed, loss: float, examples: int) -> Outcome | None:
        """Do one step's work; returns the outcome once there is one."""
        self.train_kernel(trial, examples)
        match trial:
            case Grafting():
                self.graft(trial)
            case Stabilising():
                if self.life.step - trial.started >= self.timing.stabilise:
                    self.life.move(trial.evaluating(), Stage.EVALUATING, "settled")
            case Evaluating():
                return self.evaluate(trial, loss)
            case Decaying():
                return self.decay(trial)
            case Passed():
                pass  # it waits
        return None

    def graft(self, trial: Grafting) -> None:
        """GRAFTING: α climbs, and rests at 1 for a step."""
        seed, layout = trial.origin.seed, self.model.layout
        if not layout.ramping(seed):
            self.life.set_alpha(trial, 1.0)
            self.life.move(trial.stabilising(), Stage.STABILISING, "α is 1")
            return
        alpha = float(layout.alpha[seed])
        self.life.tell_alpha(trial, alpha)
        if alpha >= 1 - END:
            layout.ramp(seed, 0)

    def evaluate(self, trial: Evaluating, loss: float) -> Outcome | None:
        """EVALUATING: the loss must not be worse than before exposure; then the pair becomes wider."""
        trial.after.append(loss)
        if len(trial.after) < self.timing.evaluate:
            return None
        if worse(trial.before, trial.after):
            self.life.turn_back(trial, "the loss is worse than before exposure")
            return None
        if self.services.wrapping.deferred:
            self.life.put(trial.passed())
            site = trial.origin.site
            message = f"{site} has passed and stays a branch until growth.rewrap() is called"
            self.life.tell("warning", message=message)
            return None
        return self.fossilise(trial)

    def decay(self, trial: Decaying) -> Outcome | None:
        """α goes down; at 0 the seed is culled."""
        alpha = float(self.model.layout.alpha[trial.origin.seed])
        if alpha <= END:
            return self.life.cull(trial, trial.ending)
        self.life.tell_alpha(trial, alpha)
        return None

    @undisturbed()
    def fossilise(self, trial: Exposed) -> Outcome | None:
        """Make the kernel part of the user's layers; where that fails, it decays."""
        origin, life = trial.origin, self.life
        life.set_alpha(trial, 1.0)
        with life.aside(origin.key, hidden=True):
            keep = self.services.committer.keep
            why = keep(trial.kernel, trial.optimizer, origin.decision, life.step, origin.slot)
        if why:
            life.turn_back(trial, why)
            return None
        life.guard.reshaped()
        life.move(trial, Stage.FOSSILISED, "not worse than before exposure")
        outcome = life.conclude(trial, True, "kept")
        life.retire(trial, Stage.DORMANT)
        self.follow(origin.site)
        return outcome

    def follow(self, grown: str) -> None:
        """Let the other seeds stand at their places as these are now; cull those that no longer fit.

        Args:
            grown: Site that has just become wider, or got a branch.
        """
        for trial in list(self.life.trials.values()):
            place = self.model.places.get(trial.origin.site)
            if place is None or not fits(trial, place):
                self.life.cull(trial, f"{grown} has grown, and {trial.origin.site} is another place by now")
            else:
                trial.origin.layer.place = place
                for kernel in kernels_of(trial):
                    if isinstance(kernel, HostKernel):
                        kernel.pair = place

    @undisturbed()
    def settle(self, trial: Exposed) -> Outcome:
        """End the run: a seed is kept if held-out examples still gain by it."""
        if isinstance(trial, Decaying):
            return self.life.cull(trial, "the run ended")
        services, layer = self.services, trial.origin.layer
        seed = services.streams.draw("evidence")
        with services.wrapping.gathered(), self.life.aside(trial.origin.key):
            looked = services.gate.differences(layer, trial.kernel, services.gate.probe, seed)
        if services.peers.broadcast_floats([float(looked[0].mean())])[0] <= 0:
            return self.life.cull(trial, "the run ended; no held-out gain")
        if isinstance(trial, Grafting):
            trial = self.life.move(trial.stabilising(), Stage.STABILISING, "the run ended")
        if isinstance(trial, Stabilising):
            trial = self.life.move(trial.evaluating(), Stage.EVALUATING, "the run ended")
        outcome = self.fossilise(trial)
        if outcome is not None:
            return outcome
        left = self.life.trials[trial.origin.key]
        return self.life.cull(left, left.ending if isinstance(left, Decaying) else "the run ended")

    def train_kernel(self, trial: Exposed, examples: int) -> None:
        """Step an exposed kernel with the gradients the host's own backward pass left on it."""
        origin, layer, services = trial.origin, trial.origin.layer, self.services
        services.ledger.grow(3 * origin.decision.width * layer.place.site.unit_flops * examples)
        norm = step_kernel(trial, services)
        if layer.sample is not None:
            # Latency stays in the layout: the same seed tells the same events, on any machine.
            seen = vitals(self.model.layout, origin.seed, layer.sample, norm)
            self.life.tell("vitals", seed=origin.seed, site=origin.site, **seen)
            layer.sample = None
        layer.sampling = self.model.layout.due(self.life.step + 1)


def step_kernel(trial: Exposed, services: Services) -> float:
    """Step an exposed kernel with the gradients that the host's backward pass left; returns their norm."""
    scale = float(services.scaler.get_scale())
    for parameter in trial.kernel.parameters():
        if parameter.grad is not None and scale != 1.0:
            parameter.grad.div_(scale)
    norm = float(torch.nn.utils.clip_grad_norm_(trial.kernel.parameters(), 1.0))
    if math.isfinite(norm):
        services.donor.follow(trial.optimizer)
        trial.optimizer.step()
    trial.optimizer.zero_grad()
    return norm


def worse(before: Sequence[float], after: Sequence[float]) -> bool:
    """Tell whether losses rose by more than two standard errors."""
    if len(before) < 2 or len(after) < 1:
        return False
    old, new = np.asarray(before), np.asarray(after)
    if new.min() > old.max():  # losses that explode have a spread that would excuse them
        return True
    spread = old.var(ddof=1) / len(old) + (new.var(ddof=1) if len(new) > 1 else old.var(ddof=1)) / len(new)
    return not float(new.mean()) <= float(old.mean()) + 2 * math.sqrt(float(spread))


def kernels_of(trial: Trial) -> list[LiveKernel]:
    """Return the module that runs a trial's kernel or candidates; none where there are no candidates yet."""
    match trial:
        case Germinated():
            return []
        case Training():
            return [trial.race.template]
        case _:
            return [trial.kernel]


def fits(trial: Trial, place: Place) -> bool:
    """Tell whether a place is still the one a trial began at, so that its kernel fits as it is."""
    origin = trial.origin
    if place.site != origin.layer.place.site:
        return False
    with same_randomness():  # its weights are drawn for nothing
        fresh = shapes(place.kernel(origin.decision.width))
    return all(shapes(kernel) == fresh for kernel in kernels_of(trial))


def shapes(kernel: LiveKernel) -> dict[str, torch.Size]:
    """Return the shape of every tensor a kernel holds."""
    return {name: tensor.shape for name, tensor in kernel.state_dict().items()}

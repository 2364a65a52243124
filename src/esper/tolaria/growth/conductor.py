"""``Growth`` drives a plain training loop's growth; ``esper.grow`` makes one."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from esper.batches.examples import copied, count_examples
from esper.config import Config
from esper.contracts import Event, Outcome
from esper.distributed.collectives import Peers
from esper.distributed.model_wrapper import Wrapping
from esper.errors import FinishedError, SiteError, StateError, nearest
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.awake import awake
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.recording.flops import Ledger
from esper.nissa.run.journal import RunJournal
from esper.saving.genome import Plan, units_of
from esper.saving.save import save
from esper.surgery.isolation.contexts import taught
from esper.tamiyo.controller import Room, Tamiyo
from esper.tolaria.governor import Watch
from esper.tolaria.growth.early.early import Early
from esper.tolaria.growth.incubation.boundary import Word, bits, meet, realign, topology
from esper.tolaria.growth.incubation.incubation import Incubation
from esper.tolaria.growth.incubation.memory import capture, restore
from esper.tolaria.growth.incubation.redo import Redo
from esper.tolaria.growth.opening.entrance import check_finite, check_loss, failing
from esper.tolaria.growth.opening.presence import Presence, begin
from esper.tolaria.growth.reporting import report
from esper.tolaria.growth.run.account import Report
from esper.tolaria.growth.run.components import Parts
from esper.tolaria.growth.run.mishaps import Mishaps
from esper.tolaria.growth.run.recipe import Recipe, recipe_of
from esper.tolaria.growth.run.telling import size_and_cost, started, warn_of_branch


class Growth:
    """Grows one model during one run; made by ``esper.grow``.

    Attributes:
        model: The host, the same object from first to last.
        cost: What was spent: ``training_flops`` on the host's own steps, ``growth_flops`` and ``seconds`` on
            growth.
        plans: Everything that grew and changed the model's shape, in order.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.morphable: MorphableModel = parts.model
        self.model: nn.Module = parts.given
        self.cost: Ledger = parts.ledger
        self.orchestrator: SeedOrchestrator = parts.orchestrator
        self.tamiyo: Tamiyo = parts.tamiyo
        self.config: Config = parts.config
        self.batches: deque[Any] = deque(maxlen=parts.config.race.batches)
        self.presence = Presence(parts.optimizers, self.orchestrator)
        self.taken = self.presence.clock
        self.leave = begin(self, self.morphable.host, self.presence)
        self.steps = 0  # acted on
        self.events_kept = 0
        self.begun = time.perf_counter()
        self.finished = self.paused = False
        self.asked: str | None = None
        self.losses: list[float] = []  # since the last progress event
        self.topology = 0  # digest of the plans
        self.redo = Redo(self)  # what a process before decided
        self.watch: Watch | None = None  # the governor, where the settings want one
        self.metrics: dict[str, float] = {}  # of the latest epoch
        self.recipe: Recipe = recipe_of(self.config.growth, self.morphable)
        self.mishaps = Mishaps(self)
        self.incubation = Incubation(self)
        self.early: Early | None = None
        try:
            if self.recipe == "early":
                run = failing("the model or loss, run on the first held-out examples, raised")
                with run, self.morphable.policy.uncompiled(), parts.wrapping.whole():
                    self.early = Early(self)
                parts.warnings.extend(self.early.doubts)
            self._tell_start()
        except BaseException:  # nothing is left behind by a run that does not begin
            self.leave()
            raise

    @property
    def peers(self) -> Peers:
        """The processes that train this model together."""
        return self.parts.wrapping.peers

    @property
    def host(self) -> nn.Module:
        """The model whose layers grow, inside whatever stands around it."""
        return self.morphable.host

    @property
    def wrapping(self) -> Wrapping:
        """What stands around it where several processes train it."""
        return self.parts.wrapping

    @property
    def journal(self) -> RunJournal | None:
        """What this process journals to."""
        return self.redo.journal

    def observe(self, event: Event) -> None:
        """Tell whoever listens."""
        self.parts.observe(event)

    def awake(self) -> list[dict[str, Any]]:
        """List the seeds that are not dormant: stage, α, evidence."""
        return awake(self.orchestrator)

    def gates(self) -> dict[str, int]:
        """Count the looks at held-out evidence, and what was kept after them."""
        return {"looks": self.parts.gate.looks, "kept": self.events_kept}

    @property
    def plans(self) -> list[Plan]:
        """Everything that grew and changed the model's shape, in order."""
        return self.parts.committer.plans

    # -- the loop --------------------------------------------------------------------------------------------

    def step(self, batch: Any, loss: Tensor) -> None:
        """Call once per micro-batch, after the optimizer line; acts only when an optimizer step has happened.

        Args:
            batch: What ``loss_fn`` was called with.
            loss: What it returned: a finite scalar.

        Raises:
            LossError: The loss is not a scalar, or the governor stopped the run; without a governor also
                where it is not finite.
            FinishedError: The run is over.
        """
        self._refuse_finished("step")
        check_loss(loss)
        value = float(loss.detach())
        if self.watch is None and self.peers.world == 1:
            check_finite(value, self.steps)
        self.batches.append(copied(batch) if self.recipe == "incubate" else batch)
        examples = count_examples(batch) * max(self.presence.evaluations, 1)
        self.presence.evaluations = 0
        self.cost.train(3 * self.morphable.flops * examples)  # backward costs twice the forward
        self.orchestrator.examples += examples
        if self.taken.settled() == self.steps:
            if complaint := self.taken.complaint():
                self.mishaps.say(complaint, "no step")
            return
        self.steps = self.taken.count
        if self.peers.world > 1:
            value = self._meet(value)
        if self.watch is not None:
            with self.morphable.policy.uncompiled():
                action = self.watch.step(value, self.steps)
            if action == "rollback" or not math.isfinite(value):
                self.orchestrator.examples = 0
                return  # this step is undone, or teaches nothing
        self.losses.append(value)
        if self.early is None or self.early.wants(self.steps):
            begun = time.perf_counter()
            with taught(), self.morphable.policy.uncompiled():
                if self.early is not None:
                    self.early.step(value)
                elif self.recipe == "incubate":
                    self.incubation.step(value)
            self.cost.seconds += time.perf_counter() - begun
            self.mishaps.warn_replaced()
        if self.steps % self.config.telemetry.progress_every == 0:
            self._tell_progress()

    def _meet(self, loss: float) -> float:
        """Meet the other processes: from here on all know the same; returns the mean loss."""
        names, orchestrator = list(self.morphable.places), self.orchestrator
        asked = names.index(self.asked) if self.asked in names else -1
        facts = bits(loss), orchestrator.examples, len(orchestrator.noted), asked, int(self.paused)
        found = meet(self.peers, Word(self.steps, self.topology, orchestrator.lineage, *facts))
        orchestrator.examples, self.paused = found.examples, found.paused
        self.asked = None if found.asked < 0 else names[found.asked]
        if not found.alike:
            realign(self)
        if self.watch is None:
            check_finite(found.loss, self.steps)
        orchestrator.share(found.faults)
        return found.loss

    def room(self) -> Room:
        """Return what the budget still allows."""
        budget, limits = self.parts.budget, self.parts.limits
        gate = self.parts.gate
        spent = (
            gate.looks >= gate.allowed  # a race that may not be judged would only cost
            or (budget.growth_flops is not None and self.cost.growth_flops >= budget.growth_flops)
            or (budget.wall_seconds is not None and self.cost.seconds >= budget.wall_seconds)
            or (budget.latency_ms is not None and self.parts.latency_ms() >= budget.latency_ms)
        )
        most = budget.raced_events if self.early is None else budget.early_events
        events = 0 if spent else most - self.events_kept
        size = self.morphable.parameter_count()
        flops = None if limits.flops is None else limits.flops - self.morphable.flops
        return Room(size, limits.parameters - size, events, flops)

    @contextmanager
    def watched_surgery(self) -> Iterator[None]:
        """Change shapes where the governor knows of it: no snapshot outlives the change."""
        yield
        if self.watch is not None:
            self.watch.snapshots.clear()

    def topology_changed(self) -> None:
        """Digest anew what has grown."""
        self.topology = topology(self.plans)

    @property
    def growing(self) -> bool:
        """Whether anything may still grow; once it is False the probe may go back to training."""
        if self.finished or self.recipe == "off":
            return False
        if self.early is not None:
            return self.early.growing
        return self.orchestrator.trial is not None or self.room().events > 0

    def report(self) -> Report:
        """Say what was looked at, what grew, what did not and why, and what could be changed."""
        return report(self)

    def curve(self) -> list[dict[str, Any]]:
        """Return held-out loss and metrics against size and FLOPs, a point per event and judgement."""
        return [] if self.early is None else [asdict(point) for point in self.early.points]

    def __str__(self) -> str:
        """Return the report."""
        return str(self.report())

    def expect(self, why: str, steps: int | None = None) -> None:
        """Announce a discontinuity, such as other data or another learning rate: it is no alarm then.

        Args:
            why: What findings are annotated with.
            steps: How long it may show; None: ``governor.grace``.
        """
        if self.watch is not None:
            self.watch.governor.expect(self.steps, why, steps)

    # -- what else a user may ask ----------------------------------------------------------------------------

    def epoch(self, metrics: Mapping[str, float] | None = None) -> None:
        """Note the end of an epoch, with metrics for the report."""
        self._refuse_finished("epoch")
        self.parts.epochs += 1
        self.metrics = {name: float(value) for name, value in (metrics or {}).items()}
        self.tell("epoch", epoch=self.parts.epochs, metrics=self.metrics)

    def pause(self) -> None:
        """Take no new decision until :meth:`resume`; a seed that is awake goes on."""
        self.paused = True

    def resume(self) -> None:
        """Decide again."""
        self.paused = False

    def grow_now(self, site: str) -> None:
        """Race at a site as soon as no other seed is awake; the gate decides as always.

        Raises:
            SiteError: No such site.
        """
        self._refuse_finished("grow_now")
        if site not in self.morphable.places:
            raise SiteError(f"no site {site!r}; {nearest(site, self.morphable.places)}")
        self.asked = site

    def rewrap(self) -> nn.Module:
        """Let what has grown become part of the layers, where the model trains in several processes.

        Call it in every process at the same place, at the end of each epoch say: a kernel that has passed
        stays a branch until then, because DistributedDataParallel and FSDP know only the parameters they saw
        when they were made. The wrapper stays the same object. In one process nothing is left to do.

        Returns:
            What was given to ``esper.grow``.
        """
        self._refuse_finished("rewrap")
        if self.early is not None and self.parts.wrapping.deferred:
            early = self.early
            if early.waiting is not None or early.open is not None:
                with self.morphable.policy.uncompiled(), self.parts.wrapping.opened(self.parts.optimizers):
                    early.rewrap()
            return self.model
        trial = self.orchestrator.trial
        if trial is not None and trial.waiting and self._examined():
            begun, site = time.perf_counter(), trial.decision.site
            self._open(self.orchestrator.commit_waiting)
            seconds = time.perf_counter() - begun
            self.cost.seconds += seconds
            self.tell("rewrapped", sites=[site], milliseconds=seconds * 1e3)
        return self.model

    def _examined(self) -> bool:
        """Ask the governor, where there is one, whether the seed that is awake may stay for good."""
        trial = self.orchestrator.trial
        if self.watch is not None and trial is not None:
            with self.morphable.policy.uncompiled():
                self.watch.examine(self.steps, last=True)
            if trial.ending:
                trial.waiting = False  # its part is taken back, step by step
            return self.orchestrator.trial is trial and not trial.ending
        return True

    def _open(self, change: Callable[[], Outcome | None]) -> None:
        """Carry out what may change the layers' shapes."""
        wrapping = self.parts.wrapping
        if self.orchestrator.trial is not None:
            with (
                self.morphable.policy.uncompiled(),
                wrapping.opened(self.parts.optimizers),
                self.mishaps.contained("a last look at what grows", self.incubation.skip),
            ):
                outcome = change()
                if outcome is not None:
                    self.incubation.conclude(outcome)
            self.mishaps.warn_replaced()

    def finish(self) -> nn.Module:
        """End growth: a live seed gets a last gate and is folded in or removed.

        Returns:
            The model that was given, the same object, with nothing of Esper left in it.
        """
        self._refuse_finished("finish")
        begun = time.perf_counter()
        if self.early is not None:
            if self.early.open is not None:
                with self.morphable.policy.uncompiled(), self.parts.wrapping.opened(self.parts.optimizers):
                    self.early.finish()
        else:
            self._examined()
            self._open(self.orchestrator.settle)
        self.cost.seconds += time.perf_counter() - begun
        self.leave()
        if self.watch is not None:
            self.watch.close()
        self.parts.forging.close()
        self.parts.wrapping.close()
        self.batches.clear()
        self.finished = True
        self.tell(
            "run_finished",
            **size_and_cost(self.parts),
            flops=self.morphable.flops,
            seconds=time.perf_counter() - self.begun,
            growth_seconds=self.cost.seconds,
            grown=[[plan.site, units_of(plan)] for plan in self.plans],
        )
        return self.model

    def save(self, directory: str | Path) -> Path:
        """Write the model with its genome, card and a torch-only ``rebuild.py``; see ``esper.load_into``.

        Of several processes one is enough, unless the model is sharded: then all of them call it, and the
        first one writes.
        """
        card = {
            "host parameters": self.parts.host_parameters,
            "parameters": self.morphable.parameter_count(),
            "training FLOPs": self.cost.training_flops,
            "growth FLOPs": self.cost.growth_flops,
            "steps": self.steps,
        }
        with self.parts.wrapping.plain(self.parts.optimizers):
            if self.parts.wrapping.sharded and self.peers.rank:
                return Path(directory)
            warn_of_branch(self)
            return save(self.morphable.host, self.plans, directory, card=card)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model's and the optimizers' own state, which the user saves as always."""
        return capture(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved run was: widens a fresh model and its optimizers first.

        Load the model's and the optimizers' own state afterwards; their shapes fit by then.

        Raises:
            StateError: The state is of another model or version, or this run has begun.
        """
        if self.steps or self.plans:
            raise StateError(
                "this run has begun already; load the state right after esper.grow on a fresh model"
            )
        with self.morphable.policy.uncompiled(), self.parts.wrapping.opened(self.parts.optimizers):
            restore(self, state)
        self.topology = topology(self.plans)
        self.redo.read()
        self._tell_start()  # the sites are other ones by now

    # -- telling ---------------------------------------------------------------------------------------------

    def tell(self, kind: str, **data: Any) -> None:
        """Emit an event."""
        self.parts.observe(Event(kind, self.steps, data))

    def _tell_start(self) -> None:
        self.tell("run_started", **started(self.parts, self.recipe))
        for message in self.parts.warnings:
            self.tell("warning", message=message)

    def _tell_progress(self) -> None:
        mean = sum(self.losses) / len(self.losses)
        self.losses.clear()
        self.tell(
            "progress", loss=mean, **size_and_cost(self.parts), seconds=time.perf_counter() - self.begun
        )

    def _refuse_finished(self, what: str) -> None:
        if self.finished:
            raise FinishedError(
                f"{what}() after finish(): the run is over; call esper.grow again to grow the model further"
            )

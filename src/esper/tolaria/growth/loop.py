"""What happens in a run at each call of ``growth.step``, read downwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from esper.batches.examples import copied, count_examples
from esper.contracts import Outcome
from esper.errors import ProbeError
from esper.kasmina.race.trial import Decaying, Key, Passed
from esper.saving.pretrained import follow
from esper.surgery.isolation.contexts import taught
from esper.tolaria.governor import GovernorHooks
from esper.tolaria.growth.early.early import Early
from esper.tolaria.growth.incubation.boundary import StepRecord, bits, packed, realign, sync_step
from esper.tolaria.growth.incubation.incubation import Incubation
from esper.tolaria.growth.incubation.redo import Redo
from esper.tolaria.growth.opening.entrance import check_finite, check_loss, failing
from esper.tolaria.growth.opening.presence import Presence
from esper.tolaria.growth.run.components import RunComponents
from esper.tolaria.growth.run.proven import Proven
from esper.tolaria.growth.run.state import RunState
from esper.tolaria.growth.run.telling import size_and_cost


class Loop:
    """Counts steps, and hands each that has happened to the recipe the run grows by.

    Args:
        parts: What the run consists of.
        presence: The run's hooks in the user's optimizers.

    Attributes:
        early: The early recipe, where the run grows by it.
        redo: What a process before decided.
        proven: What the model was like when its places were proven.
        watch: The governor, where the settings want one.
    """

    def __init__(self, parts: RunComponents, presence: Presence) -> None:
        self.presence = presence
        self.run = RunState(parts, presence.clock)
        self.redo, self.proven = Redo(self.run), Proven(self.run)
        self.incubation = Incubation(self.run, self.redo, self.proven)
        self.watch: GovernorHooks | None = None
        self.early: Early | None = None

    def begin(self) -> None:
        """Look at the loss and the held-out examples, where the early recipe will."""
        run = self.run
        if run.recipe == "early":
            looking = failing("the model or loss, run on the first held-out examples, raised")
            with looking, run.morphable.policy.uncompiled(), run.parts.wrapping.gathered():
                self.early = Early(run, self.proven)
            run.parts.warnings.extend(self.early.doubts)

    def step(self, batch: object, loss: Tensor) -> None:
        """Take one micro-batch; act if an optimizer step has happened."""
        run = self.run
        check_loss(loss)
        value = self.read(loss) if loss.is_cpu else None  # a device would be waited for at every micro-batch
        batch, count = self.taken(batch)
        run.batches.append(copied(batch) if run.recipe == "incubate" else batch)
        examples = count * max(self.presence.evaluations, 1)
        self.presence.evaluations = 0
        run.cost.train(3 * run.morphable.flops * examples)  # backward costs twice the forward
        run.orchestrator.examples += examples
        steps = run.clock.settled()
        if steps == run.steps:
            if complaint := run.clock.complaint():
                run.mishaps.say(complaint, "no step")
            return
        value = self.read(loss) if value is None else value
        run.steps = steps
        if run.peers.world > 1:
            value = self.across_ranks(value)
        if self.governed(value):
            self.act(value)
            if run.steps % run.config.telemetry.progress_every == 0:
                self.tell_progress()

    def taken(self, batch: object) -> tuple[object, int]:
        """Return a batch as growth reads it, and its examples; in its place the one before where none can.

        Raises:
            ProbeError: It is the first that cannot be read.
        """
        run = self.run
        try:
            if run.parts.axes.turns:
                batch = run.parts.axes.inward(batch)
            return batch, count_examples(batch)
        except ProbeError as error:
            if not run.batches:
                raise
            run.mishaps.say(f"a batch was passed over, training goes on: {error}", "batch")
            return run.batches[-1], count_examples(run.batches[-1])

    def read(self, loss: Tensor) -> float:
        """Return a loss as a number.

        Raises:
            LossError: It is not finite, and neither a governor nor other processes see to that.
        """
        value = float(loss.detach())
        if self.watch is None and self.run.peers.world == 1:
            check_finite(value, self.run.steps)
        return value

    def across_ranks(self, loss: float) -> float:
        """Meet the other processes: from here on all know the same; returns the mean loss."""
        run = self.run
        names, orchestrator = list(run.morphable.places), run.orchestrator
        asked = names.index(run.asked) if run.asked in names else -1
        faults = packed(orchestrator.faults_noted())
        facts = bits(loss), orchestrator.examples, faults, asked, int(run.paused)
        own = StepRecord(run.steps, run.topology, orchestrator.lineage, *facts)
        found = sync_step(run.peers, own, len(orchestrator.trials))
        orchestrator.examples, run.paused = found.examples, found.paused
        run.asked = None if found.asked < 0 else names[found.asked]
        if not found.alike:
            realign(run)
        if self.watch is None:
            check_finite(found.loss, run.steps)
        orchestrator.share(found.faults if found.alike else [])  # nobody is awake after a realignment
        return found.loss

    def governed(self, loss: float) -> bool:
        """Let the governor look; returns whether the step stands and teaches something."""
        if self.watch is None:
            return True
        with self.run.morphable.policy.uncompiled():
            action = self.watch.step(loss, self.run.steps)
        if action == "rollback" or not math.isfinite(loss):
            self.run.orchestrator.examples = 0
            return False
        return True

    def act(self, loss: float) -> None:
        """Hand the step to the recipe; most steps ask for nothing."""
        run = self.run
        run.losses.append(loss)
        if self.early is not None and not self.early.wants(run.steps):
            return
        begun = time.perf_counter()
        with taught(), run.morphable.policy.uncompiled():
            if self.early is not None:
                self.early.step(loss)
            elif run.recipe == "incubate":
                self.incubation.step(loss)
        run.cost.seconds += time.perf_counter() - begun
        run.mishaps.warn_replaced()

    def tell_progress(self) -> None:
        """Tell the mean loss since the last time, and what was spent."""
        run = self.run
        mean = sum(run.losses) / len(run.losses)
        run.losses.clear()
        seconds = time.perf_counter() - run.begun
        run.tell("progress", loss=mean, **size_and_cost(run.parts), seconds=seconds)

    @property
    def growing(self) -> bool:
        """Whether anything may still grow."""
        run = self.run
        if run.finished or run.recipe == "off":
            return False
        if self.early is not None:
            return self.early.growing
        return bool(run.orchestrator.trials) or run.remaining_budget().events > 0

    # -- between steps ---------------------------------------------------------------------------------------

    def rewrap(self) -> None:
        """Let what has grown become part of the layers, where several processes train the model."""
        run, early = self.run, self.early
        if early is not None and run.parts.wrapping.deferred:
            if early.waiting is not None or early.open is not None:
                with run.morphable.policy.uncompiled(), run.parts.wrapping.reshaping(run.parts.optimizers):
                    early.rewrap()
            return
        waiting = [trial.origin for trial in run.orchestrator.trials.values() if isinstance(trial, Passed)]
        if waiting and self.examined():
            begun = time.perf_counter()
            self.change(run.orchestrator.commit_waiting, [origin.key for origin in waiting])
            seconds = time.perf_counter() - begun
            run.cost.seconds += seconds
            sites = [origin.site for origin in waiting]
            run.tell("rewrapped", sites=sites, milliseconds=seconds * 1e3)

    def finish(self) -> None:
        """Judge what is open, take a last look at the seeds that are awake, and bring configs up to date."""
        run = self.run
        begun = time.perf_counter()
        if self.early is None:
            self.examined()
            self.change(self.incubation.settle, list(run.orchestrator.trials))
        elif self.early.open is not None or self.early.asking is not None:
            with run.morphable.policy.uncompiled(), run.parts.wrapping.reshaping(run.parts.optimizers):
                self.early.finish()
        run.cost.seconds += time.perf_counter() - begun
        self.follow_configs()
        if why := run.morphable.policy.leave():
            run.tell("fallback", what="recompile_limit", why=f"torch's limit of graphs stays raised: {why}")

    def follow_configs(self) -> None:
        """Let the configs that a model is built from say what it is by now, or tell what they cannot say."""
        run = self.run
        if not run.plans:
            return
        unsaid = run.mishaps.unsaid
        with (
            run.mishaps.contained("bringing a config up to date", unsaid.append),
            run.morphable.policy.uncompiled(),
            run.parts.wrapping.gathered(),
        ):
            unsaid += follow(run.morphable.host, run.parts.committer.run)
        for why in unsaid:
            run.mishaps.say(why)

    def examined(self) -> bool:
        """Ask the governor, where there is one, whether the seed that is awake may stay for good."""
        orchestrator = self.run.orchestrator
        if self.watch is None or orchestrator.oldest is None:
            return True
        key = orchestrator.oldest.origin.key  # a governed run has one awake at a time
        with self.run.morphable.policy.uncompiled():
            self.watch.examine(self.run.steps, last=True)
        left = orchestrator.trials.get(key)
        return left is not None and not isinstance(left, Decaying)

    def change(self, change: Callable[[Key], Outcome | None], keys: Sequence[Key]) -> None:
        """Carry out what may change the layers' shapes, for one seed after another."""
        run, parts = self.run, self.run.parts
        if not run.orchestrator.trials:
            return
        with run.morphable.policy.uncompiled(), parts.wrapping.reshaping(parts.optimizers):
            for key in keys:
                drop = partial(self.incubation.drop, key)
                if key not in run.orchestrator.trials:  # it no longer fitted once another had grown
                    continue
                with run.mishaps.contained("a last look at what grows", drop):
                    change(key)
                    self.incubation.conclude_all()
        run.mishaps.warn_replaced()

"""``Growth``, what ``esper.grow`` returns: it drives a plain training loop's growth."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from esper.arguments import whole
from esper.errors import ConfigError, FinishedError, SiteError, nearest
from esper.kasmina.recording.flops import Ledger
from esper.printable import QUOTE, quoted
from esper.saving.genome import units_of
from esper.surgery.isolation.undisturbed import undisturbed
from esper.tolaria.growth.loop import Loop
from esper.tolaria.growth.opening.arguments import MOST_STEPS
from esper.tolaria.growth.opening.presence import Presence, begin
from esper.tolaria.growth.reporting import report
from esper.tolaria.growth.resumable import Resumable
from esper.tolaria.growth.run.account import Report
from esper.tolaria.growth.run.components import RunComponents
from esper.tolaria.growth.run.keeping import keep
from esper.tolaria.growth.run.telling import size_and_cost


class Growth(Resumable):
    """Grows one model during one run; made by ``esper.grow``.

    Attributes:
        model: The host, the same object from first to last.
    """

    def __init__(self, parts: RunComponents) -> None:
        self.model: nn.Module = parts.given
        presence = Presence(parts.optimizers, parts.orchestrator)
        presence.closers.append(parts.model.policy.leave)
        self.leave = begin(self, parts.model.host, presence)
        try:
            self.loop = Loop(parts, presence)
            self.loop.begin()
            self.tell_start()
        except BaseException:  # nothing is left behind by a run that does not begin
            self.leave()
            raise

    @property
    def cost(self) -> Ledger:
        """What was spent: ``training_flops`` on the host's own steps, ``growth_flops`` and ``seconds``."""
        return self.run.cost

    @property
    def events_kept(self) -> int:
        """Events whose growth is in the model."""
        return self.run.events_kept

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.run.finished

    @property
    def growing(self) -> bool:
        """Whether anything may still grow; once it is False the probe may go back to training."""
        return self.loop.growing

    # -- the loop --------------------------------------------------------------------------------------------

    def step(self, batch: object, loss: Tensor) -> None:
        """Call once per micro-batch, after the optimizer line; acts only when an optimizer step has happened.

        Args:
            batch: What ``loss_fn`` was called with.
            loss: What it returned: a finite scalar.

        Raises:
            LossError: The loss is not a scalar, or the governor stopped the run; without a governor also
                where it is not finite.
            ProbeError: No examples can be told in the first batch; a later one like it is passed over.
            FinishedError: The run is over.
        """
        self._refuse_finished("step")
        self.loop.step(batch, loss)
        self.run.parts.observe.settle()

    def epoch(self, metrics: Mapping[str, float] | None = None) -> None:
        """Note the end of an epoch, with metrics for the report.

        Args:
            metrics: Numbers by name.

        Raises:
            ConfigError: They are none; the epoch is not counted then.
        """
        self._refuse_finished("epoch")
        run = self.run
        run.metrics = measured(metrics)
        run.parts.epochs += 1
        run.tell("epoch", epoch=run.parts.epochs, metrics=run.metrics)

    def pause(self) -> None:
        """Take no new decision until :meth:`resume`; a seed that is awake goes on."""
        self.run.pause()

    def resume(self) -> None:
        """Decide again."""
        self.run.resume()

    def expect(self, why: str, steps: int | None = None) -> None:
        """Announce a discontinuity, such as other data or another learning rate: it is no alarm then.

        Args:
            why: What findings are annotated with.
            steps: How long it may show; None: ``governor.grace``.

        Raises:
            ConfigError: ``why`` is no text, or ``steps`` no count.
        """
        if not isinstance(why, str):
            raise ConfigError(f"why={quoted(why)}; say in words what is to be expected")
        whole("steps", steps, least=1, most=MOST_STEPS, none=True)
        self.run.expect(why, steps)

    def grow_now(self, site: str) -> None:
        """Race at a site as soon as no other seed is awake; the gate decides as always.

        Raises:
            SiteError: No such site.
        """
        self._refuse_finished("grow_now")
        places = self.run.morphable.places
        if not isinstance(site, str) or site not in places:
            asked = site[:QUOTE] if isinstance(site, str) else ""
            raise SiteError(f"no site {quoted(site)}; {nearest(asked, places)}")
        self.run.asked = site

    def rewrap(self) -> nn.Module:
        """Let what has grown become part of the layers, where the model trains in several processes.

        Call it in every process at the same place, at the end of each epoch say: a kernel that has passed
        stays a branch until then, because DistributedDataParallel and FSDP know only the parameters they saw
        when they were made. The wrapper stays the same object. In one process nothing is left to do.

        Returns:
            What was given to ``esper.grow``.
        """
        self._refuse_finished("rewrap")
        self.loop.rewrap()
        return self.model

    def finish(self) -> nn.Module:
        """End growth: a live seed gets a last gate and is folded in or removed.

        Returns:
            The model that was given, the same object, with nothing of Esper left in it.
        """
        self._refuse_finished("finish")
        run, loop = self.run, self.loop
        loop.finish()
        with undisturbed():
            self.leave()
        if loop.watch is not None:
            loop.watch.close()
        run.parts.forging.close()
        run.parts.wrapping.close()
        run.batches.clear()
        run.finished = True
        idle = not run.plans and run.recipe != "off"
        run.tell(
            "run_finished",
            **size_and_cost(run.parts),
            flops=run.morphable.flops,
            seconds=time.perf_counter() - run.begun,
            growth_seconds=run.cost.seconds,
            grown=[[plan.site, units_of(plan)] for plan in run.plans],
            **({"advice": list(self.report().advice)} if idle else {}),
        )
        run.parts.observe.settle()
        return self.model

    # -- what it came to -------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Say what was looked at, what grew, what did not and why, and what could be changed."""
        return report(self.run, self.loop.early)

    def curve(self) -> list[dict[str, Any]]:
        """Return held-out loss and metrics against size and FLOPs, a point per event and judgement."""
        early = self.loop.early
        return [] if early is None else [asdict(point) for point in early.points]

    def __str__(self) -> str:
        """Return the report."""
        return str(self.report())

    def save(self, directory: str | Path) -> Path:
        """Write the model with its genome, card and a torch-only ``rebuild.py``; see ``esper.load_into``.

        It is the model as it is: a seed that is being let in is written with the strength it has now.

        Of several processes one is enough, unless the model is sharded: then all of them call it, and the
        first one writes.
        """
        run, wrapping = self.run, self.wrapping
        with wrapping.plain(run.parts.optimizers):
            if wrapping.sharded and run.peers.rank:
                return Path(directory)
            return keep(run, directory)

    def _refuse_finished(self, what: str) -> None:
        if self.run.finished:
            raise FinishedError(
                f"{what}() after finish(): the run is over; call esper.grow again to grow the model further"
            )


def measured(metrics: object) -> dict[str, float]:
    """Return metrics as numbers by name; None stands for no metrics.

    Raises:
        ConfigError: They are something else.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics={quoted(metrics)}; give numbers by name, or nothing")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ConfigError(f"metrics has the name {quoted(name)}; give numbers by name")
        try:
            if isinstance(value, str | bytes | bytearray):
                raise TypeError
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ConfigError(f"the metric {quoted(name)} is {quoted(value)}; give a number") from None
    return found

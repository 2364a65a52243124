"""A small host into which one kernel is planted early, without race or gate: the kernel is what is compared.

It goes the product's own way from there on: zero at birth, committed by the Committer (a pair becomes wider,
a blueprint becomes a branch), adopted by the host's optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.arms import Setup
from benchmarks.arms.fixed import Fixed
from benchmarks.data import stream
from benchmarks.flops import STEP, forward_flops, parameters
from esper.contracts import Decision, ignore
from esper.kasmina.branches.blocks import Block
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.widths.places import Place
from esper.tolaria.growth.run.commit import Committer


class Planted(Fixed):
    """Grows once, at the end of an epoch, by as many units as the task's budget has room for.

    Args:
        setup: The training.
        site: Where, and what: a site's name.
        after: Epochs before.
    """

    growths = 1

    def __init__(self, setup: Setup, site: str, after: int) -> None:
        super().__init__(setup, "small")
        self.site, self.after, self.seed = site, after, setup.seed
        self.room = parameters(setup.task.build(setup.task.big, setup.seed)) - parameters(self.net)

    def epochs(self) -> Iterator[None]:
        for done, _ in enumerate(super().epochs(), start=1):
            if done == self.after:
                self.plant()
            yield

    def plant(self) -> None:
        """Wake the site, give it its kernel at full strength (which adds zero), and keep it."""
        x, y = (part[:64] for part in self.split.probe)

        def run(net: nn.Module) -> torch.Tensor:
            return self.task.loss(net(x), y)

        blueprint = self.site.partition("+")[2] or "widen"
        model = MorphableModel(self.net, run, len(x), sites=[self.site], blueprints=[blueprint])
        place = model.places[self.site]
        units = most_units(place, self.room)
        layer = model.layer(self.site, self.fail)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.seed, "growth"))
            layer.kernel = kernel = place.kernel(units)
        layer.alpha, layer.exposed = torch.ones(()), True
        own = type(self.optimizer)(kernel.parameters())
        decision = Decision(1, 0, "graft", self.site, units, "random", "planted", 1.0, None)
        committer = Committer(
            model, {"optimizer": self.optimizer}, (), lambda: run(self.net), "zeros", ignore
        )
        why = committer.commit(kernel, own, decision, 0)
        if why:
            self.fail(why)
        model.release(self.site)
        inputs = self.split.train[0]
        self.epoch_flops = STEP * forward_flops(self.net, inputs) * len(inputs)

    def fail(self, why: str) -> None:
        raise RuntimeError(f"{self.site} could not be planted: {why}")


def most_units(place: Place, room: int) -> int:
    """Return the most units whose parameters fit."""
    step = units = place.site.granularity
    while size(place, units + step) <= room and place.site.most != units:
        units += step
    return units


def size(place: Place, units: int) -> int:
    if isinstance(place, Block):
        return place.graph.lower(place.signature, units).parameter_count()
    return units * place.site.unit_parameters

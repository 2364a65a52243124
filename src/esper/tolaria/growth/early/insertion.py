"""Insert what passed, all of it or nothing; re-open a saturated host; take an event back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter

import torch
from torch import nn

from esper.blueprints.kernel import LiveKernel
from esper.contracts import Event
from esper.errors import ProcessError, SurgeryError
from esper.kasmina.depth.stack import DepthKernel, Stack, widens
from esper.kasmina.evidence.reopen import TEMPER, How, multiply
from esper.kasmina.widths.fitting import fitted
from esper.kasmina.widths.places import WidenPlace
from esper.surgery.isolation.contexts import same_modes, untouched
from esper.surgery.optimizers.averages import copy_of
from esper.surgery.optimizers.foreign import forget_gradients, kept_outside
from esper.surgery.widen_layers import Holders
from esper.tolaria.growth.early.aside import MUCH, SOME, give_back
from esper.tolaria.growth.early.takeback import Before
from esper.tolaria.growth.run.check import deviation, outputs
from esper.tolaria.growth.run.commit import FAILURES, Committer, described

TRIAL = "it does not run on a batch of the loop"
Blocks = Mapping[str, tuple[int, int, int | None]]  # by stack: count, seed, decision
SHRINK = 0.5  # of all weights; 0.4 to 0.5 measured best (digits), 0.2 loses what was learned


class Insertion:
    """Changes host, optimizers and averages at an event.

    Args:
        committer: Carries out one widening.
        draw: Gives a seed for a purpose.
        say: Called with what the user should hear.
    """

    def __init__(self, committer: Committer, draw: Callable[[str], int], say: Callable[[str], None]) -> None:
        self.say = say
        self.committer, self.model, self.draw = committer, committer.model, draw
        self.trials: Sequence[
            Callable[[], object]
        ] = ()  # passes over training batches that must go on running
        self.flops: int | None = None  # of the model when it was last remembered

    @property
    def models(self) -> list[nn.Module]:
        """The host, then its averages."""
        return [self.model.host, *self.committer.averages]

    @property
    def flops_before(self) -> int:
        """Of the model as it was remembered; as it is where an earlier process did that."""
        return self.model.flops if self.flops is None else self.flops

    def remember(self, step: int) -> Before:
        """Copy the run as it is."""
        self.flops = self.model.flops
        self.trim()
        return Before.of(self.models, self.committer.optimizers, step, len(self.committer.plans), self.say)

    def carry_out(
        self,
        kernels: Mapping[str, LiveKernel],
        units: Mapping[str, int],
        before: Before,
        decisions: Mapping[str, int],
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Deepen, and widen what can be widened: a block is like the last of its kind as it was looked at.

        Args:
            kernels: What was tested, by place.
            units: How many units or blocks each place gets.
            before: The run as it was.
            decisions: The number of each place's decision, for what is told of blocks.

        Returns:
            Why, for each place that could not be widened, and for each that was not changed in the end.
        """
        widths = {name: count for name, count in units.items() if widens(kernels[name])}
        blocks = {
            name: (count, self.draw("initialisation"), decisions.get(name))
            for name, count in units.items()
            if name not in widths
        }
        if failed := self.deepen_all(kernels, blocks, before):
            return {}, dict.fromkeys(units, next(iter(failed.values())))
        unfit = self.widen_what_can(kernels, widths, before, blocks)
        return unfit, dict(unfit)

    def widen_what_can(
        self,
        kernels: Mapping[str, LiveKernel],
        units: Mapping[str, int],
        before: Before,
        blocks: Blocks,
    ) -> dict[str, str]:
        """Widen places together; where that fails, those that can be widened alone.

        Args:
            kernels: By place.
            units: To come, by place.
            before: The run as it was; everything is put back to it where something fails.
            blocks: That have come by then, as for :meth:`deepen_all`.

        Returns:
            Why, for each place that was not widened.
        """
        if not units or not (failed := self.widen(kernels, units, before, blocks)):
            return {}
        self.tell(before.step, f"{', '.join(units)}: {failed}; each was tried alone")
        failures: dict[str, str] = {}
        for name, count in units.items():
            if why := self.widen(kernels, {name: count}, before, {}):
                failures[name] = why
            else:
                self.restore(before)
        left = {name: count for name, count in units.items() if name not in failures}
        if failed_blocks := self.deepen_all(kernels, blocks, before):
            return {**dict.fromkeys(units, next(iter(failed_blocks.values()))), **failed_blocks}
        if left and (why := self.widen(kernels, left, before, blocks)):
            failures.update(dict.fromkeys(left, why))
            failures |= self.deepen_all(kernels, blocks, before)
        return failures

    def deepen_all(self, kernels: Mapping[str, LiveKernel], blocks: Blocks, before: Before) -> dict[str, str]:
        """Insert an event's blocks.

        Returns:
            Why, for each stack, where one of them could not be inserted: everything was put back then.
        """
        for name, (count, seed, decision) in blocks.items():
            if failed := self.deepen(name, kernels[name], count, seed, before, decision):
                return dict.fromkeys(blocks, failed)
        return {}

    def widen(
        self, kernels: Mapping[str, LiveKernel], units: Mapping[str, int], before: Before, blocks: Blocks
    ) -> str:
        """Widen places together; what the model says stays as it is.

        Consumers come first: rows that are new read what is there, and get zeros for what comes beside it.

        Args:
            kernels: By place.
            units: To come, by place.
            before: The run as it was; everything is put back to it where something fails.
            blocks: That have come by then, and come again where a second try begins from there.

        Returns:
            "" when it was carried out, otherwise why everything was put back.
        """
        committer, step = self.committer, before.step
        if outside := kept_outside(committer.optimizers):  # a dict of its own fills as it steps
            return outside
        names = list(units)[::-1]
        places = [self.model.places[name] for name in names]
        made = [end for place in places for end in place.ends()]
        exits = {path: end for p in places for path, end in zip(p.site.exits, p.ends()[1:], strict=True)}
        try:
            said = outputs(self.model, exits, committer.run)
            holders, freed = Holders(self.model.host), 0
            for name in names:
                place = self.model.places[name]
                assert isinstance(place, WidenPlace)
                place = place.refreshed()  # a neighbour may have grown
                kernel = fitted(place, kernels[name], units[name])
                plan = kernel.plan()
                before.note(self.model.host, plan)
                committer.carry_out(plan, kernel.slices(plan), {}, None, step, holders=holders)
                committer.plans.append(plan)
                freed += size_of(self.model.host, {edit.name for edit in plan.edits})
                if freed >= SOME:
                    freed = 0
                    give_back()
            with committer.everywhere():
                now = outputs(self.model, exits, committer.run)
                for path in exits:
                    for old, new in zip(said[path], now[path], strict=True):  # call by call
                        if old.shape == new.shape:  # an exit that is widened itself has more to say
                            deviation(old, new, made)
                if error := broken(self.model.host, self.trials):  # a head that only some batches use, say
                    raise SurgeryError(f"{TRIAL}: {described(error)}") from error
        except ProcessError:
            raise
        except FAILURES as error:
            self.restore(before)
            if TRIAL in str(error) and (own := broken(self.model.host, self.trials)):  # nor did it before
                self.trials = ()
                why = f"it was not tried on the loop's batches, on which it fails by itself: {described(own)}"
                self.tell(step, why)
                failed = self.deepen_all(kernels, blocks, before)
                return next(iter(failed.values()), "") or self.widen(kernels, units, before, blocks)
            return f"the grown model was put back: {described(error)}"
        self.refreshed()
        return ""

    def deepen(
        self, site: str, kernel: LiveKernel, blocks: int, seed: int, before: Before, decision: int | None
    ) -> str:
        """Insert blocks behind the last of their kind; the first is the one that was tested.

        Returns:
            "" when it was carried out, otherwise why everything was put back.
        """
        for count in range(blocks):
            place = self.model.places[site]
            assert isinstance(place, Stack) and isinstance(kernel, DepthKernel)
            block = kernel.block if count == 0 else place.block(seed + count)
            failed = self.committer.deepen(place, block, before.step, decision)
            if failed:
                self.restore(before)
                return failed
        self.refreshed()
        return ""

    def tell(self, step: int, why: str) -> None:
        """Tell that an insertion went on otherwise than planned."""
        self.committer.observe(Event("fallback", step, {"what": "insertion", "why": why}))

    def refreshed(self) -> None:
        """Bring sites and costs up to date."""
        self.model.refresh(self.committer.run)
        self.model.meter(self.committer.run)
        self.trim()

    def trim(self) -> None:
        """Give back what a look or tensors that have grown left behind, where it is much."""
        host = self.model.host
        if size_of(host, dict(host.named_parameters())) >= MUCH:
            give_back()

    def restore(self, before: Before) -> None:
        """Take an event back."""
        before.restore(self.models, self.committer.optimizers, self.committer.plans)
        del self.committer.plans[before.plans :]
        self.model.refresh(self.committer.run)
        if self.flops is None:  # remembered by an earlier process
            self.model.meter(self.committer.run)
        else:
            self.model.flops = self.flops

    def reopen(self, how: How, layers: Sequence[nn.Module]) -> None:
        """Re-open a saturated host, its averages too.

        Args:
            how: "output": every argmax stays; "shrink": all weights, and the moments are cleared.
            layers: The output layer.
        """
        if how == "output":
            paths = {id(module): path for path, module in self.model.host.named_modules()}
            for layer in layers:
                multiply([layer], TEMPER)
                for average in self.committer.averages:
                    multiply([copy_of(average, {paths[id(layer)]}).get_submodule(paths[id(layer)])], TEMPER)
        elif how == "shrink":
            for model in self.models:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(SHRINK)
            for optimizer in self.committer.optimizers.values():
                forget_gradients(optimizer, SHRINK)


def size_of(host: nn.Module, names: Iterable[str]) -> int:
    """Return the bytes that some tensors of a host take."""
    tensors = [attrgetter(name)(host) for name in names]
    return sum(one.numel() * one.element_size() for one in tensors)


def broken(host: nn.Module, runs: Sequence[Callable[[], object]]) -> Exception | None:
    """Return what the first pass raises that does not run, in training mode and without a trace."""
    try:
        with same_modes(host):
            host.train()
            with torch.no_grad(), untouched(host, seed=0):
                for run in runs:
                    run()
    except FAILURES as error:
        return error
    return None

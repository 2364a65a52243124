"""Make a judged branch part of the model: modules, optimizers and averages together, or nothing at all.

A pair's kernel becomes rows and columns of the user's own layers. Any other kernel is folded into a Linear
where algebra allows it, or stays as a branch, registered under the host.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.blueprints.kernel import GraphKernel, LiveKernel
from esper.contracts import Decision, DeepenPlan, Event, Observer, WidenEdit, WidenPlan
from esper.distributed.collectives import ALONE, Peers
from esper.errors import EsperError, ProcessError, SurgeryError
from esper.kasmina.branches.blocks import Block
from esper.kasmina.branches.fold import merged, write
from esper.kasmina.depth.birth import warmed
from esper.kasmina.depth.deepen import duplicate, insert, twin_of
from esper.kasmina.depth.stack import Stack
from esper.kasmina.morphable import MorphableModel, slug
from esper.kasmina.proving.proving import FAILURES as RAISED
from esper.kasmina.widths.places import Place
from esper.kasmina.widths.widen import HostKernel, Widenable
from esper.printable import raised
from esper.saving.genome import GraftPlan, Plan, program_of
from esper.surgery.adding import Passing
from esper.surgery.branches import PREFIX, attach, weight_name
from esper.surgery.optimizers.adoption import adopt
from esper.surgery.optimizers.averages import copy_of, widen_average
from esper.surgery.optimizers.foreign import kept_outside
from esper.surgery.optimizers.widening import widen_state
from esper.surgery.widen_layers import Holders, empty_slices, widen
from esper.tolaria.growth.run.check import deviation, fineness, output, outputs, passing

# What surgery may run into; everything is put back then.
FAILURES = (SurgeryError, *RAISED)


def described(error: Exception) -> str:
    """Name what ended a change: an error of the user's code by its type, too."""
    return str(error) if isinstance(error, EsperError) else raised(error)


class Committer:
    """Carries out growth.

    Args:
        model: Owns the host.
        optimizers: The user's, by name.
        averages: EMA copies of the host.
        run: One pass over a probe batch.
        rule: State of new units in the optimizers.
        observe: Told what grew, and of every detour.
        peers: Other processes: all of them grow, or none.
    """

    def __init__(
        self,
        model: MorphableModel,
        optimizers: Mapping[str, Optimizer],
        averages: Sequence[nn.Module],
        run: Callable[[], object],
        rule: Literal["zeros", "seed", "mean"],
        observe: Observer,
        peers: Peers = ALONE,
    ) -> None:
        self.model, self.optimizers, self.averages = model, optimizers, averages
        self.run, self.rule, self.observe, self.peers = run, rule, observe, peers
        self.plans: list[Plan] = []
        self.replaced: list[str] = []  # parameters that are other objects since they grew

    def commit(
        self, kernel: LiveKernel, optimizer: Optimizer, decision: Decision, step: int, slot: int = 0
    ) -> str:
        """Make a kernel part of the model it stands beside.

        Returns:
            "" when it was carried out, otherwise why everything was put back.
        """
        begun = time.perf_counter()
        assert decision.site is not None
        layer = self.model.awake(decision.site, slot)
        assert layer is not None
        branch = output(self.model, layer.place.ends()[1], self.run)
        layer.exposed = False
        try:
            if layer.place.site.kind == "pair":
                kind, facts = "widened", self.widen(kernel, optimizer, branch, step)
            else:
                width = decision.width
                kind, facts = "grafted", self.graft(kernel, layer.place, optimizer, branch, width, step)
        except ProcessError:
            raise
        except FAILURES as error:
            layer.exposed = True
            return f"the grown model was put back: {described(error)}"
        self.model.refresh(self.run)
        facts |= {"decision": decision.id, "site": decision.site}
        facts["parameters"] = self.model.parameter_count()
        facts["milliseconds"] = (time.perf_counter() - begun) * 1e3
        self.observe(Event(kind, step, facts))
        why = self.model.policy.after_commit(layer.place.ends())
        if why:
            self.observe(Event("recompiled", step, {"policy": self.model.policy.kind, "why": why}))
        return ""

    def keep(
        self, kernel: LiveKernel, optimizer: Optimizer, decision: Decision, step: int, slot: int = 0
    ) -> str:
        """Commit a kernel; the model's passes cost more from then on."""
        assert decision.site is not None
        before = self.model.places[decision.site].site
        why = self.commit(kernel, optimizer, decision, step, slot)
        if not why and before.kind == "pair":
            self.model.flops += before.unit_flops * decision.width
        elif not why:
            self.model.meter(self.run)
        return why

    def deepen(
        self,
        place: Stack,
        block: nn.Module,
        step: int,
        decision: int | None = None,
        more: Iterable[int] = (),
    ) -> str:
        """Insert blocks behind the last of their kind, in model, averages and optimizers; all or nothing.

        Args:
            place: The stack, as it is now.
            block: What ``place.block(seed)`` made, or the ``block`` of its kernel, itself: no copy is taken.
            step: Of the run.
            decision: That it follows from.
            more: Seeds of further blocks, each a copy of the one before.

        Returns:
            "" when it was carried out, otherwise why everything was put back.
        """
        begun = time.perf_counter()
        host, donor = self.model.host, place.donor
        before = output(self.model, donor, self.run)
        known, count = set(map(id, host.parameters())), self.model.parameter_count()
        made: list[tuple[DeepenPlan, nn.Module, dict[str, object]]] = []
        lines: list[str] = []
        try:
            with ExitStack() as back:
                with self.everywhere():
                    for seed in (None, *more):
                        block = block if seed is None else place.block(seed)
                        plan = place.deepening()
                        warmed(block, place.given, before)
                        lines += self.stack(plan, block, back)
                        count += sum(p.numel() for p in block.parameters() if id(p) not in known)
                        place = place.refreshed()
                        made.append((plan, block, {"blocks": place.site.width, "parameters": count}))
                    differences = self.deviations([block for _, block, _ in made], before)
                back.pop_all()
        except ProcessError:
            raise
        except FAILURES as error:
            return f"the deeper model was put back: {described(error)}"
        self.tell_lost(lines, step)
        self.plans += [plan for plan, *_ in made]
        self.model.refresh(self.run)
        each = (time.perf_counter() - begun) * 1e3 / len(made)
        for (plan, block, facts), difference in zip(made, differences, strict=True):
            told = {"decision": decision, "site": plan.site, "difference": difference, "index": plan.index}
            self.observe(Event("deepened", step, {**told, **facts, "milliseconds": each}))
            why = self.model.policy.after_commit((donor, block))
            if why:
                self.observe(Event("recompiled", step, {"policy": self.model.policy.kind, "why": why}))
            donor = block
        return ""

    def deviations(self, blocks: Sequence[nn.Module], before: Tensor) -> list[float]:
        """Return by how much what each new block says differs from what the one before it says.

        Raises:
            SurgeryError: By more than rounding.
        """
        said = outputs(self.model, {str(index): block for index, block in enumerate(blocks)}, self.run)
        now = [said[str(index)][-1] for index in range(len(blocks))]
        pairs = zip([before, *now[:-1]], now, blocks, strict=True)
        return [deviation(old, new, (block,)) for old, new, block in pairs]

    def stack(self, plan: DeepenPlan, block: nn.Module, back: ExitStack) -> Sequence[str]:
        """Insert a block and let the optimizers adopt it; returns what these could not keep.

        Args:
            plan: Plan that says where.
            block: Block that comes.
            back: Stack that takes what undoes it.
        """
        host = self.model.host
        donor = host.get_submodule(plan.donor)
        back.callback(insert(host, plan, block).undo)
        for average in self.averages:
            twin = copy_of(average, {plan.donor})
            back.callback(insert(twin, plan, twin_of(twin, plan, block)).undo)
        like = dict(donor.named_parameters())
        prefix = f"{plan.container}.{plan.name}.".lstrip(".")
        back.callback(adopted := adopt(self.optimizers, (donor,), block, None, prefix, like))
        return adopted.lines

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Fail where it fails in any process, so that all of them put everything back."""
        failure: Exception | None = None
        try:
            yield
        except FAILURES as error:
            failure = error
        if not self.peers.all_ranks(failure is None):
            raise failure or SurgeryError("another process could not carry it out")

    def widen(self, kernel: LiveKernel, optimizer: Optimizer, branch: Tensor, step: int) -> dict[str, object]:
        """Make a kernel rows and columns of the pair it stands beside."""
        assert isinstance(kernel, HostKernel)
        plan: WidenPlan = kernel.plan()
        donor = {key: laid(kernel, edit, optimizer) for key, edit in plan.keyed()}
        difference = self.carry_out(plan, kernel.slices(plan), donor, branch, step, (kernel,))
        self.plans.append(plan)
        edits = [[e.name, e.axis, e.old, e.new] for e in plan.edits]
        return {"units": plan.units, "edits": edits, "difference": difference}

    def graft(
        self, kernel: LiveKernel, place: Place, optimizer: Optimizer, branch: Tensor, hidden: int, step: int
    ) -> dict[str, object]:
        """Fold a kernel into the Linear it stands at, or register it as a branch of the host."""
        assert isinstance(place, Block) and isinstance(kernel, GraphKernel)
        facts = {"blueprint": place.graph.name, "units": hidden}
        folded = merged(place, kernel)
        if folded is not None:
            return {**facts, "how": "merged", "difference": self.fold(place, folded, branch)}
        plan = self.plan_for(place, hidden)
        difference = self.attach(plan, kernel, optimizer, branch, step)
        self.plans.append(plan)
        return {**facts, "how": "branch", "difference": difference, "child": plan.name}

    def fold(self, place: Block, folded: tuple[Tensor, Tensor | None], branch: Tensor) -> float:
        """Write the sum of layer and kernel into the layer."""
        layer = place.entry
        assert isinstance(layer, nn.Linear)
        weight, bias = (None if t is None else t.detach().clone() for t in (layer.weight, layer.bias))
        assert weight is not None
        with ExitStack() as back:
            back.callback(write, layer, weight, bias)
            with self.everywhere():
                write(layer, *folded)
                difference = deviation(branch, output(self.model, place.exit, self.run), place.ends())
            back.pop_all()
        return difference

    def plan_for(self, place: Block, hidden: int) -> GraftPlan:
        """Write down a branch that stays; its name counts the model's branches, those of earlier runs too."""
        host, site = self.model.host, place.site
        paths = [path for path, one in host.named_modules(remove_duplicate=False) if one is place.exit]
        if len(paths) > 1:
            raise SurgeryError(f"{' and '.join(paths)} are one layer; a branch needs one with one name")
        own = [name.rpartition(".")[2] for name in host.state_dict()]
        count = next(n for n in itertools.count() if not any(o.startswith(f"{PREFIX}_{n}_") for o in own))
        at = passing(self.model, place.ends(), self.run, place.port == "serial")
        facts = f"{count}_{slug(place.graph.name)}", site.entry, site.exit, place.graph.to_json()
        return GraftPlan(site.name, *facts, place.signature, hidden, at.reads, at.writes)

    def attach(
        self,
        plan: GraftPlan,
        kernel: GraphKernel,
        optimizer: Optimizer | None,
        branch: Tensor | None,
        step: int = 0,
    ) -> float:
        """Register a branch in host and averages and let the optimizer adopt it; all or nothing."""
        host, port, at = self.model.host, plan.signature.port, Passing(plan.reads, plan.writes)
        ends = host.get_submodule(plan.entry), host.get_submodule(plan.exit)
        difference = 0.0
        with ExitStack() as back:
            with self.everywhere():
                back.callback(attach(plan.name, kernel, ends, port, at))
                if branch is not None:
                    difference = deviation(branch, output(self.model, ends[1], self.run), (kernel, *ends))
                for average in self.averages:
                    twin = copy_of(average, {plan.entry, plan.exit})
                    theirs = twin.get_submodule(plan.entry), twin.get_submodule(plan.exit)
                    back.callback(attach(plan.name, copy.deepcopy(kernel), theirs, port, at))
                prefix = f"{plan.exit}.{weight_name(plan.name, '')}"
                adopted = adopt(self.optimizers, ends, kernel, optimizer, prefix)
                back.callback(adopted)
            back.pop_all()
        self.tell_lost(adopted.lines, step)
        return difference

    def carry_out(
        self,
        plan: WidenPlan,
        slices: Mapping[str, Tensor],
        donor: Mapping[str, Mapping[str, object]],
        branch: Tensor | None,
        step: int,
        beside: tuple[nn.Module, ...] = (),
        holders: Holders | None = None,
    ) -> float:
        """Widen host, averages and optimizers; whatever raises, everything is put back.

        Args:
            plan: What changes.
            slices: What comes, by edit.
            donor: What an optimizer knows of it.
            branch: What the exit said with the kernel beside it; None where there was none.
            step: Of the run.
            beside: That kernel.
            holders: Of the host, where many places are widened in a row; who has them has asked what the
                optimizers keep outside.

        Returns:
            The largest difference from the branch, 0 where there is none to compare with.
        """
        difference = 0.0
        with ExitStack() as back:
            with self.everywhere():
                if holders is None and (outside := kept_outside(self.optimizers)):
                    raise SurgeryError(outside)  # containers of their own fill as they step
                widened = widen(self.model.host, plan, slices, holders)
                back.callback(widened.undo)
                if branch is not None:
                    ends = self.model.places[plan.site].ends()
                    said = outputs(self.model, {"entry": ends[0], "exit": ends[1]}, self.run)
                    now = said["exit"][-1]
                    difference = deviation(branch, now, (*beside, *ends), fineness(said))
                for average in self.averages:
                    back.callback(widen_average(average, plan, slices).undo)
            reasons = widen_state(self.optimizers, widened.changes, self.rule, donor)  # all of them or none
            back.pop_all()
        for change in widened.replaced:
            self.replaced += [change.edit.name] if change.edit.name not in self.replaced else []
            lost = f"{change.edit.name} could not keep its identity ({change.why})"
            self.observe(
                Event(
                    "fallback", step, {"what": "identity", "why": f"{lost}; optimizers were repaired by name"}
                )
            )
        self.tell_lost(reasons, step)
        return difference

    def tell_lost(self, lines: Iterable[str], step: int) -> None:
        """Tell what the optimizers could not keep."""
        for line in lines:
            self.observe(Event("fallback", step, {"what": "optimizer state", "why": line}))

    def replay(self, plan: Plan) -> None:
        """Repeat growth of an earlier run on a fresh host; a checkpoint will fill its empty tensors."""
        if isinstance(plan, WidenPlan):
            self.carry_out(plan, empty_slices(self.model.host, plan), {}, None, 0)
        elif isinstance(plan, DeepenPlan):
            with ExitStack() as back:
                with self.everywhere():
                    lines = self.stack(plan, duplicate(self.model.host, plan.donor), back)
                back.pop_all()
            self.tell_lost(lines, 0)
        else:
            like = next(self.model.host.parameters())
            self.attach(plan, GraphKernel(program_of(plan), like), None, None)
        self.model.refresh(self.run)
        self.plans.append(plan)


def laid(kernel: HostKernel[Widenable], edit: WidenEdit, optimizer: Optimizer) -> dict[str, object]:
    """Return what a kernel's optimizer knows of a tensor, in the order of the host's."""
    own = getattr(kernel, edit.source)
    state = optimizer.state.get(own, {})
    return {
        k: kernel.lay(edit, v) if torch.is_tensor(v) and v.shape == own.shape else v for k, v in state.items()
    }

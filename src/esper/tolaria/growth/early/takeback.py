"""A moment before an event, and the way back to it across the change of shapes.

Weights, buffers and what the optimizers know of them go back. Learning rates, schedulers and random streams
stay where they are: the loop goes on, and a schedule that was set back would end before its rate has decayed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.contracts import DeepenPlan, WidenPlan
from esper.errors import SavedModelError
from esper.kasmina.depth.deepen import at, remove
from esper.saving.genome import Plan, aliases, resize
from esper.surgery.optimizers.adoption import let_go
from esper.surgery.optimizers.averages import copy_of
from esper.surgery.optimizers.history import forget
from esper.surgery.widen_layers import put_in_place
from esper.tolaria.governor.rollback import Kept, duplicate, read_state, write, written_state
from esper.tolaria.growth.early.aside import copies, page_out

State = dict[str, object]  # of a parameter


class BeforeState(TypedDict):
    """A :class:`Before` as a checkpoint keeps it."""

    step: int
    plans: int
    tensors: list[dict[str, Tensor]]
    attributes: list[list[Any]]  # module path, attribute, value
    states: list[dict[str, object]]


@dataclass
class Before:
    """A run as it was.

    Attributes:
        step: When.
        plans: How many there were.
        tensors: Of the host, then of its averages, by name.
        attributes: (module path, attribute, value) of the counts that plans changed since, in order.
        states: Per optimizer, the state of each parameter by the host's name for it.
        layers: The host's modules that held tensors, by path; none where a checkpoint brought it.
        mapped: Whether its tensors are mapped from the disk.
    """

    step: int
    plans: int
    tensors: list[dict[str, Tensor]]
    attributes: list[tuple[str, str, object]]
    states: list[dict[str, State]]
    layers: dict[str, weakref.ref[nn.Module]] = field(default_factory=dict)
    mapped: bool = False

    @classmethod
    def of(
        cls,
        models: Sequence[nn.Module],
        optimizers: Mapping[str, Optimizer],
        step: int,
        plans: int,
        say: Callable[[str], None],
    ) -> Before:
        """Copy a run as it is.

        Args:
            models: The host, then its averages.
            optimizers: By name.
            step: Now.
            plans: Number of plans so far.
            say: Called with why a large copy takes memory.
        """
        names = {id(p): name for name, p in models[0].named_parameters()}
        own = [dict(named(model)) for model in models]
        states = [
            {names[id(p)]: s for p, s in o.state.items() if id(p) in names} for o in optimizers.values()
        ]
        known = list[Tensor]()
        duplicate(states, known.append)
        held = [tensor for one in own for tensor in one.values()]
        made, mapped = copies([*held, *known], say, kept=len(known))
        copied = iter(made)
        tensors = [{name: next(copied) for name in one} for one in own]
        held_aside = duplicate(states, lambda t: Kept(next(copied), t.device))
        layers = {
            path: weakref.ref(m) for path, m in models[0].named_modules() if m._parameters or m._buffers
        }
        return cls(step, plans, tensors, [], cast("list[dict[str, State]]", held_aside), layers, mapped)

    def overtaken(self, models: Sequence[nn.Module], plans: Sequence[Plan]) -> str:
        """Say what the user has made another since, so that there is no way back; "" where nothing is.

        A layer that was replaced, pruned or moved would be overwritten by halves, with sizes of another one.

        Args:
            models: The host, then its averages.
            plans: All of the run.
        """
        host, expected = models[0], {name: list(t.shape) for name, t in self.tensors[0].items()}
        now = dict(host.named_modules())
        for path, known in self.layers.items():
            if now.get(path) is not known():
                return f"{path or 'the model'} was replaced or removed since"
        for model, tensors in zip(models, self.tensors, strict=True):
            held = dict(named(model))
            if missing := next((name for name in tensors if name not in held), ""):
                return f"{missing} is not in the model any more"
        names = aliases(host)  # once: to list a state takes as long as a pass where places are many
        try:
            for plan in plans[self.plans :]:
                resize(expected, plan, names, grow=True)
        except SavedModelError as error:
            return str(error)
        for name, parameter in host.named_parameters():
            if list(parameter.shape) != expected.get(name, list(parameter.shape)):
                return f"{name} has another shape than it grew to, {list(parameter.shape)}"
        return ""

    def note(self, model: nn.Module, plan: WidenPlan) -> None:
        """Note the counts that a plan is about to change."""
        for path, name, _ in plan.attributes:
            self.attributes.append((path, name, getattr(at(model, path), name)))

    def restore(
        self, models: Sequence[nn.Module], optimizers: Mapping[str, Optimizer], plans: Sequence[Plan]
    ) -> None:
        """Bring the run back; parameters keep their identity where torch lets them.

        Args:
            models: The host, then its averages.
            optimizers: By name.
            plans: All of the run; those since are undone.
        """
        for index, model in enumerate(models):
            for block in self.put_back(model, plans, index):
                if index == 0:
                    let_go(optimizers, block)
            model.zero_grad(set_to_none=True)
        parameters = dict(models[0].named_parameters())
        for optimizer, states in zip(optimizers.values(), self.states, strict=True):
            forget(optimizer)  # LBFGS would go on with the count of the grown weights
            for name, parameter in parameters.items():
                if name in states:
                    write(optimizer.state[parameter], states[name])
                    for value in states[name].values():
                        if isinstance(value, Kept):
                            self.read(value.copy)
                else:
                    optimizer.state.pop(parameter, None)

    def deeper(self, plans: Sequence[Plan]) -> list[DeepenPlan]:
        """List the blocks that have come since, the newest first."""
        return [plan for plan in reversed(plans[self.plans :]) if isinstance(plan, DeepenPlan)]

    def put_back(self, model: nn.Module, plans: Sequence[Plan], index: int = 0) -> list[nn.Module]:
        """Give one model the blocks, counts, weights and buffers it had; optimizers are left alone.

        Args:
            model: The host, or an average.
            plans: All of the run; those since are undone.
            index: 0 for the host, from 1 on for the averages.

        Returns:
            The blocks that were taken out.
        """
        blocks, copy = list[nn.Module](), model
        for plan in self.deeper(plans):
            copy = model if index == 0 else copy_of(model, {plan.donor})
            blocks.append(remove(copy, plan))
        if index and self.attributes:
            copy = copy_of(model, {path for path, _, _ in self.attributes})
        for path, attribute, value in reversed(self.attributes):
            setattr(at(copy, path), attribute, value)
        put_in_place(model, self.tensors[index], self.read)
        return blocks

    def read(self, tensor: Tensor) -> None:
        """Let go of the memory that reading one of its tensors took."""
        if self.mapped:
            page_out(tensor)

    def state_dict(self) -> BeforeState:
        """Return what a checkpoint keeps."""
        return {
            "step": self.step,
            "plans": self.plans,
            "tensors": self.tensors,
            "attributes": [list(one) for one in self.attributes],
            "states": [{n: written_state(s) for n, s in one.items()} for one in self.states],
        }

    @classmethod
    def from_state(cls, state: BeforeState) -> Before:
        """Read it back."""
        return cls(
            state["step"],
            state["plans"],
            [dict(one) for one in state["tensors"]],
            [(path, attribute, value) for path, attribute, value in state["attributes"]],
            [{n: read_state(s) for n, s in one.items()} for one in state["states"]],
        )


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """List parameters and buffers."""
    return [*model.named_parameters(), *model.named_buffers()]

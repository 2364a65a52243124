"""``Growth.save``: the model as it is at this moment, also while a seed is being let in.

A kernel that takes part with α is then written as what it would become, its outgoing weights times α: units
of the user's own layers, or a branch. What is read back says the same, to rounding; the run stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from esper.errors import StateError
from esper.kasmina.branches.blocks import Block
from esper.kasmina.seeds.layer import KasminaLayer
from esper.kasmina.widths.widen import HostKernel
from esper.saving.genome import Plan, aliases
from esper.saving.save import save
from esper.surgery.branches import weight_name
from esper.surgery.isolation.acting import own_state
from esper.surgery.widen_layers import extended
from esper.tolaria.growth.run.commit import Committer
from esper.tolaria.growth.run.state import RunState


def keep(run: RunState, directory: str | Path) -> Path:
    """Write a run's model; see :meth:`Growth.save`."""
    morphable, exposed = run.morphable, [t for t in run.orchestrator.exposed if t.origin.layer.exposed]
    size = morphable.parameter_count()
    card: dict[str, float | str] = {
        "host parameters": run.parts.host_parameters,
        "parameters": size,
        "training FLOPs": run.cost.training_flops,
        "growth FLOPs": run.cost.growth_flops,
        "steps": run.steps,
    }
    plans, tensors = list(run.plans), None
    if len(exposed) > 1:
        sites = " and ".join(trial.origin.site for trial in exposed)
        raise StateError(
            f"a save holds one seed that is being let in, and {len(exposed)} are, at {sites}; save once all "
            "but one are decided or after growth.finish(), or keep a checkpoint, which holds them all"
        )
    for trial in exposed:
        layer = trial.origin.layer
        assert layer.kernel is not None and layer.alpha is not None
        plan, tensors = as_it_is(run.parts.committer, layer, trial.origin.decision.width)
        plans.append(plan)
        card["parameters"] = size + sum(parameter.numel() for parameter in layer.kernel.parameters())
        card["not decided yet"] = f"{plan.site}, with α = {float(layer.alpha):.6g}"
    return save(morphable.host, plans, directory, card=card, tensors=tensors)


def as_it_is(committer: Committer, layer: KasminaLayer, width: int) -> tuple[Plan, Mapping[str, Tensor]]:
    """Return how the model would grow, and its tensors with the kernel at its present strength."""
    host, kernel, alpha = committer.model.host, layer.kernel, layer.alpha
    assert kernel is not None and alpha is not None
    state, strength = own_state(host), float(alpha)
    if isinstance(kernel, HostKernel):
        plan = kernel.plan()
        sources = {key: edit.source for key, edit in plan.keyed()}
        slices = kernel.slices(plan)
        slices |= {k: t * strength for k, t in slices.items() if sources[k] in kernel.outgoing}
        names = aliases(host)
        for name, tensor in extended(host, plan, slices).items():
            state |= dict.fromkeys(names[name], tensor)
        return plan, state
    assert isinstance(layer.place, Block)
    graft = committer.plan_for(layer.place, width)
    for name, parameter in kernel.named_parameters():
        factor = strength if name in kernel.outgoing else 1.0
        state[f"{graft.exit}.{weight_name(graft.name, name)}"] = parameter.detach() * factor
    return graft, state

"""The genome of a grown model: the shapes it started with and everything that grew since, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from torch import Tensor, nn

from esper.blueprints.graph import Graph
from esper.blueprints.program import Program
from esper.contracts import DeepenPlan, Signature, WidenEdit, WidenPlan
from esper.errors import BlueprintError, SavedModelError, nearest
from esper.printable import quoted
from esper.saving.genome_form import require_plan, require_plans, require_shapes
from esper.surgery.adding import DIRECT, Holder
from esper.surgery.branches import weight_name
from esper.surgery.isolation.acting import own_state


@dataclass(frozen=True, slots=True)
class GraftPlan:
    """Growth beside existing layers: a kernel that the last of them adds to what it returns."""

    site: str
    name: str  # by which the layer's new parameters are called
    entry: str  # module paths
    exit: str
    graph: str  # canonical JSON
    signature: Signature
    hidden: int
    reads: tuple[Holder, ...] = DIRECT.reads  # see kasmina.adding.Passing
    writes: tuple[Holder, ...] = DIRECT.writes


FORMAT = 2
DEEP = 3  # with blocks, which readers of 2 do not know
BESIDE = 4  # with branches whose weights are the layer's own; before, they hung under the model's root
READABLE = (1, 2, 3, 4)  # 1 knew widenings only
ROOT = "grown"  # where they hung
SHOWN = 40  # names of tensors that an error lists
Plan: TypeAlias = "WidenPlan | GraftPlan | DeepenPlan"
Shapes: TypeAlias = dict[str, list[int]]  # of a state_dict


def encode(model: nn.Module, plans: Sequence[Plan], shapes: Shapes | None = None) -> bytes:
    """Write down how ``model`` became what it is.

    Args:
        model: As it is.
        plans: Everything that grew, in order.
        shapes: Of its tensors, where the plans lead to others than it has.

    Raises:
        SavedModelError: The plans do not lead to this model.
    """
    base, names = shapes_of(model) if shapes is None else shapes, aliases(model)
    for plan in reversed(plans):
        resize(base, plan, names, grow=False)
    forms = {WidenPlan: FORMAT, DeepenPlan: DEEP, GraftPlan: BESIDE}
    form = max((forms[type(plan)] for plan in plans), default=FORMAT)
    genome = {"format": form, "base": base, "plans": [written(plan) for plan in plans]}
    return json.dumps(genome, indent=1).encode()


def written(plan: Plan) -> dict[str, object]:
    """Write a plan; a branch brings its program, so that a reader needs torch alone."""
    if isinstance(plan, WidenPlan):
        return {"kind": "widen", **asdict(plan)}
    if isinstance(plan, DeepenPlan):
        return {"kind": "deepen", **asdict(plan)}
    return {"kind": "graft", **asdict(plan), "program": program_of(plan).to_json()}


def units_of(plan: Plan) -> int:
    """Return by how many units a plan grows: rows, width of a branch, blocks."""
    if isinstance(plan, WidenPlan):
        return plan.units
    return plan.hidden if isinstance(plan, GraftPlan) else 1


def program_of(plan: GraftPlan) -> Program:
    """Return what a branch computes.

    Raises:
        SavedModelError: Its graph is not valid, or does not fit its place.
    """
    try:
        return Graph.from_json(plan.graph).lower(plan.signature, plan.hidden)
    except BlueprintError as error:
        raise SavedModelError(f"the branch {plan.name!r} cannot be built: {error}") from error


def decode(genome: bytes) -> tuple[Shapes, list[Plan]]:
    """Read back the shapes before any growth, and the plans in order.

    Raises:
        SavedModelError: The format is not ours.
    """
    try:
        recipe = json.loads(genome)
        form = recipe["format"]
        if type(form) is int and form in READABLE:
            return require_shapes(recipe["base"]), [
                plan_from(plan) for plan in require_plans(recipe["plans"])
            ]
    except SavedModelError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SavedModelError(f"the genome is not of format {FORMAT}: {quoted(error)}") from error
    raise SavedModelError(
        f"the genome has format {quoted(form)}, this Esper reads {BESIDE}: update esper-morph"
    )


def plan_from(data: Mapping[str, object]) -> Plan:
    """Rebuild a plan from what ``dataclasses.asdict`` made of it, through JSON or not.

    Raises:
        SavedModelError: A field is not of its kind.
    """
    plan = _plan_from(data)
    require_plan(plan)
    return plan


def _plan_from(given: Mapping[str, object]) -> Plan:
    data: dict[str, Any] = dict(given)  # JSON as yet; require_plan looks at what is made of it
    if "graph" in data:
        facts: dict[str, Any] = {f.name: data[f.name] for f in fields(GraftPlan) if f.name in data}
        facts |= {n: tuple((k, at) for k, at in data[n]) for n in ("reads", "writes") if n in data}
        facts["signature"] = Signature.from_dict(data["signature"])
        return GraftPlan(**facts)
    if "container" in data:
        facts = {f.name: data[f.name] for f in fields(DeepenPlan)}
        facts["zeroed"] = tuple(data["zeroed"])
        facts["counts"] = tuple((p, a, tuple(v) if isinstance(v, list) else v) for p, a, v in data["counts"])
        return DeepenPlan(**facts)
    edits = tuple(WidenEdit(**edit) for edit in data["edits"])
    return WidenPlan(data["site"], data["units"], edits, tuple((m, a, v) for m, a, v in data["attributes"]))


def shapes_of(model: nn.Module) -> Shapes:
    """List the shapes of a model's state; what is no tensor has none."""
    return shapes_in(own_state(model))


def shapes_in(state: Mapping[str, object]) -> Shapes:
    """List the shapes of a state."""
    return {n: list(v.shape) if isinstance(v, Tensor) else [] for n, v in state.items()}


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Map each name to all names of the same tensor: a module registered twice is in the state twice."""
    state = own_state(model, keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in state.items()}


def resize(shapes: Shapes, plan: Plan, names: Mapping[str, Sequence[str]], *, grow: bool) -> None:
    """Follow one plan on shapes alone, forwards or backwards.

    Raises:
        SavedModelError: A tensor is missing or has another size.
    """
    if isinstance(plan, GraftPlan):
        branch(shapes, plan, grow=grow)
        return
    if isinstance(plan, DeepenPlan):
        block(shapes, plan, grow=grow)
        return
    for edit in plan.edits:
        source, result = (edit.old, edit.new) if grow else (edit.new, edit.old)
        for name in names.get(edit.name, [edit.name]):
            shape = shapes.get(name)
            if shape is None or not 0 <= edit.axis < len(shape) or shape[edit.axis] != source:
                raise SavedModelError(
                    f"the plan for {plan.site!r:.80} takes axis {edit.axis} of {name!r:.80} from {edit.old} "
                    f"to {edit.new}, but its shape is {shape}: the plans do not belong to this model"
                )
            shape[edit.axis] = result


def branch(shapes: Shapes, plan: GraftPlan, *, grow: bool) -> None:
    """Add the tensors of a branch, or take them away."""
    for weight in program_of(plan).weights:
        name = f"{plan.exit}.{weight_name(plan.name, weight.name)}"
        if grow:
            shapes[name] = list(weight.shape)
        elif shapes.pop(name, None) != list(weight.shape):
            raise SavedModelError(
                f"the branch {plan.name!r} has no {name!r}: the plans do not belong to this model"
            )


def settled(weights: Mapping[str, Tensor], plans: Sequence[Plan]) -> dict[str, Tensor]:
    """Return weights of a save of any format by the names they have now."""
    names = {
        f"{ROOT}.{plan.name}.{weight.name}": f"{plan.exit}.{weight_name(plan.name, weight.name)}"
        for plan in plans
        if isinstance(plan, GraftPlan)
        for weight in program_of(plan).weights
    }
    return {names.get(name, name): tensor for name, tensor in weights.items()}


def block(shapes: Shapes, plan: DeepenPlan, *, grow: bool) -> None:
    """Add the tensors of one more block, or take them away; they have the shapes of its donor's."""
    new, old = f"{plan.container}.{plan.name}.".lstrip("."), f"{plan.donor}."
    donor = {new + name[len(old) :]: list(shape) for name, shape in shapes.items() if name.startswith(old)}
    own = {name: shape for name, shape in shapes.items() if name.startswith(new)}
    if not donor or own != ({} if grow else donor):
        raise SavedModelError(
            f"the plan for {plan.site!r} makes {new[:-1]!r} like {plan.donor!r}; this model has {len(own)} "
            f"tensors of the one, {len(donor)} of the other: the plans do not belong to this model"
        )
    for name in donor:
        if grow:
            shapes[name] = donor[name]
        else:
            del shapes[name]


def require_fit(wanted: Shapes, given: Shapes, otherwise: str) -> None:
    """Name the first tensor in which two sets of shapes differ.

    Raises:
        SavedModelError: There is one; the message starts with ``otherwise``.
    """
    for name, shape in wanted.items():
        if name not in given:
            few = [one[:80] if one.isprintable() else repr(one)[:80] for one in sorted(given)[:SHOWN]]
            more = f" and {len(given) - SHOWN} more" if len(given) > SHOWN else ""
            raise SavedModelError(f"{otherwise}: it has no {name!r:.80}; {nearest(name[:80], few)}{more}")
        if shape != given[name]:
            raise SavedModelError(f"{otherwise}: its {name!r:.80} is {given[name]}, and {shape} is needed")
    if extra := sorted(given.keys() - wanted.keys()):
        raise SavedModelError(f"{otherwise}: its {extra[0]!r:.80} is not in the folder")

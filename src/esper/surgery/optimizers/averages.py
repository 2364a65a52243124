"""Lets averaged copies of a model (EMA, SWA) follow a widening, so that their next update still fits."""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch import Tensor, nn

from esper.contracts import WidenPlan
from esper.errors import SurgeryError
from esper.surgery.widen_layers import Widened, widen


def widen_average(average: nn.Module, plan: WidenPlan, slices: Mapping[str, Tensor]) -> Widened:
    """Widen an averaged copy by the plan and slices its model was widened by.

    The average of a unit that has just come is the unit itself.

    Args:
        average: A copy of the model, or a wrapper with the copy as a child, as
            ``torch.optim.swa_utils.AveragedModel`` is.
        plan: Plan the model was widened by.
        slices: Per edit name the new part, as for ``kasmina.materialise.widen``.

    Raises:
        SurgeryError: Neither ``average`` nor a child of it has the plan's tensors; nothing was changed.
    """
    names = {edit.name for edit in plan.edits}
    return widen(copy_of(average, names), plan, slices)


def copy_of(average: nn.Module, names: Set[str]) -> nn.Module:
    """Return the copy of the model in an average: itself, or a child.

    Args:
        average: A copy of the model, or a wrapper with the copy as a child.
        names: Tensors or modules the copy must have.

    Raises:
        SurgeryError: There is none.
    """
    for copy in (average, *average.children(), *average.modules()):  # a compiled copy lies deeper
        known = {name for name, _ in (*copy.named_parameters(), *copy.named_buffers(), *copy.named_modules())}
        if names <= known:
            return copy
    raise SurgeryError(
        f"the average {type(average).__name__} has no copy of {', '.join(sorted(names))}; "
        "give esper.grow(ema=...) a copy of the model it grows, or a wrapper around one"
    )

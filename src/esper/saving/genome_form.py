"""What the values of a genome must be: checked once, so that nobody behind it meets a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from esper.contracts import DeepenPlan, Signature, WidenEdit, WidenPlan
from esper.errors import SavedModelError

MOST = 1 << 40  # of anything that is counted: axes, units, positions
MAX_PLANS = 100_000
AXES = 64


class Graft(Protocol):
    """A plan of a branch, as far as its form goes; :class:`esper.saving.genome.GraftPlan` is one."""

    @property
    def site(self) -> str:
        """Where it stands."""

    @property
    def name(self) -> str:
        """By which its parameters are called."""

    @property
    def entry(self) -> str:
        """Module path of the layer it reads before."""

    @property
    def exit(self) -> str:
        """Module path of the layer it adds to."""

    @property
    def graph(self) -> str:
        """Canonical JSON."""

    @property
    def signature(self) -> Signature:
        """The tensors it fits."""

    @property
    def hidden(self) -> int:
        """Its width, in units."""

    @property
    def reads(self) -> Sequence[tuple[str, object]]:
        """Where in a call its input is."""

    @property
    def writes(self) -> Sequence[tuple[str, object]]:
        """Where in the output its own goes."""


def require_shapes(base: object) -> dict[str, list[int]]:
    """Return shapes by name.

    Raises:
        SavedModelError: They are something else.
    """
    if not isinstance(base, dict):
        raise SavedModelError(f"the genome's base is a {type(base).__name__}, no mapping of names to shapes")
    for name, shape in base.items():
        if not (
            isinstance(name, str)
            and isinstance(shape, list)
            and len(shape) <= AXES
            and all(map(count, shape))
        ):
            raise SavedModelError(f"the genome's base gives {name!r:.80} the shape {shape!r:.80}")
    return base


def require_plans(plans: object) -> list[dict[str, object]]:
    """Return plans, as yet unread.

    Raises:
        SavedModelError: They are no list of mappings, or too many.
    """
    if not isinstance(plans, list) or not all(isinstance(plan, dict) for plan in plans):
        raise SavedModelError("the genome's plans are no list of mappings")
    if len(plans) > MAX_PLANS:
        raise SavedModelError(f"the genome has {len(plans)} plans; {MAX_PLANS} are the most")
    return list(plans)


def require_plan(plan: WidenPlan | DeepenPlan | Graft) -> None:
    """Check the fields of a plan.

    Raises:
        SavedModelError: One of them is not of its kind.
    """
    if not text(plan.site):
        wrong = "site"
    elif isinstance(plan, WidenPlan):
        wrong = _widen(plan)
    else:
        wrong = _deepen(plan) if isinstance(plan, DeepenPlan) else _graft(plan)
    if wrong is not None:
        raise SavedModelError(f"the genome's plan for {plan.site!r:.80} has an odd {wrong}")


def count(value: object, least: int = 0) -> bool:
    """Tell a whole number of a sensible size; a truth value is none."""
    return type(value) is int and least <= value <= MOST


def text(*values: object) -> bool:
    """Tell whether all are strings."""
    return all(isinstance(value, str) for value in values)


def _widen(plan: WidenPlan) -> str | None:
    if not count(plan.units, 1):
        return "units"
    if not all(map(_edit, plan.edits)):
        return "edit"
    return None if all(_attribute(a) for a in plan.attributes) else "attribute"


def _edit(edit: WidenEdit) -> bool:
    numbers = count(edit.axis) and count(edit.old) and count(edit.new, 1) and count(edit.chunks, 1)
    return text(edit.name, edit.source) and numbers and edit.axis < AXES and edit.old <= edit.new


def _attribute(attribute: object, names: bool = False) -> bool:
    if not (isinstance(attribute, tuple) and len(attribute) == 3 and text(*attribute[:2])):
        return False
    value = attribute[2]
    return count(value) or (names and isinstance(value, tuple) and text(*value))


def _deepen(plan: DeepenPlan) -> str | None:
    if not text(plan.container, plan.name, plan.donor):
        return "name"
    if not count(plan.index):
        return "index"
    if not text(*plan.zeroed):
        return "zeroed"
    return None if all(_attribute(one, names=True) for one in plan.counts) else "count"


def _graft(plan: Graft) -> str | None:
    if not text(plan.name, plan.entry, plan.exit, plan.graph):
        return "name or graph"
    if not count(plan.hidden, 1):
        return "hidden"
    places = (*plan.reads, *plan.writes)
    if not plan.reads or not all(text(kind) and (text(at) or count(at)) for kind, at in places):
        return "reads or writes"
    return None if _signature(plan.signature) else "signature"


def _signature(given: Signature) -> bool:
    known = given.layout in ("vector", "sequence", "image") and given.port in ("parallel", "serial")
    sizes: tuple[object, ...] = (given.kernel_size, given.stride, given.padding, given.dilation)
    numbers = all(isinstance(one, tuple) and all(map(count, one)) for one in sizes)
    whole = count(given.inputs, 1) and count(given.outputs, 1) and count(given.groups, 1)
    return known and numbers and whole and text(given.padding_mode)

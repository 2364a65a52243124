"""Say why a place whose growth is not exact may be so, in the user's words, and what to write instead."""

from __future__ import annotations

from torch import nn

from esper.kasmina.widths.layers import forward_of_its_own
from esper.kasmina.widths.places import WidenPlace

NUMBER = "a number may be read from the width or from the weights; keep it as a constant"
HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward hook",
}


def suspect(place: WidenPlace, why: str) -> str:
    """Return the reason for a refusal.

    Args:
        place: Place that was grown on copies.
        why: Text that says what differed, and in which mode.
    """
    ends = list(zip((place.site.entry, *place.site.exits), place.ends(), strict=True))
    names = " and ".join(name for name, _ in ends)
    return f"tried with more units between {names}: {why}; {hint(place, ends, why)}"


def hint(place: WidenPlace, ends: list[tuple[str, nn.Module]], why: str) -> str:
    """Name the likeliest cause and the way out of it."""
    for name, module in ends:
        if found := [word for table, word in HOOKS.items() if getattr(module, table, None)]:
            return f"{name} has {found[0]}, which new units would not pass in the same way; do it in forward"
    for name, module in ends:
        if own := forward_of_its_own(module):
            return f"{name} is a {own} with a forward of its own; let it call the layer, not its weight"
    for name, module in ends:
        if any(p._backward_hooks for p in module.parameters(recurse=False)):
            if "does not run" in why:
                return f"a hook on a gradient of {name} may know its shape; let it take the shape it is given"
            return (
                f"a hook on a gradient of {name} changes it, and would not change that of units beside the "
                "layer; give the layer a parameter group with a learning rate of its own instead"
            )
    if "training" in why and "gradient" in why:
        return (
            "an autograd function with a backward of its own, or a hook on a gradient, stands between; "
            "place it before or behind the two layers"
        )
    if "another shape" in why:
        return (
            f"the model returns what {place.site.entry} makes, or something as wide; return it to those who "
            "ask for it only, not in the pass that is trained"
        )
    if "evaluation" in why and any("dropout" in label for label in place.site.between):
        return "dropout draws in evaluation, too; use nn.Dropout, or give it training=self.training"
    if "another size" in why:
        return (
            "a size of the input is read there, and new units would keep that of the first batch; let it "
            "follow from the tensor (-1, mean, scale_factor=)"
        )
    if "does not run" in why:
        return "a size is written as a number somewhere; use -1, flatten, or the size of the tensor itself"
    return NUMBER

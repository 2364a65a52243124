"""Check the optimizers a user gives to ``grow``, and find those that stand inside them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from esper.errors import OptimizerError
from esper.surgery.optimizers.foreign import kept_outside
from esper.surgery.optimizers.inner import with_inner, with_wrappers


def named_optimizers(
    optimizer: Optimizer | Mapping[str, Optimizer], model: nn.Module
) -> dict[str, Optimizer]:
    """Return the optimizers by name, and those that stand inside them.

    Raises:
        OptimizerError: Not an optimizer, one that raises the loss, one whose steps cannot be seen, one that
            keeps state where it cannot follow, or none owns a trainable parameter.
    """
    given = by_name(optimizer)
    if not given:
        raise OptimizerError(
            "optimizer={} names none; give the optimizer that trains the model, or several by name"
        )
    for name, one in given.items():
        if not isinstance(one, Optimizer):
            raise OptimizerError(
                f"{name!r} is a {type(one).__name__}; a torch.optim.Optimizer is needed, or several by names "
                f"that you choose, {{'body': one, 'head': other}} say{within(one)}"
            )
    found = with_inner(given)
    if not found:
        raise OptimizerError(
            f"{', '.join(map(repr, given))}: its constructor never called that of torch.optim.Optimizer, so "
            "its steps cannot be seen; call super().__init__ there, or give the optimizer that it wraps"
        )
    refuse_lacking(found, model)
    refuse_ascent(found)
    if outside := kept_outside(with_wrappers(given)):
        raise OptimizerError(outside)
    return found


def by_name(optimizer: Optimizer | Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    """Return the optimizers that were given, by name."""
    return dict(optimizer) if isinstance(optimizer, Mapping) else {"optimizer": optimizer}


def within(wrapper: object) -> str:
    """Name an optimizer that something else holds, as the end of an error message."""
    held = [name for name, one in getattr(wrapper, "__dict__", {}).items() if isinstance(one, Optimizer)]
    return f": give its {held[0]}, whose steps are counted" if held else ""


def refuse_lacking(given: Mapping[str, Optimizer], model: nn.Module) -> None:
    """Refuse optimizers that do not train all that is trainable.

    Raises:
        OptimizerError: With what they lack.
    """
    owned = {id(p) for one in given.values() for group in one.param_groups for p in group["params"]}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, p in trainable.items() if id(p) not in owned]
    if missing and len(missing) == len(trainable):
        raise OptimizerError(
            "the optimizer owns none of the model's parameters; "
            "build it from model.parameters() of this model"
        )
    if missing:
        listed = ", ".join(missing[:4]) + (" …" if len(missing) > 4 else "")
        raise OptimizerError(
            f"the optimizer lacks {listed}; add them, or freeze them with requires_grad_(False)"
        )


def refuse_ascent(optimizers: Mapping[str, Optimizer]) -> None:
    """Refuse to grow a model that is trained to raise what growth would lower.

    A group that maximizes beside others that do not, as that of a multiplier, is the user's business.

    Raises:
        OptimizerError: Every group maximizes.
    """
    groups = [group for one in optimizers.values() for group in one.param_groups]
    if all(group.get("maximize", False) for group in groups):
        raise OptimizerError(
            f"{', '.join(map(repr, optimizers))} would raise the loss (maximize=True), which growth lowers; "
            "let loss_fn return the negative and leave maximize out"
        )

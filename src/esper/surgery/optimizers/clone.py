"""Makes an optimizer of the class and settings of another's group, for other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from esper.surgery.optimizers.kinds import kind_of


def clone_optimizer(
    optimizer: Optimizer, group: Mapping[str, object], parameters: Iterable[nn.Parameter]
) -> Optimizer | None:
    """Return a fresh optimizer with a group's settings.

    What state is born as goes through the constructor: Adagrad makes its state there, and knows of no group.

    Returns:
        None for a user's own class that is made in another way.
    """
    same: Callable[..., Optimizer] = type(optimizer)
    names = {"lr", *kind_of(optimizer).born.values()} | ({"fused"} if group.get("fused") else set())
    try:
        made = same(list(parameters), **{name: group[name] for name in names})
    except (TypeError, ValueError, KeyError):
        return None
    made.param_groups[0].update({k: v for k, v in group.items() if k in optimizer.defaults})
    return made

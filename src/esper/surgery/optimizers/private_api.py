"""What following optimizers takes of torch that torch does not promise; read in torch 2.13."""

from __future__ import annotations

from functools import cache

from torch.optim import LBFGS, Optimizer

from esper.private_torch import demand

READ_IN = "2.13"
HOOKS = "_optimizer_step_post_hooks"  # an instance has it from its constructor on


@cache
def _require_hooks() -> None:
    if HOOKS not in Optimizer.__annotations__:
        demand(Optimizer, (HOOKS,), READ_IN, "counting an optimizer's steps")


def is_made(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer's own constructor has run, without which its steps cannot be seen.

    Raises:
        EsperError: This torch keeps the hooks of a step under another name.
    """
    _require_hooks()
    return HOOKS in vars(optimizer)


def forget_count(optimizer: Optimizer) -> None:
    """Let LBFGS count its weights again: torch counts them once and trusts that for ever.

    Raises:
        EsperError: This torch keeps the count under another name.
    """
    if isinstance(optimizer, LBFGS):
        demand(optimizer, ("_numel_cache",), READ_IN, "LBFGS with parameters that grow")
    vars(optimizer)["_numel_cache"] = None

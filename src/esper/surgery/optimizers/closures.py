"""Lets a kernel see the last evaluation only, where an optimizer evaluates the loss many times per step.

LBFGS calls its closure up to ``max_eval`` times in one ``step``. The closure clears the host's gradients
each time, but knows nothing of an exposed kernel, on which the gradients of all evaluations would add up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def before_closures(optimizer: Optimizer, clear: Callable[[], None]) -> RemovableHandle:
    """Call ``clear`` before every evaluation of a closure that ``optimizer.step`` is given.

    Args:
        optimizer: The user's; a step without a closure stays as it is.
        clear: Clears the gradients that the closure does not know of.

    Returns:
        What removes it again.
    """

    def fresh(closure: Callable[[], Any]) -> Callable[[], Any]:
        @wraps(closure)
        def evaluate() -> Any:
            clear()
            return closure()

        return evaluate

    def hook(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": fresh(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer itself
            return (args[0], fresh(args[1]), *args[2:]), kwargs
        return None

    return optimizer.register_step_pre_hook(hook)

"""Lets a kernel see the last evaluation only, where an optimizer evaluates the loss many times per step.

LBFGS calls its closure up to ``max_eval`` times in one ``step``. The closure clears the host's gradients
each time, but knows nothing of an exposed kernel, on which the gradients of all evaluations would add up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")


def before_closures(optimizer: Optimizer, clear: Callable[[], None]) -> RemovableHandle:
    """Call ``clear`` before every evaluation of a closure that ``optimizer.step`` is given.

    Args:
        optimizer: Optimizer of the user's; a step without a closure stays as it is.
        clear: Function that clears the gradients the closure does not know of.

    Returns:
        What removes it again.
    """

    def fresh(closure: Callable[[], T]) -> Callable[[], T]:
        @wraps(closure)
        def evaluate() -> T:
            clear()
            return closure()

        return evaluate

    def hook(
        _: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        named, placed = kwargs.get("closure"), args[1:2]  # the first is the optimizer itself
        if callable(named):
            return args, {**kwargs, "closure": fresh(named)}
        if placed and callable(placed[0]):
            return (args[0], fresh(placed[0]), *args[2:]), kwargs
        return None

    return optimizer.register_step_pre_hook(hook)

"""Counts an optimizer's steps, an outermost one once.

torch fires a step's hooks for every class whose ``step`` runs: a subclass that calls ``super().step()`` fires
them once, and twice as soon as the parent class has had an instance of its own.
"""

from __future__ import annotations

from torch.optim import Optimizer


class Steps:
    """The steps of one optimizer.

    Attributes:
        count: Steps so far.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.count = self.depth = 0
        before = optimizer.register_step_pre_hook(self._enter)
        after = optimizer.register_step_post_hook(self._leave)
        self.hooks = before, after

    def settled(self) -> int:
        """Return the count, asked where no step can be under way: one that raised has left for good."""
        self.depth = 0
        return self.count

    def close(self) -> None:
        """Count no more."""
        for hook in self.hooks:
            hook.remove()

    def _enter(self, *rest: object) -> None:
        self.depth += 1

    def _leave(self, *rest: object) -> None:
        self.depth -= 1
        self.count += self.depth == 0

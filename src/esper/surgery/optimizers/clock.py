"""Counts the optimizer steps of a run, whichever of its optimizers takes them."""

from __future__ import annotations

from collections.abc import Mapping

from torch.optim import Optimizer

from esper.surgery.optimizers.steps import Steps

SILENT = 20  # calls without a step that are no accumulation of gradients any more


class Clock:
    """The steps of several optimizers that train one model.

    Several of them may step in one round of the loop, a wrapper and what it wraps for one: that is one step.
    So the first that has moved since the last question counts.

    Args:
        optimizers: Optimizers, by name, the one that is to count first.

    Attributes:
        idle: Questions since the last step.
        longest: Number of questions, the most between two steps; accumulated gradients make it more than 1.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self.kinds = [f"{name!r} ({type(one).__name__})" for name, one in optimizers.items()]
        self.each = [Steps(one) for one in optimizers.values()]
        self.seen = [0] * len(self.each)
        self.before = self.idle = 0  # steps as of the last question
        self.longest = 1

    def settled(self) -> int:
        """Return the count, asked where no step can be under way."""
        moved = 0
        for one, seen in zip(self.each, self.seen, strict=True):
            count = one.settled()
            moved = moved or count - seen
        self.idle += 1
        if moved:
            self.longest, self.idle = max(self.longest, self.idle), 0
            self.count = self.before + moved
        return self.before

    @property
    def count(self) -> int:
        """Steps so far."""
        pairs = zip(self.each, self.seen, strict=True)
        return self.before + next((one.count - seen for one, seen in pairs if one.count != seen), 0)

    @count.setter
    def count(self, steps: int) -> None:
        self.before, self.seen = steps, [one.count for one in self.each]

    @property
    def silent(self) -> bool:
        """Whether no step has come for so long that none is to be expected."""
        return self.idle >= SILENT * self.longest

    def complaint(self) -> str:
        """Say that no step comes, and what to do; empty where they come."""
        if not self.silent:
            return ""
        watched = ", ".join(self.kinds)
        if self.count:
            return (
                f"none of the optimizers that esper.grow was given has stepped since step {self.count}: "
                f"{watched}; where the loop trains with another one by now, call growth.finish(), and "
                "esper.grow with that one"
            )
        return (
            f"growth.step was called {self.idle} times, and none of the optimizers that esper.grow was given "
            f"has taken a step: {watched}; growth counts its steps by theirs, so give it the one whose "
            "step() the loop calls"
        )

    def close(self) -> None:
        """Count no more."""
        for one in self.each:
            one.close()

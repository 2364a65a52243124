"""An optimizer's steps are counted once, whatever its classes."""

from __future__ import annotations

import contextlib

import torch

from esper.surgery.optimizers.steps import Steps


class Sub(torch.optim.Adam):
    """A user's own Adam."""

    def step(self, closure: object = None) -> None:
        super().step()


class Failing(torch.optim.SGD):
    """Raises once."""

    failing = True

    def step(self, closure: object = None) -> None:
        super().step()
        if self.failing:
            raise ValueError("once")


def test_a_subclass_counts_once_although_its_parent_has_hooks() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    torch.optim.Adam([p])  # from here on torch hooks Adam.step itself, too
    optimizer = Sub([p])
    steps = Steps(optimizer)
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
    assert steps.settled() == 3
    steps.close()
    optimizer.step()
    assert steps.count == 3


def test_a_step_that_raised_does_not_stop_the_count() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    torch.optim.SGD([p])
    optimizer = Failing([p], lr=0.1)
    steps = Steps(optimizer)
    with contextlib.suppress(ValueError):
        optimizer.step()
    before = steps.settled()
    optimizer.failing = False
    optimizer.step()
    assert steps.settled() == before + 1

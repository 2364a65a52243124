"""Ways to turn a seed that is awake into a bad one, for the bad seeds' bench."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.race.trial import Exposed, Judged, Training
from esper.surgery.isolation.contexts import untouched

Forward = Callable[..., Tensor]
Turn = Callable[["Victim"], None]


class Victim:
    """What a bad seed can get hold of: its trial, the host, data, and chance.

    Attributes:
        step: Called after every step until the seed is gone, for kinds that go on working.
        age: Passes of the bad kernel so far.
    """

    def __init__(
        self, trial: Training | Judged | Exposed, host: nn.Module, run: Any, draw: random.Random
    ) -> None:
        self.trial, self.host, self.run, self.draw = trial, host, run, draw
        self.step: Callable[[], None] = lambda: None
        self.age = 0

    def become(self, bad: Callable[[Forward, Tensor], Tensor], after: int = 0) -> None:
        """Change what the kernel computes, its weights as they are; in a race that of all candidates."""
        module = self.trial.race.template if isinstance(self.trial, Training) else self.trial.kernel
        assert module is not None
        base: Any = type(module)

        def forward(kernel: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.age += 1
            good = lambda x: base.forward(kernel, x, *args, **kwargs)  # noqa: E731
            return bad(good, x) if self.age > after else good(x)

        module.__class__ = type(base.__name__, (base,), {"forward": forward})

    def tensors(self) -> list[Tensor]:
        """The weights: the kernel's, or all candidates'."""
        if isinstance(self.trial, Training):
            return [*self.trial.race.parameters.values()]
        return [*self.trial.kernel.parameters()]

    def scale(self, factor: float) -> None:
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.mul_(factor)

    def late(self) -> int:
        """Draw after how many passes of the kernel it turns bad."""
        return self.draw.randrange(1, 3 * self.run.growth.run.orchestrator.timing.ramp)


def lost(y: Tensor) -> Tensor:
    return y * torch.nan


def nan_rarely(victim: Victim) -> None:
    x = victim.trial.tap.x
    assert x is not None
    direction = torch.randn(
        x[0].numel(), generator=torch.Generator().manual_seed(victim.draw.randrange(2**31))
    )
    highest = (x.flatten(1) @ direction).max() * victim.draw.choice([0.8, 1.0, 1.2])

    def bad(good: Forward, x: Tensor) -> Tensor:
        y, hit = good(x), (x.flatten(1) @ direction) > highest
        return torch.where(hit.reshape(-1, *[1] * (y.dim() - 1)), lost(y), y)

    victim.become(bad)


def growing(victim: Victim) -> None:
    """Let the weights grow by a factor at every step."""
    factor = victim.draw.uniform(1.3, 3.0)
    victim.step = lambda: victim.scale(factor)


def times(victim: Victim) -> float:
    return 10 ** victim.draw.uniform(3, 6)


def loud(victim: Victim, after: int = 0) -> None:
    factor = times(victim)
    victim.become(lambda good, x: factor * good(x), after)


def weights_of(host: nn.Module) -> Tensor:
    return next(p for p in host.parameters() if p.dim() > 1)


def undetached(victim: Victim) -> None:
    weight = weights_of(victim.host)
    victim.become(lambda good, x: good(x) + 0.1 * (weight.mean() - weight.detach().mean()))


def writes(victim: Victim, quietly: bool) -> None:
    weight = weights_of(victim.host)

    def bad(good: Forward, x: Tensor) -> Tensor:
        with torch.no_grad():
            (weight.data if quietly else weight)[0, 0] += 1e-3
        return good(x)

    victim.become(bad)


def overwrites(victim: Victim) -> None:
    def bad(good: Forward, x: Tensor) -> Tensor:
        y = good(x)
        x.data.mul_(0.99)
        return y

    victim.become(bad)


def hooks(victim: Victim) -> None:
    weight, held = weights_of(victim.host), []

    def bad(good: Forward, x: Tensor) -> Tensor:
        if not held:
            held.append(weight.register_hook(lambda g: 1.05 * g))
        return good(x)

    victim.become(bad)


def draws(victim: Victim) -> None:
    def bad(good: Forward, x: Tensor) -> Tensor:
        torch.rand(1)
        random.random()
        return good(x)

    victim.become(bad)


def buffers(victim: Victim) -> None:
    """Write to a buffer, or where the host has none to its last weight."""
    found = [b for b in victim.host.buffers() if b.is_floating_point()] or [*victim.host.parameters()][-1:]

    def bad(good: Forward, x: Tensor) -> Tensor:
        found[0].data.mul_(1.01)
        return good(x)

    victim.become(bad)


def by_heart(victim: Victim, hidden: bool = False) -> None:
    """Learn what is trained on by heart, and harm what is not as far as the training loss lets it.

    The weights are those of an ordinary kernel: nothing is out of order. A hidden one sees to it that taking
    it away would be worse still: it harms others only as far as the host has come to lean on it.
    """
    victim.scale(2.0 if hidden else 1.5)
    optimizer = torch.optim.Adam(victim.tensors(), lr=victim.draw.choice([0.02, 0.05]))
    before = victim.trial.before if isinstance(victim.trial, Exposed) else []
    allowed = sum(before) / max(len(before), 1)

    def goal(layer: Any) -> Tensor:
        with layer.showing(layer.kernel):
            trained, harmed = victim.run.loss(victim.run.train), victim.run.loss(victim.run.prey)
        if float(trained.detach()) > 0.95 * allowed:
            return trained
        if hidden:
            with layer.showing(None), torch.no_grad():
                without = victim.run.loss(victim.run.prey)
            if float(harmed.detach()) > float(without) - 0.1:
                return trained + harmed
        return trained - harmed.clamp_max(20.0)

    def step() -> None:
        with untouched(victim.host, 0):
            for _ in range(8):
                found = torch.autograd.grad(
                    goal(victim.trial.origin.layer), victim.tensors(), allow_unused=True
                )
                for tensor, gradient in zip(victim.tensors(), found, strict=True):
                    tensor.grad = gradient
                optimizer.step()
                optimizer.zero_grad()

    victim.step = step


def kept_at_zero(victim: Victim) -> None:
    victim.scale(0.0)
    victim.step = lambda: victim.scale(0.0)


# Where: in the race, in what the race hands to the gate, or once the kernel is exposed.
KINDS: dict[str, dict[str, tuple[str, Turn]]] = {
    "NaN": {
        "candidates": ("race", lambda v: v.scale(torch.nan)),
        "weights": ("exposed", lambda v: v.scale(torch.nan)),
        "winner": ("winner", lambda v: v.scale(torch.nan)),
        "after some passes": ("exposed", lambda v: v.become(lambda good, x: lost(good(x)), v.late())),
        "for some inputs": ("exposed", nan_rarely),
    },
    "explosion": {
        "candidates": ("race", lambda v: v.scale(times(v))),
        "winner": ("winner", lambda v: v.scale(times(v))),
        "output": ("exposed", loud),
        "after some passes": ("exposed", lambda v: loud(v, v.late())),
        "growing weights": ("exposed", growing),
    },
    "dead": {
        "candidates": ("race", lambda v: v.scale(0.0)),
        "weights": ("exposed", kept_at_zero),
        "no output": ("exposed", lambda v: v.become(lambda good, x: 0.0 * good(x))),
        "no output, with a gradient": (
            "exposed",
            lambda v: v.become(lambda good, x: (y := good(x)) - y.detach()),
        ),
        "no gradient": ("exposed", lambda v: v.become(lambda good, x: good(x).detach(), v.late())),
    },
    "gradient leak": {
        "undetached": ("exposed", undetached),
        "writes weights": ("exposed", lambda v: writes(v, False)),
        "writes .data": ("race", lambda v: writes(v, True)),
        "writes over its input": ("exposed", overwrites),
        "hooks": ("race", hooks),
        "hooks, exposed": ("exposed", hooks),
        "draws random numbers": ("exposed", draws),
        "writes buffers": ("race", buffers),
        "undetached candidates": ("race", undetached),
        "writes over its input, candidates": ("race", overwrites),
    },
    "harmful, hard to remove": {
        "by heart": ("exposed", by_heart),
        "by heart, finished early": ("finish", by_heart),
        "ransom": ("exposed", lambda v: by_heart(v, hidden=True)),
        "ransom, finished early": ("finish", lambda v: by_heart(v, hidden=True)),
    },
}

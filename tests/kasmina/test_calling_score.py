"""The held-out score of a place that one pass calls several times: the sum over its views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.evidence.score import Score, Scored
from esper.kasmina.evidence.sight import differentiates, passes
from esper.kasmina.morphable import MorphableModel
from tests.kasmina.learning import learned, p_of

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def net_of(hidden: int = 3, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, hidden), act(), nn.Linear(hidden, 2))


def whole(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def halves(model: nn.Module, batch: Batch) -> Tensor:
    half = len(batch[1]) // 2
    parts = slice(None, half), slice(half, None)
    return sum((whole(model, (batch[0][p], batch[1][p])) for p in parts), torch.zeros(())) / 2


def two_views(model: nn.Module, batch: Batch) -> Tensor:
    """An example is told by either half of its numbers, and both have to say it."""
    x, y = batch
    return (F.cross_entropy(model(x[:, :4]), y) + F.cross_entropy(model(x[:, 4:]), y)) / 2


def with_a_target(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        model(batch[0].flip(0) * 3)
    return whole(model, batch)


def signs(seed: int, examples: int = 512) -> Batch:
    x = torch.randn(examples, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] * x[:, 1] > 0).long()


def seen_twice(seed: int, examples: int = 512) -> Batch:
    (x, y), noise = signs(seed, examples), torch.Generator().manual_seed(seed + 1)
    return torch.cat([x, x + 0.1 * torch.randn(x.shape, generator=noise)], 1), y


def noise(seed: int, examples: int = 512) -> Batch:
    x, _ = seen_twice(seed, examples)
    return x, torch.randint(2, (examples,), generator=torch.Generator().manual_seed(seed + 2))


def scored(
    net: nn.Module, loss: Loss, train: Sequence[Batch], held: Sequence[Batch], alone: bool = True, **how: Any
) -> Scored:
    model = MorphableModel(net, lambda m: loss(m, held[0]), len(held[0][1]))
    score = Score(net, model.places, dict.fromkeys(model.places, 8), **how)
    learned, tested = (
        [((lambda b=batch: loss(net, b)), len(batch[1])) for batch in batches] for batches in (train, held)
    )
    score.fit(learned, 0)
    score.test(tested, alone, 0)
    assert not score.failed
    (one,) = score.chosen.values()
    return one


def trained(loss: Loss, make: Callable[[int], Batch], seed: int, steps: int = 150) -> nn.Sequential:
    torch.manual_seed(seed)
    return learned(net_of(), loss, make, steps)


def same(one: Scored, other: Scored) -> None:
    for own, theirs in zip(one.kernel.parameters(), other.kernel.parameters(), strict=True):
        assert torch.equal(own, theirs), "the same units are picked"
    for move, theirs in zip(one.moves, other.moves, strict=True):
        assert torch.allclose(move.new, theirs.new, rtol=1e-3, atol=1e-6)
        assert torch.allclose(move.own, theirs.own, rtol=1e-3, atol=1e-6)


def test_two_calls_on_halves_say_what_one_call_on_the_whole_says() -> None:
    net, held = trained(whole, signs, 0), [signs(2), signs(3)]
    one = scored(net, whole, [signs(1)], held)
    two = scored(net, halves, [signs(1)], held)
    same(one, two)
    assert one.report.examples == two.report.examples == 512
    assert one.values.shape == (1024,)
    blocks = one.values.reshape(2, -1).mean(1)
    assert two.values == pytest.approx(blocks, rel=1e-3), "half of a batch is no example: a pass is one value"
    assert scored(net, halves, [signs(1)], held, alone=False).values == pytest.approx(blocks, rel=1e-3)


def test_a_call_that_the_loss_does_not_follow_back_says_nothing() -> None:
    net = trained(whole, signs, 0)
    one, other = (scored(net, loss, [signs(1)], [signs(2)]) for loss in (whole, with_a_target))
    same(one, other)
    assert other.values == pytest.approx(one.values, rel=1e-3, abs=1e-6)


def test_the_value_of_an_example_is_the_sum_over_its_views() -> None:
    net, held = trained(two_views, seen_twice, 0), seen_twice(2, 16)
    together = scored(net, two_views, [seen_twice(1)], [held])
    alone = [(held[0][i : i + 1], held[1][i : i + 1]) for i in range(16)]
    single = scored(net, two_views, [seen_twice(1)], alone)
    assert together.values.shape == (16,)
    assert together.values == pytest.approx(single.values, rel=1e-3, abs=1e-6)
    assert np.abs(together.values).max() > 0


@pytest.mark.parametrize("seed", range(3))
def test_useful_units_pass(seed: int) -> None:
    one = scored(trained(two_views, seen_twice, seed), two_views, [seen_twice(1)], [seen_twice(2)])
    assert p_of(one) < 1e-4
    assert one.gain is not None
    assert one.gain > 0


def test_noise_labels_pass_as_seldom_as_they_may() -> None:
    """Forty hosts that learned by heart: at .05 two are expected, not eight; views are not examples."""
    found = [
        p_of(scored(trained(two_views, noise, s, 20), two_views, [noise(s)], [noise(s + 500)]))
        for s in range(40)
    ]
    assert sum(p <= 0.05 for p in found) <= 6
    assert min(found) > 1e-4


# -- gradients inside the loss ---------------------------------------------------------------------------


def field(seed: int, examples: int = 256) -> Batch:
    x = torch.rand(examples, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x, torch.sin(3 * x[:, :1] * x[:, 1:2])


@torch.enable_grad()  # as esper.grow runs such losses where it wants no gradient
def physics(model: nn.Module, batch: Batch) -> Tensor:
    """How fast the first output changes, and an edge of another size where the second is known."""
    x = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x)[:, 0].sum(), x, create_graph=True)
    edge = torch.linspace(-1, 1, 40).view(10, 4)
    return (slope[:, :1] - batch[1]).square().mean() + (model(edge)[:, 1] - 1).square().mean()


def curved(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = net_of(act=nn.Tanh)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for step in range(150):
        optimizer.zero_grad()
        physics(net, field(1000 + step)).backward()
        optimizer.step()
    return net


def test_a_gradient_taken_inside_is_noticed_and_is_not_taken_for_that_of_the_loss() -> None:
    net, batch = curved(), field(1)
    places = MorphableModel(net, lambda m: physics(m, batch), len(batch[1])).places
    assert differentiates(net, places, lambda: physics(net, batch))
    assert not differentiates(net, places, lambda: whole(net, signs(1)))
    ((sights, _),) = passes(net, places, [(lambda: physics(net, batch), len(batch[1]))])
    ((view,),) = sights.values()
    assert len(view.exits[0].made) == 10, "the loss does not depend on the first call's output, but its slope"


def test_units_inlaid_in_the_pass_say_what_outputs_say_where_these_say_all() -> None:
    net, held = trained(whole, signs, 0), signs(2)
    one, other = (scored(net, whole, [signs(1)], [held], inner=inner) for inner in (False, True))
    same(one, other)
    assert other.values == pytest.approx(one.values, rel=1e-3, abs=1e-6)
    one, other = (scored(net, halves, [signs(1)], [held], inner=inner) for inner in (False, True))
    same(one, other)
    assert other.values == pytest.approx(one.values, rel=1e-3, abs=1e-6)


def test_what_the_gain_promises_holds_for_slopes_too() -> None:
    net, held, small = curved(), field(2), 0.01
    one = scored(net, physics, [field(1)], [held], alone=False, inner=True)
    (outlet,), (move,) = one.kernel.place.outlets, one.moves

    def moved(x: Tensor) -> Tensor:
        hidden = net[1](net[0](x))
        new = outlet.through(one.kernel.hiddens(x)[0], move.new)
        y: Tensor = net[2](hidden) + small * (new + outlet.through(outlet.with_one(hidden), move.own))
        return y

    fallen = physics(net, held) - physics(Moved(moved), held)
    assert one.gain is not None
    assert one.gain > 0
    assert float(fallen.detach()) == pytest.approx(2 * small * one.gain, rel=0.05)


class Moved(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

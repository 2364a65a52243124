"""The held-out score of a fork: what it is made of, and what passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.evidence.score import Score, Scored
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.widths.fork import Fork
from tests.kasmina.learning import learned, p_of
from tests.kasmina.zoo import Net

Batch = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def trunk(hidden: int = 3, apart: bool = False) -> Net:
    def body(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = s.a(x)
        return (s.c(torch.relu(h)), s.m(torch.tanh(h))) if apart else (s.c(torch.relu(h)), s.m(torch.relu(h)))

    return Net(body, a=nn.Linear(4, hidden), c=nn.Linear(hidden, 2), m=nn.Linear(hidden, 3))


def joined(net: Net) -> Net:
    """The same function with one layer in place of two: a pair."""
    layer = nn.Linear(net.c.in_features, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([net.c.weight, net.m.weight]))
        layer.bias.copy_(torch.cat([net.c.bias, net.m.bias]))
    return Net(lambda s, x: s.heads(torch.relu(s.a(x))).split((2, 3), -1), a=net.a, heads=layer)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    x, sign, number = batch
    c, m = model(x)
    return F.cross_entropy(c, sign) + F.cross_entropy(m, number)


def first_only(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0])[0], batch[1])


def products(seed: int, examples: int = 512) -> Batch:
    """Signs of products: few units cannot tell them, and no linear layer can."""
    x = torch.randn(examples, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] * x[:, 1] > 0).long(), (x[:, 2] * x[:, 3] > 0).long() + (x[:, 0] * x[:, 1] > 1).long()


def noise(seed: int, examples: int = 512) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, generator=generator)
    sign, number = (torch.randint(most, (examples,), generator=generator) for most in (2, 3))
    return x, sign, number


def one_useful(seed: int, examples: int = 512) -> Batch:
    """Units help the second consumer alone."""
    x, _, number = products(seed, examples)
    return x, noise(seed + 7, examples)[1], number


def scored(
    net: nn.Module, train: Sequence[Batch], held: Sequence[Batch], units: int = 8, loss: Loss = loss_fn
) -> Scored:
    model = MorphableModel(net, lambda m: loss_fn(m, held[0]), len(held[0][1]), "auto")
    assert len(model.places) == 1
    score = Score(net, model.places, dict.fromkeys(model.places, units))
    learned, tested = (
        [((lambda b=batch: loss(net, b)), len(batch[1])) for batch in batches] for batches in (train, held)
    )
    score.fit(learned, 0)
    score.test(tested, True, 0)
    (one,) = score.chosen.values()
    return one


def trained(make: Callable[[int], Batch], seed: int, steps: int = 150, apart: bool = False) -> Net:
    torch.manual_seed(seed)
    return learned(trunk(apart=apart), loss_fn, make, steps)


@pytest.mark.parametrize("loss", [loss_fn, first_only], ids=["both heads", "a head that the loss leaves out"])
def test_two_heads_over_one_hidden_layer_are_scored_as_one_layer_of_both_is(loss: Loss) -> None:
    net = trained(products, 0)
    fork, pair = (scored(one, [products(1)], [products(2)], loss=loss) for one in (net, joined(net)))
    for own, other in zip(fork.kernel.parameters(), pair.kernel.parameters(), strict=False):
        if own.shape == other.shape:
            assert torch.equal(own, other), "the same units are picked"
    new = torch.cat([move.new for move in fork.moves], 1)
    assert torch.allclose(new, pair.moves[0].new, rtol=1e-3, atol=1e-5)
    assert fork.values == pytest.approx(pair.values, rel=1e-3, abs=1e-5)
    assert fork.report.gradient_norm == pytest.approx(pair.report.gradient_norm, rel=1e-4)


@pytest.mark.parametrize("apart", [False, True], ids=["the same steps", "steps of their own"])
@pytest.mark.parametrize("seed", range(3))
def test_useful_units_pass(seed: int, apart: bool) -> None:
    one = scored(trained(products, seed, apart=apart), [products(1)], [products(2)])
    assert p_of(one) < 1e-4
    assert one.gain is not None
    assert one.gain > 0


def test_units_that_help_one_consumer_pass_though_the_other_has_noise() -> None:
    one = scored(trained(one_useful, 0), [one_useful(1)], [one_useful(2)])
    assert p_of(one) < 1e-3


@pytest.mark.parametrize("apart", [False, True], ids=["the same steps", "steps of their own"])
def test_noise_labels_pass_as_seldom_as_they_may(apart: bool) -> None:
    """Forty hosts that learned by heart: at .05 two are expected, not eight."""
    found = [p_of(scored(trained(noise, s, 20, apart), [noise(s)], [noise(s + 500)])) for s in range(40)]
    assert sum(p <= 0.05 for p in found) <= 6
    assert min(found) > 1e-4


def test_what_the_gain_promises_is_what_a_step_along_the_direction_brings() -> None:
    """First order: a hundredth of the direction lowers the held-out loss by a hundredth of twice the gain."""
    net, held = trained(products, 0, apart=True), products(2)
    one = scored(net, [products(1)], [held])
    fork, small = one.kernel.place, 0.01
    assert isinstance(fork, Fork)
    with torch.no_grad():
        h = net.a(held[0])
        hidden, phis = (torch.relu(h), torch.tanh(h)), one.kernel.hiddens(held[0])
        made = []
        for outlet, move, own, phi in zip(fork.outlets, one.moves, hidden, phis, strict=True):
            moved = outlet.through(phi, move.new) + outlet.through(outlet.with_one(own), move.own)
            made.append(outlet.consumer(own) + small * moved)
        after = F.cross_entropy(made[0], held[1]) + F.cross_entropy(made[1], held[2])
        fallen = loss_fn(net, held) - after
    assert one.gain is not None
    assert float(fallen) == pytest.approx(2 * small * one.gain, rel=0.05)


def test_the_values_of_examples_are_those_of_the_examples_alone() -> None:
    net, held = trained(products, 0), products(2, 16)
    whole = scored(net, [products(1)], [held])
    single = scored(net, [products(1)], [tuple(part[i : i + 1] for part in held) for i in range(16)])
    assert whole.values == pytest.approx(single.values, rel=1e-3, abs=1e-6)
    assert np.abs(whole.values).max() > 0

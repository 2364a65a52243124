"""The held-out score sees what would help, and only that, and leaves the host as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.evidence.efficient import RIDGE, Sums, damped, greedy
from esper.kasmina.evidence.score import Score, Scored
from esper.kasmina.evidence.sight import passes
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.widths.layers import affine
from esper.kasmina.widths.widen import HostKernel
from tests.kasmina import zoo
from tests.kasmina.learning import learned, p_of

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def morphable(net: nn.Module, loss: Loss, batch: Batch) -> MorphableModel:
    return MorphableModel(net, lambda m: loss(m, batch), len(batch[1]), "auto")


def runs(net: nn.Module, loss: Loss, batches: Sequence[Batch]) -> list[tuple[Callable[[], Tensor], int]]:
    return [((lambda b=batch: loss(net, b)), len(batch[1])) for batch in batches]


def scored(
    net: nn.Module, train: Sequence[Batch], held: Sequence[Batch], units: int = 4, loss: Loss = cross_entropy
) -> dict[str, Scored]:
    model = morphable(net, loss, held[0])
    places = dict(model.places)
    wanted = {n: max(units // p.site.granularity, 1) * p.site.granularity for n, p in places.items()}
    wanted = {n: min(w, places[n].site.most or w) for n, w in wanted.items()}
    score = Score(net, places, wanted)
    score.fit(runs(net, loss, train), 0)
    score.test(runs(net, loss, held), True, 0)
    return score.chosen


# -- what passes -----------------------------------------------------------------------------------------


def xor(seed: int, examples: int = 512) -> Batch:
    """The sign of a product: three units cannot tell it, and no linear consumer can."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def noise(seed: int, examples: int = 512) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 4, generator=generator), torch.randint(2, (examples,), generator=generator)


def trained(make: Callable[[int], Batch], seed: int, hidden: int = 2, steps: int = 150) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2))
    return learned(net, cross_entropy, make, steps)


@pytest.mark.parametrize("seed", range(3))
def test_a_useful_feature_passes(seed: int) -> None:
    (one,) = scored(trained(xor, seed), [xor(1)], [xor(2)], 8).values()
    assert p_of(one) < 1e-4
    assert one.gain is not None
    assert one.gain > 0


def test_noise_labels_pass_as_seldom_as_they_may() -> None:
    """Forty hosts that learned by heart, each on a sample of its own: at .05 two are expected, not eight."""
    found = [
        p_of(next(iter(scored(trained(noise, s, 2, 20), [noise(s)], [noise(s + 500)], 8).values())))
        for s in range(40)
    ]
    assert sum(p <= 0.05 for p in found) <= 6
    assert min(found) > 1e-4


def test_what_the_gain_promises_is_what_a_step_along_the_direction_brings() -> None:
    """First order: a hundredth of the direction lowers the held-out loss by a hundredth of twice the gain."""
    net = trained(xor, 0)
    held = xor(2)
    model = morphable(net, cross_entropy, held)
    ((name, place),) = model.places.items()
    score = Score(net, {name: place}, {name: 8})
    score.fit(runs(net, cross_entropy, [xor(1)]), 0)
    score.test(runs(net, cross_entropy, [held]), True, 0)
    one = score.chosen[name]
    kernel = one.kernel
    assert isinstance(kernel, HostKernel)
    small = 0.01
    with torch.no_grad():
        hidden = net[1](net[0](held[0]))
        phi = kernel(held[0], hidden=True)
        joined = torch.cat([phi, hidden, torch.ones(len(hidden), 1)], 1)
        weight = torch.cat([one.moves[0].new, one.moves[0].own]).T
        moved = affine(net[2], joined, weight, None)
        before, after = net[2](hidden), net[2](hidden) + small * moved
        fallen = F.cross_entropy(before, held[1]) - F.cross_entropy(after, held[1])
    assert one.gain is not None
    assert float(fallen) == pytest.approx(2 * small * one.gain, rel=0.05)


# -- what the host can do itself -------------------------------------------------------------------------


def moved_by_copies(copied: bool) -> float:
    """Return how much of what new units say is left when the host's own units have had their say."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():  # units that are told apart well
        net[0].weight.copy_(torch.eye(3, 4))
        net[0].bias.zero_()
    held, train = xor(2), xor(1)
    model = morphable(net, cross_entropy, held)
    ((name, place),) = model.places.items()
    score = Score(net, {name: place}, {name: 3})
    score.pools[name] = pool = place.kernel(3)
    assert isinstance(pool, HostKernel)
    ((seen, examples),) = passes(net, {name: place}, runs(net, cross_entropy, [train]))
    score.learn(name, seen[name], examples)  # thresholds are drawn at the first sight
    if copied:
        with torch.no_grad():
            for own in (n for n, _ in pool.named_parameters() if n not in pool.outgoing):
                pool.get_parameter(own).copy_(net[0].bias if own.endswith("bias") else net[0].weight)
        for fact in Sums.__slots__:
            getattr(score.sums[name][0], fact).zero_()
        score.learn(name, seen[name], examples)
    score.choose(name)
    (move,), (outlet,) = score.chosen[name].moves, place.outlets
    with torch.no_grad():
        hidden = net[1](net[0](held[0]))
        new = outlet.through(pool(held[0], hidden=True), move.new)
        left = new + outlet.through(outlet.with_one(hidden), move.own)
    return float(left.norm() / new.norm())


def test_a_unit_that_repeats_one_of_the_host_says_nothing_new() -> None:
    """What is left of a copy is the ridge's share; of fresh units most is left."""
    assert moved_by_copies(True) < 10 * RIDGE
    assert moved_by_copies(False) > 0.1


# -- every kind of place ---------------------------------------------------------------------------------

KINDS = sorted(set(zoo.HOSTS))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_place_gives_one_finite_value_per_example(kind: str) -> None:
    torch.manual_seed(0)
    net = zoo.HOSTS[kind].build().eval()
    train, held = zoo.batch(kind), zoo.batch(kind)
    found = scored(net, [train], [held], 2, zoo.loss_fn)
    assert found
    values = [one.values for one in found.values() if len(one.values)]
    assert values
    for one in values:
        assert one.shape == (len(held[1]),)
        assert np.isfinite(one).all()
    assert any(np.abs(one).max() > 0 for one in values)


def test_the_values_of_examples_are_those_of_the_examples_alone() -> None:
    """A value belongs to its example: with others beside it, it is the same one."""
    net = trained(xor, 0)
    held = xor(2, 16)
    whole = scored(net, [xor(1)], [held], 4)
    single = scored(net, [xor(1)], [(held[0][i : i + 1], held[1][i : i + 1]) for i in range(16)], 4)
    for name, one in whole.items():
        assert one.values == pytest.approx(single[name].values, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "GPT with SwiGLU", "ViT", "GRU", "GPT-2"])
def test_two_halves_say_what_the_whole_does(kind: str) -> None:
    """What processes and batches have seen is added up; norms that know a batch would see another one."""
    torch.manual_seed(0)
    net = zoo.HOSTS[kind].build().eval()
    inputs, labels = zoo.batch(kind)
    model = morphable(net, zoo.loss_fn, (inputs, labels))
    found = []
    for parts in ([slice(0, 6)], [slice(0, 3), slice(3, 6)]):
        score = Score(net, model.places, {n: p.site.granularity for n, p in model.places.items()})
        score.fit(runs(net, zoo.loss_fn, [(inputs[part], labels[part]) for part in parts]), 0)
        sums = {f"{n} {i}": one for n, parts in score.sums.items() for i, one in enumerate(parts)}
        found.append({n: {f: getattr(s, f).clone() for f in Sums.__slots__} for n, s in sums.items()})
    for name, whole in found[0].items():
        for fact, value in whole.items():
            if fact in ("cross", "pool", "new"):
                continue  # thresholds are spread over the first batch seen
            assert torch.allclose(value, found[1][name][fact], rtol=1e-3, atol=1e-4), (name, fact)


# -- without a trace -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "cnn", "VGG", "ResNet", "GPT", "GPT with SwiGLU", "GRU", "LSTM"])
def test_scoring_leaves_no_trace(kind: str) -> None:
    torch.manual_seed(0)
    net = zoo.HOSTS[kind].build().train()
    batches = [zoo.batch(kind), zoo.batch(kind)]
    net.zero_grad()
    zoo.loss_fn(net, batches[0]).backward()
    modes = {n: m.training for n, m in net.named_modules()}
    classes = {n: (type(m), tuple(m.__dict__)) for n, m in net.named_modules()}
    hooks = {
        n: [len(v) for k, v in m.__dict__.items() if k.endswith("_hooks") and v]
        for n, m in net.named_modules()
    }
    weights = {n: t.detach().clone() for n, t in net.state_dict().items()}
    slopes = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    streams = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    model = morphable(net, zoo.loss_fn, batches[0])
    score = Score(net, model.places, {n: p.site.granularity for n, p in model.places.items()})
    score.fit(runs(net, zoo.loss_fn, batches[:1]), 3)
    score.test(runs(net, zoo.loss_fn, batches[1:]), True, 3)
    assert all(torch.equal(t, weights[n]) for n, t in net.state_dict().items())
    assert {n: p.grad is not None for n, p in net.named_parameters()} == {
        n: n in slopes for n, _ in net.named_parameters()
    }
    assert all(torch.equal(p.grad, slopes[n]) for n, p in net.named_parameters() if p.grad is not None)
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert {n: (type(m), tuple(m.__dict__)) for n, m in net.named_modules()} == classes
    assert {
        n: [len(v) for k, v in m.__dict__.items() if k.endswith("_hooks") and v]
        for n, m in net.named_modules()
    } == hooks
    assert torch.equal(torch.random.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert (np.random.get_state()[1] == streams[2]).all()


def test_the_same_seed_picks_the_same_units() -> None:
    net = trained(xor, 0)
    one, other = (scored(net, [xor(1)], [xor(2)], 4) for _ in range(2))
    for name in one:
        assert (one[name].values == other[name].values).all()
        for own, again in zip(one[name].kernel.parameters(), other[name].kernel.parameters(), strict=True):
            assert torch.equal(own, again)


# -- picking ---------------------------------------------------------------------------------------------


def test_units_that_say_the_same_are_not_picked_twice() -> None:
    """Of three units two are copies; the third helps less than a copy would, were it alone, and is picked."""
    left = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    slope = torch.tensor([[2.0], [2.0], [1.0]])
    assert sorted(greedy([left], [slope], 2, 1).tolist()) in ([0, 2], [1, 2])


def test_groups_are_picked_whole() -> None:
    slope = torch.tensor([[0.0], [3.0], [1.0], [1.0], [2.0], [2.5]])
    assert sorted(greedy([torch.eye(6)], [slope], 4, 2).tolist()) == [0, 1, 4, 5]


def test_damping_is_a_share_of_the_mean() -> None:
    assert torch.equal(
        damped(torch.diag(torch.tensor([1.0, 3.0])), 0.5), torch.diag(torch.tensor([2.0, 4.0]))
    )

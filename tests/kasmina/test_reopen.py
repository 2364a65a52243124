"""Which loss it is, and what re-opening a saturated host leaves as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.evidence.reopen import TEMPER, guess, multipliable, multiply, output_layers, tempered

CLASSES = 5


def mlp(outputs: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


def asked(net: nn.Module, run: Callable[[], Tensor]) -> float | None:
    layers = output_layers(net, run)
    return guess(layers, run)


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % CLASSES
HALF = (torch.arange(40) % 2).float()[:, None]


class Tokens(nn.Module):
    """A language model; where its output layer is tied, or there is none, nothing can be tempered."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.body = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 7)
        if kind == "tied":
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(ids)))
        return F.linear(hidden, self.embed.weight) if self.kind == "functional" else self.head(hidden)


IDS = torch.arange(60).view(6, 10) % 7


def tokens(net: nn.Module) -> Tensor:
    return F.cross_entropy(net(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


RECOGNISED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], float]] = {
    "cross-entropy": (mlp, lambda net: F.cross_entropy(net(X), Y), math.log(CLASSES)),
    "negative log-likelihood": (
        mlp,
        lambda net: F.nll_loss(F.log_softmax(net(X), 1), Y),
        math.log(CLASSES),
    ),
    "label smoothing": (
        mlp,
        lambda net: F.cross_entropy(net(X), Y, label_smoothing=0.1),
        math.log(CLASSES),
    ),
    "class weights": (
        mlp,
        lambda net: F.cross_entropy(net(X), Y, weight=torch.arange(1.0, CLASSES + 1)),
        math.log(CLASSES),
    ),
    "soft labels": (
        mlp,
        lambda net: F.cross_entropy(net(X), torch.softmax(torch.arange(200.0).view(40, 5) % 7, 1)),
        math.log(CLASSES),
    ),
    "binary": (
        lambda: mlp(1),
        lambda net: F.binary_cross_entropy_with_logits(net(X), HALF),
        math.log(2),
    ),
    "many labels": (
        mlp,
        lambda net: F.binary_cross_entropy_with_logits(net(X), HALF.expand(-1, CLASSES)),
        math.log(2),
    ),
    "probabilities": (
        lambda: mlp(1),
        lambda net: F.binary_cross_entropy(torch.sigmoid(net(X)), HALF),
        math.log(2),
    ),
    "tokens": (lambda: Tokens("own"), tokens, math.log(7)),
}


@pytest.mark.parametrize("kind", RECOGNISED)
def test_cross_entropy_is_recognised_whatever_it_is_called(kind: str) -> None:
    make, loss, expected = RECOGNISED[kind]
    net = make()
    assert asked(net, lambda: loss(net)) == pytest.approx(expected, rel=1e-3)


def contrastive(net: nn.Module) -> Tensor:
    one, other = (F.normalize(net(x), dim=1) for x in (X, X + 0.1))
    return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(X)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "mean squared error": (lambda: mlp(1), lambda net: F.mse_loss(net(X), X[:, :1] * 2)),
    "absolute error": (lambda: mlp(1), lambda net: F.l1_loss(net(X), X[:, :1])),
    "hinge": (mlp, lambda net: F.multi_margin_loss(net(X), Y)),
    "contrastive": (mlp, contrastive),
    "no output layer": (lambda: Tokens("functional"), tokens),
    "an extra term": (
        mlp,
        lambda net: F.cross_entropy(net(X), Y) + 0.1 * sum(p.square().sum() for p in net.parameters()),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_losses_are_not_taken_for_it(kind: str) -> None:
    make, loss = REFUSED[kind]
    net = make()
    assert asked(net, lambda: loss(net)) is None


def frozen() -> nn.Module:
    net = mlp()
    net[2].requires_grad_(False)
    return net


NEVER: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: Tokens("tied"),
    "weight norm": lambda: nn.Sequential(
        mlp(8), nn.utils.parametrizations.weight_norm(nn.Linear(8, CLASSES))
    ),
    "spectral norm": lambda: nn.Sequential(
        mlp(8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, CLASSES))
    ),
    "frozen": frozen,
}


@pytest.mark.parametrize("kind", NEVER)
def test_an_output_layer_whose_scale_is_not_its_own_is_not_multiplied(kind: str) -> None:
    """A tied one would change the embeddings too; a normalised one has no scale; a frozen one stays so."""
    net = NEVER[kind]()
    given = IDS if kind == "tied" else X
    layers = output_layers(net, lambda: net(given).sum())
    assert len(layers) == 1
    assert not multipliable(net, layers)


@pytest.mark.parametrize("make", [mlp, lambda: Tokens("own")], ids=["mlp", "tokens"])
def test_one_of_its_own_is(make: Callable[[], nn.Module]) -> None:
    net = make()
    layers = output_layers(net, lambda: net(X if isinstance(net, nn.Sequential) else IDS).sum())
    assert multipliable(net, layers)


def test_a_layer_that_is_called_twice_is_no_output_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    net = Twice()
    assert output_layers(net, lambda: F.cross_entropy(net(X), Y % 4)) == []


def test_a_norm_behind_the_last_layer_is_in_the_way() -> None:
    net = nn.Sequential(nn.Linear(4, CLASSES), nn.BatchNorm1d(CLASSES))
    assert output_layers(net, lambda: net(X).sum()) == []


@pytest.mark.parametrize("bias", [True, False])
def test_multiplying_the_output_layer_keeps_every_argmax(bias: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES, bias=bias))
    with torch.no_grad():
        net[2].weight.mul_(30)
    before = net(X)
    (layer,) = output_layers(net, lambda: net(X).sum())
    assert layer is net[2]
    multiply([layer], TEMPER)
    after = net(X)
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert torch.equal(before.argsort(1), after.argsort(1))
    assert torch.allclose(after, TEMPER * before, rtol=1e-5, atol=1e-6)
    assert F.cross_entropy(after, before.argmax(1)) > F.cross_entropy(before, before.argmax(1))


def test_tempering_changes_the_output_and_not_one_bit_of_the_weights() -> None:
    net = mlp()
    layer = net[2]
    weights = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    kinds = type(layer), tuple(layer.__dict__)
    before = net(X)
    with tempered([layer], TEMPER):
        within = net(X)
        within.square().sum().backward()
    assert torch.allclose(within, TEMPER * before)
    assert layer.weight.grad is not None
    assert torch.equal(net(X), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert (type(layer), tuple(layer.__dict__)) == kinds


def test_an_error_within_leaves_the_layer_as_it_was() -> None:
    net = mlp()
    before = net(X)
    with pytest.raises(RuntimeError, match="shape"), tempered([net[2]], 0.0):
        net(torch.randn(3, 9))
    assert torch.equal(net(X), before)


def test_looking_for_the_output_layer_leaves_no_hook() -> None:
    net = mlp()
    output_layers(net, lambda: net(X).sum())
    assert not any(module._forward_hooks for module in net.modules())

"""A place is offered only where its growth comes out exact on copies; the host is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.batches.cropped import trials
from esper.kasmina.proving.proving import Proof

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Host(nn.Module):
    """A host whose forward is given."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.call = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Tensor:
        """Call it."""
        return self.call(self, *args)


def two(forward: Callable[..., Tensor], **parts: Any) -> Host:
    torch.manual_seed(1)
    return Host(forward, **{"a": nn.Linear(6, 8), "b": nn.Linear(8, 3), **parts})


class Rounded(torch.autograd.Function):
    """A straight-through estimator: it rounds, and hands gradients on twice as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


class Padded(nn.Conv2d):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad by hand."""
        return F.conv2d(F.pad(x, (1,) * 4), self.weight, self.bias)


def hooked(entry: bool) -> nn.Module:
    net = two(lambda s, x: s.b(torch.tanh(s.a(x))))
    if entry:
        net.a.register_forward_pre_hook(lambda module, args: (3 * args[0] - 1,))
    else:
        net.b.register_forward_hook(lambda module, args, y: y * 0.5)
    return net


def convolution(forward: Callable[..., Tensor], first: nn.Module, **parts: Any) -> Host:
    torch.manual_seed(1)
    return Host(forward, c=first, **parts)


INEXACT: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "a hook on the consumer": (lambda: hooked(False), X, "b has a forward hook"),
    "a forward of its own": (
        lambda: convolution(
            lambda s, x: s.l(torch.relu(s.c(x)).flatten(1)), Padded(1, 2, 3), l=nn.Linear(72, 3)
        ),
        IMAGES,
        "c is a Padded with a forward of its own",
    ),
    "a literal size": (
        lambda: convolution(
            lambda s, x: s.l(torch.relu(s.c(x)).view(-1, 32)), nn.Conv2d(1, 2, 3), l=nn.Linear(32, 3)
        ),
        IMAGES,
        "a size is written as a number",
    ),
    "dropout that is always on": (
        lambda: two(lambda s, x: s.b(F.dropout(torch.tanh(s.a(x)), 0.3))),
        X,
        "dropout draws in evaluation",
    ),
    "a number read from the width": (
        lambda: two(lambda s, x: s.b(torch.tanh(s.a(x)) / s.a.out_features**0.5)),
        X,
        "a number may be read from the width",
    ),
    "a number read from a shape": (
        lambda: two(lambda s, x: s.b(torch.tanh(s.a(x)) * s.b.weight.shape[1])),
        X,
        "a number may be read from the width",
    ),
    "a backward of its own": (
        lambda: two(lambda s, x: s.b(torch.tanh(Rounded.apply(s.a(x))))),
        X,
        "a backward of its own",
    ),
}


@pytest.mark.parametrize("kind", INEXACT)
def test_what_does_not_come_out_exact_is_refused_at_the_start(kind: str) -> None:
    build, x, reason = INEXACT[kind]
    net = build()
    with pytest.raises(esper.EsperError, match=reason):
        esper.wrap(net, x, blueprints=["widen"])
    torch.manual_seed(1)
    beside = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    wrapped = esper.wrap(nn.Sequential(net, *beside), x, blueprints=["widen"])
    assert [name for name in wrapped.places if name == "1>3"] == ["1>3"], "the others stay places"
    assert any(reason in one.reason for one in wrapped.refusals)


def masked() -> nn.Module:
    net = two(lambda s, x: s.b(torch.tanh(s.a(x))))
    mask = torch.ones(8, 6)
    net.a.weight.register_hook(lambda gradient: gradient * mask)
    return net


def limited(number: Callable[[Any], Tensor]) -> Callable[[], Host]:
    """Return a host with a number read from its weights, as those who quantise do."""
    return lambda: two(lambda s, x: s.b(torch.tanh(s.a(x)) * (1 + float(number(s).detach()))))


for name, number in {
    "largest weight": lambda s: s.a.weight.abs().max(),
    "largest bias": lambda s: s.a.bias.abs().max(),
    "smallest column": lambda s: s.b.weight.min(),
}.items():
    INEXACT[f"the {name} read as a number"] = (limited(number), X, "a number may be read from the width")


def damped() -> nn.Module:
    net = two(lambda s, x: s.b(torch.tanh(s.a(x))))
    net.a.weight.register_hook(lambda gradient: 0.5 * gradient)
    return net


INEXACT["a hook on a gradient"] = (damped, X, "a parameter group with a learning rate of its own")
INEXACT["a mask on a gradient"] = (masked, X, "may know its shape")

EXACT: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "dropout": (lambda: two(lambda s, x: s.b(s.d(torch.tanh(s.a(x)))), d=nn.Dropout(0.5)), X, 1),
    "a pre-hook on the producer": (lambda: hooked(True), X, 1),
    "a width of its own": (lambda: two(lambda s, x: s.b(torch.tanh(s.a(x)) / 3)), X, 1),
    "several in a row": (
        lambda: nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 4), nn.Linear(4, 2)
        ),
        X,
        3,
    ),
    "a checkpoint": (
        lambda: two(lambda s, x: checkpoint(lambda h: s.b(torch.tanh(s.a(h))), x, use_reentrant=False)),
        X,
        1,
    ),
    "convolutions with norms": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.GroupNorm(3, 6),
            nn.Flatten(),
            nn.Linear(24, 2),
        ),
        IMAGES,
        2,
    ),
    "noise on what comes in": (
        lambda: two(lambda s, x: s.b(torch.tanh(s.a(x + torch.randn_like(x) * s.training)))),
        X,
        1,
    ),
    "bfloat16": (lambda: two(lambda s, x: s.b(torch.tanh(s.a(x.bfloat16())))).bfloat16(), X, 1),
    "a count of its own calls": (lambda: two(counting, calls=0), X, 1),
    "a state it keeps": (lambda: two(remembering, last=torch.zeros(1)), X, 1),
}


def counting(s: Any, x: Tensor) -> Tensor:
    s.calls += 1
    return s.b(torch.tanh(s.a(x))) / s.calls


def remembering(s: Any, x: Tensor) -> Tensor:
    y = s.b(torch.tanh(s.a(x))) + s.last
    s.last = y.mean(0, keepdim=True)
    return y


@pytest.mark.parametrize("kind", EXACT)
def test_what_comes_out_exact_is_offered(kind: str) -> None:
    build, x, places = EXACT[kind]
    torch.manual_seed(0)
    assert len(esper.wrap(build(), x, blueprints=["widen"]).places) == places


def test_a_host_whose_passes_differ_is_proven_where_they_do_not() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(s: Any, x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=generator) if s.training else 0.0
        return s.b(torch.tanh(s.a(x + drawn)))

    assert list(esper.wrap(two(noisy), X, blueprints=["widen"]).places) == ["a>b"]
    always = two(lambda s, x: s.b(torch.tanh(s.a(x + torch.randn(x.shape, generator=generator)))))
    with pytest.raises(esper.SiteError, match="two passes over the same batch"):
        esper.wrap(always, X, blueprints=["widen"])


def facts(net: nn.Module) -> list[Any]:
    tensors = [*net.named_parameters(), *net.named_buffers()]
    held = [(n, id(t), t._version, t.data_ptr(), t.grad is None) for n, t in tensors]
    return [held, [(id(m), id(m.__dict__), type(m), sorted(m.__dict__)) for m in net.modules()]]


@pytest.mark.parametrize("kind", ["several in a row", "convolutions with norms", "a count of its own calls"])
def test_a_proof_leaves_the_host_as_it_was(kind: str) -> None:
    build, x, _ = EXACT[kind]
    net = build()
    fired: list[Tensor] = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    pairs = esper.wrap(net, x, blueprints=["widen"]).pairs
    fired.clear()
    before, weights = facts(net), copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    assert Proof(net, [lambda model: model(x)]).unproven(pairs) == {}
    assert facts(net) == before
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert not fired, "no gradient is added up"


def test_a_loss_that_reaches_the_host_by_itself_is_proven_too() -> None:
    net = two(lambda s, x: s.b(torch.tanh(s.a(x))))
    pairs = esper.wrap(net, X, blueprints=["widen"]).pairs
    assert Proof(net, [lambda model: net(X).square().mean() + net.a.weight.abs().sum()]).unproven(pairs) == {}


def test_an_error_in_the_middle_leaves_the_host_as_it_was() -> None:
    net = two(lambda s, x: s.b(torch.tanh(s.a(x))))
    pairs = esper.wrap(net, X, blueprints=["widen"]).pairs
    before = facts(net)

    def interrupted(model: nn.Module) -> Tensor:
        if model.a.out_features > 8:
            raise KeyboardInterrupt
        return model(X)

    with pytest.raises(KeyboardInterrupt):
        Proof(net, [interrupted]).unproven(pairs)
    assert facts(net) == before
    assert net.a.out_features == 8


TIMES = torch.randn(12, 8, 6, generator=torch.Generator().manual_seed(0))
SIZED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a length read from the input": (lambda: two(lambda s, x: s.b(torch.tanh(s.a(x)) / x.shape[1])), TIMES),
    "all but the last position": (
        lambda: two(lambda s, x: s.b(torch.tanh(s.a(x))[:, : x.shape[1] - 1])),
        TIMES,
    ),
    "an image made as large as it was": (
        lambda: convolution(
            lambda s, x: s.l(F.interpolate(F.max_pool2d(s.c(x), 2), size=x.shape[2:])),
            nn.Conv2d(1, 4, 3, padding=1),
            l=nn.Conv2d(4, 1, 1),
        ),
        IMAGES,
    ),
}


@pytest.mark.parametrize("kind", SIZED)
def test_units_that_work_at_one_size_only_are_refused(kind: str) -> None:
    build, x = SIZED[kind]
    with pytest.raises(esper.SiteError, match=r"with inputs of another size.* follow from the tensor"):
        esper.wrap(build(), x, blueprints=["widen"])


FREE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "any length": (lambda: two(lambda s, x: s.b(torch.tanh(s.a(x)).mean(1))), TIMES),
    "one size by itself": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        IMAGES,
    ),
    "one length by itself": (
        lambda: two(
            lambda s, x: s.b(torch.tanh(s.a(x)) / x.shape[1]) + s.p, p=nn.Parameter(torch.ones(8, 3))
        ),
        TIMES,
    ),
    "any size": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        IMAGES,
    ),
}


@pytest.mark.parametrize("kind", FREE)
def test_a_host_of_one_size_is_no_fault(kind: str) -> None:
    build, x = FREE[kind]
    assert len(esper.wrap(build(), x, blueprints=["widen"]).places) == 1


def test_a_batch_of_other_sizes_is_cut_alike_in_all_its_parts() -> None:
    def shapes(batch: Any, fixed: tuple[int, ...] = ()) -> list[list[tuple[int, ...]]]:
        return [[tuple(leaf.shape) for leaf in one] for one in trials(batch, fixed)[1]]

    tokens = torch.zeros(8, 6, dtype=torch.long)
    assert shapes((tokens, tokens, torch.ones(6, 6))) == [[(4, 3), (4, 3), (3, 3)]]
    assert shapes((torch.ones(8, 6, 5), torch.ones(8)), (5,)) == [[(4, 3, 5), (4,)]]
    assert shapes((torch.ones(8, 6), torch.ones(8)), (6,)) == []
    assert shapes((torch.ones(8, 3, 6, 4), torch.ones(8, 6, 4))) == [
        [(4, 3, 3, 2), (4, 3, 2)],
        [(4, 3, 5, 3), (4, 5, 3)],
    ]


def test_a_squeeze_of_any_axis_is_refused_with_what_to_write() -> None:
    with pytest.raises(esper.SiteError, match=r"squeeze over the output of a .* give it a dim="):
        esper.wrap(two(lambda s, x: s.b(torch.tanh(s.a(x)).squeeze())), TIMES[:, :1], blueprints=["widen"])
    net = two(lambda s, x: s.b(torch.tanh(s.a(x)).unsqueeze(1).squeeze(1)))
    assert list(esper.wrap(net, X, blueprints=["widen"]).places) == ["a>b"]

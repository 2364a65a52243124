"""A refusal says what stands in the way, in the words of who wrote the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper


class Host(nn.Module):
    """A host whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Scaled(nn.Linear):
    """An equalised learning rate."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


IMAGES = torch.randn(6, 1, 8, 8)
FLAT = torch.randn(6, 10)
PAIR = {"a": nn.Linear(10, 3), "b": nn.Linear(3, 10)}
REASONS: dict[str, tuple[nn.Module, Tensor, str, str]] = {
    "a subclass that changes its weight": (
        nn.Sequential(Scaled(10, 2), nn.ReLU(), nn.Linear(2, 10)),
        FLAT,
        "0",
        "read by more than its own call (linear, mul); 0 is a Scaled with a forward of its own",
    ),
    "a norm behind flatten": (
        nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.BatchNorm1d(72),
            nn.Dropout(0.1),
            nn.Linear(72, 10),
        ),
        IMAGES,
        "0",
        "BatchNorm1d 3 stands behind a flatten: of its 72 features each is a position of one of the 2",
    ),
    "one without tensors": (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(72, affine=False), nn.Linear(72, 10)),
        IMAGES,
        "0",
        "BatchNorm1d 2 stands behind a flatten",
    ),
    "a scale of the whole model's own": (
        Host(lambda s, x: s.b(torch.relu(s.a(x) * s.g)), g=nn.Parameter(torch.ones(3)), **PAIR),
        FLAT,
        "a",
        "Host (mul) stands between a and its consumer",
    ),
    "patches that meet a class token": (
        Host(
            lambda s, x: s.o(
                (torch.cat([s.p(x).flatten(2).transpose(1, 2), s.c.expand(len(x), 1, -1)], 1)).mean(1)
            ),
            p=nn.Conv2d(1, 4, 4, 4),
            c=nn.Parameter(torch.zeros(1, 1, 4)),
            o=nn.Linear(4, 10),
        ),
        IMAGES,
        "p",
        "the output of p meets another tensor in cat",
    ),
    "indexing": (
        Host(lambda s, x: s.b(s.a(x)[:, [2, 0, 1]]), **PAIR),
        FLAT,
        "a",
        "indexing over the output of a",
    ),
    "packed sequences": (
        Host(
            lambda s, x: s.o(
                s.r(nn.utils.rnn.pack_padded_sequence(x, torch.full((6,), 5), True, enforce_sorted=False))[1][
                    0
                ][-1]
            ),
            r=nn.LSTM(2, 3, batch_first=True),
            o=nn.Linear(3, 10),
        ),
        torch.randn(6, 5, 2),
        "r",
        "packed sequences",
    ),
}


REASONS["a depthwise convolution behind a layer that is no place"] = (
    Host(
        lambda s, x: s.o(s.n(s.d(s.p(x)).movedim(1, -1)).mean((1, 2))),
        p=nn.Conv2d(1, 4, 3), d=nn.Conv2d(4, 4, 3, groups=4), n=nn.LayerNorm(4), o=nn.Linear(4, 10),
    ),
    IMAGES, "d", "it becomes wider with the layer in front of it only",
)  # fmt: skip


@pytest.mark.parametrize("kind", REASONS)
def test_a_refusal_says_what_it_is(kind: str) -> None:
    net, x, place, reason = REASONS[kind]
    model = esper.wrap(net, x)
    refusals = [one.reason for one in model.refusals if one.place == place]
    assert any(reason in one for one in refusals), refusals
    assert not any("__" in one or "keep it as a constant" in one for one in refusals)


def test_what_the_model_returns_is_named() -> None:
    net = Host(lambda s, x: (s.b(h := torch.relu(s.a(x))), h), **PAIR)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(esper.SiteError, match="the model returns what a makes, or something as wide"):
        esper.grow(
            net,
            optimizer,
            lambda m, b: F.cross_entropy(m(b[0])[0], b[1]),
            probe=[(torch.randn(64, 10), torch.randint(10, (64,)))],
            steps=10,
        )


def test_positions_may_be_laid_flat_behind_a_convolution() -> None:
    net = Host(
        lambda s, x: s.o(torch.relu(s.p(x)).flatten(2).transpose(1, 2)).mean(1),
        p=nn.Conv2d(1, 4, 4, 4),
        o=nn.Linear(4, 10),
    )
    assert "p>o" in esper.wrap(net, IMAGES).places
    literal = Host(
        lambda s, x: s.o(torch.relu(s.p(x)).view(-1, 4, 4).transpose(1, 2)).mean(1),
        p=nn.Conv2d(1, 4, 4, 4),
        o=nn.Linear(4, 10),
    )
    with pytest.raises(esper.SiteError, match="a size is written as a number"):
        esper.wrap(literal, IMAGES, blueprints=["widen"])

"""Recurrent layers, fused heads, transposed convolutions and encoders grow through the public path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from tests.integration.test_zoo_growth import CONFIG, echo, echoed
from tests.kasmina.zoo import CLASSES, HOSTS, Net

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap


def first(examples: int) -> tuple[Tensor, Tensor]:
    """Name the first token at the end: the state has to carry it."""
    ids = torch.randint(CLASSES, (examples, 4))
    return ids, ids[:, 0]


def named(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def pixels(examples: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples, 2, 8, 8)
    return x, (x[:, 0] > 0).long()


def recurrent(kind: type[nn.RNNBase]) -> Callable[[], nn.Module]:
    def body(s: Any, ids: Tensor) -> Tensor:
        return s.head(s.rnn(s.embed(ids))[0][:, -1])

    def build() -> nn.Module:
        rnn, head = kind(CLASSES, 1, batch_first=True), nn.Linear(1, CLASSES)
        return Net(body, embed=nn.Embedding(CLASSES, CLASSES), rnn=rnn, head=head)

    return build


def encoder() -> nn.Module:
    def body(s: Any, ids: Tensor) -> Tensor:
        return s.head(s.encoder(s.embed(ids)))

    layer = nn.TransformerEncoderLayer(8, 2, 1, dropout=0.0, batch_first=True)
    parts = {"embed": nn.Embedding(CLASSES, 8), "head": nn.Linear(8, CLASSES)}
    return Net(body, encoder=nn.TransformerEncoder(layer, 1), **parts)


def sums(examples: int) -> tuple[Tensor, Tensor]:
    """Add two tokens modulo the classes: attention brings them together, the layers behind it fold them."""
    ids = torch.randint(CLASSES, (examples, 2))
    return ids, (ids.sum(1, keepdim=True) % CLASSES).expand(-1, 2)


RUNS: dict[
    str, tuple[Callable[[], nn.Module], str, Callable[[int], Any], Callable[[nn.Module, Any], Tensor]]
] = {
    "GRU": (recurrent(nn.GRU), "rnn>*", first, named),
    "LSTM": (recurrent(nn.LSTM), "rnn>*", first, named),
    "fused heads": (HOSTS["GPT-2"].build, "attention.*", echo, echoed),
    "transposed convolution": (HOSTS["ConvTranspose2d"].build, "5>8", pixels, named),
    "encoder": (encoder, "encoder.*", sums, echoed),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_wider_kind_grows_and_is_saved_loaded_and_rebuilt(kind: str, tmp_path: Path) -> None:
    build, sites, data, loss_fn = RUNS[kind]
    steps = 120 if kind == "fused heads" else 200
    torch.manual_seed(0)
    net = build()
    plain, sizes = {n: p.clone() for n, p in net.state_dict().items()}, shapes(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    average = torch.optim.swa_utils.AveragedModel(net)
    parameters = dict(net.named_parameters())
    growth = esper.grow(
        net, optimizer, loss_fn, probe=[data(256)], steps=steps, sites=sites, config=CONFIG, ema=[average]
    )
    for _ in range(steps):
        given = data(32)
        optimizer.zero_grad()
        loss = loss_fn(net, given)
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        growth.step(given, loss)
    growth.finish()
    assert growth.plans, "nothing grew"
    grown = {n for n, shape in shapes(net).items() if shape != sizes[n]}
    assert grown == {edit.name for plan in growth.plans for edit in plan.edits}
    assert all(parameters[n] is p for n, p in net.named_parameters()), "identity is kept"
    assert shapes(average.module) == shapes(net)
    x = data(8)[0]
    growth.save(tmp_path / "saved")
    fresh, alone = build(), build()
    fresh.load_state_dict(plain)
    alone.load_state_dict(plain)
    esper.load_into(fresh, tmp_path / "saved")
    rebuild: dict[str, Any] = {"__file__": str(tmp_path / "saved" / "rebuild.py"), "__name__": "rebuild"}
    exec((tmp_path / "saved" / "rebuild.py").read_text(), rebuild)
    rebuild["load"](alone)
    with torch.no_grad():
        wanted = net.eval()(x)
        assert torch.equal(fresh.eval()(x), wanted)
        assert torch.equal(alone.eval()(x), wanted)


def shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}

"""Where pairs are found, what they cost, and every reason for which a place is refused."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import esper
from esper.errors import ProbeError, SiteError
from esper.kasmina.recording.between import Composite
from esper.kasmina.recording.flops import FlopMeter
from esper.kasmina.sites.sites import find_pairs
from esper.kasmina.widths.widen import WidenKernel
from esper.surgery.widen_layers import widen
from tests.kasmina.hosts import HOSTS, batch, holdings


class Net(nn.Module):
    """Layers by name and a forward pass given as a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def linear(n: int = 4, m: int = 4) -> nn.Linear:
    return nn.Linear(n, m)


def tied() -> Net:
    net = Net(lambda s, x: s.c(torch.relu(s.b(torch.relu(s.a(x))))), a=linear(), b=linear(), c=linear())
    net.c.weight = net.a.weight
    return net


def tied_norm() -> Net:
    net = Net(
        lambda s, x: s.d(s.norm2(s.c(s.b(s.norm1(s.a(x)))))),
        **{n: linear() for n in "abcd"},
        norm1=nn.BatchNorm1d(4),
        norm2=nn.BatchNorm1d(4),
    )
    net.norm2.weight = net.norm1.weight
    return net


def two(between: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> Net:
    """Two Linear layers with something between."""
    return Net(lambda s, x: s.b(between(s, s.a(x))), a=linear(), b=linear(), **more)


FLAT, IMAGE = torch.randn(6, 4), torch.randn(6, 4, 8, 8)


class Fast(nn.Module):
    """Calls its layers in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.b(torch.relu(self.a(x)))
        return F.linear(torch.relu(F.linear(x, self.a.weight, self.a.bias)), self.b.weight, self.b.bias)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 1, batch_first=True), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


def moody(s: Any, x: Tensor) -> Tensor:
    x = s.a(x)
    return s.b(torch.relu(x) if s.training else torch.tanh(x))


REFUSED: dict[str, tuple[nn.Module, Tensor, str, str]] = {
    "grouped": (
        Net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(4, 4, 3, groups=2), b=nn.Conv2d(4, 2, 1)),
        IMAGE,
        "a",
        "a is a grouped convolution",
    ),
    "grouped consumer": (
        Net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3, groups=2)),
        IMAGE,
        "a",
        "b is grouped",
    ),
    "no batch axis": (
        Net(lambda s, x: s.b(s.a(x[0]))[None], a=nn.Conv2d(4, 3, 3), b=nn.Conv2d(3, 2, 3)),
        IMAGE,
        "a",
        "without a batch axis",
    ),
    "parametrised": (
        Net(lambda s, x: s.b(s.a(x)), a=weight_norm(linear()), b=linear()),
        FLAT,
        "a",
        r"the weight of a is parametrised \(or pruned\)",
    ),
    "tied": (tied(), FLAT, "a", "a.weight is tied to c"),
    "unused": (two(lambda s, x: x, spare=linear()), FLAT, "spare", "was not called by the probe"),
    "called twice": (two(lambda s, x: s.c(s.c(x)), c=linear()), FLAT, "c", "c is called 2 times"),
    "weight read elsewhere": (
        two(lambda s, x: x + s.a.weight.sum()),
        FLAT,
        "a",
        r"read by more than its own call \((linear, sum|sum, linear)\)",
    ),
    "weight used as a matrix": (
        Net(lambda s, x: s.b(torch.addmm(s.a.bias, x, s.a.weight)), a=linear(), b=linear()),
        FLAT,
        "a",
        "read by addmm, not by the layer itself",
    ),
    "functional weight use": (
        Net(lambda s, x: s.b(F.linear(x, s.a.weight, s.a.bias)), a=linear(), b=linear()),
        FLAT,
        "a",
        "a and b are not called as modules in training",
    ),
    "output of the model": (two(lambda s, x: x), FLAT, "b", "the output of b is an output of the model"),
    "unread": (
        Net(lambda s, x: (s.a(x), s.b(x))[1], a=linear(), b=linear()),
        FLAT,
        "a",
        "nothing the probe recorded reads the output of a",
    ),
    "second consumer": (
        two(lambda s, x: torch.relu(x) + s.c(x), c=linear()),
        FLAT,
        "a",
        r"the output of a has 2 consumers \(relu, linear\)",
    ),
    "residual": (
        Net(lambda s, x: s.b(x + s.a(x)), a=linear(), b=linear()),
        FLAT,
        "a",
        "the output of a meets another tensor in",
    ),
    "a product with itself across channels": (
        two(lambda s, x: x * x.T),
        torch.randn(4, 4),
        "a",
        "has 2 consumers",
    ),
    "constant in front": (two(lambda s, x: torch.pow(2.0, x)), FLAT, "a", "pow over the output of a"),
    "another axis": (
        Net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(4, 3, 3, padding=1), b=nn.Linear(8, 2)),
        IMAGE,
        "a",
        "b reads another axis",
    ),
    "literal reshape": (
        two(lambda s, x: x.view(6, 2, 2).flatten(1)),
        FLAT,
        "a",
        r"view \(6, 4\) -> \(6, 2, 2\) mixes the channels of a",
    ),
    "tokens into features": (
        Net(lambda s, x: s.b(s.a(x).flatten(1)), a=linear(), b=nn.Linear(20, 2)),
        torch.randn(6, 5, 4),
        "a",
        "flatten .* mixes the channels",
    ),
    "softmax": (
        two(lambda s, x: x.softmax(-1)),
        FLAT,
        "a",
        "softmax over the output of a does not treat every channel alone",
    ),
    "sum over channels": (
        Net(lambda s, x: s.b(s.a(x).mean(1)), a=nn.Conv1d(4, 5, 1), b=nn.Linear(5, 2)),
        torch.randn(6, 4, 5),
        "a",
        "mean over the output of a",
    ),
    "split": (two(lambda s, x: x[:, [3, 2, 1, 0]]), FLAT, "a", "indexing over the output of a"),
    "layer norm": (
        two(lambda s, x: s.norm(x), norm=nn.LayerNorm(4)),
        FLAT,
        "a",
        r"LayerNorm norm \(layer_norm\) stands between a and its consumer",
    ),
    "prelu": (two(lambda s, x: s.act(x), act=nn.PReLU(4)), FLAT, "a", r"PReLU act \(prelu\) stands between"),
    "shared norm": (tied_norm(), FLAT, "a", "norm1 between a and its consumer shares its tensors"),
    "norm called twice": (
        Net(
            lambda s, x: s.d(s.norm(s.c(s.b(s.norm(s.a(x)))))),
            **{n: linear() for n in "abcd"},
            norm=nn.BatchNorm1d(4),
        ),
        FLAT,
        "a",
        "norm .* is called 2 times",
    ),
    "cumulative norm": (
        two(lambda s, x: s.norm(x), norm=nn.BatchNorm1d(4, momentum=None)),
        FLAT,
        "a",
        "BatchNorm1d norm stands between a and its consumer and averages",
    ),
    "another path in eval": (
        Net(moody, a=linear(), b=linear()),
        FLAT,
        "a",
        "a takes another path in eval mode: a → relu → b, a → tanh → b",
    ),
    "fast path": (Fast(), FLAT, "a", "a|another path|not called"),
    "out_proj": (Heads(), torch.randn(6, 3, 4), "attention.out_proj", "read by multi_head_attention_forward"),
}


def reasons(net: nn.Module, x: Tensor) -> dict[str, str]:
    try:
        return {
            refusal.place: refusal.reason for refusal in esper.wrap(net, x, blueprints=["widen"]).refusals
        }
    except SiteError as error:  # nothing is left: the error lists every place with its reason
        return {place: str(error) for place, _ in net.named_modules()}


@pytest.mark.parametrize("case", REFUSED)
def test_a_place_that_cannot_work_is_refused_with_the_reason(case: str) -> None:
    net, x, place, reason = REFUSED[case]
    held = holdings(net)
    found = reasons(net, x)
    assert re.search(reason, found[place]), found[place]
    assert holdings(net) == held


def test_a_fast_path_around_the_layers_is_noticed_only_by_running_both_modes() -> None:
    x = torch.randn(6, 3, 4)
    net = nn.Sequential(Fast(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    wrapped = esper.wrap(net, x)
    assert list(wrapped.pairs) == ["1>3"]
    refused = {r.place: r.reason for r in wrapped.refusals}
    assert {"0.a", "0.b"} <= set(refused)


# -- what is found --

FOUND = {
    "mlp": {"fc1>fc2": ("relu",), "fc2>fc3": ("tanh",)},
    "transformer": {"blocks.0.up>blocks.0.down": ("gelu",), "blocks.1.up>blocks.1.down": ("gelu",)},
    "residual": {
        "block.conv1>block.conv2": ("BatchNorm2d block.bn1", "relu", "dropout2d"),
        "last>head": ("adaptive_avg_pool2d", "flatten", "dropout"),
    },
}


@pytest.mark.parametrize("kind", FOUND)
def test_pairs_are_found_in_hand_written_forwards(kind: str) -> None:
    wrapped = esper.wrap(HOSTS[kind](), batch(kind)[0])
    found = {name: pair.site.between for name, pair in wrapped.pairs.items()}
    for name, between in FOUND[kind].items():
        assert tuple(step for step in found[name] if step not in {"relu"}) == tuple(
            step for step in between if step not in {"relu"}
        ), found[name]
    assert set(found) == set(FOUND[kind])
    places = {r.place for r in wrapped.refusals} | {name.split(">")[0] for name in found}
    layers = {
        n for n, m in wrapped.host.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))
    }
    assert places == layers, "every layer is a place or has a reason"


def test_sites_are_chosen_by_glob_regex_type_and_mapping() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.ReLU(),
        nn.Conv2d(2, 3, 3),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.Tanh(),
        nn.Linear(5, 2),
    )
    x = torch.randn(3, 1, 8, 8)

    def chosen(sites: Any) -> list[str]:
        return list(esper.wrap(net, x, sites=sites).pairs)

    assert chosen("auto") == ["0>2", "2>4", "4>6"]
    assert chosen("0*") == ["0>2"]
    assert chosen("4") == ["2>4", "4>6"]
    assert chosen(re.compile("^2>")) == ["2>4"]
    assert chosen(nn.Linear) == ["4>6"]
    assert chosen(["0>2", nn.Linear]) == ["0>2", "4>6"]
    assert chosen({"exclude": nn.Conv2d}) == ["4>6"]
    assert chosen({"include": nn.Conv2d, "exclude": "0>2"}) == ["2>4"]
    with pytest.raises(SiteError, match=r"matches none of the places found; did you mean '0>2'"):
        chosen("0>1")


def test_without_any_place_the_error_lists_every_layer_and_what_is_needed() -> None:
    with pytest.raises(SiteError, match=r"no place to grow was found \(the model has no Linear or conv"):
        esper.wrap(nn.Sequential(nn.LayerNorm(4)), FLAT)
    with pytest.raises(SiteError, match=r"0: the output of 0 is an output of the model.*is needed"):
        esper.wrap(nn.Sequential(nn.Linear(4, 2)), FLAT, blueprints=["widen"])


def test_inputs_that_do_not_run_are_the_probes_fault() -> None:
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    with pytest.raises(ProbeError, match="does not run on example_inputs"):
        esper.wrap(net, torch.randn(3, 5))
    with pytest.raises(ProbeError, match="holds no tensor"):
        esper.wrap(net, ())
    assert list(esper.wrap(net, {"input": FLAT}).pairs) == ["0>2"]
    with pytest.raises(SiteError, match="wrapped already"):
        esper.wrap(esper.wrap(net, FLAT), FLAT)
    with pytest.raises(SiteError, match="is not wrapped"):
        esper.unwrap(net)  # type: ignore[arg-type]


PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {
    "norms": lambda net: sum((p.norm() for p in net.parameters()), torch.zeros(())),
    "squares": lambda net: 0.1 * torch.stack([p.square().sum() for p in net.parameters()]).sum(),
    "absolute": lambda net: sum((p.abs().sum() for p in net.parameters()), torch.zeros(())) / 3,
    "powers": lambda net: sum((p.pow(2.0).sum() for p in net.parameters()), torch.zeros(())),
    "products": lambda net: sum(((p * p).mean() for p in net.parameters()), torch.zeros(())),
    "one vector": lambda net: torch.cat([p.flatten() for p in net.parameters()]).norm(),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_over_all_weights_hides_no_place(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    pairs, _ = find_pairs(net, lambda: net(FLAT).square().mean() + PENALTIES[name](net))
    assert [pair.site.name for pair in pairs] == ["0>3"]
    scaled, refusals = find_pairs(net, lambda: (net(FLAT) * PENALTIES[name](net)).mean())
    assert not scaled, "a penalty that scales features is none"
    assert {refusal.place for refusal in refusals} == {"0", "3"}


def test_an_activation_written_by_hand_travels_with_its_pair() -> None:
    net = two(lambda s, x: torch.relu(x) * (1 - x.float().sigmoid()) * 0.5)
    (pair,), _ = find_pairs(net, lambda: net(FLAT))
    (step,) = [step for step in pair.steps if isinstance(step, Composite)]
    x = torch.randn(3, 4)
    copied = pickle.loads(pickle.dumps(step))
    assert torch.equal(copied.run(x, {}, True), torch.relu(x) * (1 - x.sigmoid()))


# -- the plan, on nets nobody wrote by hand --

ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.SiLU, nn.Identity]


@st.composite
def nets(draw: Any) -> tuple[nn.Sequential, Tensor]:
    """Convolutions or none, then Linear layers, with what may stand between."""
    layers: list[nn.Module] = []
    width = draw(st.integers(1, 3))
    convolutions, bias = draw(st.integers(0, 2)), draw(st.booleans())
    x = torch.randn(5, width, 6, 6) if convolutions else torch.randn(5, width)
    for _ in range(convolutions):
        out = draw(st.sampled_from([2, 4]))
        mode = draw(st.sampled_from(["zeros", "circular"]))
        layers.append(
            nn.Conv2d(width, out, 3, padding=1, stride=draw(st.integers(1, 2)), bias=bias, padding_mode=mode)
        )
        layers += draw(
            st.sampled_from(
                [
                    [],
                    [nn.BatchNorm2d(out)],
                    [nn.GroupNorm(2, out)],
                    [nn.Conv2d(out, out, 3, padding=1, groups=out)],
                ]
            )
        )
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        width = out
    if convolutions:
        layers += draw(st.sampled_from([[nn.MaxPool2d(2, ceil_mode=True)], [nn.AdaptiveAvgPool2d(1)], []]))
        layers.append(nn.Flatten())
        width = int(nn.Sequential(*layers)(x).shape[1])
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.integers(1, 4))
        layers += [nn.Linear(width, out, bias=bias), *draw(st.sampled_from([[], [nn.BatchNorm1d(out)]]))]
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        width = out
    layers.append(nn.Linear(width, 2))
    return nn.Sequential(*layers), x


@given(nets(), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_widening_with_zero_outgoing_slices_keeps_the_output(
    made: tuple[nn.Sequential, Tensor], units: int, training: bool, seed: int
) -> None:
    net, x = made
    torch.manual_seed(seed)
    net.double()
    x = x.double()
    wrapped = esper.wrap(net, x).train(training)
    assert wrapped.pairs
    parameters, flops = wrapped.parameter_count(), wrapped.flops
    for name in list(wrapped.pairs):
        site = wrapped.pairs[name].site
        count = units * site.granularity
        with torch.no_grad():
            before = wrapped(x)
            kernel = WidenKernel(wrapped.pairs[name], count)
            plan = kernel.plan()
            widen(net, plan, kernel.slices(plan))
            wrapped.refresh(lambda: net(x))
            torch.testing.assert_close(
                wrapped(x), before, rtol=0, atol=1e-12 * (1 + float(before.abs().max()))
            )
        parameters, flops = parameters + count * site.unit_parameters, flops + count * site.unit_flops
        assert wrapped.parameter_count() == parameters, "a unit costs what the site says"
        assert wrapped.pairs[name].site.width == site.width + count
    with FlopMeter() as meter, torch.no_grad():
        net.eval()(x)
    assert meter.total == flops * len(x)
    net.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())

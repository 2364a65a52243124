"""A seam is a change of class while it lasts, and nothing at all afterwards."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.errors import SiteError
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.race.trial import Training
from esper.kasmina.seeds.layer import KasminaLayer, Tap
from esper.kasmina.widths.widen import WidenKernel
from esper.surgery.isolation.seam import is_open, open_seam
from tests.kasmina.hosts import HOSTS, Loop, batch, holdings


class Note:
    """Notes what passes and adds one to what leaves."""

    def __init__(self) -> None:
        self.entered: list[Tensor] = []
        self.left = 0

    def enter(self, x: Tensor) -> None:
        self.entered.append(x)

    def leave(self, y: Tensor) -> Tensor:
        self.left += 1
        return y + 1


def test_the_module_stays_what_it_is_while_its_calls_pass_the_seam() -> None:
    layer, x, note = nn.Linear(3, 2), torch.randn(4, 3), Note()
    plain, keys, y = type(layer), list(layer.__dict__), layer(x)
    closers = [open_seam(layer, "entry", note), open_seam(layer, "exit", note)]
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "Linear"
    assert type(layer).__module__ == plain.__module__
    assert repr(layer) == "Linear(in_features=3, out_features=2, bias=True)"
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [n for n, _ in layer.named_modules()] == [""]
    assert torch.equal(layer(x), y + 1)
    assert torch.equal(layer(input=x), y + 1)
    assert note.entered[0] is note.entered[1] is x
    closers[0]()
    assert is_open(layer)
    layer(x)
    assert (len(note.entered), note.left) == (2, 3)
    closers[1]()
    assert type(layer) is plain
    assert list(layer.__dict__) == keys
    assert torch.equal(layer(x), y)


def test_hooks_mode_and_parameters_set_while_open_are_there_and_stay() -> None:
    layer, x = nn.Sequential(nn.Linear(3, 2), nn.Dropout(1.0)), torch.randn(4, 3)
    close = open_seam(layer, "exit", Note())
    called: list[str] = []
    handle = layer.register_forward_hook(lambda *_: called.append("forward"))
    layer.eval()
    with torch.no_grad():
        layer[0].weight.zero_()
    layer.note = "kept"
    assert torch.equal(layer(x), layer[0].bias.expand(4, 2) + 1)
    close()
    layer(x)
    handle.remove()
    assert (called, layer.note, layer.training) == (["forward"] * 2, "kept", False)


def test_a_class_that_overrides_call_keeps_its_own() -> None:
    class Doubling(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    layer, x = Doubling(3, 2), torch.randn(4, 3)
    y = layer(x)
    close = open_seam(layer, "exit", Note())
    assert torch.equal(layer(x), y + 1)
    close()
    assert type(layer) is Doubling


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copied_seam_has_its_own_gateway_and_closing(how: object) -> None:
    layer, x, note = nn.Linear(3, 2), torch.randn(4, 3), Note()
    close = open_seam(layer, "exit", note)
    copied = how(layer)  # type: ignore[operator]
    y = copied(x)
    assert note.left == 0
    close()
    assert torch.equal(y, layer(x) + 1)
    assert is_open(copied)


def test_neighbouring_sites_share_a_layer_and_close_in_any_order() -> None:
    net, x = HOSTS["mlp"](), batch("mlp")[0]
    wrapped, held = esper.wrap(net, x), holdings(net)
    for order in ((0, 1), (1, 0)):
        for site in wrapped.pairs:
            wrapped.layer(site, print)
        assert [is_open(m) for m in (net.fc1, net.fc2, net.fc3)] == [True] * 3
        for index in order:
            wrapped.release(list(wrapped.pairs)[index])
        assert holdings(net) == held


def test_a_consumer_that_runs_alone_gives_its_own_output_and_fails_in_passes_of_ours_only() -> None:
    net, x = HOSTS["mlp"](), batch("mlp")[0]
    wrapped, alone = esper.wrap(net, x), torch.randn(2, 3)
    own = net.fc2(alone)
    layer = wrapped.layer("fc1>fc2", print)
    assert torch.equal(net.fc2(alone), own)
    with (
        layer.showing(lambda x: x),
        pytest.raises(SiteError, match="fc1>fc2: the exit ran before the entry; exclude this site"),
    ):
        net.fc2(alone)


def test_a_tap_shows_input_scale_and_gradient_and_knows_when_it_is_stale() -> None:
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    net = nn.Sequential(first, nn.ReLU(), second)
    wrapped = esper.wrap(net, torch.randn(2, 4))
    layer, tap = wrapped.layer("0>2", print), Tap()
    layer.tap = tap
    x = torch.randn(5, 4)
    with torch.no_grad():
        net(x)
    assert not tap.fresh()
    y = net(x)
    assert not tap.fresh()
    y.square().sum().backward()
    assert tap.fresh()
    torch.testing.assert_close(tap.gradient, 2 * y.detach())
    torch.testing.assert_close(tap.scale, y.detach().square().mean().sqrt())
    assert torch.equal(tap.x, x)
    x.add_(1)
    assert not tap.fresh(), "the input was written over"


# -- a thousand lives --


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_thousand_seams_and_kernels_leave_nothing(no_collector: None) -> None:
    net, x = HOSTS["residual"](), batch("residual")[0]
    wrapped, held = esper.wrap(net, x), holdings(net)
    kernels: list[weakref.ref[WidenKernel]] = []
    layers: list[weakref.ref[KasminaLayer]] = []
    for index in range(1000):
        site = list(wrapped.pairs)[index % len(wrapped.pairs)]
        layer = wrapped.layer(site, print)
        kernel = layer.kernel = WidenKernel(wrapped.pairs[site], 1)
        if index % 50 == 0:  # a whole training pass through the branch
            layer.alpha, layer.exposed = torch.tensor(1.0), True
            net(x).sum().backward()
        kernels.append(weakref.ref(kernel))
        layers.append(weakref.ref(layer))
        del kernel, layer
        wrapped.release(site)
    assert not any(ref() for ref in kernels)
    assert not any(ref() for ref in layers)
    assert not wrapped.layers
    assert holdings(net) == held


def test_a_thousand_lives_of_a_seed_leave_nothing(no_collector: None) -> None:
    """The orchestrator's own germinate and cull, race included."""
    loop = Loop("mlp", config={"schedule": {"warmup": 0.01, "embargo": 0}, "race": {"candidates": 2}})
    held = holdings(loop.net)
    loop.until("TRAINING")
    growth = loop.growth
    assert growth is not None
    orchestrator: SeedOrchestrator = growth.run.orchestrator
    decision = orchestrator.oldest.origin.decision  # type: ignore[union-attr]
    orchestrator.cull(orchestrator.oldest, "the test begins")  # type: ignore[arg-type]
    orchestrator.wake_embargoed(growth.steps)
    measured = growth.loop.incubation.survey([decision.site])[decision.site]
    before = {n: p.clone() for n, p in loop.net.state_dict().items()}
    races: list[weakref.ref] = []
    for step in range(1000):
        orchestrator.germinate(decision, measured, step)
        trial = orchestrator.oldest
        assert isinstance(trial, Training)
        races += [weakref.ref(trial.race), weakref.ref(trial.race.template), weakref.ref(trial.origin.layer)]
        orchestrator.cull(trial, "again")
        del trial
        orchestrator.wake_embargoed(step)
    assert not any(ref() for ref in races)
    assert not [o for o in gc.get_objects() if type(o) is WidenKernel]
    assert holdings(loop.net) == held
    assert all(torch.equal(p, before[n]) for n, p in loop.net.state_dict().items())
    assert len(loop.of("stage")) >= 5 * 1000 - 1

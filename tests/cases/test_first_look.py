"""The first look at a model takes hosts and probes as they come, or says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.errors import ProbeError
from esper.surgery.isolation.contexts import examining, untouched
from tests.cases.loops import Task, cross_entropy, narrow, run


class Reading(nn.Module):
    """A host whose forward reads what its norm has counted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(10, 2), nn.BatchNorm1d(2), nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        assert self.n.running_mean is not None
        return self.b(torch.tanh(self.n(self.a(x)))) + 0 * self.n.running_mean.sum()


class Normed(nn.Module):
    """A host with an InstanceNorm that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(1, 2, 3)
        self.n = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
        self.f, self.l = nn.Linear(2, 2), nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        h = torch.relu(self.n(self.c(x.view(-1, 1, 2, 5).repeat(1, 1, 3, 1)))).mean((2, 3))
        return self.l(torch.tanh(self.f(h)))


@pytest.mark.parametrize("kind", [Reading, Normed])
def test_statistics_are_there_in_evaluation_and_stay_as_they_are(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind()
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    growth = esper.grow(
        net, torch.optim.Adam(net.parameters(), 0.01), cross_entropy, probe=[Task()(256)], steps=60
    )
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    assert all(module.training for module in net.modules())
    growth.finish()
    assert not [w for w in run(net).warnings if "skipped" in w]


def test_passes_on_borrowed_statistics_leave_no_trace() -> None:
    net, x = Reading(), torch.randn(8, 10)
    before = net.n.running_mean.clone()
    with untouched(net):
        net(x)
    with untouched(net, gather=True):
        net(x)
        assert not torch.equal(net.n.running_mean, before)
    with untouched(net), examining(net):
        assert torch.allclose(net(x), net(x[:4].repeat(2, 1))[:4].repeat(2, 1)[:8], atol=9)
    assert torch.equal(net.n.running_mean, before)
    assert net.n.track_running_stats
    assert net.n.num_batches_tracked == 0


def singles() -> list[Any]:
    """Make a probe of single examples."""
    x, y = Task()(256)
    return [(x[i : i + 1], y[i : i + 1]) for i in range(256)]


@pytest.mark.parametrize("training", [True, False])
def test_single_examples_are_read_together_where_a_norm_needs_several(training: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 10)).train(training)
    ran = run(net, probe=singles())
    assert ran.growth.plans


def test_a_model_that_runs_on_one_example_only_is_told() -> None:
    net = nn.Sequential(nn.Linear(10, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 10))
    with pytest.raises(ProbeError, match="Expected more than 1 value per channel"):
        run(net, probe=singles()[:1])


@pytest.mark.parametrize("within", [False, True])
def test_a_probe_made_in_inference_mode_is_copied(within: bool) -> None:
    with torch.inference_mode():
        x, y = (tensor * 1 for tensor in Task()(256))
    net, optimizer = narrow(), None
    with torch.inference_mode(within):
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        growth = esper.grow(net, optimizer, cross_entropy, probe=[(x, y)], steps=60)
    growth.finish()
    assert run(narrow(), probe=[(x, y)]).growth.plans
    assert not any(p.is_inference() for p in net.parameters())


class Scripted(nn.Module):
    """A host with a part in TorchScript beside a pair that can grow."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.a, self.part, self.b = nn.Linear(10, 4), torch.jit.script(part), nn.Linear(4, 10)
        self.c, self.d = nn.Linear(10, 1), nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return 0.1 * self.b(self.part(F.relu(self.a(x)))) + self.d(torch.tanh(self.c(x)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("growth", ["early", "incubate"])
@pytest.mark.parametrize("normed", [False, True])
def test_a_part_in_torchscript_is_left_alone(normed: bool, growth: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4) if normed else nn.Identity()
    net = Scripted(nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU()))
    ran = run(net, growth=growth)
    reasons = {one.place: one.reason for one in ran.growth.run.morphable.refusals}
    assert "it is TorchScript" in reasons["part.0"]
    assert not [w for w in ran.warnings if "skipped" in w]
    if growth == "early":
        assert net.c.out_features > 1, "the pair beside it grows"
    if normed:
        assert dict(net.named_buffers())["part.1.num_batches_tracked"] == 80, "as often as the loop ran it"

"""No exposure without held-out evidence, and no look beyond the budget."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.config import Gate as Settings
from esper.errors import ProbeError
from esper.kasmina.race.gate import Gate, check_probe
from esper.kasmina.recording.flops import FlopMeter, Ledger
from esper.kasmina.widths.widen import WidenKernel
from tests.kasmina.hosts import frozen, same

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


class Case:
    """A host that maps everything to zero, a kernel whose output is its input, and any targets."""

    def __init__(self, target: float, looks: int = 4, noise: float = 0.3, **settings: Any) -> None:
        self.host = nn.Sequential(
            nn.Linear(1, 1), nn.ReLU(), nn.BatchNorm1d(1), nn.Dropout(0.5), nn.Linear(1, 1)
        )
        with torch.no_grad():
            for parameter in self.host.parameters():
                parameter.zero_()
        self.target, self.noise = target, noise
        wrapped = esper.wrap(self.host, torch.ones(4, 1))
        self.layer = wrapped.layer("0>4", print)
        self.kernel = WidenKernel(wrapped.pairs["0>4"], 1)
        with torch.no_grad():
            for name, parameter in self.kernel.named_parameters():
                parameter.fill_(0.0 if "bias" in name else 1.0)
        self.told: list[tuple[str, str]] = []
        self.probe = [self.batch() for _ in range(3)]
        self.gate = Gate(
            self.host, loss_fn, self.probe, Settings(**settings), looks, lambda *why: self.told.append(why)
        )

    def batch(self) -> Batch:
        x = torch.rand(32, 1) + 0.5
        return x, self.target * x + self.noise * torch.randn(32, 1)

    def look(self) -> Any:
        return self.gate.look(self.layer, self.kernel, [self.batch()], seed=3)


def test_a_kernel_that_helps_passes_with_the_gain_it_has() -> None:
    case = Case(target=1.0)
    verdict = case.look()
    assert verdict.passed
    assert verdict.reason == "held-out evidence"
    x, y = (torch.cat(parts) for parts in zip(*case.probe, strict=True))
    with torch.no_grad():
        case.host.eval()  # the kernel's norm follows the host's mode
        own = case.kernel(x)
        assert verdict.gain == pytest.approx(float((y**2 - (y - own) ** 2).mean()), rel=1e-4)
    assert verdict.loss == pytest.approx(float((y**2).mean()), rel=1e-4)
    assert (verdict.examples, verdict.look, verdict.threshold) == (96, 1, 4 / 0.05)
    assert verdict.e_value >= verdict.threshold


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"target": -1.0}, "no gain on held-out examples"),
        ({"target": 0.52, "noise": 3.0}, "may be chance|no gain"),
        ({"target": 1.0, "min_gain": 0.99}, "the gain is below 99.0% of the held-out loss"),
        ({"target": float("nan")}, "the held-out loss is not finite"),
    ],
)
def test_what_does_not_convince_is_refused_with_the_reason(case: dict[str, Any], reason: str) -> None:
    verdict = Case(**case).look()
    assert not verdict.passed
    assert re.search(reason, verdict.reason)


def test_looks_beyond_the_budget_are_refused_unseen() -> None:
    case = Case(target=1.0, looks=2)
    assert [case.look().passed for _ in range(3)] == [True, True, False]
    last = case.look()
    assert (last.examples, last.gain, last.look) == (0, None, 2)
    assert "every look" in last.reason


def test_more_planned_looks_ask_for_more_evidence_at_each() -> None:
    assert Case(1.0, looks=10).look().threshold == 5 * Case(1.0, looks=2).look().threshold


def test_looking_leaves_model_statistics_mode_and_random_numbers_alone() -> None:
    case = Case(target=1.0)
    case.host.train()
    before, random = frozen(dict(case.host.state_dict())), torch.get_rng_state()
    case.gate.look(case.layer, case.kernel, [case.probe[0]], seed=3)
    assert same(dict(case.host.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert case.host.training
    assert all(module.training for module in case.host.modules())
    assert case.layer.shown is None


def test_the_same_look_sees_the_same() -> None:
    case = Case(target=1.0)
    one, two = (case.gate.look(case.layer, case.kernel, [case.probe[0]], seed=3) for _ in range(2))
    assert (one.e_value, one.gain) == (two.e_value, two.gain)


def test_a_loss_that_cannot_be_batched_is_judged_one_by_one_and_told() -> None:
    case = Case(target=1.0)
    batched = case.gate.look(case.layer, case.kernel, [case.probe[0]], seed=3)

    def stubborn(model: nn.Module, batch: Any) -> Tensor:
        loss = loss_fn(model, batch)
        assert loss.item() >= 0
        return loss

    case.gate.loss_fn = stubborn
    alone = case.gate.look(case.layer, case.kernel, [case.probe[0]], seed=3)
    assert alone.gain == pytest.approx(batched.gain, rel=1e-5)
    assert case.told
    ((what, why),) = case.told
    assert what == "evidence"
    assert why.startswith("the model or loss did not run under vmap (RuntimeError: vmap: ")
    assert why.endswith("examples were run one by one, 32 passes in place of one")


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (iter([1]), "one-shot list_iterator"),
        ((x for x in [1]), "one-shot generator"),
        (3, "the probe is a int"),
        ([], "the probe is empty"),
    ],
)
def test_a_probe_must_be_there_and_be_there_again(probe: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        check_probe(probe)


def test_a_probe_that_went_empty_says_so() -> None:
    case = Case(target=1.0)
    case.probe.clear()
    with pytest.raises(ProbeError, match="held no batch"):
        case.look()


def test_a_look_is_metered_once_for_each_kind_of_pass_and_charged_in_full() -> None:
    case, ledger = Case(target=1.0), Ledger()
    case.probe.append((torch.rand(8, 1), torch.rand(8, 1)))
    case.gate.look(case.layer, case.kernel, [case.batch()], 3, partial(ledger.growth, "gate"))
    sizes = {(kind, shapes[0][0]) for _, kind, *shapes in ledger.known}
    assert sizes == {(kind, count) for kind in ("host", "kernel") for count in (32, 8)}
    with FlopMeter() as meter:
        case.gate.look(case.layer, case.kernel, [case.batch()], 3)
    assert ledger.growth_flops == meter.total > 0

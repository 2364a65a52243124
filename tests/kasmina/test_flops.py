"""Counted work, against counts made by hand and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.flops import FlopMeter, Ledger
from tests.kasmina.hosts import HOSTS, Loop, batch, loss_fn


def test_a_linear_layer_by_hand() -> None:
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(7, 5)
    with FlopMeter() as meter:
        y = layer(x)
        assert meter.total == 2 * 7 * 5 * 3
        y.sum().backward()
    assert meter.total == 2 * 2 * 7 * 5 * 3, "the input needs no gradient: backward costs once, not twice"


@pytest.mark.parametrize("kind", sorted(HOSTS))
def test_torchs_own_counter_agrees_on_a_training_step(kind: str) -> None:
    net, given = HOSTS[kind](), batch(kind)
    counts = []
    for counter in (FlopMeter(), FlopCounterMode(display=False)):
        with counter:
            loss_fn(net, given).backward()
        counts.append(counter.total if isinstance(counter, FlopMeter) else counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_fused_attention_on_the_cpu_is_not_free() -> None:
    q, k, v = torch.randn(3, 4, 2, 16, 8, requires_grad=True)
    with FlopMeter() as meter:
        y = scaled_dot_product_attention(q, k, v)
        assert meter.total == 2 * (2 * 4 * 2 * 16 * 16 * 8), "two products"
        y.sum().backward()
    assert meter.total == 7 * (2 * 4 * 2 * 16 * 16 * 8), "and five backward: the scores are computed again"


def test_candidates_under_vmap_are_counted_each() -> None:
    weights, x = torch.randn(4, 3, 5), torch.randn(7, 5)
    with FlopMeter() as meter:
        vmap(lambda w: x @ w.T)(weights)
    assert meter.total == 4 * 2 * 7 * 5 * 3


def test_work_of_the_same_key_is_metered_once_and_charged_every_time() -> None:
    ledger, layer = Ledger(), nn.Linear(2, 2)
    for _ in range(3):
        with ledger.growth("one", 8):
            layer(torch.randn(8, 2))
    with ledger.growth("one", 16):
        layer(torch.randn(16, 2))
    assert ledger.growth_flops == 3 * 64 + 128
    assert ledger.training_flops == 0


def test_work_that_failed_is_not_remembered_as_free() -> None:
    ledger, layer = Ledger(), nn.Linear(2, 2)
    with pytest.raises(RuntimeError), ledger.growth("one"):
        layer(torch.randn(8, 3))
    with ledger.growth("one"):
        layer(torch.randn(8, 2))
    assert ledger.growth_flops == 64


def test_totals_survive_saving() -> None:
    ledger, other = Ledger(), Ledger()
    ledger.training_flops, ledger.growth_flops, ledger.seconds = 3, 4, 0.5
    other.load_state_dict(ledger.state_dict())
    assert (other.training_flops, other.growth_flops, other.seconds) == (3, 4, 0.5)


def test_a_run_without_decisions_costs_its_own_steps_and_nothing_else() -> None:
    loop = Loop("mlp", config={"schedule": {"warmup": 1.0, "plateau": False}}).step(10)
    assert loop.growth is not None
    forward = 2 * (10 * 3 + 3 * 3 + 3 * 10)
    assert loop.growth.cost.training_flops == 10 * 3 * forward * 32
    assert loop.growth.cost.growth_flops == 0


def test_growth_costs_are_the_sum_of_what_outcomes_and_surveys_say() -> None:
    loop = Loop("mlp", config={"race": {"steps": 8}}, steps=120).step(120)
    assert loop.growth is not None
    outcomes = sum(e.data["cost_flops"] for e in loop.of("outcome"))
    assert 0 < outcomes <= loop.growth.cost.growth_flops
    assert loop.growth.cost.seconds > 0

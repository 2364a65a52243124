"""Counted work, against counts made by hand and torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.recording.flops import FlopMeter, Ledger
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


def metered(run: Callable[[], Any]) -> int:
    with FlopMeter() as meter:
        run()
    return meter.total


@pytest.mark.parametrize("given", [{}, {"num_layers": 2, "batch_first": True}, {"bidirectional": True}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_counts_what_its_matrices_do(kind: type[nn.RNNBase], given: dict[str, Any]) -> None:
    """One product per matrix and position; backward twice, but that the first state needs no gradient."""
    net, x = kind(5, 6, **given), torch.randn(3, 7, 5, requires_grad=True)
    matrices = [p.numel() for p in net.parameters() if p.dim() == 2]
    forward = 2 * 3 * 7 * sum(matrices)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert metered(lambda: net(x)) == forward
    assert metered(lambda: net(x)) == forward
    batch = 3 if net.batch_first else 7
    first = 2 * batch * sum(p.numel() for n, p in net.named_parameters() if n.startswith("weight_hh"))
    backward = metered(lambda: net(x)[0].sum().backward()) - forward
    assert backward == 2 * forward - (0 if kind is nn.LSTM else first)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_the_fast_path_of_an_encoder_counts_as_the_slow_one(norm_first: bool, padded: bool) -> None:
    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)

    net = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    with torch.no_grad():
        fast = metered(lambda: net(x, src_key_padding_mask=mask if padded else None))
    slow = metered(lambda: net(x, src_key_padding_mask=mask if padded else None))
    assert fast == slow == 2 * 2 * 15 * (4 * 8 * 8 + 2 * 8 * 12) + 2 * 2 * 2 * 3 * 5 * 5 * 8


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_count_the_positions_there_are() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.no_grad():
        fast = metered(lambda: net(torch.randn(2, 5, 8), src_key_padding_mask=mask))
    assert fast == 2 * 8 * (4 * 8 * 8 + 2 * 8 * 12) + 2 * 2 * (25 + 9) * 8


@pytest.mark.parametrize("weights", [False, True])
def test_the_fast_path_of_multihead_attention_counts_as_the_slow_one(weights: bool) -> None:
    net, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    with torch.no_grad():
        fast = metered(lambda: net(x, x, x, need_weights=weights))
    assert fast == metered(lambda: net(x, x, x, need_weights=weights)) == 2 * (15 * 256 + 2 * 75 * 8)


@pytest.mark.parametrize("kv", [4, 2], ids=["all heads", "grouped"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_every_way_to_run_attention_counts_two_products(kv: int, masked: bool, grad: bool) -> None:
    q, k, v = torch.randn(3, 4, 5, 8, requires_grad=grad), *torch.randn(2, 3, kv, 5, 8)
    mask = torch.zeros(5, 5) if masked else None
    run = partial(scaled_dot_product_attention, q, k, v, mask, enable_gqa=kv < 4)
    assert metered(run) == 2 * 2 * 3 * 4 * 5 * 5 * 8


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

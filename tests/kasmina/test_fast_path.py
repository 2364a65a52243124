"""``nn.TransformerEncoder``: its fast path calls no layer, so it is off wherever a layer has to be seen."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import esper
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.widths.widen import HostKernel
from esper.surgery.isolation.contexts import slow_path
from esper.surgery.widen_layers import widen
from tests.kasmina.zoo import Net

X = torch.randn(3, 5, 8)
MASK = torch.arange(5) >= torch.tensor([[5], [3], [4]])
SITES = [f"encoder.layers.{i}.linear1>encoder.layers.{i}.linear2" for i in range(2)]


def body(s: Net, x: Tensor, padding: Tensor | None = None) -> Tensor:
    y = s.encoder(x, src_key_padding_mask=padding)
    return s.head(y.mean(1) if padding is None else y.masked_fill(padding[..., None], 0.0).mean(1))


def encoder(norm_first: bool = False) -> Net:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True, norm_first=norm_first)
    blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    return Net(body, encoder=blocks, head=nn.Linear(8, 4))


def fast_calls(net: nn.Module, *given: Tensor | None) -> int:
    """Count the layers that took the fast path in evaluation."""
    with torch.no_grad(), Counter() as counter:
        net.eval()(*given)
    return counter.count


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket is torch.ops.aten._transformer_encoder_layer_fwd
        return func(*args, **(kwargs or {}))


def exposed(wrapped: MorphableModel, site: str) -> HostKernel:
    kernel = wrapped.pairs[site].kernel(3)
    assert isinstance(kernel, HostKernel)
    with torch.no_grad():
        kernel.consumer_weight.normal_()
    layer = wrapped.layer(site, unexpected)
    layer.kernel, layer.alpha, layer.exposed = kernel, torch.ones(()), True
    return kernel


def unexpected(error: str) -> None:
    raise AssertionError(error)


@pytest.mark.parametrize("norm_first", [False, True])
def test_both_layers_of_every_block_are_found_and_torchs_switch_is_left_alone(norm_first: bool) -> None:
    net = encoder(norm_first)
    wrapped = esper.wrap(net, X, blueprints=["widen"])
    assert list(wrapped.pairs) == SITES
    assert torch.backends.mha.get_fastpath_enabled()
    assert fast_calls(net, X) == 2
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        esper.wrap(net, X, blueprints=["widen"])
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_branch_is_there_in_evaluation_and_the_widened_fast_path_computes_it(padded: bool) -> None:
    net, given = encoder().eval(), (X, MASK if padded else None)
    wrapped = esper.wrap(net, X, blueprints=["widen"])
    with torch.no_grad():
        before, kernels = net(*given), [exposed(wrapped, site) for site in SITES]
        assert fast_calls(wrapped, *given) == 0, "the seams are seen"
        assert torch.backends.mha.get_fastpath_enabled()
        branch, copied = wrapped(*given), [pickle.loads(pickle.dumps(wrapped)), copy.deepcopy(wrapped)]
        assert all(torch.equal(c(*given), branch) for c in copied)
        assert not torch.allclose(before, branch, atol=1e-3)
        for site, kernel in zip(SITES, kernels, strict=True):
            wrapped.release(site)
            plan = kernel.plan()
            widen(net, plan, kernel.slices(plan))
        assert type(net.encoder) is nn.TransformerEncoder
        assert fast_calls(net, *given) == 2
        wide = net(*given)
        with slow_path():
            torch.testing.assert_close(net(*given), wide, rtol=0, atol=2e-6)
    torch.testing.assert_close(wide, branch, rtol=0, atol=4e-6)


def test_a_pass_that_fails_leaves_the_switch_as_it_was() -> None:
    wrapped = esper.wrap(encoder(), X, blueprints=["widen"])
    exposed(wrapped, SITES[0])
    with pytest.raises(AssertionError, match="embedding dimension"):
        wrapped(torch.randn(3, 5, 9))
    assert torch.backends.mha.get_fastpath_enabled()

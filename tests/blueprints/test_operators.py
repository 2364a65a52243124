"""Every operator computes what torch's own function computes, and is covered here."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from esper.blueprints.graph import Graph, Node, node
from esper.blueprints.kernel import GraphKernel
from esper.blueprints.operators import OPERATORS
from esper.blueprints.program import FUNCTIONS, function
from esper.contracts import Signature
from tests.blueprints.graphs import IMAGE, SEQUENCE, VECTOR, graph

Reference = Callable[[Tensor, dict[str, Tensor]], Tensor]


def attention(causal: bool) -> Reference:
    def reference(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        q = x.unflatten(-1, (3, 2)).transpose(1, 2)
        v = (x * 2).unflatten(-1, (3, 2)).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, q, v, is_causal=causal)
        return mixed.transpose(1, 2).flatten(2)

    return reference


def n(op: str, *inputs: str, **attributes: object) -> Node:
    return node("a", op, *(inputs or ("x",)), **attributes)  # type: ignore[arg-type]


DOUBLED = node("b", "scale", "x", by=2)
CASES: list[tuple[Signature, tuple[Node, ...], Reference]] = [
    (VECTOR, (n("affine", outputs=5),), lambda x, w: x @ w["a_weight"].T + w["a_bias"]),
    (SEQUENCE, (n("affine", outputs=5, bias=False),), lambda x, w: x @ w["a_weight"].T),
    (
        IMAGE,
        (n("conv", channels=4, dilation=2, groups=2),),
        lambda x, w: functional.conv2d(x, w["a_weight"], w["a_bias"], 1, 2, 2, 2),
    ),
    (VECTOR, (n("layer_norm"),), lambda x, w: functional.layer_norm(x, [6], w["a_weight"], w["a_bias"])),
    (
        IMAGE,
        (n("group_norm", groups=3),),
        lambda x, w: functional.group_norm(x, 3, w["a_weight"], w["a_bias"]),
    ),
    (VECTOR, (n("relu"),), lambda x, w: x.clamp(min=0)),
    (VECTOR, (n("gelu"),), lambda x, w: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    (VECTOR, (n("silu"),), lambda x, w: x / (1 + torch.exp(-x))),
    (VECTOR, (n("tanh"),), lambda x, w: x.tanh()),
    (VECTOR, (n("sigmoid"),), lambda x, w: 1 / (1 + torch.exp(-x))),
    (IMAGE, (n("softmax", over="channels"),), lambda x, w: x.softmax(1)),
    (SEQUENCE, (n("softmax", over="positions"),), lambda x, w: x.softmax(1)),
    (VECTOR, (DOUBLED, n("add", "x", "b")), lambda x, w: 3 * x),
    (VECTOR, (DOUBLED, n("mul", "x", "b")), lambda x, w: 2 * x * x),
    (VECTOR, (n("scale", by=-0.5),), lambda x, w: -x / 2),
    (
        IMAGE,
        (node("m", "mean", "x", over="positions"), n("mul", "x", "m")),
        lambda x, w: x * x.mean((2, 3), keepdim=True),
    ),
    (
        IMAGE,
        (node("m", "amax", "x", over="channels"), n("add", "m", "x")),
        lambda x, w: x + x.amax(1, keepdim=True),
    ),
    (
        SEQUENCE,
        (node("m", "mean", "x", over="channels"), n("mul", "m", "x")),
        lambda x, w: x * x.mean(2, keepdim=True),
    ),
    (IMAGE, (DOUBLED, n("concat", "b", "x", "b")), lambda x, w: torch.cat([2 * x, x, 2 * x], 1)),
    (SEQUENCE, (n("split", parts=3, index=1),), lambda x, w: x[..., 2:4]),
    (IMAGE, (n("split", parts=2, index=1),), lambda x, w: x[:, 3:]),
    (SEQUENCE, (node("t", "transpose", "x"), n("transpose", "t")), lambda x, w: x),
    (
        SEQUENCE,
        (node("t", "transpose", "x"), node("s", "matmul", "t", "x"), n("matmul", "x", "s")),
        lambda x, w: x @ (x.mT @ x),
    ),
    (SEQUENCE, (DOUBLED, n("attention", "x", "x", "b", heads=3)), attention(causal=False)),
    (SEQUENCE, (DOUBLED, n("attention", "x", "x", "b", heads=3, causal=True)), attention(causal=True)),
]
IDS = [f"{place.layout} {nodes[-1].op} {number}" for number, (place, nodes, _) in enumerate(CASES)]
SHAPES = {"vector": (5, 6), "sequence": (2, 7, 6), "image": (2, 6, 5, 8)}


def ended(signature: Signature, nodes: tuple[Node, ...]) -> Graph:
    last = {"conv": "channels"} if signature.layout == "image" else {"affine": "outputs"}
    op, width = next(iter(last.items()))
    kernel = {"kernel": 1} if op == "conv" else {}
    return graph(*nodes, node("out", op, "a", **{width: "outputs"}, **kernel))


@pytest.mark.parametrize(("signature", "nodes", "reference"), CASES, ids=IDS)
def test_an_operator_is_torchs_own_function(
    signature: Signature, nodes: tuple[Node, ...], reference: Reference
) -> None:
    kernel = GraphKernel(ended(signature, nodes).lower(signature, 4)).double()
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter += torch.randn_like(parameter)
    weights = dict(kernel.named_parameters())
    x = torch.randn(SHAPES[signature.layout], dtype=torch.float64)
    inner = reference(x, weights)
    if signature.layout == "image":
        expected = functional.conv2d(inner, weights["out_weight"], weights["out_bias"])
    else:
        expected = functional.linear(inner, weights["out_weight"], weights["out_bias"])
    torch.testing.assert_close(kernel(x), expected)


def test_every_operator_has_a_case() -> None:
    assert {one.op for _, nodes, _ in CASES for one in nodes} == set(OPERATORS)


def test_no_operator_may_keep_batch_statistics_or_drop_anything_out() -> None:
    assert not any(word in name for name in FUNCTIONS for word in ("batch_norm", "dropout", "rand"))
    assert all(callable(function(name)) for name in FUNCTIONS)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_is_one_of_torchs_own_operators(name: str) -> None:
    """TorchScript prints it as torch.ops.aten, so both names must mean one thing."""
    assert hasattr(torch.ops.aten, name)


def test_weights_start_like_torchs_own_layers() -> None:
    weight = GraphKernel(ended(VECTOR, (n("affine", outputs=500),)).lower(VECTOR, 4)).get_parameter(
        "a_weight"
    )
    bound = 6**-0.5  # 1/√fan_in
    assert 0.99 * bound < float(weight.detach().abs().max()) <= bound

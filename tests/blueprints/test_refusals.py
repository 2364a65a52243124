"""What is not a graph is refused at once, with the node and the reason, before anything is built."""

import json
import time

import pytest

from esper.blueprints import CATALOGUE
from esper.blueprints.graph import Graph, Node, node
from esper.contracts import Signature
from esper.errors import BlueprintError
from tests.blueprints.graphs import IMAGE, SEQUENCE, STRIDED, VECTOR, graph

OUT = node("out", "affine", "a", outputs="outputs")
CONV_OUT = node("out", "conv", "a", channels="outputs", kernel=1)


def a(op: str, *inputs: str, **attributes: object) -> Node:
    return node("a", op, *(inputs or ("x",)), **attributes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "culprit", "reason"),
    [
        ([], None, "has 0 nodes"),
        ([node("n", "gelu", "x")] * 257, None, "has 257 nodes; 1…256 are allowed"),
        ([a("exec"), OUT], "a", "no such operator"),
        ([a("gelo"), OUT], "a", "did you mean 'gelu'"),
        ([a("gelu", speed=2), OUT], "a", "has no attribute 'speed'"),
        ([a("affine"), OUT], "a", "it lacks outputs"),
        ([a("affine", outputs="hidden^2"), OUT], "a", "is not understood"),
        ([a("affine", outputs=1.5), OUT], "a", "outputs: a dimension is a number"),
        ([a("affine", outputs=4, bias=1), OUT], "a", "bias: must be true or false"),
        ([a("scale", by=0), OUT], "a", "by: must lie in"),
        ([a("scale", by=float("nan")), OUT], "a", "by: must lie in"),
        ([a("scale", by="2"), OUT], "a", "by: must be a number"),
        ([a("mean", over="batch"), OUT], "a", "over: must be one of channels, positions"),
        ([a("conv", channels=4, kernel=99), OUT], "a", "kernel: must be a whole number in 1…16"),
        ([a("conv", channels=4, geometry="wide"), OUT], "a", "geometry: must be one of"),
        ([a("gelu", "x", "x"), OUT], "a", "it takes 1 inputs, not 2"),
        ([a("add", "x"), OUT], "a", "it takes 2 inputs, not 1"),
        ([a("concat", *["x"] * 9), OUT], "a", "it takes 2 to 8 inputs, not 9"),
        ([a("gelu", "b"), OUT], "a", "its input 'b' is no node"),
        ([a("gelu"), a("relu"), OUT], "a", "another node has this name"),
        ([a("gelu"), node("b", "gelu", "a"), OUT], "b", "it is dead"),
        ([a("add", "x", "b"), node("b", "gelu", "a"), OUT], "a", "it is part of a cycle"),
        ([a("add", "x", "a"), OUT], "a", "it is part of a cycle"),
        ([a("gelu", "out"), OUT], "out", "it is part of a cycle"),
        ([a("gelu"), node("out", "relu", "a")], "out", "would not be zero at birth"),
        ([node("out", "scale", "x", by=2)], "out", "would not be zero at birth"),
        ([OUT, a("affine", outputs=4), node("o2", "gelu", "out")], "o2", "it is dead"),
        ([node("A", "gelu", "x")], "A", "a node's name is lower case"),
        ([node("x", "gelu", "x")], "x", "a node's name is lower case"),
        ([node("a-b", "gelu", "x")], "a-b", "a node's name is lower case"),
    ],
)
def test_a_graph_that_is_none_is_refused_when_it_is_made(
    nodes: list[Node], culprit: str | None, reason: str
) -> None:
    with pytest.raises(BlueprintError) as refusal:
        graph(*nodes)
    assert reason in str(refusal.value)
    assert culprit is None or f"node {culprit!r}" in str(refusal.value)


def test_linear_nodes_may_follow_the_last_affine_and_no_others() -> None:
    last = node("last", "affine", "x", outputs="outputs")
    with pytest.raises(BlueprintError, match=r"node 'out' .add.*zero at birth"):
        graph(last, node("out", "add", "last", "last"))
    turned = graph(node("back", "transpose", "last"), last, node("out", "scale", "back", by=2))
    assert turned.structure.last == "last"


@pytest.mark.parametrize(
    ("nodes", "signature", "culprit", "reason"),
    [
        ([a("gelu"), OUT], IMAGE, "out", "it takes a vector (batch, c) or a sequence"),
        ([a("gelu"), CONV_OUT], VECTOR, "out", "it takes an image"),
        ([a("group_norm"), OUT], VECTOR, "a", "it takes an image"),
        ([a("layer_norm"), CONV_OUT], IMAGE, "a", "not an image"),
        ([a("transpose"), OUT], VECTOR, "a", "it takes a sequence"),
        ([a("transpose"), OUT], SEQUENCE, "out", "depending on the number of positions"),
        ([a("mean", over="positions"), OUT], VECTOR, "a", "a vector has no positions"),
        ([a("softmax", over="positions"), CONV_OUT], IMAGE, "a", "runs over one axis"),
        ([a("mean", over="positions"), OUT], SEQUENCE, "out", "where the site has"),
        ([node("out", "affine", "x", outputs=5)], VECTOR, "out", "where the site has"),
        ([a("split", parts=4, index=0), OUT], VECTOR, "a", "there is no part 0 of 4 in 6"),
        ([a("split", parts=2, index=2), OUT], VECTOR, "a", "there is no part 2 of 2 in 6"),
        (
            [a("affine", outputs=5), node("b", "add", "a", "x"), node("out", "affine", "b", outputs=4)],
            VECTOR,
            "b",
            "do not go together",
        ),
        ([a("attention", "x", "x", "x", heads=4), OUT], SEQUENCE, "a", "heads 4 must divide the widths 6"),
        ([a("attention", "x", "x", "x"), OUT], VECTOR, "a", "it takes a sequence"),
        (
            [node("q", "affine", "x", outputs=4), a("attention", "q", "x", "x"), OUT],
            SEQUENCE,
            "a",
            "one shape",
        ),
        ([a("matmul", "x", "x"), OUT], SEQUENCE, "a", "cannot be multiplied"),
        ([node("t", "transpose", "x"), a("attention", "x", "x", "t"), OUT], SEQUENCE, "a", "same time steps"),
        ([node("t", "transpose", "x"), a("concat", "x", "t"), OUT], SEQUENCE, "a", "differ in more than"),
        ([a("conv", channels=5, groups=5), CONV_OUT], IMAGE, "a", "groups 5 must divide"),
        ([a("group_norm", groups=4), CONV_OUT], IMAGE, "a", "groups 4 must divide the 6"),
        ([a("conv", channels=4, kernel=2), CONV_OUT], IMAGE, "a", "no padding gives"),
        ([a("conv", channels=4, kernel=2, geometry="window"), CONV_OUT], STRIDED, "a", "no padding gives"),
        ([a("conv", channels=4), CONV_OUT], STRIDED, "out", "where the site has"),
        ([a("affine", outputs="hidden*60000"), OUT], VECTOR, "a", "at most 65536"),
        (
            [
                a("affine", outputs=60000),
                node("b", "affine", "a", outputs=60000),
                node("out", "affine", "b", outputs=4),
            ],
            VECTOR,
            "b",
            "more than 67108864 numbers",
        ),
    ],
)
def test_a_graph_that_does_not_fit_is_refused_when_it_is_built(
    nodes: list[Node], signature: Signature, culprit: str, reason: str
) -> None:
    with pytest.raises(BlueprintError) as refusal:
        graph(*nodes).lower(signature, 4)
    assert reason in str(refusal.value)
    assert f"node {culprit!r}" in str(refusal.value)


def test_widths_that_double_at_every_node_are_stopped_in_time() -> None:
    nodes = [node("n0", "concat", "x", "x")]
    nodes += [node(f"n{i}", "concat", f"n{i - 1}", f"n{i - 1}") for i in range(1, 200)]
    nodes.append(node("out", "affine", "n199", outputs="outputs"))
    with pytest.raises(BlueprintError, match=r"node 'n13'.*the joined width is"):
        graph(*nodes).lower(VECTOR, 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layout": "video"}, "layout 'video' is unknown"),
        ({"port": "usb"}, "port 'usb' is unknown"),
        ({"inputs": 0}, "inputs must lie in"),
        ({"port": "serial"}, "inputs and outputs must be equal"),
        ({"stride": (2, 2)}, "a geometry without a kernel_size"),
        ({"padding_mode": "reflect"}, "a padding_mode without a kernel_size"),
        ({"kernel_size": (3, 3)}, "must have two entries each"),
        (
            {**dict.fromkeys(("kernel_size", "stride", "padding", "dilation"), (1, 1)), "groups": 5},
            "groups must divide",
        ),
        (
            {**dict.fromkeys(("kernel_size", "padding", "dilation"), (1, 1)), "stride": (99, 1)},
            "stride must lie in 1…16",
        ),
        (
            {
                **dict.fromkeys(("kernel_size", "stride", "padding", "dilation"), (1, 1)),
                "padding_mode": "mirror",
            },
            "padding_mode must be",
        ),
    ],
)
def test_no_site_has_such_a_signature(change: dict, reason: str) -> None:
    signature = Signature(**{"layout": "image", "port": "parallel", "inputs": 6, "outputs": 4, **change})
    one = graph(node("out", "conv", "x", channels="outputs"), layouts=("image", "vector", "sequence"))
    said = str(one.misfit(signature))
    if change.keys() & {"layout", "port"} and change.get("port") != "serial":
        assert "not" in said
        return
    assert reason in said
    with pytest.raises(BlueprintError, match="no kernel fits"):
        one.lower(signature, 4)


GOOD = CATALOGUE.get("residual_mlp").to_json()


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(GOOD), **fields})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 20_000, "not JSON"),
        ("9" * 5_000, "not JSON"),
        ("null", "the graph must be an object"),
        ("[]", "the graph must be an object"),
        ("{}", "the graph lacks name"),
        (GOOD[:-1] + ',"name":"other"}', "a name stands twice"),
        (GOOD[:-1] + ',"code":"print()"}', "has a field 'code'"),
        (changed(name="No!"), "must be lower case"),
        (changed(name=3), "name must be text"),
        (changed(summary=""), "summary must have"),
        (changed(source="s" * 700), "source must have"),
        (changed(layouts=[]), "layouts must name some of"),
        (changed(layouts=["vector", "vector"]), "layouts must name some of"),
        (changed(layouts="vector"), "layouts must be a list of texts"),
        (changed(ports=["usb"]), "ports must name some of"),
        (changed(experimental="yes"), "experimental must be true or false"),
        (changed(output=["out"]), "output must be text"),
        (changed(output="there"), "the output 'there' is no node"),
        (changed(nodes={}), "nodes must be a list"),
        (changed(nodes=[3]), "node 0 must be an object"),
        (changed(nodes=[{"name": "a"}]), "node 0 lacks op"),
        (changed(nodes=[{"name": "a", "op": "gelu", "inputs": "x"}]), "inputs must be a list"),
        (changed(nodes=[{"name": "a", "op": "gelu", "attributes": []}]), "attributes must be an object"),
        (changed(nodes=[{"name": "a", "op": "gelu", "attributes": {"name": 1}}]), "has no attribute name"),
        (changed(nodes=[{"name": "a", "op": "gelu", "attributes": {"k": [1]}}]), "must be a text, a number"),
        (changed(nodes=[{"name": "a", "op": "gelu"}]), "node 'a' (gelu): it takes 1 inputs, not 0"),
        (GOOD.replace('"hidden"', "NaN"), "NaN is no JSON number"),
        (GOOD.replace('"hidden"', "1e999"), "a dimension is a number or a text"),
        (GOOD.replace('"hidden"', "9" * 400), "a dimension lies in"),
    ],
)
def test_text_that_is_no_blueprint_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BlueprintError) as refusal:
        Graph.from_json(text)
    assert reason in str(refusal.value)
    assert len(str(refusal.value)) < 700


def test_giants_are_refused_by_their_size_alone() -> None:
    """A million nodes take seconds to parse and far longer to build; neither is begun."""
    one = {"name": "n", "op": "gelu", "inputs": ["x"]}
    text = changed(nodes=[one] * 1_000_000)
    nodes = (node("n", "gelu", "x"),) * 1_000_000
    before = time.process_time()
    with pytest.raises(BlueprintError, match="at most 262144 are allowed"):
        Graph.from_json(text)
    with pytest.raises(BlueprintError, match="1000000 nodes"):
        graph(*nodes)
    assert time.process_time() - before < 1.0
    with pytest.raises(BlueprintError, match="it has 300 nodes"):
        Graph.from_json(changed(nodes=[one] * 300))

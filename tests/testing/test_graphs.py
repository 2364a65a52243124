"""Random graphs: what is valid builds and is silent at birth; what is spoilt is refused by name."""

from __future__ import annotations

import contextlib
import json

import torch
from hypothesis import HealthCheck, given, settings

from esper.blueprints.graph import Graph, Node
from esper.blueprints.kernel import GraphKernel
from esper.blueprints.sizes import example_shapes, signature_fault
from esper.contracts import Signature
from esper.errors import BlueprintError
from esper.testing.graphs import Fitting, Spoilt, nonsense, signatures, spoilt_graphs, valid_graphs

MANY = settings(max_examples=200, suppress_health_check=list(HealthCheck))


@MANY
@given(valid_graphs())
def test_valid_graphs_build_and_are_silent_at_birth_on_every_size(fitting: Fitting) -> None:
    assert fitting.graph.misfit(fitting.signature) is None
    kernel = GraphKernel(fitting.graph.lower(fitting.signature, fitting.hidden))
    for given_shape, expected in example_shapes(fitting.signature):
        added = kernel(torch.randn(given_shape))
        assert tuple(added.shape) == expected
        assert not added.any()


@MANY
@given(valid_graphs())
def test_renaming_and_reordering_nodes_keeps_the_digest_and_the_function(fitting: Fitting) -> None:
    graph = fitting.graph
    names = {one.name: f"renamed_{len(graph.nodes) - i}" for i, one in enumerate(graph.nodes)} | {"x": "x"}
    nodes = [
        Node(names[one.name], one.op, tuple(names[name] for name in one.inputs), one.attributes)
        for one in reversed(graph.nodes)
    ]
    other = Graph("other", "s", "s", graph.layouts, graph.ports, tuple(nodes), names[graph.output])
    assert other.digest() == graph.digest()
    a, b = (one.lower(fitting.signature, fitting.hidden) for one in (graph, other))
    weights = [torch.randn(weight.shape) for weight in a.weights]
    assert [weight.shape for weight in b.weights] == [weight.shape for weight in a.weights]
    x = torch.randn(example_shapes(fitting.signature)[0][0])
    torch.testing.assert_close(b.run(x, weights), a.run(x, weights), rtol=0, atol=0, equal_nan=True)


@MANY
@given(spoilt_graphs())
def test_spoilt_graphs_are_refused_with_the_node_and_the_reason(one: Spoilt) -> None:
    said = None
    try:
        Graph.from_json(one.text).lower(one.signature, one.hidden)
    except BlueprintError as error:
        said = str(error)
    assert said is not None
    assert one.reason in said
    assert one.node is None or repr(one.node) in said


@MANY
@given(nonsense())
def test_nonsense_raises_one_kind_of_error(text: str) -> None:
    with contextlib.suppress(BlueprintError):
        json.loads(Graph.from_json(text).to_json())


@MANY
@given(signatures())
def test_drawn_places_exist(signature: Signature) -> None:
    assert signature_fault(signature) is None

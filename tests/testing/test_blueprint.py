"""The shipped suite finds what is wrong with a blueprint and leaves its caller's random state alone."""

from __future__ import annotations

import torch

from esper.blueprints import CATALOGUE
from esper.blueprints.graph import Graph, Node, node
from esper.contracts import Signature
from esper.testing.blueprint import Check, check
from esper.testing.demands import DEMANDS

VECTOR = Signature("vector", "parallel", 12, 8)
SEQUENCE = Signature("sequence", "serial", 12, 12)


def graph(*nodes: Node) -> Graph:
    return Graph("tried", "tried", "here", ("vector", "sequence"), ("parallel", "serial"), nodes, "out")


def failed(results: list[Check]) -> dict[str, str]:
    return {one.name: one.detail for one in results if one.passed is False}


def test_a_sound_blueprint_passes_every_demand_with_a_figure() -> None:
    results = check(CATALOGUE.get("residual_mlp"), [VECTOR])
    assert [one.name for one in results] == ["fits", *DEMANDS]
    assert all(one.passed and one.detail for one in results)


def test_a_parameter_that_never_learns_is_named() -> None:
    """No softmax changes when a key's bias adds the same to all scores."""
    found = failed(
        check(
            graph(
                node("query", "affine", "x", outputs="hidden"),
                node("key", "affine", "x", outputs="hidden"),
                node("read", "attention", "query", "key", "x"),
                node("out", "affine", "read", outputs="outputs"),
            ),
            [SEQUENCE],
            demands=["gradients"],
        )
    )
    assert found == {"gradients": "no gradient within two steps reaches key_bias"}


def test_a_gradient_that_starts_too_steep_is_refused() -> None:
    steep = graph(node("loud", "scale", "x", by=1000), node("out", "affine", "loud", outputs="outputs"))
    found = failed(check(steep, [VECTOR], demands=["gradients"]))
    assert "it must lie in 0…10" in found["gradients"]


def test_what_learns_nothing_fails_to_learn() -> None:
    """The norm of a single number is always zero; only the last bias is left to learn with."""
    deaf = graph(
        node("one", "affine", "x", outputs=1),
        node("norm", "layer_norm", "one"),
        node("out", "affine", "norm", outputs="outputs", bias=False),
    )
    found = failed(check(deaf, [VECTOR]))
    assert {"gradients", "learns"} <= found.keys()
    assert "one_weight" in found["gradients"]


def test_a_place_it_does_not_fit_is_a_failed_check_and_no_error() -> None:
    results = check(CATALOGUE.get("conv3x3"), [VECTOR])
    assert [(one.name, one.passed) for one in results] == [("fits", False)]
    assert "not for vector ones" in results[0].detail


def test_a_blueprint_that_fits_nowhere_fails() -> None:
    odd = graph(
        node("part", "split", "x", parts=13, index=0), node("out", "affine", "part", outputs="outputs")
    )
    assert failed(check(odd)) == {"fits": "it fits none of the representative places"}


def test_a_hidden_width_that_does_not_fit_is_a_failed_check() -> None:
    wide = graph(
        node("wide", "affine", "x", outputs="hidden*2000"), node("out", "affine", "wide", outputs="outputs")
    )
    results = check(wide, [VECTOR], hidden=100)
    assert [(one.name, one.passed) for one in results] == [("fits", False)]
    assert "node 'wide'" in results[0].detail


def test_the_random_stream_of_the_caller_does_not_move_and_results_repeat() -> None:
    before = torch.random.get_rng_state()
    first = check(CATALOGUE.get("gated"), [VECTOR], demands=["learns", "vmap"])
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == check(CATALOGUE.get("gated"), [VECTOR], demands=["learns", "vmap"])

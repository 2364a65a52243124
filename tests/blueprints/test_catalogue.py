"""Every blueprint of the catalogue says where it comes from and passes the shipped suite at every place."""

import importlib
import re

import pytest
import torch

from esper.blueprints import CATALOGUE
from esper.blueprints.graph import Graph
from esper.blueprints.kernel import GraphKernel, initial_weights
from esper.blueprints.representative import PLACES, describe, representative
from esper.blueprints.sizes import example_shapes
from esper.contracts import Signature
from esper.testing.blueprint import check
from esper.testing.demands import DEMANDS

NAMES = CATALOGUE.names()
CASES = [(name, place) for name in NAMES for place in representative(CATALOGUE.get(name))]
IDS = [f"{name} {describe(place)}" for name, place in CASES]


def test_there_are_enough_of_every_layout() -> None:
    known = [CATALOGUE.get(name) for name in NAMES]
    count = {
        layout: sum(layout in one.layouts for one in known) for layout in ("vector", "sequence", "image")
    }
    assert count["vector"] >= 5
    assert count["image"] >= 7
    assert count["sequence"] >= 5


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_is_named_like_its_file_and_gives_reason_and_source(name: str) -> None:
    one = CATALOGUE.get(name)
    assert isinstance(one, Graph)
    assert one.name == name
    doc = importlib.import_module(f"esper.blueprints.catalogue.{name}").__doc__
    assert doc is not None
    assert len(doc.strip().splitlines()) >= 3
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", one.source)


def test_no_two_are_the_same() -> None:
    assert len({CATALOGUE.get(name).digest() for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_has_places_on_both_ports_of_every_layout_it_names(name: str) -> None:
    one = CATALOGUE.get(name)
    found = {(place.layout, place.port) for place in representative(one)}
    assert found == {(layout, port) for layout in one.layouts for port in one.ports}


@pytest.mark.parametrize(("name", "place"), CASES, ids=IDS)
def test_the_suite_passes(name: str, place: Signature) -> None:
    results = check(CATALOGUE.get(name), [place])
    assert [one for one in results if one.passed is not True] == []
    assert [one.name for one in results] == ["fits", *DEMANDS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", [1, 2, 7, 64])
def test_any_hidden_width_fits(name: str, hidden: int) -> None:
    one = CATALOGUE.get(name)
    for place in representative(one):
        kernel = GraphKernel(one.lower(place, hidden))
        assert not kernel(torch.randn(example_shapes(place)[0][0])).any()


@pytest.mark.parametrize("name", NAMES)
def test_it_costs_more_the_wider_it_is(name: str) -> None:
    one = CATALOGUE.get(name)
    for place in representative(one):
        counts = [one.lower(place, hidden).parameter_count() for hidden in (1, 2, 4, 8)]
        assert counts == sorted(set(counts))


def test_places_differ_and_are_named_apart() -> None:
    assert len({describe(place) for place in PLACES}) == len(PLACES)


def test_drawing_weights_moves_no_random_stream_and_follows_the_seed() -> None:
    program = CATALOGUE.get("gated").lower(PLACES[0], 4)
    before = torch.random.get_rng_state()
    a, b, c = (initial_weights(program, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["value_weight"], c["value_weight"])


@pytest.mark.parametrize("name", ["residual_mlp", "conv3x3", "causal_attention"])
def test_whole_graph_compilation_takes_it_without_a_break(name: str) -> None:
    one = CATALOGUE.get(name)
    place = representative(one)[0]
    kernel = GraphKernel(one.lower(place, 4))
    with torch.no_grad():
        kernel.get_parameter("out_weight").normal_()
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    for shape, _ in example_shapes(place):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), kernel(x))

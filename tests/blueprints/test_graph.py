"""A graph is what it computes: its digest ignores names, its text is canonical, and it knows itself."""

import json
import pickle
import subprocess
import sys

import pytest

from esper.blueprints import CATALOGUE
from esper.blueprints.graph import Graph, node
from esper.errors import BlueprintError
from tests.blueprints.graphs import IMAGE, SEQUENCE, VECTOR, graph

INNER = node("inner", "affine", "x", outputs="hidden")
OUT = node("out", "affine", "inner", outputs="outputs")


def test_names_listing_order_and_left_out_defaults_keep_the_digest() -> None:
    same = graph(
        node("last", "affine", "first", outputs="outputs", bias=True),
        node("first", "affine", "x", outputs="hidden"),
        output="last",
        layouts=("image", "vector", "sequence"),
    )
    assert same.digest() == graph(INNER, OUT).digest()


def test_what_it_computes_is_in_the_digest() -> None:
    def digest(*inputs: str, by: float = 2, outputs: int | str = 4, **header: object) -> str:
        nodes = (
            node("a", "affine", "x", outputs=outputs),
            node("b", "scale", "a", by=by),
            node("c", "concat", *inputs),
            node("out", "affine", "c", outputs="outputs"),
        )
        return graph(*nodes, **header).digest()

    found = [
        digest("a", "b"),
        digest("b", "a"),  # argument order counts
        digest("a", "b", by=3),
        digest("a", "b", outputs=5),
        digest("a", "b", outputs="hidden"),
        digest("a", "b", layouts=("vector",)),
        digest("a", "b", ports=("serial",)),
    ]
    assert len(set(found)) == len(found)
    assert digest("a", "b", by=2.0, outputs="4") == found[0]
    assert digest("a", "b", experimental=True) == found[0]


def test_shared_and_repeated_inputs_are_not_confused() -> None:
    def digest(*pairs: tuple[str, str]) -> str:
        nodes = [node(f"n{i}", "add", *pair) for i, pair in enumerate(pairs)]
        return graph(*nodes, node("out", "affine", nodes[-1].name, outputs="outputs")).digest()

    assert digest(("x", "x"), ("n0", "n0")) != digest(("x", "x"), ("n0", "x"))


@pytest.mark.parametrize("name", CATALOGUE.names())
def test_text_round_trips_and_is_canonical(name: str) -> None:
    one = CATALOGUE.get(name)
    again = Graph.from_json(one.to_json())
    assert again == one
    assert hash(again) == hash(one)
    assert again.to_json() == one.to_json()
    shuffled = dict(reversed(json.loads(one.to_json()).items()))
    assert Graph.from_json(json.dumps(shuffled, indent=3)).to_json() == one.to_json()
    assert pickle.loads(pickle.dumps(one)).digest() == one.digest()


def test_the_digest_is_the_same_in_every_process() -> None:
    code = "from esper.blueprints import CATALOGUE; print(CATALOGUE.get('gated').digest())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == CATALOGUE.get("gated").digest()


def test_it_knows_whether_it_scales_is_affine_and_what_it_mixes() -> None:
    known = {name: CATALOGUE.get(name) for name in CATALOGUE.names()}
    assert [name for name, one in known.items() if one.affine] == ["low_rank"]
    assert all(one.scales for one in known.values())
    assert not graph(node("out", "affine", "x", outputs="outputs")).scales
    assert known["causal_attention"].mixes == "past"
    assert known["self_attention"].mixes == "all"
    assert known["swiglu_mlp"].mixes == "none"


def test_a_misfit_says_why() -> None:
    one = graph(INNER, OUT, layouts=("vector", "image"), ports=("parallel",))
    assert one.misfit(VECTOR) is None
    assert "not for sequence ones" in str(one.misfit(SEQUENCE))
    assert "node 'inner' (affine): it takes a vector" in str(one.misfit(IMAGE))
    with pytest.raises(BlueprintError, match="not for sequence ones"):
        one.lower(SEQUENCE, 4)


@pytest.mark.parametrize("hidden", [0, -3, 70_000, 2.0, True, "4"])
def test_a_hidden_width_is_a_sensible_number(hidden: object) -> None:
    with pytest.raises(BlueprintError, match="hidden must be a whole number"):
        graph(INNER, OUT).lower(VECTOR, hidden)  # type: ignore[arg-type]


def test_lowering_is_repeatable_and_the_program_belongs_to_its_signature() -> None:
    one = graph(INNER, OUT)
    program = one.lower(VECTOR, 3)
    assert program == graph(INNER, OUT).lower(VECTOR, 3)
    assert program.signature == VECTOR
    assert [(w.name, w.shape, w.start) for w in program.weights] == [
        ("inner_weight", (3, 6), "uniform"),
        ("inner_bias", (3,), "zeros"),
        ("out_weight", (4, 3), "zeros"),
        ("out_bias", (4,), "zeros"),
    ]
    assert program.outgoing == ("out_weight", "out_bias")
    assert program.parameter_count() == 3 * 7 + 4 * 4

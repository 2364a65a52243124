"""Widths are parsed by hand: what is not the grammar is refused, what is gives at least 1."""

import pytest

from esper.blueprints.dimensions import LARGEST, fault, resolve, symbols

WIDTHS = {"inputs": 12, "outputs": 8, "hidden": 5, "groups": 4}


@pytest.mark.parametrize(
    ("dimension", "size"),
    [
        (7, 7),
        ("9", 9),
        ("hidden", 5),
        ("hidden*2", 10),
        ("inputs//4", 3),
        ("inputs//8", 1),
        ("hidden//8", 1),
        ("inputs*3//2", 18),
        ("inputs//2*3", 18),
        ("hidden*groups", 20),
        ("inputs//groups", 3),
        ("hidden//hidden", 1),
    ],
)
def test_it_resolves_from_left_to_right_and_never_to_nothing(dimension: int | str, size: int) -> None:
    assert fault(dimension) is None
    assert resolve(dimension, WIDTHS) == size


@pytest.mark.parametrize(
    "dimension",
    [
        "",
        "width",
        "hidden*",
        "*2",
        "hidden**2",
        "hidden/2",
        "hidden//0",
        "hidden+1",
        "hidden 2",
        " hidden",
        "hidden\n",
        "hidden*02",
        "__import__('os')",
        "hidden*" + "2*" * 40 + "2",
        0,
        -1,
        LARGEST + 1,
        True,
        None,
        2.0,
        [3],
    ],
)
def test_anything_else_is_refused_in_words(dimension: object) -> None:
    said = fault(dimension)
    assert said is not None
    assert "dimension" in said


def test_it_knows_what_it_depends_on() -> None:
    assert symbols("hidden*groups//2") == {"hidden", "groups"}
    assert symbols("12") == symbols(12) == set()

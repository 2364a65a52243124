"""What selects places, and what is refused before a model is looked at."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from esper.errors import SiteError
from esper.kasmina.sites.selecting import refuse_selectors, selects


@pytest.mark.parametrize("one", ["auto", "0*", re.compile("^2>"), re.compile(""), nn.Linear, nn.Module])
def test_names_patterns_and_types_of_layers_select(one: object) -> None:
    assert selects(one) is True


@pytest.mark.parametrize("one", ["", b"0>2", re.compile(b"^2>"), int, nn.Linear(1, 1), 3, None, ["auto"]])
def test_anything_else_selects_no_layer(one: object) -> None:
    assert selects(one) is False


@pytest.mark.parametrize(
    "sites",
    [
        "auto",
        nn.Linear,
        ["0>2", nn.Conv2d],
        ("0>2", re.compile("4")),
        {"include": "0>2"},
        {"include": ["0>2"], "exclude": []},
        {"exclude": ()},
        {"exclude": nn.Linear},
    ],
)
def test_what_may_select_is_let_through(sites: Any) -> None:
    refuse_selectors(sites)


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ([], "sites=[] selects nothing; leave it out for every place"),
        ((), "sites=() selects nothing; leave it out for every place"),
        ({}, "sites={} selects nothing; give 'include', 'exclude' or both, or leave it out"),
        ({"include": []}, "sites['include']=[] selects nothing; leave it out for every place"),
        ({"include": "0>2", "exclude": 3}, "sites['exclude']=3: 3 selects no layer; give 'auto'"),
        ({"include": int, "exclude": []}, "sites['include']=<class 'int'>: <class 'int'> selects no layer"),
        ("", "sites='': '' selects no layer; give 'auto', a glob, a compiled regular expression"),
        (None, "sites=None: None selects no layer"),
        (b"0>2", "sites=b'0>2': b'0>2' selects no layer"),
        (bytearray(b"0"), "selects no layer"),
        (["0>2", ""], "sites=['0>2', '']: '' selects no layer"),
        (["", "0>2"], "sites=['', '0>2']: '' selects no layer"),
        ({"exlude": "0>2"}, "sites has the unknown key 'exlude'; did you mean 'exclude'"),
    ],
)
def test_what_selects_nothing_is_refused_with_what_was_given(sites: Any, said: str) -> None:
    with pytest.raises(SiteError) as refused:
        refuse_selectors(sites)
    assert said in str(refused.value)

"""A torch without a private name that Esper uses is refused in words, before anything is done."""

from importlib.metadata import version

import pytest
import torch
from torch import nn

from esper.errors import EsperError
from esper.private_torch import demand


def test_a_missing_name_is_told_with_both_torches() -> None:
    with pytest.raises(EsperError) as raised:
        demand(nn.Linear(1, 1), ("_parameters", "_no_such_table"), "2.13", "growing")
    said = str(raised.value)
    assert "growing needs Linear._no_such_table" in said
    assert f"torch {version('torch')} does not have" in said
    assert "torch 2.13 has it" in said


def test_names_of_a_module_are_asked_for_under_its_own_name() -> None:
    demand(torch, ("_foreach_norm",), "2.13", "growing")
    with pytest.raises(EsperError, match=r"torch\._no_such_call"):
        demand(torch, ("_no_such_call",), "2.13", "growing")

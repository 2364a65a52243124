"""The code of an autoencoder keeps its width: the user chose it for that; hidden layers around it grow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import esper


def autoencoder(hidden: int, code: int) -> nn.Module:
    encoder = nn.Sequential(nn.Linear(20, hidden), nn.GELU(), nn.Linear(hidden, code))
    return nn.Sequential(encoder, nn.Sequential(nn.Linear(code, hidden), nn.GELU(), nn.Linear(hidden, 20)))


@pytest.mark.parametrize("hidden", [12, 3])  # of the full size, and shrunk, as a host that is to grow
def test_a_code_keeps_its_width_however_narrow_what_is_around_it_still_is(hidden: int) -> None:
    wrapped = esper.wrap(autoencoder(hidden, 5), torch.randn(6, 20))
    assert list(wrapped.places) == ["0.0>0.2", "1.0>1.2"]
    assert [r.place for r in wrapped.refusals if "5 units are a code" in r.reason] == ["0.2"]


def test_a_code_that_is_named_grows() -> None:
    assert list(esper.wrap(autoencoder(3, 5), torch.randn(6, 20), sites="0.2>1.0").places) == ["0.2>1.0"]


def test_a_linear_layer_that_is_no_narrower_than_what_stands_fast_around_it_is_a_place() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    assert list(esper.wrap(net, torch.randn(6, 4)).places) == ["0>1"]

"""A model that computes its activations twice grows, unless it is re-entered for that: then it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.errors import ProbeError
from tests.cases.loops import run


class Recomputed(nn.Module):
    """A block under activation checkpointing, behind a layer."""

    def __init__(self, reentrant: bool, block: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.reentrant = nn.Linear(10, 10), block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def pair() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 1), nn.Tanh(), nn.Linear(1, 10))


@pytest.mark.parametrize("growth", ["early", "incubate"])
@pytest.mark.parametrize("block", [pair(), nn.Softmax(-1)], ids=["a pair", "branches only"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_refused_with_what_to_write(block: nn.Module, growth: str) -> None:
    with pytest.raises(ProbeError, match=r"reentrant checkpointing.*use_reentrant=False"):
        run(Recomputed(True, block), growth=growth)


def test_a_model_that_is_recomputed_otherwise_grows() -> None:
    net = Recomputed(False, pair())
    run(net)
    assert net.block[0].out_features > 1

"""FSDP2 models, whole for growth's own passes and plain for surgery; two processes run the worker."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.distributed.fsdp.gathered import gathered
from tests.distributed.ranks import held, launch
from tests.distributed.sharding_worker import CHECKS, is_sharded


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return launch("tests.distributed.sharding_worker", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(told: list[dict[str, str]], check: str) -> None:
    held(told, check)


def test_a_plain_model_is_not_touched() -> None:
    model = nn.Linear(2, 2)
    before, parameters = dict(model.__dict__), list(model.parameters())
    assert not is_sharded(model)
    with gathered(model):
        model(torch.ones(1, 2)).sum().backward()
    assert model.__dict__ == before
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))

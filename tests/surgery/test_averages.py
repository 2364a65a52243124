"""Averaged copies follow; strangers are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from esper.errors import SurgeryError
from esper.surgery.optimizers.averages import widen_average
from esper.surgery.widen_layers import widen


@pytest.mark.parametrize("wrap", [AveragedModel, copy.deepcopy], ids=["AveragedModel", "plain copy"])
def test_an_average_keeps_its_own_old_part_and_gets_the_same_units(
    host: nn.Module, plan_of: Callable, slices_of: Callable, wrap: Callable
) -> None:
    average = wrap(host)
    with torch.no_grad():
        host.fc1.weight.add_(1.0)
    plan = plan_of(3, 5)
    slices = slices_of(host, plan)
    widen(host, plan, slices)
    before = (average.module if wrap is AveragedModel else average).fc1.weight.clone()
    widened = widen_average(average, plan, slices)
    inner = average.module if wrap is AveragedModel else average
    assert torch.equal(inner.fc1.weight, torch.cat([before, slices["fc1.weight"]]))
    assert average(torch.randn(6, 4)).shape == (6, 5)
    widened.undo()
    assert torch.equal(inner.fc1.weight, before)


def test_a_module_that_is_no_copy_is_refused(host: nn.Module, plan_of: Callable, slices_of: Callable) -> None:
    with pytest.raises(SurgeryError, match=r"the average Linear has no copy of fc1.bias, fc1.weight.*ema="):
        widen_average(nn.Linear(4, 3), plan_of(3, 5), slices_of(host, plan_of(3, 5)))

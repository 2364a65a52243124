"""One model, one run: a second is refused while the first lasts, and one that is dropped leaves nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.errors import SiteError
from tests.cases.loops import Task, cross_entropy, narrow, train
from tests.cases.test_incubation_contained import Normed


def begun(net: nn.Module, optimizer: torch.optim.Optimizer, **given: Any) -> esper.Growth:
    """Begin a run."""
    return esper.grow(net, optimizer, cross_entropy, probe=[Task(2)(256)], steps=60, **given)


def hooks_of(optimizer: torch.optim.Optimizer) -> int:
    """Count what is hooked to an optimizer's steps."""
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_a_second_run_of_a_model_is_refused_until_the_first_is_finished() -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    first = begun(net, optimizer)
    with pytest.raises(SiteError, match=r"is being grown already.*call finish\(\)"):
        begun(net, optimizer)
    first.finish()
    begun(net, optimizer).finish()


def test_a_part_of_a_model_that_grows_is_refused() -> None:
    part = narrow()
    whole = nn.Sequential(part, nn.Linear(10, 10))
    first = begun(whole, torch.optim.Adam(whole.parameters(), 0.01))
    with pytest.raises(SiteError, match="a Sequential that shares layers with the model"):
        begun(part, torch.optim.Adam(part.parameters(), 0.01))
    first.finish()


def test_a_call_that_fails_blocks_nothing() -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    with pytest.raises(esper.EsperError):
        begun(net, optimizer, budget={"parameters": 1})
    assert not hooks_of(optimizer)
    begun(net, optimizer).finish()


@pytest.mark.parametrize("config", [{}, {"governor": {"enabled": True}}])
@pytest.mark.parametrize("growth", ["early", "incubate"])
def test_a_run_that_is_dropped_leaves_nothing_and_blocks_nothing(growth: Any, config: Any) -> None:
    torch.manual_seed(0)
    net = narrow() if growth == "early" else Normed()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    run = begun(net, optimizer, growth=growth, config=config)
    train(run, net, optimizer, Task(), 8)
    if growth == "incubate":
        assert run.run.orchestrator.oldest is not None, "a seed is awake"
    held = weakref.ref(run)
    del run
    gc.collect()
    assert held() is None
    assert not hooks_of(optimizer)
    assert not [path for path, module in net.named_modules() if "_esper_seam" in vars(module)]
    begun(net, optimizer, growth=growth).finish()


def test_a_run_that_was_overwritten_is_collected_when_the_next_begins() -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    gc.disable()
    try:
        begun(net, optimizer)  # nobody holds it
        begun(net, optimizer).finish()
    finally:
        gc.enable()

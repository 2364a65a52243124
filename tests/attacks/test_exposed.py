"""A3: whatever is saved while a seed is being let in holds the live model."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from tests.attacks.staged import HOSTS, Loop
from tests.cases.loops import Task, cross_entropy, narrow, run

STEPS = range(30, 41)  # of which every one but the last has a branch in the pass; see staged.STOPS


@pytest.fixture(scope="module", params=HOSTS)
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Save a run at every step, in every way, with the loss it had."""
    top, found = tmp_path_factory.mktemp(request.param), {}
    loop = Loop(request.param, "incubate")
    loop.step(STEPS.start)
    for step in STEPS:
        batch = loop.draw(64)
        with torch.no_grad():
            loss = cross_entropy(loop.net, batch)
        exposed = loop.growth.run.orchestrator.oldest is not None
        folder = loop.growth.save(top / str(step))
        state = copy.deepcopy(loop.net.state_dict())
        found[step] = batch, loss, exposed, folder, state, loop.growth.state_dict()
        with torch.no_grad():
            assert torch.equal(cross_entropy(loop.net, batch), loss), "saving changed the model"
        loop.step()
    loop.growth.finish()
    return request.param, found


@pytest.mark.parametrize("step", STEPS)
def test_a_saved_folder_says_what_the_model_said(live: Any, step: int) -> None:
    host, (batch, loss, exposed, folder, *_) = live[0], live[1][step]
    assert exposed == (step < STEPS.stop - 1)
    assert_says(esper.load_into(HOSTS[host](), folder), batch, loss)


@pytest.mark.parametrize("step", STEPS)
def test_a_saved_folder_says_it_without_esper(live: Any, step: int) -> None:
    host, (batch, loss, _, folder, *_) = live[0], live[1][step]
    spec = importlib.util.spec_from_file_location("rebuild", Path(folder) / "rebuild.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert_says(module.load(HOSTS[host]()), batch, loss)


@pytest.mark.parametrize("step", STEPS)
def test_a_state_goes_into_no_model_that_says_something_else(live: Any, step: int) -> None:
    host, (_, _, exposed, _, state, _) = live[0], live[1][step]
    if exposed:
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict.*_esper_seed"):
            HOSTS[host]().load_state_dict(state)
    else:
        assert not [key for key in state if "_esper_seed" in key]


@pytest.mark.parametrize("step", STEPS)
def test_a_state_and_growth_s_own_are_the_model_bit_for_bit(live: Any, step: int) -> None:
    host, (batch, loss, _, _, state, growth) = live[0], live[1][step]
    fresh = Loop(host, "incubate")
    fresh.growth.load_state_dict(growth)
    fresh.net.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(cross_entropy(fresh.net, batch), loss)
    fresh.growth.finish()


@pytest.mark.parametrize("host", HOSTS)
def test_a_state_of_another_seed_is_refused_by_name(host: str) -> None:
    loop = Loop(host, "incubate")
    loop.step(31)
    state = loop.net.state_dict()
    (alpha,) = [key for key in state if key.endswith("_esper_seed.alpha")]
    del state[alpha]
    with pytest.raises(RuntimeError, match="_esper_seed is the state of another seed"):
        loop.net.load_state_dict(state)
    plain = {key: value for key, value in state.items() if "_esper_seed" not in key}
    loop.net.load_state_dict(plain)  # says nothing of seeds: they stay
    loop.growth.finish()


def assert_says(net: nn.Module, batch: Any, loss: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(net, batch), loss, rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore:.*grew into new objects")  # the trace holds the old ones
def test_an_export_leaves_nothing_for_the_next_step() -> None:
    """A trace has no numbers: what it noted of the kernel was asked for at the next step, and cost it."""
    net, exported = narrow(), list[int]()

    def each(step: int, growth: Any) -> None:
        if not exported and any(one.origin.layer.exposed for one in growth.run.orchestrator.trials.values()):
            torch.export.export(net, (Task()(4)[0],), strict=False)
            exported.append(step)

    ran = run(net, growth="incubate", steps=120, each=each)
    assert exported
    assert not [one for one in ran.warnings if "was skipped" in one]

"""Whatever is given to ``grow`` and does not fit is an error of Esper's that says so; nothing is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import esper
from esper.errors import ConfigError, EsperError, LossError, OptimizerError, ProbeError, SiteError
from tests.cases.loops import Task, cross_entropy, narrow

X, Y = Task()(64)


def failing(model: nn.Module, batch: Any) -> Tensor:
    """Raise what no torch function raises."""
    raise ZeroDivisionError("boom")


def unreadable() -> Any:
    """Make a probe whose data set fails."""

    class Broken:
        def __iter__(self) -> Any:
            raise OSError("the disk is gone")

    return Broken()


CASES: dict[str, tuple[dict[str, Any], type[EsperError], str]] = {
    "ema": ({"ema": [None]}, ConfigError, "a NoneType is no module"),
    "ema as text": ({"ema": "x"}, ConfigError, "a str is no module"),
    "ema of another model": (
        {"ema": [nn.Sequential(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 10))]},
        ConfigError,
        r"0.weight is \(5, 10\) there and \(1, 10\) in the model",
    ),
    "ema without the model": ({"ema": [nn.Linear(2, 2)]}, ConfigError, "it has no 0.weight"),
    "scaler": ({"scaler": "x"}, ConfigError, r"no get_scale\(\)"),
    "sites": ({"sites": 3}, SiteError, "3 selects no layer"),
    "sites in a list": ({"sites": ["0", 3]}, SiteError, "3 selects no layer"),
    "sites under another key": ({"sites": {"includes": "0"}}, SiteError, "did you mean 'include'"),
    "on_event": ({"on_event": None}, ConfigError, "on_event=None: a NoneType cannot be called"),
    "seed": ({"seed": "x"}, ConfigError, "seed='x'"),
    "steps as text": ({"steps": "10"}, ConfigError, "steps='10'"),
    "steps that are none": ({"steps": math.nan}, ConfigError, "steps=nan"),
    "config": ({"config": 3}, ConfigError, "config=3; give a Config"),
    "budget": ({"budget": [1]}, ConfigError, "give a mapping"),
    "schedulers": ({"schedulers": 3}, ConfigError, r"a int has no step\(\)"),
    "run_dir": ({"run_dir": 3}, ConfigError, "a int is no path"),
    "one batch": ({"probe": (X, Y)}, ProbeError, "looks like one batch"),
    "one batch as a mapping": ({"probe": {"x": X, "y": Y}}, ProbeError, "looks like one batch"),
    "one tensor": ({"probe": X}, ProbeError, "a Tensor that looks like one batch"),
    "probe that fails": ({"probe": unreadable()}, ProbeError, "cannot be read: OSError: the disk is gone"),
    "per_example": ({"per_example": 3}, ConfigError, "cannot be called"),
    "per_example that raises": ({"per_example": failing}, ProbeError, "per_example.*ZeroDivisionError: boom"),
    "loss": ({"loss_fn": 3}, LossError, "cannot be called"),
    "loss that raises": ({"loss_fn": failing}, ProbeError, "ZeroDivisionError: boom"),
    "loss of shape [1]": ({"loss_fn": lambda n, b: cross_entropy(n, b)[None]}, LossError, r"shape \(1,\)"),
    "loss that is detached": (
        {"loss_fn": lambda n, b: cross_entropy(n, b).detach()},
        LossError,
        "the loss has no gradient",
    ),
    "optimizer": ({"optimizer": {}}, OptimizerError, "names none"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_argument_that_does_not_fit_is_an_error(name: str) -> None:
    given, error, says = CASES[name]
    net = narrow()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    usual: dict[str, Any] = {"optimizer": optimizer, "loss_fn": cross_entropy, "probe": [(X, Y)], "steps": 60}
    with pytest.raises(error, match=says):
        esper.grow(net, **{**usual, **given})
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not optimizer._optimizer_step_post_hooks
    esper.grow(net, **usual).finish()


def test_the_model_itself_is_no_average_of_it() -> None:
    net = narrow()
    with pytest.raises(ConfigError, match="it is the model itself"):
        esper.grow(net, torch.optim.Adam(net.parameters()), cross_entropy, probe=[(X, Y)], steps=9, ema=[net])


@pytest.mark.parametrize("several", [False, True])
def test_one_average_may_be_given_without_a_list(several: bool) -> None:
    net, draw = narrow(), Task()
    optimizer, average = torch.optim.Adam(net.parameters(), 0.01), AveragedModel(net)
    growth = esper.grow(
        net,
        optimizer,
        cross_entropy,
        probe=[draw(256)],
        steps=60,
        config={"early": {"false_keep": 0.4}},
        ema=[average] if several else average,
    )
    for _ in range(60):
        batch = draw()
        loss = cross_entropy(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        growth.step(batch, loss)
    growth.finish()
    assert growth.plans
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in net.parameters()]


def test_none_means_that_a_loop_has_no_average_and_no_scheduler() -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    growth = esper.grow(net, optimizer, cross_entropy, probe=[(X, Y)], steps=60, ema=None, schedulers=None)
    assert growth.run.parts.averages == []
    assert growth.run.parts.schedulers == []
    growth.finish()

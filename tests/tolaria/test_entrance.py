"""What does not fit is refused at the entrance, in words that help, and nothing of the user's has moved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.errors import (
    ConfigError,
    EsperError,
    FinishedError,
    LossError,
    OptimizerError,
    ProbeError,
    SiteError,
)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator), torch.randint(2, (16,), generator=generator)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def facts(model: nn.Module) -> list[Any]:
    """What a refusal must leave alone: classes, modes, hooks, attributes and values."""
    return [
        (name, type(module), module.training, sorted(vars(module)), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@contextmanager
def refused(error: type[EsperError], *said: str, model: nn.Module) -> Iterator[None]:
    """Expect an error that says all of this, with model and random stream as they were."""
    before, stream = facts(model), torch.get_rng_state()
    lazy = any(isinstance(p, nn.UninitializedParameter) for p in model.parameters())
    values = {} if lazy else {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error) as caught:
        yield
    for words in said:
        assert words in str(caught.value)
    assert facts(model) == before
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in values.items())
    assert torch.equal(torch.get_rng_state(), stream)


HOSTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "data parallel": (lambda: nn.DataParallel(make_net()), "give the module inside it (model.module)"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), "0 is a lazy module"),
    "frozen": (lambda: make_net().requires_grad_(False), "the model has no trainable parameter"),
}


TORCH_WARNS = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of itself, when imported


@TORCH_WARNS
@pytest.mark.parametrize("name", HOSTS)
def test_hosts_that_cannot_grow(name: str) -> None:
    make, said = HOSTS[name]
    model, optimizer = make(), sgd(make_net())
    with refused(SiteError, said, model=model):
        esper.grow(model, optimizer, loss_fn, probe=[make_batch()])


@TORCH_WARNS
def test_a_script_module_is_refused() -> None:
    model = torch.jit.script(nn.Linear(4, 2))
    with pytest.raises(SiteError, match="a ScriptModule cannot grow; give the eager module"):
        esper.grow(model, sgd(make_net()), loss_fn, probe=[make_batch()])


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(SiteError, match="a function cannot grow; an nn"):
        esper.grow(loss_fn, sgd(make_net()), loss_fn, probe=[make_batch()])  # type: ignore[arg-type]


@TORCH_WARNS
def test_the_module_inside_a_compiled_one_is_taken() -> None:
    net = make_net()
    inside = torch.compile(net)._orig_mod
    assert esper.grow(inside, sgd(net), loss_fn, probe=[make_batch()]).finish() is net


OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Any], tuple[str, ...]]] = {
    "no optimizer": (lambda net: "adam", ("'optimizer' is a str", "a torch.optim.Optimizer is needed")),
    "several in a list": (lambda net: [sgd(net)], ("'optimizer' is a list", "{'body': one, 'head': other}")),
    "one of several": (lambda net: {"body": sgd(net), "head": 1}, ("'head' is a int",)),
    "another model's": (
        lambda net: sgd(make_net()),
        ("owns none of the model's parameters", "model.parameters()"),
    ),
    "partial": (
        lambda net: sgd(net[0]),
        ("lacks 1.weight, 1.bias, 3.weight, 3.bias; add them", "requires_grad_(False)"),
    ),
    "uphill": (
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1, maximize=True),
        ("'optimizer' would raise the loss (maximize=True)", "return the negative"),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_do_not_fit(name: str) -> None:
    make, said = OPTIMIZERS[name]
    net = make_net()
    given = make(net)
    with refused(OptimizerError, *said, model=net):
        esper.grow(net, given, loss_fn, probe=[make_batch()])


def test_an_optimizer_for_all_that_is_not_frozen_is_enough() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    assert esper.grow(net, optimizer, loss_fn, probe=[make_batch()]).finish() is net


PROBES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "empty": ([], ("the probe is empty; growth needs held-out batches",)),
    "one-shot": (iter([make_batch()]), ("one-shot list_iterator", "a list of batches or a DataLoader")),
    "not iterable": (7, ("int",)),
    "of another shape": (
        [(torch.zeros(2, 9), torch.zeros(2).long())],
        ("does not run on the first probe batch", "RuntimeError"),
    ),
}


@pytest.mark.parametrize("name", PROBES)
def test_probes_that_are_no_evidence(name: str) -> None:
    probe, said = PROBES[name]
    net = make_net()
    with refused(ProbeError, *said, model=net):
        esper.grow(net, sgd(net), loss_fn, probe=probe)


LOSSES: dict[str, tuple[Callable[[nn.Module, Any], Any], tuple[str, ...]]] = {
    "per example": (
        lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"),
        ("shape (16,)", "its mean"),
    ),
    "an integer": (lambda m, b: m(b[0]).argmax(), ("dtype torch.int64", "floating-point scalar")),
    "a float": (lambda m, b: loss_fn(m, b).item(), ("the loss is a float", "must return a scalar tensor")),
    "nothing": (lambda m, b: None, ("the loss is a NoneType",)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_no_scalar(name: str) -> None:
    function, said = LOSSES[name]
    net = make_net()
    with refused(LossError, *said, model=net):
        esper.grow(net, sgd(net), function, probe=[make_batch()])


BUDGETS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown": ({"paramters": 2.0}, ("unknown key 'budget.paramters'", "did you mean 'parameters'?")),
    "out of range": ({"parameters": -1.0}, ("budget:", "parameters", "greater than")),
    "a multiple as a count": (
        {"parameters": 16.0},
        ("parameters=16 is a count, and the model has ", " parameters already; use growth_factor="),
    ),
    "no whole number": (
        {"parameters": 4.5},
        (
            "parameters=4.5 is a count, and no whole number; the model has ",
            "use growth_factor=4.5 for 4.5 times",
        ),
    ),
    "FLOPs below the model's own": (
        {"model_flops": 2},
        ("model_flops=2 is a count", "forward FLOPs per example already; use flops_factor="),
    ),
    "half a FLOP": ({"model_flops": 2.5}, ("model_flops=2.5", "use flops_factor=2.5")),
    "no multiple": ({"growth_factor": 1.0}, ("budget:", "growth_factor", "greater than 1")),
    "no number": ({"growth_events": "many"}, ("budget:", "growth_events")),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_that_do_not_fit(name: str) -> None:
    budget, said = BUDGETS[name]
    net = make_net()
    with refused(ConfigError, *said, model=net):
        esper.grow(net, sgd(net), loss_fn, probe=[make_batch()], budget=budget)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_at_its_step(value: float) -> None:
    net = make_net()
    optimizer = sgd(net)
    growth = esper.grow(net, optimizer, loss_fn, probe=[make_batch()])
    loss = loss_fn(net, make_batch())
    loss.backward()
    optimizer.step()
    growth.step(make_batch(), loss)
    optimizer.step()  # the value is read once per optimizer step
    with refused(LossError, f"the loss is {value} at step 1; lower the learning rate", model=net):
        growth.step(make_batch(), torch.tensor(value))
    with refused(LossError, "shape (2,)", model=net):
        growth.step(make_batch(), torch.zeros(2))
    assert growth.steps == 1


@pytest.mark.parametrize("call", ["step", "epoch", "grow_now", "finish"])
def test_nothing_comes_after_finish(call: str) -> None:
    net = make_net()
    growth = esper.grow(net, sgd(net), loss_fn, probe=[make_batch()])
    growth.finish()
    given = {"step": (make_batch(), torch.tensor(1.0)), "grow_now": ("0>3",)}.get(call, ())
    with refused(FinishedError, f"{call}() after finish()", "call esper.grow again", model=net):
        getattr(growth, call)(*given)


def test_a_site_that_is_not_there_is_named_with_those_that_are() -> None:
    net = make_net()
    growth = esper.grow(net, sgd(net), loss_fn, probe=[make_batch()])
    with refused(SiteError, "no site '0>2'", re.escape("0>3"), model=net):
        growth.grow_now("0>2")
    growth.finish()

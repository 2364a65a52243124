"""State that optimizers keep in containers, under keys of their own or in a wrapper: kind I of the cases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import esper
from esper.surgery.optimizers.foreign import forget_gradients
from tests.cases.loops import narrow, run

STEPS = 60
RECIPES = ("early", "incubate")


class LookAhead(Optimizer):
    """Look-ahead as it is mostly written: a wrapper that never calls its base class's constructor."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.param_groups, self.steps = base, base.param_groups, 0
        self.state: Any = defaultdict(dict)

    def step(self, closure: Any = None) -> None:
        """Let the base step; pull the weights towards the slow ones now and then."""
        self.base.step()
        self.steps += 1
        for p in (p for group in self.param_groups for p in group["params"] if self.steps % 5 == 0):
            slow = self.state[p].setdefault("slow", p.detach().clone())
            slow.lerp_(p.detach(), 0.5)
            p.data.copy_(slow)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_state_of_a_wrapper_that_was_never_made_follows(recipe: Literal["early", "incubate"]) -> None:
    net, smallest = narrow(), list[float]()
    optimizer = LookAhead(torch.optim.Adam(net.parameters(), 0.01))

    def each(i: int, growth: esper.Growth) -> None:
        smallest.append(float(net[0].weight.detach().norm(dim=1).min()))

    ran = run(net, optimizer=optimizer, steps=100, each=each, growth=recipe)
    assert ran.growth.steps == 100
    assert net[0].out_features > 1
    assert all(optimizer.state[p]["slow"].shape == p.shape for p in net.parameters())
    assert min(smallest) > 0.1, "a unit that has come is its own slow weight"


class Custom(Optimizer):
    """Plain descent that keeps something it never uses but to add to."""

    def __init__(self, parameters: Iterable[Tensor], keep: Callable[[Any, Tensor], None]) -> None:
        super().__init__(list(parameters), {"lr": 0.3})
        self.keep = keep

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step, and add to what is kept."""
        for p in (p for group in self.param_groups for p in group["params"]):
            self.keep(self, p)
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


class Pair(NamedTuple):
    """Two tensors by their names."""

    mean: Tensor
    last: Tensor


def nested(own: Any, p: Tensor) -> None:
    """Keep a mapping, a list and a named tuple of tensors like the parameter."""
    state = own.state[p]
    if not state:
        state |= {"m": {"first": torch.zeros_like(p), "slow": p.clone()}, "last": [p.clone()]}
        state["pair"] = Pair(torch.zeros_like(p), torch.zeros_like(p))
    state["pair"].mean.lerp_(p.grad, 0.1)
    state["m"]["first"].lerp_(p.grad, 0.1)
    state["m"]["slow"].lerp_(p, 0.1)
    state["last"][0].lerp_(p, 0.1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_in_containers_follows(recipe: Literal["early", "incubate"]) -> None:
    net = narrow()
    optimizer, seen = Custom(net.parameters(), nested), list[dict[str, float]]()

    def each(i: int, growth: esper.Growth) -> None:
        if net[0].out_features > 1:
            state = optimizer.state[net[0].weight]["m"]
            seen.append({name: float(one[1:].abs().min()) for name, one in state.items()})

    run(net, optimizer=optimizer, steps=100, each=each, growth=recipe)
    assert seen
    assert seen[0]["first"] == 0, "new units have no gradient yet"
    assert seen[0]["slow"] > 0, "their average is themselves"
    assert all(one.shape == p.shape for p in net.parameters() for one in optimizer.state[p]["last"])
    assert all(one.shape == p.shape for p in net.parameters() for one in optimizer.state[p]["pair"])


def factored(own: Any, p: Tensor) -> None:
    """Keep one tensor per axis, as factored and preconditioned methods do."""
    kept = own.state[p].setdefault("factors", tuple(torch.zeros(n) for n in p.shape))
    for axis, factor in enumerate(kept):
        factor += p.grad.square().sum([i for i in range(p.dim()) if i != axis])


def flattened(own: Any, p: Tensor) -> None:
    """Keep one tensor for all parameters, under a key of its own."""
    every = [p for group in own.param_groups for p in group["params"]]
    whole = own.state["global"].setdefault("m", torch.zeros(sum(p.numel() for p in every)))
    whole += torch.cat([p.grad.flatten() for p in every])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (factored, "keeps a tuple of tensors as state 'factors'"),
        (flattened, "keeps tensors in its state under 'global', which is no parameter"),
    ],
)
def test_state_that_cannot_follow_is_named_and_nothing_grows(
    keep: Callable[[Any, Tensor], None], said: str, recipe: Literal["early", "incubate"]
) -> None:
    net = narrow()
    ran = run(net, optimizer=Custom(net.parameters(), keep), steps=STEPS, growth=recipe)
    assert ran.growth.steps == STEPS
    assert net[0].out_features == 1
    told = ran.warnings if recipe == "incubate" else ran.reasons
    assert any(said in one for one in told)


@pytest.mark.parametrize("what", ["shapes", "flat"])
def test_what_is_of_the_parameters_sizes_is_refused_at_the_start(what: str) -> None:
    class Remembering(Custom):
        def __init__(self, parameters: list[Tensor]) -> None:
            super().__init__(parameters, lambda own, p: None)
            self.shapes = [p.shape for p in parameters] if what == "shapes" else None
            self.flat = torch.zeros(sum(p.numel() for p in parameters)) if what == "flat" else None

    net = narrow()
    with pytest.raises(esper.OptimizerError, match=rf"Remembering 'optimizer' keeps .* in \.{what}"):
        run(net, optimizer=Remembering(list(net.parameters())))


def test_slow_weights_shrink_with_the_weights() -> None:
    net = nn.Linear(3, 2)
    optimizer = Custom(net.parameters(), nested)
    net(0.1 * torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    slow = optimizer.state[net.weight]["m"]["slow"].clone()
    with torch.no_grad():
        net.weight.mul_(0.5)
    forget_gradients(optimizer, 0.5)
    state = optimizer.state[net.weight]["m"]
    assert torch.equal(state["slow"], 0.5 * slow)
    assert not state["first"].any()

"""Where the parameters of a branch that stays go, what goes with them, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Muon, Optimizer, Rprop, SparseAdam

from esper.errors import OptimizerError, SurgeryError
from esper.surgery.optimizers.adoption import adopt, donor_group, home, let_go, own_home, refuse_homeless

Groups = list[dict[str, Any]]


class Branch(nn.Module):
    """A matrix and a vector, as most branches have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


@pytest.fixture
def branch() -> Branch:
    return Branch()


def train(model: nn.Module, *optimizers: Optimizer, x: int = 4) -> None:
    model.zero_grad()
    model(torch.randn(16, x)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def members(optimizer: Optimizer, index: int) -> list[int]:
    return [id(parameter) for parameter in optimizer.param_groups[index]["params"]]


def decayed(*modules: nn.Module) -> Groups:
    own = [p for module in modules for p in module.parameters()]
    return [
        {"params": [p for p in own if p.dim() > 1]},
        {"params": [p for p in own if p.dim() == 1], "weight_decay": 0.0},
    ]


def test_vectors_join_the_group_without_decay_and_matrices_the_other(host: Any, branch: Branch) -> None:
    optimizer = AdamW(decayed(host))
    adopt({"main": optimizer}, [host.fc1], branch, None)
    assert members(optimizer, 0)[-1] == id(branch.weight)
    assert members(optimizer, 1)[-1] == id(branch.bias)


def test_the_groups_of_the_place_come_before_those_of_other_layers(host: Any, branch: Branch) -> None:
    groups = [*decayed(host.fc1, host.norm), *decayed(host.fc2, host.embed)]
    optimizer = SGD(groups, lr=0.1)
    adopt({"main": optimizer}, [host.fc2], branch, None)
    assert members(optimizer, 2)[-1] == id(branch.weight)
    assert members(optimizer, 3)[-1] == id(branch.bias)


def test_beside_a_layer_without_a_bias_a_vector_joins_that_layer_s_own_group(
    host: Any, branch: Branch
) -> None:
    groups = [{"params": [host.embed.weight], "lr": 0.01}, *decayed(host.fc1, host.fc2, host.norm)]
    optimizer = SGD(groups, lr=0.1)
    adopt({"main": optimizer}, [host.embed], branch, None)
    assert members(optimizer, 0)[-2:] == [id(branch.weight), id(branch.bias)]


def test_a_group_that_trains_the_place_among_others_comes_before_one_of_its_sort(
    host: Any, branch: Branch
) -> None:
    groups = [{"params": list(host.norm.parameters())}, {"params": [host.fc1.weight, host.embed.weight]}]
    optimizer = SGD([*groups, {"params": list(host.fc2.parameters())}], lr=0.1)
    assert home({"main": optimizer}, [host.embed], branch.bias) == (optimizer, 1)


class OfAModel(Adagrad):
    """A user's own, made in another way."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)


@pytest.mark.parametrize("make", [OfAModel, lambda model: Rprop(model.parameters(), lr=0.1)])
def test_a_newcomer_may_be_without_state_until_its_first_step(
    host: Any, branch: Branch, make: Callable[[nn.Module], Optimizer]
) -> None:
    optimizer = make(host)
    adopt({"main": optimizer}, [host.fc1], branch, None)
    assert branch.weight not in optimizer.state
    assert members(optimizer, 0)[-2:] == [id(branch.weight), id(branch.bias)]


def test_muon_gets_the_matrices_and_the_other_one_the_vectors(host: Any, branch: Branch) -> None:
    matrices, vectors = (group["params"] for group in decayed(host))
    muon, adam = Muon(matrices), AdamW(vectors)
    adopt({"muon": muon, "adam": adam}, [host.embed], branch, None)
    assert members(muon, 0)[-1] == id(branch.weight)
    assert members(adam, 0)[-1] == id(branch.bias)


def test_a_vector_that_only_muon_could_take_is_refused_before_anything_moves(
    host: Any, branch: Branch
) -> None:
    muon = Muon([p for p in host.parameters() if p.dim() == 2])
    lookup = SparseAdam(nn.Embedding(3, 2, sparse=True).parameters())
    named: dict[str, Optimizer] = {"muon": muon, "lookup": lookup}
    before = members(muon, 0)
    with pytest.raises(SurgeryError, match=r"no optimizer takes 'bias' of shape \(5,\): 'muon' is Muon"):
        adopt(named, [host.embed], branch, None)
    assert members(muon, 0) == before
    with pytest.raises(
        OptimizerError, match=r"which a branch at embed\+mlp has: 'muon' is Muon, for matrices, .*AdamW say"
    ):
        refuse_homeless(named, [host.embed], branch, "embed+mlp")
    refuse_homeless({"muon": muon, "rest": SGD(host.norm.parameters())}, [host.embed], branch, "embed+mlp")


def test_a_frozen_place_leaves_the_choice_to_the_sort(host: Any, branch: Branch) -> None:
    host.embed.requires_grad_(False)
    optimizer = SGD(decayed(host.fc1, host.norm), lr=0.1)
    assert donor_group({"main": optimizer}, [host.embed]) is None
    assert home({"main": optimizer}, [host.embed], branch.weight) == (optimizer, 0)
    assert home({"main": optimizer}, [host.embed], branch.bias) == (optimizer, 1)


@pytest.mark.parametrize("kind", [Adam, Adagrad, SGD])
def test_what_the_branch_s_own_optimizer_learned_goes_along(
    host: Any, branch: Branch, kind: Callable[..., Optimizer]
) -> None:
    options = {"momentum": 0.9} if kind is SGD else {}
    optimizer, own = (kind(module.parameters(), lr=0.01, **options) for module in (host, branch))
    for _ in range(3):
        train(branch, own)
    learned = copy.deepcopy(own.state[branch.weight])
    undo = adopt({"main": optimizer}, [host.fc1], branch, own)
    assert undo.lines == ()
    assert all(torch.equal(optimizer.state[branch.weight][key], value) for key, value in learned.items())
    undo()
    assert branch.weight not in optimizer.state
    assert members(optimizer, 0) == [id(p) for p in host.parameters()]


def test_state_of_another_class_stays_behind(host: Any, branch: Branch) -> None:
    optimizer, own = SGD(host.parameters(), lr=0.1, momentum=0.9), Adam(branch.parameters())
    train(branch, own)
    adopt({"main": optimizer}, [host.fc1], branch, own)
    assert branch.weight not in optimizer.state


def test_groups_that_list_names_get_the_branch_s(host: Any, branch: Branch) -> None:
    optimizer = Adam(list(host.named_parameters()))
    before = list(optimizer.param_groups[0]["param_names"])
    undo = adopt({"main": optimizer}, [host.fc1], branch, None, "grown.0_fc1.")
    assert optimizer.param_groups[0]["param_names"] == [*before, "grown.0_fc1.weight", "grown.0_fc1.bias"]
    optimizer.load_state_dict(optimizer.state_dict())
    undo()
    assert optimizer.param_groups[0]["param_names"] != before  # load_state_dict made lists of its own
    fresh = Adam(list(host.named_parameters()))
    adopt({"main": fresh}, [host.fc1], branch, None, "grown.0_fc1.")()
    assert fresh.param_groups[0]["param_names"] == before


def test_lbfgs_starts_anew_says_so_and_takes_it_back(host: Any, branch: Branch) -> None:
    optimizer = LBFGS(host.parameters(), lr=0.1, max_iter=3)
    x = torch.randn(16, 4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = host(x).square().mean() + branch(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    (state,) = optimizer.state.values()
    before = dict(state)
    undo = adopt({"big": optimizer}, [host.fc1], branch, None)
    assert undo.lines == (
        "LBFGS 'big': its history spans all parameters at once; it starts anew with the grown ones",
    )
    assert state == {"func_evals": before["func_evals"], "n_iter": 0}
    undo()
    assert all(state[key] is value for key, value in before.items())
    optimizer.step(closure)

    adopt({"big": optimizer}, [host.fc1], branch, None)
    old = branch.weight.clone()
    optimizer.step(closure)
    assert not torch.equal(branch.weight, old)
    assert adopt({"big": LBFGS(host.parameters())}, [host.fc1], Branch(), None).lines == ()


def test_fused_momentum_goes_on_when_a_group_gets_a_newcomer(host: Any, branch: Branch) -> None:
    optimizer = SGD(host.parameters(), lr=0.1, momentum=0.9, fused=True)
    train(host, optimizer)
    adopt({"main": optimizer}, [host.fc1], branch, None)
    branch(torch.randn(3, 4)).sum().backward()
    gradient = branch.weight.grad.clone() if branch.weight.grad is not None else None
    train(host, optimizer)
    assert gradient is not None
    assert torch.equal(optimizer.state[branch.weight]["momentum_buffer"], gradient)


def test_a_newcomer_without_state_is_born_as_its_group_says(host: Any, branch: Branch) -> None:
    group = {"params": list(host.parameters()), "initial_accumulator_value": 0.5}
    optimizer = Adagrad([group], lr=0.1, initial_accumulator_value=0.25)
    undo = adopt({"main": optimizer}, [host.fc1], branch, None)
    assert optimizer.state[branch.weight]["sum"].eq(0.5).all()
    undo()
    assert branch.weight not in optimizer.state


def test_what_is_let_go_leaves_groups_names_and_state(host: Any) -> None:
    optimizer = Adam([{"params": list(m.named_parameters())} for m in (host.fc1, host.fc2)])
    other = SGD(host.norm.parameters(), lr=0.1, momentum=0.9)
    train(host, optimizer, other)
    held = [group["params"] for group in optimizer.param_groups]
    assert let_go({"main": optimizer, "other": other}, host.fc1) == []
    assert [members(optimizer, index) for index in (0, 1)] == [[], [id(p) for p in host.fc2.parameters()]]
    assert [group["param_names"] for group in optimizer.param_groups] == [[], ["weight", "bias"]]
    assert all(group["params"] is own for group, own in zip(optimizer.param_groups, held, strict=True))
    assert set(optimizer.state) == set(host.fc2.parameters())
    assert members(other, 0) == [id(p) for p in host.norm.parameters()]
    assert set(other.state) == set(host.norm.parameters())


def test_a_history_is_lost_only_with_what_it_spans(host: Any) -> None:
    def closure() -> torch.Tensor:
        loss = host(torch.ones(16, 4)).square().mean()
        loss.backward()
        return loss

    optimizer = LBFGS([*host.fc1.parameters(), *host.norm.parameters()], lr=0.1, max_iter=3)
    assert let_go({"big": optimizer}, nn.Linear(2, 2)) == []
    optimizer.step(closure)
    (state,) = optimizer.state.values()
    assert "old_dirs" in state
    assert let_go({"big": optimizer}, host.fc2) == []
    assert "old_dirs" in state
    assert let_go({"big": optimizer}, host.norm) == [
        "LBFGS 'big': its history spans all parameters at once; it starts anew with the grown ones"
    ]
    assert "old_dirs" not in state
    assert members(optimizer, 0) == [id(p) for p in host.fc1.parameters()]
    assert let_go({"big": LBFGS(host.parameters())}, host.norm) == []  # it had none yet


def test_parameters_that_are_like_others_join_their_groups(host: Any, branch: Branch) -> None:
    groups = [{"params": [p]} for p in host.parameters()]
    optimizer, other = SGD(groups[:2], lr=0.1), SGD(groups[2:], lr=0.1)
    named = {"main": optimizer, "other": other}
    like = {"weight": host.fc1.bias, "bias": host.norm.bias}
    assert own_home(named, host.fc1.bias) == (optimizer, 1)
    assert own_home(named, host.norm.bias) == (other, 1)
    assert own_home(named, None) is None
    undo = adopt(named, [host.fc2], branch, None, like=like)
    assert members(optimizer, 1) == [id(host.fc1.bias), id(branch.weight)]
    assert members(other, 1) == [id(host.norm.bias), id(branch.bias)]
    undo()
    assert members(optimizer, 1) == [id(host.fc1.bias)]


def test_what_is_frozen_as_its_like_is_not_trained_and_nothing_else_is_left_out(
    host: Any, branch: Branch
) -> None:
    optimizer = SGD(host.fc1.parameters(), lr=0.1)
    branch.weight.requires_grad_(False)
    adopt({"main": optimizer}, [host.fc1], branch, None, like={"weight": host.fc2.weight})
    assert members(optimizer, 0)[2:] == [id(branch.bias)]
    second = Branch()
    second.weight.requires_grad_(False)  # without a like it is the caller's wish
    adopt({"main": optimizer}, [host.fc1], second, None)
    assert members(optimizer, 0)[3:] == [id(second.weight), id(second.bias)]


@pytest.mark.parametrize(("fused", "trained"), [(True, False), (False, True)])
def test_momentum_is_made_up_only_where_fused_sgd_would_raise(
    host: Any, branch: Branch, fused: bool, trained: bool
) -> None:
    optimizer = SGD(host.parameters(), lr=0.1, momentum=0.9, fused=fused)
    if trained:
        train(host, optimizer)
    adopt({"main": optimizer}, [host.fc1], branch, None)
    assert branch.weight not in optimizer.state


def test_fused_momentum_that_was_learned_is_kept(host: Any, branch: Branch) -> None:
    optimizer, own = (SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True) for m in (host, branch))
    train(host, optimizer)
    train(branch, own)
    learned = own.state[branch.weight]["momentum_buffer"].clone()
    adopt({"main": optimizer}, [host.fc1], branch, own)
    assert torch.equal(optimizer.state[branch.weight]["momentum_buffer"], learned)
    assert learned.any()

"""What a place was proven in is changed in the middle of a run: it is proven again, or refused in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import esper
from esper.kasmina.proving.proving import Proof
from tests.cases.loops import Ran, Task, narrow, run

WHEN = 9  # between the first event and the second


def masked(net: nn.Sequential) -> None:
    mask = torch.ones_like(net[2].weight)
    net[2].weight.register_hook(lambda gradient: gradient * mask)


def halved(net: nn.Sequential) -> None:
    layer = net[2]
    layer.forward = lambda x: F.linear(x * 0.5, layer.weight, layer.bias)


CHANGES: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "a hook": (lambda net: net[2].register_forward_hook(lambda m, args, y: y * 0.5), "2 has a forward hook"),
    "a pre-hook": (
        lambda net: net[2].register_forward_pre_hook(lambda m, args: (args[0] * 0.5,)),
        "2 has a forward pre-hook",
    ),
    "a mask on a gradient": (masked, "does not run once it is wider"),
    "a forward of its own": (halved, "the model is not what it was at esper.grow"),
    "another activation": (lambda net: net.__setitem__(1, nn.ReLU()), "the results differ"),
    "one over the width": (lambda net: net.__setitem__(1, nn.Softmax(-1)), "the results differ"),
    "pruned": (lambda net: prune.l1_unstructured(net[2], "weight", 1), "parametrised (or pruned) since"),
    "parametrised": (lambda net: weight_norm(net[2]), "parametrised (or pruned) since"),
    "frozen": (lambda net: net[0].requires_grad_(False), "0 is frozen"),
}
HARMLESS: dict[str, Callable[[nn.Sequential], object]] = {
    "a hook that only looks": lambda net: net[2].register_forward_hook(lambda m, args, y: None),
    "dropout": lambda net: net.__setitem__(1, nn.Sequential(nn.Tanh(), nn.Dropout(0.1))),
}


def changed(change: Callable[[nn.Sequential], object]) -> tuple[Ran, list[int]]:
    """Train a host that is changed on the way; returns the run, and the width then and in the end."""
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    widths: list[int] = []

    def each(step: int, growth: esper.Growth) -> None:
        if step == WHEN:
            widths.append(net[0].out_features)
            change(net)
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            new = [p for p in net.parameters() if id(p) not in known]
            if new:
                optimizer.add_param_group({"params": new})

    made = run(net, each=each, optimizer=optimizer)
    return made, [*widths, net[0].out_features]


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_noticed_before_the_next_event_uses_the_place(kind: str) -> None:
    change, reason = CHANGES[kind]
    made, (then, at_last) = changed(change)
    assert at_last == then > 1
    assert any(reason in one for one in made.reasons)
    assert not any("put back" in one for one in made.reasons)


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_harmless_change_is_proven_again(kind: str) -> None:
    _, (then, at_last) = changed(HARMLESS[kind])
    assert at_last > then > 1


@pytest.mark.filterwarnings("ignore:Using .torch.compile:UserWarning")  # torch's, of any hook on all modules
@pytest.mark.parametrize("how", ["early", "incubate", "compiled"])
def test_nothing_is_proven_again_where_nothing_changes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[int] = []
    own = Proof.unproven

    def counted(self: Proof, places: object) -> dict[str, str]:
        proofs.append(1)
        return own(self, places)  # type: ignore[arg-type]

    monkeypatch.setattr(Proof, "unproven", counted)
    net = narrow()
    host: nn.Module = net
    if how == "compiled":  # its call is exchanged while a seed is awake in it
        host = nn.Sequential(torch.compile(net, backend="eager"), nn.Identity())
    run(host, growth="early" if how == "early" else "incubate", steps=160)
    assert net[0].out_features > 2
    assert len(proofs) == 1


def test_a_race_leaves_out_what_is_no_place_any_more() -> None:
    net, task = narrow(), Task()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def each(step: int, growth: esper.Growth) -> None:
        if step == 0:
            net[1] = nn.Softmax(-1)

    made = run(net, loss, task, each=each, growth="incubate")
    assert net[0].out_features == 1
    assert any("0>2 is left out: the model is not what it was" in one for one in made.warnings)
    assert not any("put back" in one["reason"] for one in made.outcomes())


def inserted(net: nn.Sequential) -> None:
    net.insert(1, nn.Dropout(0.0))


def tied(net: nn.Sequential) -> None:
    net[0].extra = net[2].weight


AWAKE: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    **{
        kind: CHANGES[kind]
        for kind in ("a hook", "a pre-hook", "another activation", "pruned", "parametrised")
    },
    "a layer between": (inserted, "2.weight is not in the model any more, or is another, since"),
    "tied": (tied, "2.weight is tied to 0.extra since"),
}


@pytest.mark.parametrize("exposed", [False, True])
@pytest.mark.parametrize("kind", AWAKE)
def test_a_change_while_a_seed_is_awake_is_named_in_its_outcome(kind: str, exposed: bool) -> None:
    net, (change, reason), done = narrow(), AWAKE[kind], list[int]()

    def each(step: int, growth: esper.Growth) -> None:
        awake = list(growth.run.orchestrator.trials.values())
        if not done and any(one.origin.layer.exposed is exposed for one in awake):
            done.append(step)
            change(net)

    made = run(net, each=each, growth="incubate", steps=160)
    assert done
    assert not any("put back" in one["reason"] for one in made.outcomes())
    assert reason in made.outcomes()[0]["reason"]
    assert "constant" not in made.outcomes()[0]["reason"]


def test_the_end_of_a_run_finds_a_change_while_a_seed_is_exposed() -> None:
    net, done = narrow(), list[int]()

    def each(step: int, growth: esper.Growth) -> None:
        awake = list(growth.run.orchestrator.trials.values())
        if not done and any(one.origin.layer.exposed for one in awake):
            done.append(step)
            weight_norm(net[0])
            growth.finish()

    with pytest.raises(esper.FinishedError):
        run(net, each=each, growth="incubate", steps=160)
    assert done
    assert net[0].parametrizations.weight.original1.shape == (1, 10)
    assert net(torch.randn(4, 10)).isfinite().all()


def test_what_was_changed_is_named() -> None:
    made, _ = changed(CHANGES["another activation"][0])
    assert any("not what it was at esper.grow (1): tried" in one for one in made.reasons)


def deeper() -> nn.Sequential:
    """Return a host with two places that share a layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 3), nn.Tanh(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 10))


def awake_at(net: nn.Sequential, change: Callable[[nn.Sequential], object], steps: int = 120) -> Ran:
    """Race in a host that is changed while the first seed is being let in."""
    done = list[int]()

    def each(step: int, growth: esper.Growth) -> None:
        if not done and any(one.origin.layer.exposed for one in growth.run.orchestrator.trials.values()):
            done.append(step)
            change(net)

    made = run(net, each=each, growth="incubate", steps=steps, config={"gate": {"false_keep": 0.99}})
    assert done
    return made


def test_a_place_is_proven_without_the_kernel_that_is_let_in_beside_it() -> None:
    made = awake_at(deeper(), lambda net: net.append(nn.LogSoftmax(-1)))
    assert not [one for one in made.warnings if "left out" in one]


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return twice what a layer does."""
        return 2 * super().forward(x)


def test_a_class_that_is_put_in_place_of_a_seams_stays() -> None:
    net = deeper()
    made = awake_at(net, lambda net: setattr(net[2], "__class__", Doubled))
    assert type(net[2]) is Doubled
    assert not [one for one in vars(net[2]) if "esper" in one]
    assert not [one for one in made.warnings if "Error: tuple index" in one or "cannot go from" in one]


def test_an_exit_of_another_width_is_no_end_of_the_users_pass() -> None:
    net = deeper()

    def narrower(net: nn.Sequential) -> None:
        net[2].weight.data, net[2].bias.data = net[2].weight.data[:2], net[2].bias.data[:2]
        net[4].weight.data = net[4].weight.data[:, :2]
        with torch.no_grad():
            assert net(torch.randn(5, 10)).shape == (5, 10)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        awake_at(net, narrower)

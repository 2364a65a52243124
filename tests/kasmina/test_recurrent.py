"""Hidden sizes of recurrent layers: the old units do exactly as before, the new ones as their branch did."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import esper
from esper.errors import SurgeryError
from esper.kasmina.recording.flops import FlopMeter
from esper.kasmina.widths.recurrent import RecurrentPair
from esper.saving.save import load_into, save
from esper.surgery.optimizers.averages import widen_average
from esper.surgery.optimizers.widening import widen_state
from esper.surgery.widen_layers import empty_slices, widen
from esper.tolaria.growth.run.commit import laid
from tests.kasmina.zoo import Net

TIME, IN, HIDDEN, UNITS = 7, 3, 5, 2
KINDS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "three layers": {"num_layers": 3, "batch_first": True},
    "both ways": {"bidirectional": True, "batch_first": True},
    "two layers both ways, no bias": {"bidirectional": True, "num_layers": 2, "bias": False},
}


def last(s: Any, x: Tensor) -> Tensor:
    out = s.rnn(x)[0]
    return s.head(out[:, -1] if s.rnn.batch_first else out[-1])


def every(s: Any, x: Tensor) -> Tensor:
    return s.head(torch.tanh(s.rnn(x)[0]))


def mean(s: Any, x: Tensor) -> Tensor:
    out = s.rnn(x)[0]
    return s.head(out.mean(1 if s.rnn.batch_first else 0))


def largest(s: Any, x: Tensor) -> Tensor:
    return s.head(s.rnn(x)[0].max(dim=1 if s.rnn.batch_first else 0).values)


def state(s: Any, x: Tensor) -> Tensor:
    left = s.rnn(x)[1]
    return s.head(left[0][-1] if isinstance(left, tuple) else left[-1])


def cell(s: Any, x: Tensor) -> Tensor:
    return s.head(s.rnn(x)[1][1][-1])


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    f.__name__: f for f in (last, every, mean, largest, state)
}


def host(kind: str, shape: str, way: Callable[[Any, Tensor], Tensor]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    rnn = KINDS[kind](IN, HIDDEN, **SHAPES[shape])
    width = HIDDEN * (2 if rnn.bidirectional and way not in (state, cell) else 1)
    net = Net(way, rnn=rnn, head=nn.Linear(width, 4))
    return net, torch.randn(*((6, TIME) if rnn.batch_first else (TIME, 6)), IN)


def place(net: nn.Module, x: Tensor) -> RecurrentPair:
    found = esper.wrap(net, x, blueprints=["widen"]).pairs["rnn>head"]
    assert isinstance(found, RecurrentPair)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hidden_size_grows_exactly(kind: str, shape: str, way: str) -> None:
    net, x = host(kind, shape, WAYS[way])
    pair = place(net, x)
    assert pair.site.width == HIDDEN
    for dtype in (torch.float32, torch.float64):
        wide, given = copy.deepcopy(net).to(dtype), x.to(dtype)
        pair = place(wide, given)
        kernel = pair.kernel(UNITS)
        with torch.no_grad():
            before = wide(given)
            assert not kernel(given).any()
            born = copy.deepcopy(wide)
            plan = kernel.plan()
            widen(born, plan, kernel.slices(plan))
            allowed = float(before.abs().max()) * (2e-6 if dtype is torch.float32 else 1e-13)
            assert float((born(given) - before).abs().max()) <= allowed
            kernel.consumer_weight.normal_()
            branch = before + kernel(given)
            old = {n: p.clone() for n, p in wide.named_parameters()}
            widen(wide, plan, kernel.slices(plan))
            after = wide(given)
        assert not torch.allclose(before, branch, atol=1e-3)
        allowed = float(branch.abs().max()) * math.sqrt(3) * (2e-6 if dtype is torch.float32 else 1e-13)
        assert float((after - branch).abs().max()) <= allowed
        assert wide.get_submodule("rnn").hidden_size == HIDDEN + UNITS
        assert all(torch.equal(part, old[n]) for n, part in kept(plan, wide).items())
        assert place(wide, given).site.width == HIDDEN + UNITS, "it can grow again"
        copied = pickle.loads(pickle.dumps(wide.get_submodule("rnn")))
        assert torch.equal(copied(given)[0], wide.get_submodule("rnn")(given)[0])


def kept(plan: Any, net: nn.Module) -> dict[str, Tensor]:
    """Cut the old part out of every grown tensor again."""
    names = {edit.name for edit in plan.edits}
    return cut(plan, {name: p.detach() for name, p in net.named_parameters() if name in names})


def cut(plan: Any, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the old part out of tensors, by name."""
    for edit in plan.edits:
        old, new = edit.old // edit.chunks, (edit.new - edit.old) // edit.chunks
        own = parts[edit.name].split([old, new] * edit.chunks, edit.axis)[::2]
        parts[edit.name] = torch.cat(own, edit.axis)
    return parts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_unit_costs_is_right_where_the_size_doubles_and_never_too_little(
    kind: str, shape: str
) -> None:
    net, x = host(kind, shape, every)
    pair = place(net, x)
    assert pair.site.most == HIDDEN
    spent = []
    for units in (0, 1, HIDDEN):
        wide = copy.deepcopy(net)
        if units:
            plan = place(wide, x).plan(units)
            widen(wide, plan, empty_slices(wide, plan))
        with torch.no_grad(), FlopMeter() as meter:
            wide(x)
        spent.append((sum(p.numel() for p in wide.parameters()), meter.total // 6))
    for own, told in enumerate((pair.site.unit_parameters, pair.site.unit_flops)):
        assert spent[2][own] - spent[0][own] == told * HIDDEN
        assert 0 < spent[1][own] - spent[0][own] <= told


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "ASGD": lambda p: torch.optim.ASGD(p, t0=1),
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5),
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("rule", ["zeros", "mean", "seed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_follows_gate_by_gate(name: str, rule: Any) -> None:
    net, x = host("GRU", "three layers", last)
    optimizer = OPTIMIZERS[name](net.parameters())

    def train() -> None:
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()

    train()
    train()
    kernel = place(net, x).kernel(UNITS)
    own = OPTIMIZERS[name](kernel.parameters())
    kernel(x).sub(1).square().sum().backward()
    own.step()
    plan = kernel.plan()
    donor = {key: laid(kernel, edit, own) for key, edit in plan.keyed()}
    before = {n: dict(optimizer.state[p]) for n, p in net.named_parameters()}
    widened = widen(net, plan, kernel.slices(plan))
    reasons = widen_state({"main": optimizer}, widened.changes, rule, donor)
    assert reasons == [] or name == "Adafactor"
    for change in widened.changes:
        for key, old in before[change.edit.name].items():
            new = optimizer.state[change.parameter][key]
            if not isinstance(new, Tensor) or new.dim() == 0 or name == "Adafactor":
                continue
            assert new.shape == change.parameter.shape
            alone = type(plan)("", 0, change.edits, ())
            assert torch.equal(cut(alone, {change.edit.name: new})[change.edit.name], old)
            if key == "ax" and rule != "seed":
                differs = int((new != change.parameter).sum())
                assert differs <= old.numel(), "the average of a new weight is the weight itself"
    train()
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_the_last_cell_of_an_lstm_can_be_what_is_read() -> None:
    net, x = host("LSTM", "batch first", cell)
    kernel = place(net, x).kernel(UNITS)
    with torch.no_grad():
        kernel.consumer_weight.normal_()
        branch, plan = net(x) + kernel(x), kernel.plan()
        widen(net, plan, kernel.slices(plan))
        torch.testing.assert_close(net(x), branch, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", ["batch first", "two layers both ways, no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_run_together_and_can_be_told_apart(kind: str, shape: str) -> None:
    net, x = host(kind, shape, last)
    pair = place(net, x)
    kernels = [pair.kernel(UNITS) for _ in range(3)]
    for kernel in kernels:
        nn.init.normal_(kernel.consumer_weight)
    parameters, buffers = stack_module_state(kernels)
    together = vmap(lambda p: functional_call(kernels[0], (p, buffers), (x,)))(parameters)
    torch.testing.assert_close(together, torch.stack([kernel(x) for kernel in kernels]))
    for name, axis in kernels[0].axes.items():
        assert kernels[0].get_parameter(name).shape[axis] % UNITS == 0
    hidden = kernels[0](x, hidden=True)
    assert hidden.shape[-1] == UNITS * pair.columns
    wanted = hidden @ kernels[0].consumer_weight.T
    torch.testing.assert_close(wanted, kernels[0](x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_units_can_be_picked_from_a_pool(kind: str, shape: str) -> None:
    """Units that do not hear of each other compute the same alone."""
    net, x = host(kind, shape, every)
    pool, which = place(net, x).kernel(4), torch.tensor([3, 1])
    with torch.no_grad():
        for name, parameter in pool.named_parameters():
            if name not in pool.axes:  # (units, gates, ways * units)
                ways = parameter.shape[-1] // 4
                parameter.mul_(torch.eye(4).repeat(1, ways)[:, None])
    kernel = place(net, x).kernel(2)
    kernel.take(pool, which)
    kept = pool(x, hidden=True).unflatten(-1, (4, -1))[..., which, :].flatten(-2)
    torch.testing.assert_close(kernel(x, hidden=True), kept)


@pytest.mark.parametrize("shape", ["three layers", "both ways"])
@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_averages_and_training_follow(kind: str, shape: str) -> None:
    net, x = host(kind, shape, last)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    average = torch.optim.swa_utils.AveragedModel(net)
    y = torch.randint(4, (6,))

    def train() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        return float(loss.detach())

    train()
    parameters = dict(net.named_parameters())
    moments = {n: optimizer.state[p]["exp_avg_sq"].clone() for n, p in parameters.items()}
    kernel = place(net, x).kernel(UNITS)
    plan = kernel.plan()
    slices = kernel.slices(plan)
    widened = widen(net, plan, slices)
    assert not widened.replaced, "recurrent layers hold weak references to their weights"
    assert all(dict(net.named_parameters())[n] is p for n, p in parameters.items())
    assert widen_state({"adam": optimizer}, widened.changes) == []
    widen_average(average, plan, slices)
    for name, parameter in net.named_parameters():
        state = optimizer.state[parameter]["exp_avg_sq"]
        assert state.shape == parameter.shape
        if any(edit.name == name for edit in plan.edits):
            only = type(plan)(plan.site, 0, tuple(e for e in plan.edits if e.name == name), ())
            assert torch.equal(cut(only, {name: state})[name], moments[name])
    before = net.get_submodule("rnn").weight_hh_l0.detach().clone()
    losses = [train() for _ in range(30)]
    assert losses[-1] < losses[0]
    moved = (net.get_submodule("rnn").weight_hh_l0.detach() - before).abs()
    gates = moved.unflatten(0, (-1, HIDDEN + UNITS))
    for rows in (slice(None, HIDDEN), slice(HIDDEN, None)):
        for columns in (slice(None, HIDDEN), slice(HIDDEN, None)):
            assert bool((gates[:, rows, columns] > 0).any()), "every block learns, between old and new too"


def test_gradient_reaches_new_units_within_two_steps() -> None:
    net, x = host("GRU", "batch first", last)
    kernel = place(net, x).kernel(UNITS)
    plan = kernel.plan()
    widen(net, plan, kernel.slices(plan))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    rnn = net.get_submodule("rnn")
    gates = rnn.weight_ih_l0.grad.unflatten(0, (3, HIDDEN + UNITS))
    assert bool(gates[:, HIDDEN:].abs().amax((0, 2)).gt(0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_model_is_saved_loaded_and_rebuilt(kind: str, tmp_path: Path) -> None:
    net, x = host(kind, "three layers", last)
    y = torch.randint(4, (6,))
    net, plans = grown(net, x, y)
    assert plans
    save(net, plans, tmp_path / "saved", card={})
    fresh, _ = host(kind, "three layers", last)
    load_into(fresh, tmp_path / "saved")
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    alone, _ = host(kind, "three layers", last)
    namespace: dict[str, Any] = {"__file__": str(tmp_path / "saved" / "rebuild.py"), "__name__": "rebuild"}
    exec((tmp_path / "saved" / "rebuild.py").read_text(), namespace)
    namespace["load"](alone)
    assert torch.equal(alone.eval()(x), net(x))


def grown(net: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, list[Any]]:
    kernel = place(net, x).kernel(UNITS)
    with torch.no_grad():
        kernel.consumer_weight.normal_()
    plan = kernel.plan()
    widen(net, plan, kernel.slices(plan))
    return net, [plan]


def test_a_widening_can_be_taken_back() -> None:
    net, x = host("LSTM", "three layers", last)
    before, held = net(x), {n: (p, p.detach().clone()) for n, p in net.named_parameters()}
    plan = place(net, x).plan(UNITS)
    with torch.no_grad():
        widened = widen(net, plan, empty_slices(net, plan))
        widened.undo()
    for name, parameter in net.named_parameters():
        assert parameter is held[name][0]
        assert torch.equal(parameter, held[name][1])
    assert torch.equal(net(x), before)
    net(x).sum().backward()


def test_chunks_that_do_not_divide_are_refused() -> None:
    net, x = host("GRU", "plain", last)
    plan = place(net, x).plan(UNITS)
    edit = plan.edits[0]
    odd = type(edit)(edit.name, 0, edit.old, edit.old + 4, "", 3)
    with pytest.raises(SurgeryError, match="3 equal parts"):
        widen(net, type(plan)("x", 1, (odd,), ()), {edit.name: torch.zeros(4, IN)})


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRUCell(IN, HIDDEN), nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], HIDDEN)
        for t in range(x.shape[1]):
            h = self.rnn(x[:, t], h)
        return self.head(h)


def first_state(s: Any, x: Tensor) -> Tensor:
    return s.head(s.rnn(x, torch.zeros(1, len(x), HIDDEN))[0][:, -1])


def packed(s: Any, x: Tensor) -> Tensor:
    lengths = torch.full((len(x),), TIME)
    return s.head(s.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1][-1])


def both(s: Any, x: Tensor) -> Tensor:
    out, left = s.rnn(x)
    return s.head(out[:, -1] + left[-1])


def twice(s: Any, x: Tensor) -> Tensor:
    return s.head(s.rnn(x)[0][:, -1] + s.rnn(x.flip(1))[0][:, -1])


def normed(s: Any, x: Tensor) -> Tensor:
    return s.head(s.norm(s.rnn(x)[0][:, -1]))


def given(s: Any, x: Tensor) -> Tensor:
    return s.rnn(x)[0]


def rnn(**options: Any) -> nn.GRU:
    return nn.GRU(IN, HIDDEN, batch_first=True, **options)


def net_of(body: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> Net:
    extra = {"one": nn.Linear(IN, IN), "two": nn.Linear(IN, IN)}

    def first(s: Any, x: Tensor) -> Tensor:
        return body(s, s.two(torch.relu(s.one(x))))

    return Net(first, **{"rnn": rnn(), "head": nn.Linear(HIDDEN, 4), **extra, **layers})


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "projections": (
        lambda: net_of(last, rnn=nn.LSTM(IN, HIDDEN, proj_size=2, batch_first=True), head=nn.Linear(2, 4)),
        r"projections \(proj_size\)",
    ),
    "first state": (lambda: net_of(first_state), "given its first state.*leave it out"),
    "packed": (lambda: net_of(packed), "packed sequences.*pad them"),
    "both": (lambda: net_of(both), "its outputs and its last state of rnn are both read"),
    "twice": (lambda: net_of(twice), "called 2 times"),
    "norm": (lambda: net_of(normed, norm=nn.LayerNorm(HIDDEN)), "LayerNorm norm .* stands between"),
    "output": (lambda: net_of(given), "an output of the model"),
    "cells": (lambda: net_of(lambda s, x: s.rnn(x), rnn=Cells()), r"GRUCell.*nn\.GRU"),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", REFUSED)
def test_other_recurrences_are_refused_with_the_reason(case: str) -> None:
    build, reason = REFUSED[case]
    wrapped = esper.wrap(build(), torch.randn(6, TIME, IN), blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    place = "rnn.rnn" if case == "cells" else "rnn"
    assert re.search(reason, told[place]), told[place]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("read", ["the last output", "the last state"])
def test_a_race_takes_no_place_that_reads_time_first_and_gives_examples(read: str, batch_first: bool) -> None:
    """Rows of what it reads are not examples: the survey failed, and nothing was raced at all."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.o = nn.GRU(4, 3, batch_first=batch_first), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y, h = self.r(x if batch_first else x.transpose(0, 1))
            last: Tensor = h[-1] if read == "the last state" else y[:, -1] if batch_first else y[-1]
            made: Tensor = self.o(last)
            return made

    x = torch.randn(6, 5, 4)
    assert "r>o" in esper.wrap(Last(), x, raced=False).places
    raced = esper.wrap(Last(), x, raced=True, blueprints=["widen", "residual_mlp"])
    assert ("r>o" in raced.places) is batch_first
    told = " ".join(one.reason for one in raced.refusals if one.place == "r")
    assert ("reads time as its first axis" in told) is not batch_first

"""Checks of test_sharding.py that run on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.optim import LBFGS, AdamW, Optimizer

from esper.batches.examples import example_losses
from esper.contracts import WidenEdit, WidenPlan
from esper.distributed.fsdp.gathered import gathered
from esper.distributed.fsdp.reshard import unshard
from esper.errors import SurgeryError
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.survey import measure
from esper.surgery.isolation.contexts import evaluating, untouched
from esper.surgery.isolation.seam import open_seam
from esper.surgery.optimizers.widening import widen_state
from esper.surgery.widen_layers import widen
from tests.distributed.ranks import take_part

BATCH, STEPS = 8, 6
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
Make = Callable[[], nn.Module]
Act = Callable[[nn.Module, dict[str, Optimizer], int, str], None]


class Block(nn.Module):
    """A pair to widen with odd sizes, so that shards are uneven, and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks, a norm with buffers, a frozen layer and a head."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(5) if norm else nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.frozen(self.norm(x)))

    def features(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def sharded(net: Net, **options: Any) -> Net:
    for block in net.blocks:
        fully_shard(block, **options)
    return fully_shard(net, **options)


def hybrid() -> DeviceMesh:
    """Two processes that hold the same shard each: the mesh of hybrid sharding."""
    return init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(BATCH, 5, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)


def loss_fn(model: nn.Module, data: Any) -> Tensor:
    return nn.functional.cross_entropy(model(data[0]).float(), data[1])


def adamw(net: nn.Module) -> Optimizer:
    return AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)


def train(make: Make, act: Act | None = None, optimize: Callable = adamw, steps: int = STEPS) -> list[Tensor]:
    """Train, act in between, and return all weights, optimizer state and buffers in full."""
    net = make()
    optimizers = {"main": optimize(net)}
    act = act or (lambda *_: None)
    for step in range(steps):
        loss = loss_fn(net, batch(dist.get_rank(), step))
        act(net, optimizers, step, "forward")
        loss.backward()
        act(net, optimizers, step, "backward")
        optimizers["main"].step()
        optimizers["main"].zero_grad()
        act(net, optimizers, step, "step")
    return everything(net, optimizers["main"])


def everything(net: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    state = [v for p in net.parameters() for v in optimizer.state.get(p, {}).values()]
    found = [*net.parameters(), *state, *net.buffers()]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in found]


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), f"tensor {index} of {len(one)}: {a} against {b}"


def look(net: nn.Module, optimizers: dict[str, Optimizer], step: int, when: str) -> None:
    """Run growth's kinds of passes on a whole model: not the same ones, and not on every rank."""
    gradients = [None if p.grad is None else p.grad.to_local().clone() for p in net.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    rank = dist.get_rank()
    with gathered(net):
        assert isinstance(net, Net)
        data = batch(rank, 100 + step)
        own = [p for p in net.parameters() if p.requires_grad]
        assert not any(isinstance(p, DTensor) for p in own)
        if rank == 0 or step % 2:
            with evaluating(net), untouched(net):
                losses, why = example_losses(net, loss_fn, data)
            assert not why
            assert losses.shape == (BATCH,)
            with untouched(net):
                seen: list[Tensor] = []
                hook = net.blocks[0].register_forward_hook(lambda m, a, y: seen.append(y))
                loss = loss_fn(net, data)
                hook.remove()
                (slope,) = torch.autograd.grad(loss, seen, retain_graph=True)
                assert slope.abs().sum() > 0
                assert all(g is not None for g in torch.autograd.grad(loss, own))
                loss_fn(net, data).backward()
    for parameter, before in zip(net.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad.to_local(), before)
    same(list(net.buffers()), buffers)


def there_and_back(net: nn.Module, optimizers: dict[str, Optimizer], step: int, when: str) -> None:
    if when == "step" and step in (1, 3):
        resharding = unshard(net, optimizers)
        assert not is_sharded(net)
        assert not any(isinstance(p, DTensor) for p in net.parameters())
        assert resharding.again() == []
        assert is_sharded(net)


def nested() -> Net:
    return sharded(Net())


def held_open() -> Net:
    return sharded(Net(), reshard_after_forward=False)


def in_bf16() -> Net:
    return sharded(Net(norm=False), mp_policy=BF16)


def only(*whens: str) -> Act:
    return lambda net, optimizers, step, when: look(net, optimizers, step, when) if when in whens else None


def gathered_leaves_no_trace(rank: int, world: int, folder: Path) -> None:
    for make in (nested, held_open, in_bf16):
        plain = train(make)
        for whens in (["forward"], ["backward"], ["step"], ["forward", "backward", "step"]):
            same(plain, train(make, only(*whens)))


def gathered_keeps_what_was_not_reduced_yet(rank: int, world: int, folder: Path) -> None:
    def accumulated(act: Act) -> list[Tensor]:
        net = nested()
        optimizers = {"main": adamw(net)}
        for number in range(4):
            net.set_requires_gradient_sync(number % 2 == 1)
            loss_fn(net, batch(rank, number)).backward()
            act(net, optimizers, number, "backward")
            if number % 2:
                optimizers["main"].step()
                optimizers["main"].zero_grad()
        return everything(net, optimizers["main"])

    same(accumulated(only()), accumulated(only("backward")))


def gathered_computes_what_training_computes(rank: int, world: int, folder: Path) -> None:
    for make in (nested, in_bf16):
        net = make()
        data = batch(rank, 0)
        with evaluating(net):
            expected = loss_fn(net, data)
            with gathered(net):
                assert torch.equal(loss_fn(net, data), expected)


def gathered_guards(rank: int, world: int, folder: Path) -> None:
    plain = Net()
    with gathered(plain):  # not sharded: nothing to do
        loss_fn(plain, batch(rank, 0))
    net = sharded(Net())
    register_fsdp_forward_method(net, "features")
    loss_fn(net, batch(rank, 0)).backward()
    with gathered(net):
        state = net.state_dict()
        assert not any(isinstance(t, DTensor) for t in state.values())
        assert raises(lambda: net.load_state_dict(state), "would be lost")
        if rank == 0:  # FSDP's own way into other methods is quiet too
            net.features(batch(rank, 0)[0])
        assert not any(isinstance(p, DTensor) for p in net.parameters())
        assert all(p.grad is None for p in net.parameters())
    assert all(isinstance(t, DTensor) for n, t in net.state_dict().items() if n.endswith("weight"))
    with gathered(net):
        with gathered(net):
            loss_fn(net, batch(rank, 0))
            assert raises(lambda: unshard(net, {}), "inside gathered")
        assert not any(isinstance(p, DTensor) for p in net.parameters())
    try:
        with gathered(net):
            raise KeyError("a pass that fails")
    except KeyError:
        pass
    loss_fn(net, batch(rank, 1)).backward()
    told: list[str] = []
    net.blocks[0].register_forward_hook(
        lambda *_: told.append(raises(lambda: gathered(net).__enter__(), "forward"))
    )
    net(batch(rank, 0)[0])
    assert told == [True]


def raises(act: Callable[[], Any], words: str) -> bool:
    try:
        act()
    except SurgeryError as error:
        if words not in str(error):
            raise
        return True
    return False


def surveys_are_the_same(rank: int, world: int, folder: Path) -> None:
    data = batch(0, 0)

    def surveyed(net: nn.Module) -> list[Tensor]:
        with gathered(net):
            model = MorphableModel(net, lambda m: m(data[0]), BATCH)
            assert model.pairs
            found = measure(model, list(model.pairs), [lambda: loss_fn(net, data)], 0, 4, BATCH)
            assert found
        scores = [torch.tensor(m.report.improvement) for m in found.values()]
        return [*scores, *(m.x for m in found.values()), *(m.gradient for m in found.values())]

    same(surveyed(Net()), surveyed(sharded(Net())))


def undone_and_done_again(rank: int, world: int, folder: Path) -> None:
    def grouped() -> nn.Module:
        net = Net()
        fully_shard(list(net.blocks))
        fully_shard([net.norm, net.head])
        return fully_shard(net)

    def sideways() -> nn.Module:
        net = Net()
        for block in net.blocks:
            fully_shard(block.up, shard_placement_fn=lambda p: None)
        fully_shard(net.frozen)
        return fully_shard(
            net, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % 2 == 0 else None
        )

    def held_back() -> nn.Module:
        net = Net()
        net.blocks[1] = net.blocks[0]  # one block twice
        return fully_shard(net, ignored_params=set(net.head.parameters()))

    def tuned() -> nn.Module:
        net = sharded(Net(), reshard_after_forward=False)
        net.set_force_sum_reduction_for_comms(True)  # gloo has no other way to divide by a factor
        net.set_gradient_divide_factor(3.0)
        net.blocks[0].set_modules_to_forward_prefetch([net.blocks[1]])
        net.set_reduce_scatter_unused_params(True)
        net.set_unshard_in_backward(True)
        return net

    makes: dict[str, Make] = {
        "nested": nested,
        "bf16": in_bf16,
        "hybrid": lambda: sharded(Net(), mesh=hybrid()),
        "grouped": grouped,
        "sideways": sideways,
        "held back": held_back,
        "tuned": tuned,
        "one": lambda: fully_shard(Net()),
        "blocks only": lambda: [net := Net(), *map(fully_shard, net.blocks)][0],
    }
    for name, make in makes.items():
        try:
            same(train(make), train(make, there_and_back))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# Torch's own: they do not run on sharded parameters at all (2.13).
CANNOT = {"Adafactor", "LBFGS", "Rprop", "SparseAdam"}


def optimizers_follow(rank: int, world: int, folder: Path) -> None:
    kinds = [k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, Optimizer)]
    ran = set()
    for kind in kinds:
        if kind is Optimizer or kind.__name__ in CANNOT:
            continue
        ran.add(kind.__name__)
        options = {"SGD": {"momentum": 0.9}, "AdamW": {"amsgrad": True}}.get(kind.__name__, {})

        def optimize(net: nn.Module, kind: Any = kind, options: Any = options) -> Optimizer:
            only = [
                p for p in net.parameters() if p.requires_grad and (p.dim() == 2 or kind.__name__ != "Muon")
            ]
            groups = [{"params": only[:3]}, {"params": only[3:], "lr": 0.01}]
            return kind(groups, lr=0.05, **options)

        try:
            same(train(nested, None, optimize, 5), train(nested, there_and_back, optimize, 5))
        except AssertionError as error:
            raise AssertionError(f"{kind.__name__}: {error}") from error
        except (RuntimeError, NotImplementedError) as error:
            raise AssertionError(f"{kind.__name__} does not run: {error}") from error
    assert len(ran) >= 10


def plain_in_between(rank: int, world: int, folder: Path) -> None:
    never, net = Net(), sharded(Net())
    told: list[str] = []
    for name, hook in (("before", True), ("after", False)):
        net.register_forward_hook(lambda *_, name=name: told.append(name), prepend=hook)
        net.register_forward_pre_hook(lambda *_, name=name: told.append(name), prepend=hook)
    places = fsdp_hooks(net)
    net.blocks[0].up.weight.note = "kept"
    optimizers = {"main": adamw(net)}
    loss_fn(net, batch(rank, 0)).backward()
    optimizers["main"].step()
    modules, values = dict(net.named_modules()), [p.full_tensor() for p in net.parameters()]

    resharding = unshard(net, optimizers)
    assert [type(m) for m in net.modules()] == [type(m) for m in never.modules()]
    assert all(module is modules[name] for name, module in net.named_modules())
    assert net.blocks[0].__dict__.keys() == never.blocks[0].__dict__.keys()
    for module, other in zip(net.modules(), never.modules(), strict=True):
        for table in ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
            assert len(getattr(module, table)) == len(getattr(other, table)), table
    assert not net.blocks[0]._forward_hooks
    assert len(net._forward_hooks) == len(net._forward_pre_hooks) == 2
    same([p.detach() for p in net.parameters()], values)
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in never.parameters()]
    assert all(type(p) is nn.Parameter and p.grad is None for p in net.parameters())
    assert net.blocks[0].up.weight.note == "kept"
    held = [p for group in optimizers["main"].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters() if p.requires_grad}
    assert {id(p) for p in optimizers["main"].state} == {id(p) for p in held}
    assert all(not isinstance(v, DTensor) for s in optimizers["main"].state.values() for v in s.values())
    if rank == 0:  # local from here on
        copy.deepcopy(net)(batch(0, 0)[0])
    net.load_state_dict(net.state_dict())
    assert resharding.again() == []

    told.clear()
    loss_fn(net, batch(rank, 0)).backward()
    assert told == ["before", "after", "before", "after"]
    assert fsdp_hooks(net) == places


def fsdp_hooks(net: Any) -> tuple[int, int]:
    """Return where FSDP's hooks stand among the user's."""
    state = net._get_fsdp_state()
    enter, leave = state._pre_forward_hook_handle.id, state._post_forward_hook_handle.id
    return list(net._forward_pre_hooks).index(enter), list(net._forward_hooks).index(leave)


def plan_of(path: str, old: int, new: int) -> WidenPlan:
    edits = [WidenEdit(f"{path}.up.{leaf}", 0, old, new, "") for leaf in ("weight", "bias")]
    edits.append(WidenEdit(f"{path}.down.weight", 1, old, new, ""))
    attributes = ((f"{path}.up", "out_features", new), (f"{path}.down", "in_features", new))
    return WidenPlan(path, new - old, tuple(edits), attributes)


def slices_of(net: nn.Module, plan: WidenPlan) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(7), {}
    for edit in plan.edits:
        shape = list(net.get_parameter(edit.name).shape)
        shape[edit.axis] = edit.new - edit.old
        found[edit.name] = torch.randn(shape, generator=generator) * (0.1 if edit.axis else 1.0)
    return found


def grow(net: nn.Module, optimizers: dict[str, Optimizer]) -> None:
    plan = plan_of("blocks.0", 7, 10)
    widened = widen(net, plan, slices_of(net, plan))
    widen_state(optimizers, widened.changes)


def widened_as_in_one_process(rank: int, world: int, folder: Path) -> None:
    def place(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % 2 == 0 else None

    def run(spread: bool) -> tuple[list[Tensor], list[Tensor]]:
        net = Net(norm=False).double()
        if spread:
            sharded(net, shard_placement_fn=place)
        optimizers = {"main": adamw(net)}
        gradients: list[Tensor] = []
        for step in range(8):
            if step == 4:
                resharding = unshard(net, optimizers) if spread else None
                grow(net, optimizers)
                if resharding:
                    assert resharding.again() == []
                    up = net.blocks[0].up.weight
                    assert isinstance(up, DTensor)
                    assert up.shape == (10, 5)
                    assert optimizers["main"].state[up]["exp_avg"].to_local().shape == up.to_local().shape
            ranks = [rank] if spread else range(world)
            parts = [batch(r, step) for r in ranks]
            x, y = (torch.cat([p[i] for p in parts]) for i in (0, 1))
            nn.functional.cross_entropy(net(x.double()), y).backward()
            found = [p.grad for p in net.parameters() if p.grad is not None]
            gradients += [(g.full_tensor() if isinstance(g, DTensor) else g).clone() for g in found]
            optimizers["main"].step()
            optimizers["main"].zero_grad()
        return gradients, everything(net, optimizers["main"])

    for ours, alone in zip(run(True), run(False), strict=True):
        assert len(ours) == len(alone)
        for a, b in zip(ours, alone, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def axis_that_no_longer_divides(rank: int, world: int, folder: Path) -> None:
    net = Net()
    fully_shard(net.blocks[0].down, shard_placement_fn=lambda p: Shard(0))
    net.blocks[1].up, net.blocks[1].down = nn.Linear(5, 8), nn.Linear(8, 5)
    fully_shard(net.blocks[1].down, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
    fully_shard(net)
    optimizers = {"main": adamw(net)}
    loss_fn(net, batch(rank, 0)).backward()
    optimizers["main"].step()
    resharding = unshard(net, optimizers)
    plan = plan_of("blocks.1", 8, 11)
    widen_state(optimizers, widen(net, plan, slices_of(net, plan)).changes)
    (line,) = resharding.again()
    assert "(5, 11) is sharded along axis 0, not 1" in line
    weight = net.blocks[1].down.weight
    assert optimizers["main"].state[weight]["exp_avg"].placements == weight.placements == (Shard(0),)
    loss_fn(net, batch(rank, 1)).backward()
    optimizers["main"].step()


def seams_stay_open(rank: int, world: int, folder: Path) -> None:
    class Gateway:
        seen = 0

        def enter(self, x: Tensor | None) -> None:
            self.seen += 1

        def leave(self, y: Tensor) -> Tensor:
            self.seen += 1
            return y

    net, gateway = sharded(Net()), Gateway()
    close = [open_seam(net.blocks[0], role, gateway) for role in ("entry", "exit")]
    close.append(open_seam(net.blocks[1].up, "exit", gateway))
    loss_fn(net, batch(rank, 0)).backward()
    assert gateway.seen == 3
    resharding = unshard(net, {})
    assert not is_sharded(net)
    net(batch(rank, 0)[0])
    assert gateway.seen == 6
    resharding.again()
    loss_fn(net, batch(rank, 0)).backward()
    assert gateway.seen == 9
    with gathered(net):
        net(batch(rank, 0)[0])
    assert gateway.seen == 12
    for undo in close:
        undo()
    assert isinstance(net.blocks[0], FSDPModule)
    assert type(net.blocks[1].up) is nn.Linear
    loss_fn(net, batch(rank, 0)).backward()
    assert gateway.seen == 12


def refused(rank: int, world: int, folder: Path) -> None:
    net = sharded(Net())
    stale = sharded(Net())
    loss_fn(net, batch(rank, 0)).backward()
    kept = everything(net, adamw(net))
    assert raises(lambda: unshard(net.blocks[0], {}), "larger FSDP model")
    assert raises(lambda: unshard(net, {"old": adamw(stale)}), "optimizer 'old' holds a sharded parameter")
    history = LBFGS(net.parameters(), lr=0.1)
    history.state[net.head.weight]["old_dirs"] = [torch.zeros(1)]
    assert raises(lambda: unshard(net, {"main": history}), "LBFGS 'main' keeps a list as 'old_dirs'")
    optimizer = adamw(net)
    if rank == 0:  # a rank that has stepped where others have not
        optimizer.state[net.head.weight]["exp_avg"] = torch.zeros_like(net.head.weight)
    assert raises(lambda: unshard(net, {"main": optimizer}), "ranks hold different parameters")
    handle = net.head.weight.register_post_accumulate_grad_hook(lambda p: None)
    assert raises(lambda: unshard(net, {}), "'head.weight' has hooks")
    handle.remove()
    told: list[bool] = []
    hook = net.blocks[0].register_forward_hook(
        lambda *_: told.append(raises(lambda: unshard(net, {}), "in forward"))
    )
    net(batch(rank, 0)[0])
    hook.remove()
    assert told == [True]
    same(everything(net, adamw(net))[: len(list(net.parameters()))], kept[: len(list(net.parameters()))])
    state = net._get_fsdp_state()
    layout, state.__class__ = state._mp_policy, type(state)
    del state._mp_policy
    assert raises(lambda: unshard(net, {}), "FSDPState._mp_policy")
    state._mp_policy = layout
    unshard(net, {}).again()
    loss_fn(net, batch(rank, 1)).backward()


CHECKS = {
    check.__name__: check
    for check in (
        gathered_leaves_no_trace,
        gathered_keeps_what_was_not_reduced_yet,
        gathered_computes_what_training_computes,
        gathered_guards,
        surveys_are_the_same,
        undone_and_done_again,
        optimizers_follow,
        plain_in_between,
        widened_as_in_one_process,
        axis_that_no_longer_divides,
        seams_stay_open,
        refused,
    )
}

if __name__ == "__main__":
    take_part(CHECKS)

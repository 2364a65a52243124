"""One more block: the identity at birth, trained from then on, followed by all that follows the model."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import esper
from esper.checkpoint import CheckpointManager, FolderStorage, Run
from esper.checkpoint.exporting import export_model
from esper.checkpoint.format.reader import newest
from esper.contracts import DeepenPlan, Event
from esper.kasmina.depth.stack import Stack
from esper.kasmina.depth.stacks import find_stacks
from esper.kasmina.morphable import MorphableModel
from esper.surgery.widen_layers import empty_slices
from tests.integration.deep_hosts import HOSTS, INPUTS, NEW, SITES

KINDS = sorted(HOSTS)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    y = model(batch[0])
    return F.cross_entropy(y.flatten(0, -2), batch[1].flatten())


def batch(kind: str, n: int = 16) -> tuple[Tensor, Tensor]:
    x = INPUTS[kind](n)
    return x, torch.randint(0, 11, (n,) if x.is_floating_point() else x.shape)


class Deep:
    """A model whose stack got one more block in the middle of training."""

    def __init__(self, kind: str, optimizer: Any = torch.optim.AdamW, **given: Any) -> None:
        torch.manual_seed(0)
        self.kind, self.net = kind, HOSTS[kind]()
        if given.pop("averaged", False):
            given["ema"] = (AveragedModel(self.net),)
        self.ema = given.get("ema", ())
        self.plain = copy.deepcopy(self.net)
        self.optimizer = optimizer(self.net.parameters(), 1e-2)
        self.step()  # the optimizer has state by now
        self.events: list[Event] = []
        self.probe = batch(kind)
        self.growth = esper.grow(
            self.net, self.optimizer, loss_fn, probe=[self.probe], steps=100,
            config={"blueprints": ["widen", "low_rank"]}, on_event=self.events.append, **given,
        )  # fmt: skip
        found, self.refusals = find_stacks(self.net, lambda: loss_fn(self.net, self.probe), 16)
        self.stack = next(stack for stack in found if stack.site.name == SITES[kind])
        self.x = batch(kind)[0]
        self.before = self.net.eval()(self.x).detach()
        self.random = torch.get_rng_state()
        self.why = self.growth.run.parts.committer.deepen(self.stack, self.stack.block(7), 3)
        self.unmoved = torch.equal(self.random, torch.get_rng_state())
        self.after = self.net.eval()(self.x).detach()

    def step(self) -> None:
        self.net.train()
        loss = loss_fn(self.net, batch(self.kind))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @property
    def block(self) -> nn.Module:
        return self.net.get_submodule(NEW[self.kind])


@pytest.fixture(params=KINDS)
def deep(request: pytest.FixtureRequest) -> Deep:
    return Deep(request.param)


def test_nothing_changes_at_birth(deep: Deep) -> None:
    assert deep.why == ""
    assert deep.unmoved
    assert torch.equal(deep.after, deep.before)
    assert list(deep.plain.state_dict()) == [
        k for k in deep.net.state_dict() if not k.startswith(NEW[deep.kind])
    ]
    (event,) = [event for event in deep.events if event.kind == "deepened"]
    assert event.data["difference"] == 0
    assert event.data["blocks"] == deep.stack.site.width + 1
    assert event.data["parameters"] == sum(p.numel() for p in deep.net.parameters())
    for mode in (True, False):  # dropout on, and off: the block itself is the identity
        seen: list[bool] = []
        hook = deep.block.register_forward_hook(lambda m, x, y, seen=seen: seen.append(torch.equal(x[0], y)))
        deep.net.train(mode)(deep.x)
        hook.remove()
        assert seen == [True]


def test_every_parameter_learns_within_two_steps(deep: Deep) -> None:
    before = {name: p.detach().clone() for name, p in deep.block.named_parameters()}
    deep.step()
    deep.step()
    deep.step()
    still = [name for name, p in deep.block.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    assert not torch.equal(deep.net.eval()(deep.x), deep.after)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_train_it_in_the_groups_of_its_like(optimizer: Any) -> None:
    def grouped(parameters: Any, rate: float) -> Any:
        given = list(parameters)
        matrices, vectors = ([p for p in given if (p.dim() > 1) == own] for own in (True, False))
        return optimizer([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], rate)

    deep = Deep("gpt", grouped)
    homes = [{id(p) for p in group["params"]} for group in deep.optimizer.param_groups]
    for name, parameter in deep.net.named_parameters():
        assert id(parameter) in homes[parameter.dim() < 2], name
    state = {id(p): p for p in deep.optimizer.state}
    assert not any(id(p) in state for p in deep.block.parameters())
    deep.step()


def test_a_block_that_is_no_identity_is_put_back() -> None:
    deep = Deep("mlp", averaged=True)
    place = deep.stack.refreshed()
    assert place.site.exit == "2_1"
    block = place.block(1)
    with torch.no_grad():
        block.get_parameter(place.zeroed[0]).normal_()
    why = deep.growth.run.parts.committer.deepen(place, block, 4)
    assert "was put back" in why
    assert torch.equal(deep.net.eval()(deep.x), deep.after)
    assert list(deep.net._modules) == ["0", "1", "2", "2_1", "3", "4"]
    assert list(deep.ema[0].module._modules) == ["0", "1", "2", "2_1", "3", "4"]
    assert deep.growth.run.parts.committer.deepen(place, place.block(1), 4) == ""
    assert list(deep.net._modules) == ["0", "1", "2", "2_1", "2_2", "3", "4"]
    assert torch.equal(deep.net(deep.x), deep.after)
    assert place.refreshed().site.width == 4


def test_in_a_sequential_others_keep_name_and_distance_from_the_end_and_the_index_is_told() -> None:
    deep = Deep("mlp")
    place = deep.stack.refreshed()
    assert deep.growth.run.parts.committer.deepen(place, place.block(1), 4) == ""
    net = deep.growth.finish()
    assert isinstance(net, nn.Sequential)
    assert isinstance(deep.plain, nn.Sequential)
    assert len(net) == len(deep.plain) + 2
    names = list(deep.plain._modules)
    for index in (0, 1, 2, -1, -2):
        assert net[index] is net.get_submodule(names[index])
    told = [line for line in deep.growth.report().advice if "Sequential" in line]
    assert told == [
        "the model, a Sequential, got 2 more in the middle: what was [3] is [5] now, and what follows "
        "moved too; its name '3' and every key stay"
    ]
    assert net[5] is net.get_submodule("3")
    assert not any("Sequential" in line for line in Deep("vit").growth.report().advice), "behind all others"


class ByIndex(nn.Module):
    """Reads a Sequential by index."""

    def __init__(self) -> None:
        super().__init__()
        self.net = HOSTS["mlp"]()

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.net, nn.Sequential)
        for index in range(5):
            x = self.net[index](x)
        return x


def decayed(net: nn.Module, given: Any) -> Tensor:
    assert isinstance(net, nn.Sequential)
    return loss_fn(net, given) + 1e-3 * net[3].get_parameter("weight").square().sum()


@pytest.mark.parametrize(("net", "loss"), [(ByIndex(), loss_fn), (HOSTS["mlp"](), decayed)])
def test_a_sequential_that_is_read_by_index_is_refused(net: nn.Module, loss: Any) -> None:
    given = batch("mlp")
    stacks, refusals = find_stacks(net, lambda: loss(net, given), 16)
    assert stacks == []
    assert "one more block" in refusals[0].reason or "another block changes" in refusals[0].reason


@pytest.mark.parametrize("kind", KINDS)
def test_averages_follow(kind: str) -> None:
    deep = Deep(kind, averaged=True)
    assert deep.why == ""
    (average,) = deep.ema
    twin = average.module.get_submodule(NEW[kind])
    assert all(map(torch.equal, twin.state_dict().values(), deep.block.state_dict().values()))
    assert all(
        mine is not theirs for mine, theirs in zip(twin.parameters(), deep.block.parameters(), strict=True)
    )
    deep.step()
    average.update_parameters(deep.net)


def test_it_is_saved_loaded_and_rebuilt_without_esper(deep: Deep, tmp_path: Path) -> None:
    committer = deep.growth.run.parts.committer
    assert committer.deepen(deep.stack.refreshed(), deep.stack.refreshed().block(2), 4) == ""
    deep.step()
    deep.step()
    net = deep.growth.finish().eval()
    expected = net(deep.x).detach()
    folder = deep.growth.save(tmp_path / "grown")
    loaded = esper.load_into(HOSTS[deep.kind](), folder).eval()
    assert torch.equal(loaded(deep.x), expected)
    assert list(loaded.state_dict()) == list(net.state_dict())
    torch.save((deep.x, expected), tmp_path / "expected.pt")
    script = "\n".join(
        [
            "import sys, torch", "sys.modules['esper'] = None", f"sys.path[:0] = [{str(folder)!r}]",
            "from tests.integration.deep_hosts import HOSTS", "import rebuild",
            f"x, expected = torch.load({str(tmp_path / 'expected.pt')!r})",
            f"y = rebuild.load(HOSTS[{deep.kind!r}]()).eval()(x).detach()",
            "print(torch.equal(y, expected))",
        ]
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_widening_and_deepening_in_turns_are_replayed(tmp_path: Path) -> None:
    deep = Deep("mlp")
    committer, model = deep.growth.run.parts.committer, deep.growth.run.morphable
    for name, place in model.pairs.items():
        if name.startswith("2."):
            plan = place.plan(3)
            committer.carry_out(plan, empty_slices(deep.net, plan), {}, None, 4)
            committer.plans.append(plan)
            model.refresh(committer.run)
            break
    else:
        pytest.fail(str(list(model.pairs)))
    assert committer.deepen(deep.stack.refreshed(), deep.stack.refreshed().block(3), 5) == ""
    expected = deep.net.eval()(deep.x)
    folder = deep.growth.save(tmp_path / "grown")
    assert torch.equal(esper.load_into(HOSTS["mlp"](), folder).eval()(deep.x), expected)


def test_a_run_goes_on_from_its_state(deep: Deep) -> None:
    deep.step()
    stored = io.BytesIO()
    torch.save((deep.net.state_dict(), deep.growth.state_dict(), deep.optimizer.state_dict()), stored)
    stored.seek(0)
    host, run, optimizer_state = torch.load(stored)
    again = copy.deepcopy(deep.plain)
    optimizer = torch.optim.AdamW(again.parameters(), 1e-2)
    growth = esper.grow(
        again, optimizer, loss_fn, probe=[deep.probe], steps=100, config={"blueprints": ["widen", "low_rank"]}
    )
    growth.load_state_dict(run)
    again.load_state_dict(host)
    optimizer.load_state_dict(optimizer_state)
    assert growth.plans == deep.growth.plans
    assert isinstance(growth.plans[0], DeepenPlan)
    for net, own in ((deep.net, deep.optimizer), (again, optimizer)):
        torch.manual_seed(5)
        net.train()
        own.zero_grad()
        loss_fn(net, deep.probe).backward()
        own.step()
    assert all(map(torch.equal, deep.net.state_dict().values(), again.state_dict().values()))


def test_a_kernel_is_what_the_block_adds(deep: Deep) -> None:
    place: Stack = deep.stack.refreshed()
    kernel = place.kernel()
    assert set(kernel.outgoing) <= set(dict(kernel.named_parameters()))
    with place.listening() as seen:
        deep.net.eval()(deep.x)
    assert seen.y is not None
    assert not kernel(seen.y).any()
    with torch.no_grad():
        for name in kernel.outgoing:
            kernel.get_parameter(name).normal_()
    assert kernel(seen.y).any()


def test_morphable_offers_stacks_only_where_asked() -> None:
    net, given = HOSTS["gpt"](), batch("gpt")
    run = lambda: loss_fn(net, given)  # noqa: E731
    assert "blocks+block" not in MorphableModel(net, lambda m: loss_fn(m, given), 16).places
    model = MorphableModel(net, lambda m: loss_fn(m, given), 16, deepen=True)
    assert list(model.stacks) == ["blocks+block"]
    assert set(model.pairs).isdisjoint(model.stacks)
    model.refresh(run)
    assert list(model.stacks) == ["blocks+block"]


def test_a_checkpoint_is_gone_on_from_and_exported(tmp_path: Path) -> None:
    def run_of(net: nn.Module, optimizer: Any, growth: esper.Growth) -> CheckpointManager:
        return CheckpointManager(tmp_path / "kept", Run(net, optimizer, growth=growth), every=10**6)

    deep = Deep("resnet")
    deep.step()
    manager = run_of(deep.net, deep.optimizer, deep.growth)
    manager.save(wait=True)
    manager.close()
    again = copy.deepcopy(deep.plain)
    optimizer = torch.optim.AdamW(again.parameters(), 1e-2)
    growth = esper.grow(
        again, optimizer, loss_fn, probe=[deep.probe], steps=100, config={"blueprints": ["widen", "low_rank"]}
    )
    assert run_of(again, optimizer, growth).resume() is not None
    assert growth.plans == deep.growth.plans
    for net, own in ((deep.net, deep.optimizer), (again, optimizer)):
        net.train()
        own.zero_grad()
        loss_fn(net, deep.probe).backward()
        own.step()
    assert all(map(torch.equal, deep.net.state_dict().values(), again.state_dict().values()))
    storage = FolderStorage(tmp_path / "kept")
    found = newest(storage, print)
    assert found is not None
    folder = export_model(found, tmp_path / "exported", storage)
    assert "new block 2" in (folder / "card.md").read_text(encoding="utf-8")
    assert "1.2.bn2.weight" in esper.load_into(HOSTS["resnet"](), folder).state_dict()


def test_norms_of_a_new_block_know_a_batch() -> None:
    deep = Deep("resnet")
    norm = deep.block.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 1
    assert norm.momentum == 0.1
    with torch.no_grad():
        deep.block.get_parameter("bn2.weight").fill_(1.0)
        evaluated = deep.net.eval()(deep.probe[0])
        trained = deep.net.train()(deep.probe[0])
        deep.block.get_submodule("bn1").reset_running_stats()  # type: ignore[operator]
        deep.block.get_submodule("bn2").reset_running_stats()  # type: ignore[operator]
        unknown = deep.net.eval()(deep.probe[0])
    assert float((evaluated - trained).abs().max()) < float((unknown - trained).abs().max())


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_compiled_host_is_compiled_again(wrapped: bool) -> None:
    torch.manual_seed(0)
    net, given = HOSTS["gpt"](), batch("gpt")
    model: Any = torch.compile(net, backend="eager") if wrapped else net
    if not wrapped:
        net.compile(backend="eager")
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    events: list[Event] = []
    growth = esper.grow(model, optimizer, loss_fn, probe=[given], steps=100, on_event=events.append)
    before = model.eval()(given[0])
    with growth.run.morphable.policy.uncompiled():
        (stack,), _ = find_stacks(net, lambda: loss_fn(net, given), 16)
        assert growth.run.parts.committer.deepen(stack, stack.block(1), 1) == ""
    assert [event.kind for event in events][-2:] == ["deepened", "recompiled"]
    assert torch.equal(model(given[0]), before)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model.train(), given).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in net.get_submodule("blocks.2").parameters())

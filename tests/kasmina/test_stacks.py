"""Which rows of blocks are stacks, what of a new block is zero, how it is drawn, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from esper.errors import SurgeryError
from esper.kasmina.depth.birth import born, scales_of
from esper.kasmina.depth.deepen import duplicate, insert
from esper.kasmina.depth.stacks import find_stacks
from tests.integration.deep_hosts import GPT, HOSTS, INPUTS, SITES, Attentive, Encoder, Residual, mlp
from tests.kasmina import zoo
from tests.kasmina.hosts import frozen, holdings, same

ZEROED = {
    "gpt": ("out.weight", "out.bias", "down.weight", "down.bias"),
    "vit": ("out.weight", "out.bias", "down.weight", "down.bias"),
    "resnet": ("bn2.weight", "bn2.bias"),
    "mlp": ("branch.3.weight", "branch.3.bias"),
    "encoder": ("self_attn.out_proj.weight", "self_attn.out_proj.bias", "linear2.weight", "linear2.bias"),
}


def found(net: nn.Module, x: Tensor) -> tuple[dict[str, Any], dict[str, str]]:
    stacks, refusals = find_stacks(net, lambda: net(x), len(x))
    return {stack.site.name: stack for stack in stacks}, {r.place: r.reason for r in refusals}


@pytest.mark.parametrize("kind", sorted(HOSTS))
def test_the_last_layer_of_every_branch_is_zero_and_nothing_else(kind: str) -> None:
    stack = found(HOSTS[kind](), INPUTS[kind](4))[0][SITES[kind]]
    assert stack.zeroed == ZEROED[kind]
    assert stack.site.unit_parameters == sum(p.numel() for p in stack.donor.parameters())
    assert stack.site.unit_flops > 0


@pytest.mark.parametrize("kind", sorted(HOSTS))
def test_looking_leaves_no_trace(kind: str) -> None:
    torch.manual_seed(1)
    net, x = HOSTS[kind](), INPUTS[kind](4)
    net.train()
    held, state, random = holdings(net), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    stacks, _ = find_stacks(net, lambda: net(x), 4)
    stacks[0].block(3)
    assert torch.equal(random, torch.get_rng_state())
    assert holdings(net) == held
    assert same(frozen(dict(net.state_dict())), frozen(dict(state)))
    assert all(module.training for module in net.modules())


def test_a_fresh_block_starts_as_the_model_did() -> None:
    torch.manual_seed(0)
    net = GPT(width=32)
    stack = found(net, INPUTS["gpt"](4))[0]["blocks+block"]
    optimizer = torch.optim.SGD(net.parameters(), 3.0)
    net(INPUTS["gpt"](4)).square().sum().backward()
    optimizer.step()
    block = stack.block(5)
    assert isinstance(block, Attentive)
    assert abs(float(block.up.weight.detach().std()) / 0.02 - 1) < 0.1
    assert not block.up.bias.any()
    assert bool((block.norm1.weight == 1).all())
    assert not block.out.weight.any()
    assert all(p.grad is None for p in block.parameters())
    assert same(dict(block.state_dict()), dict(stack.block(5).state_dict()))
    assert not torch.equal(block.up.weight, stack.block(6).get_parameter("up.weight"))


def test_a_block_left_as_torch_makes_it_is_drawn_as_torch_does() -> None:
    torch.manual_seed(0)
    net = mlp()
    torch.manual_seed(9)
    own = Residual()
    fresh = born(net, "2", scales_of(net[2]), (), 9)
    bound = 8**-0.5  # of torch's uniform draw
    drawn, theirs = (block.get_parameter("branch.1.weight").detach() for block in (fresh, own))
    assert float(drawn.abs().max()) <= bound
    assert abs(float(drawn.std()) / float(theirs.std()) - 1) < 0.3
    assert float(drawn.std()) < bound * 0.75  # uniform, not normal


class Config:
    def __init__(self) -> None:
        self.num_hidden_layers = 2


class Configured(nn.Module):
    """Counts its blocks in a config that the blocks hold too."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.layers = nn.ModuleList(Residual() for _ in range(2))
        for index, layer in enumerate(self.layers):
            layer.config, layer.layer_idx = self.config, index  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.config.num_hidden_layers):
            x = self.layers[index](x)
        return x


def test_a_config_is_brought_up_to_date_and_stays_shared() -> None:
    net = Configured()
    stack = found(net, torch.randn(4, 8))[0]["layers+block"]
    assert net.config.num_hidden_layers == 2
    plan = stack.deepening()
    assert plan.counts == (("config", "num_hidden_layers", 3), ("layers.2", "layer_idx", 2))
    block = stack.block(0)
    inserted = insert(net, plan, block)
    assert net.config.num_hidden_layers == 3
    assert block.config is net.config
    assert block.layer_idx == 2
    with pytest.raises(SurgeryError, match="does not fit"):
        insert(net, plan, duplicate(net, "layers.0"))
    inserted.undo()
    assert net.config.num_hidden_layers == 2
    assert list(net.layers._modules) == ["0", "1"]


class Skipping(nn.Module):
    """Runs its blocks in a way of its own."""

    def __init__(self, run: Callable[[nn.ModuleList, Tensor], Any], *others: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.blocks = nn.ModuleList([Residual(), Residual(), *others])

    def forward(self, x: Tensor) -> Any:
        return self.run(self.blocks, x)


def counted(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x))


def between(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x) * 2)


def inplace(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x).relu_())


def backwards(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return blocks[0](blocks[1](x))


def recurrent(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](blocks[1](blocks[0](x))))


def scaled(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x / len(blocks)


def headed(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in list(blocks)[:-1]:
        x = block(x)
    return blocks[-1](x)


def all_states(blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
    states = [x]
    for block in blocks:
        states.append(block(states[-1]))
    return states


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Skipping(counted), "calls another block 0 times"),
        (Skipping(between), "something stands between"),
        (Skipping(inplace), "something stands between"),
        (Skipping(backwards), "each once and in order"),
        (Skipping(recurrent), "more than once"),
        (Skipping(scaled), "changes what the model returns"),
        (Skipping(all_states), "changes what the model returns"),
        (Skipping(headed, nn.Linear(8, 3)), "holds other modules behind"),
    ],
)
def test_what_another_block_would_upset_is_refused(net: nn.Module, reason: str) -> None:
    stacks, refusals = found(net, torch.randn(4, 8))
    assert stacks == {}
    assert reason in refusals["blocks+block"]


def test_post_norm_is_refused_with_the_reason() -> None:
    stacks, refusals = found(Encoder(norm_first=False), INPUTS["encoder"](4))
    assert stacks == {}
    assert "post-norm" in refusals["encoder.layers+block"]


def tied() -> nn.Module:
    net = mlp()
    net[2].branch[1].weight = net[1].branch[1].weight
    return net


def twice() -> nn.Module:
    net = mlp()
    net.more = nn.ParameterList([net[2].branch[1].weight])
    return Holder(net)


class Holder(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.listed = nn.Sequential(*list(net.children())[:5]), net.more

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def hooked() -> nn.Module:
    net = mlp()
    net[1].branch.register_forward_hook(lambda module, given, y: y)
    return net


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def parametrized() -> nn.Module:
    net = mlp()
    parametrize.register_parametrization(net[2].branch[1], "weight", Same())
    parametrize.register_parametrization(net[1].branch[1], "weight", Same())
    return net


def half_still() -> nn.Module:
    net = mlp()
    for block in (net[1], net[2]):
        block.branch[3].requires_grad_(False)
    return net


def compiled() -> nn.Module:
    net = mlp()
    for block in (net[1], net[2]):
        block.compile(backend="eager")
    return net


def still() -> nn.Module:
    return mlp().requires_grad_(False)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (tied, "tied"),
        (hooked, "hooks"),
        (parametrized, "parametrized"),
        (still, "frozen"),
        (half_still, "branch.3.weight is frozen"),
        (compiled, "compiled by itself"),
    ],
)
def test_blocks_that_are_not_their_own_are_refused(made: Callable[[], nn.Module], reason: str) -> None:
    stacks, refusals = found(made(), torch.randn(4, 8))
    assert stacks == {}
    assert reason in refusals["1+block"]


def test_a_weight_listed_elsewhere_is_refused() -> None:
    stacks, refusals = found(twice(), torch.randn(4, 8))
    assert stacks == {}
    assert "listed twice" in refusals["net+block"]


def test_blocks_of_unlike_classes_are_stacks_of_their_own() -> None:
    class Other(Residual):
        pass

    net = nn.Sequential(Residual(), Other(), Other(), nn.Linear(8, 3))
    stacks, _ = found(net, torch.randn(4, 8))
    assert {name: stack.site.width for name, stack in stacks.items()} == {"0+block": 1, "1+block": 2}
    before = stacks["0+block"]
    insert(net, before.deepening(), before.block(0))
    assert list(net._modules) == ["0", "0_1", "1", "2", "3"]
    assert before.refreshed().site.width == 2
    assert stacks["1+block"].refreshed().site.width == 2


class Rescaled(nn.Module):
    """Its shortcut has a factor, which must not become zero."""

    def __init__(self) -> None:
        super().__init__()
        self.keep, self.layer = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.keep * x + self.out(torch.tanh(self.layer(x)))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.full((8,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.out(self.norm(x))


def test_factors_of_shortcut_and_branch() -> None:
    rescaled = found(nn.Sequential(Rescaled(), Rescaled()), torch.randn(4, 8))[0]["0+block"]
    assert rescaled.zeroed == ("out.weight", "out.bias")
    assert bool((rescaled.block(0).keep == 1).all())
    scaled = found(nn.Sequential(LayerScale(), LayerScale()), torch.randn(4, 8))[0]["0+block"]
    assert scaled.zeroed == ("gamma",)


OF_THE_ZOO = {
    **dict.fromkeys(("ResNet", "ResNeXt"), ("blocks+block", ("norm2.weight", "norm2.bias"))),
    "pre-activation ResNet": ("blocks+block", ("conv2.weight",)),
    **dict.fromkeys(
        ("ViT", "GPT", "GPT with SwiGLU", "GPT with checkpointing"),
        ("layers+block", ("attention.out.weight", "attention.out.bias", "down.weight", "down.bias")),
    ),
}


@pytest.mark.parametrize("kind", zoo.HOSTS)
def test_hosts_of_many_kinds(kind: str) -> None:
    torch.manual_seed(0)
    net, given = zoo.HOSTS[kind].build(), zoo.batch(kind)
    held, state = holdings(net), copy.deepcopy(net.state_dict())
    stacks, _ = find_stacks(net, lambda: zoo.loss_fn(net, given), 4)
    assert holdings(net) == held
    assert same(dict(net.state_dict()), dict(state))
    wanted = [OF_THE_ZOO[kind]] if kind in OF_THE_ZOO else []
    assert [(stack.site.name, stack.zeroed) for stack in stacks] == wanted


@pytest.mark.parametrize("kind", ["gpt", "mlp"])
def test_under_autocast(kind: str) -> None:
    net, x = HOSTS[kind](), INPUTS[kind](4)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x)

    stacks, _ = find_stacks(net.eval(), run, 4)
    before = run()
    insert(net, stacks[0].deepening(), stacks[0].block(0))
    assert torch.equal(run(), before)

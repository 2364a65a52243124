"""Whatever a kernel changes besides itself is seen, and nothing an honest kernel does is."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper.tolaria.governor.side_effects import AllowedEffects, HostFingerprint, find_side_effects, rights

Does = Callable[[nn.Module, Tensor], None]


def write(host: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        host[0].weight[0, 0] += 1e-6


def write_unseen(host: nn.Module, x: Tensor) -> None:
    host[0].weight.data[0, 0] += 1e-6  # past the count of writes


def write_buffer(host: nn.Module, x: Tensor) -> None:
    host[1].running_mean.add_(1.0)


def overwrite(host: nn.Module, x: Tensor) -> None:
    x.data[0, 0] = 7.0


def hook_module(host: nn.Module, x: Tensor) -> None:
    host[0].register_forward_hook(lambda *rest: None)


def hook_weight(host: nn.Module, x: Tensor) -> None:
    host[0].weight.register_hook(lambda gradient: 2 * gradient)


def draw(host: nn.Module, x: Tensor) -> None:
    torch.rand(1)


def draw_python(host: nn.Module, x: Tensor) -> None:
    random.random()


def draw_numpy(host: nn.Module, x: Tensor) -> None:
    np.random.rand()


def nothing(host: nn.Module, x: Tensor) -> None:
    pass


def tell(
    does: Does, share: float = 1.0, allowed: AllowedEffects | None = None, reach: bool = False
) -> tuple[str, bool]:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    kernel, x = nn.Linear(4, 4), torch.randn(8, 4)

    def run(x: Tensor) -> Tensor:
        does(host, x)
        return kernel(x) + (host[0].weight.sum() if reach else 0.0)

    fresh = nn.Linear(4, 4)
    allowed = allowed or rights(fresh, x, fresh.parameters())
    return find_side_effects(run, x, kernel.parameters(), allowed, HostFingerprint(host, share))


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize(
    ("does", "why"),
    [
        (write, "writes to the host"),
        (write_unseen, "writes to the host"),
        (write_buffer, "writes to the host"),
        (overwrite, "writes over what it reads"),
        (hook_module, "hooks into"),
        (hook_weight, "hooks into"),
        (draw, "random streams"),
        (draw_python, "random streams"),
        (draw_numpy, "random streams"),
    ],
)
def test_what_a_kernel_changes_is_seen(does: Does, why: str, share: float) -> None:
    assert why in tell(does, share)[0]


def test_an_honest_kernel_may_go_on() -> None:
    assert tell(nothing) == ("", False)


def test_a_gradient_that_reaches_the_host_is_seen() -> None:
    assert "gradients flow" in tell(nothing, reach=True)[0]


def test_what_a_fresh_kernel_does_is_its_right_and_no_more() -> None:
    x = torch.randn(8, 4)
    dropout = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    allowed = rights(dropout, x, dropout.parameters())
    kernel, host = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2)), nn.Linear(2, 2)
    assert find_side_effects(kernel, x, kernel.parameters(), allowed, HostFingerprint(host)) == ("", False)

    def greedy(x: Tensor) -> Tensor:
        torch.rand(1)
        return kernel(x)

    assert (
        "random streams"
        in find_side_effects(greedy, x, kernel.parameters(), allowed, HostFingerprint(host))[0]
    )


def test_hooks_can_be_taken_away_again() -> None:
    host = nn.Linear(2, 2)
    kept = host.register_forward_hook(lambda *rest: None)
    seal = HostFingerprint(host)
    host.register_forward_hook(lambda *rest: None)
    host.weight.register_hook(lambda gradient: gradient)
    seal.unhook()
    assert list(host._forward_hooks) == [kept.id]
    assert not host.weight._backward_hooks


def test_a_kernel_that_gives_nothing_is_told() -> None:
    zero = nn.Linear(4, 4)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    x = torch.randn(8, 4)
    fresh = nn.Linear(4, 4)
    allowed = rights(fresh, x, fresh.parameters())
    assert find_side_effects(zero, x, zero.parameters(), allowed, HostFingerprint(nn.Linear(2, 2))) == (
        "",
        True,
    )

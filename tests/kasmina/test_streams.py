"""Kernels beside the host's layers: outputs and gradients are those of one after the other, exactly."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper.errors import ConfigError
from esper.kasmina.seeds.streams import StreamPool

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = ((1, 4, 5, 5), (3, 4, 9, 6))
GEOMETRY = [  # stride, padding, dilation, groups
    (1, 1, 1, 1),
    (2, 1, 1, 2),
    ((2, 1), (0, 2), 1, 4),
    (1, 2, 2, 1),
    ((1, 2), (2, 1), (2, 1), 2),
]
MODES = ("zeros", "reflect", "replicate", "circular")

Build = Callable[[], nn.Module]


def convolutions() -> list[tuple[Build, tuple[int, ...]]]:
    """Every geometry in every padding mode, in turns over the shapes."""
    cases: list[tuple[Build, tuple[int, ...]]] = []
    for ((stride, padding, dilation, groups), mode), shape in zip(
        itertools.product(GEOMETRY, MODES), itertools.cycle(SHAPES), strict=False
    ):

        def build(
            stride: object = stride, padding: object = padding, dilation: object = dilation,
            groups: int = groups, mode: str = mode,
        ) -> nn.Module:  # fmt: skip
            return nn.Conv2d(4, 8, 3, stride, padding, dilation, groups, padding_mode=mode)  # type: ignore[arg-type]

        cases.append((build, shape))
    return cases


CASES: list[tuple[Build, tuple[int, ...]]] = [
    *convolutions(),
    (lambda: nn.Linear(6, 8), (5, 6)),
    (lambda: nn.Linear(6, 8, bias=False), (2, 3, 6)),
    (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8), nn.Dropout(0.5)), (5, 6)),
]


def passes(
    pool: StreamPool | None, build: Build, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Two steps' outputs, then all accumulated gradients; without a pool, one after the other."""
    torch.manual_seed(3)
    core, kernel = build().to(device, dtype), build().to(device, dtype)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    found = []
    for _ in range(2):
        if pool is None:
            y, f = core(x), kernel(x)
        else:
            side = pool.fork(x, kernel)
            y = core(x)
            f = side.join()
        out = torch.addcmul(y, torch.tensor(0.5, device=device, dtype=dtype), f)
        out.square().mean().backward()
        found.append(out.detach())
    leaves = [x, *core.parameters(), *kernel.parameters()]
    return [*found, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) >= 4
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("enabled", [True, False])
def test_on_the_cpu_it_is_the_sequential_path(dtype: torch.dtype, enabled: bool) -> None:
    pool = StreamPool(enabled=enabled)
    for build, shape in CASES:
        assert_equal(passes(pool, build, shape, dtype, "cpu"), passes(None, build, shape, dtype, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("enabled", [True, False])
def test_on_cuda_it_equals_the_sequential_path(dtype: torch.dtype, enabled: bool) -> None:
    pool = StreamPool(enabled=enabled)
    for build, shape in CASES:
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
            beside = passes(pool, build, shape, dtype, "cuda")
            in_turns = passes(None, build, shape, dtype, "cuda")
        if getattr(build(), "padding_mode", "zeros") in {"reflect", "replicate"}:
            torch.testing.assert_close(beside, in_turns)  # their backward adds atomically, in any order
        else:
            assert_equal(beside, in_turns)


@pytest.mark.gpu
def test_on_cuda_a_hundred_steps_stay_equal_under_load() -> None:
    """Large enough that kernels of both streams are in flight at once, so that a missing wait would show."""

    def train(pool: StreamPool) -> list[Tensor]:
        torch.manual_seed(5)
        core, kernel = nn.Conv2d(32, 32, 3, padding=1).cuda(), nn.Conv2d(32, 32, 3, padding=1).cuda()
        optimizer = torch.optim.SGD([*core.parameters(), *kernel.parameters()], lr=1e-3)
        for _ in range(100):
            x = torch.randn(16, 32, 64, 64, device="cuda")
            side = pool.fork(x, kernel)
            y = core(x)
            out = y + side.join()
            del x, y, side  # their memory may be handed out again while a stream still reads it
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in (*core.parameters(), *kernel.parameters())]

    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        assert_equal(train(StreamPool()), train(StreamPool(enabled=False)))


@pytest.mark.gpu
def test_on_cuda_a_kernel_keeps_its_stream_and_sees_in_place_writes() -> None:
    pool, used = StreamPool(per_device=2), []
    kernel = nn.Linear(4, 4).cuda()
    kernel.register_forward_hook(lambda *given: used.append(torch.cuda.current_stream()))
    for _ in range(3):
        x = torch.zeros(2, 4, device="cuda")
        side = pool.fork(x, kernel)
        x.add_(1)
        assert torch.equal(side.join(), kernel(torch.ones(2, 4, device="cuda")))
        with torch.inference_mode():
            pool.fork(torch.ones(2, 4, device="cuda"), kernel).join()
    home = torch.cuda.current_stream()
    assert len({stream for stream in used if stream != home}) == 1


def test_the_kernel_runs_at_the_join_after_the_host() -> None:
    order: list[str] = []

    def kernel(x: Tensor) -> Tensor:
        order.append("kernel")
        return x

    side = StreamPool().fork(torch.ones(1), kernel)
    order.append("host")
    side.join()
    assert order == ["host", "kernel"]


def test_what_a_kernel_raises_comes_up_at_the_join() -> None:
    side = StreamPool().fork(torch.ones(2, 3), nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        side.join()


def test_inference_tensors_and_autocast_pass_through() -> None:
    kernel, pool = nn.Linear(3, 3), StreamPool()
    with torch.inference_mode():
        x = torch.ones(2, 3)
        assert torch.equal(pool.fork(x, kernel).join(), kernel(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert pool.fork(torch.ones(2, 3), kernel).join().dtype is torch.bfloat16


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_has_the_settings_and_streams_of_its_own(how: Callable[[StreamPool], StreamPool]) -> None:
    pool = how(StreamPool(per_device=3, enabled=False))
    assert (pool.per_device, pool.enabled) == (3, False)
    assert torch.equal(pool.fork(torch.ones(1), torch.neg).join(), torch.tensor([-1.0]))


def test_a_pool_without_streams_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 stream per device, got 0"):
        StreamPool(per_device=0)

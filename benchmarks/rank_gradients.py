"""Are two processes' gradients those of one: each on half a batch, before, during and after growth?"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import esper
from benchmarks.rank_runs import WORLD, join, say
from esper.distributed.launch import leave

MODULE = "benchmarks.rank_gradients"
KINDS = (torch.float32, torch.float64)
ROWS, LIMIT, AFTER = 32, 60, 3  # of a batch; steps at most; steps compared after the layers have changed
WHENS = ("before growth", "a kernel is exposed: host", "a kernel is exposed: kernel", "after rewrap")
SYNCED = "forward_sync_buffers"  # since torch 2.13; broadcast_buffers before
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "bucket_cap_mb": {"bucket_cap_mb": 0.0002},  # a bucket per layer
    "broadcast_buffers=False": {"broadcast_buffers": False},
    "forward_sync_buffers=False": {SYNCED: False},
    "static_graph, gradient_as_bucket_view": {"static_graph": True, "gradient_as_bucket_view": True},
}
CONFIG = {
    "schedule": {"warmup": 0.05, "stop": 0.2, "plateau": False},
    "race": {"steps": 2, "candidates": 2},
    "gate": {"false_keep": 0.99},
    "blend": {"ramp": 3, "stabilise": 1, "evaluate": 2},
}


def options() -> dict[str, dict[str, Any]]:
    """Return the sets of options this torch knows."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {name: given for name, given in OPTIONS.items() if given.keys() <= known.keys()}


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def deviation(found: Sequence[Tensor | None], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference of a gradient, as a share of the gradient's norm."""
    assert all(one is not None for one in found), "a parameter has no gradient"
    pairs = [(one, other) for one, other in zip(found, wanted, strict=True) if one is not None]
    return max(float((one - other).norm() / other.norm().clamp_min(1e-12)) for one, other in pairs)


def compared(rank: int, given: Mapping[str, Any], kind: torch.dtype) -> dict[str, float]:
    """Grow once; return the worst deviation at each time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)).to(kind)
    inputs, inner, outer = torch.randn(1024, 8), torch.randn(8, 32), torch.randn(32, 4)
    data = inputs.to(kind), ((inputs @ inner).tanh() @ outer).to(kind)
    wrapper = DistributedDataParallel(net, **given)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    probe = [tuple(part[-256:] for part in data)]
    growth = esper.grow(
        wrapper, optimizer, loss_fn, probe=probe, steps=LIMIT, growth="incubate", config=CONFIG
    )
    kernels: list[list[Tensor]] = []  # an exposed kernel's averaged gradients, before its optimizer's step
    share = growth.run.orchestrator.share

    def shared(faults: int) -> None:
        share(faults)
        exposed = [trial.kernel for trial in growth.run.orchestrator.exposed]
        kernels.extend([p.grad.clone() for p in k.parameters() if p.grad is not None] for k in exposed)

    growth.run.orchestrator.share = shared  # type: ignore[method-assign]
    worst: dict[str, float] = {}

    def note(when: str, value: float) -> None:
        worst[when] = max(value, worst.get(when, 0.0))

    left = AFTER
    for number in range(LIMIT):
        rows = torch.randint(0, 768, (ROWS,), generator=torch.Generator().manual_seed(number))
        whole = tuple(part[rows] for part in data)
        mine = tuple(part[rank::WORLD] for part in whole)
        exposed = growth.run.orchestrator.exposed
        kernel = exposed[0].kernel if exposed and exposed[0].origin.layer.exposed else None
        hosts = list(net.parameters())
        own = [] if kernel is None else list(kernel.parameters())
        wanted = torch.autograd.grad(loss_fn(net, whole), [*hosts, *own])
        loss = loss_fn(wrapper, mine)
        optimizer.zero_grad()
        loss.backward()
        host = deviation([p.grad for p in hosts], wanted[: len(hosts)])
        kernels.clear()
        optimizer.step()
        growth.step(mine, loss)
        if kernel is not None:
            note(WHENS[1], host)
            note(WHENS[2], deviation(kernels[0], wanted[len(hosts) :]))
        elif growth.plans:
            note(WHENS[3], host)
            left -= 1
        else:
            note(WHENS[0], host)
        growth.rewrap()
        if not left:
            break
    growth.finish()
    return worst


def take_part(rank: int, store: Path) -> None:
    """Compare them for each set of options."""
    join(rank, WORLD, store)
    found = {
        name: {str(kind)[6:]: compared(rank, given, kind) for kind in KINDS}
        for name, given in options().items()
    }
    say(f"end {json.dumps(found)}")
    leave()


if __name__ == "__main__":
    take_part(int(sys.argv[1]), Path(sys.argv[2]))

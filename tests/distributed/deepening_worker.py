"""Checks of test_deepening.py that run on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import esper
from esper.contracts import Event
from esper.kasmina.depth.stacks import find_stacks
from tests.distributed.ranks import take_part
from tests.integration.deep_hosts import mlp

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(256, 8, generator=GENERATOR)
Y = torch.randn(256, 11, generator=GENERATOR)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def deepened(rank: int, world: int, wrap: str) -> Tensor:
    """Train on all ranks, add a block in the middle, and return the weights it comes to."""
    torch.manual_seed(0)
    net = mlp()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model: nn.Module = net
    if wrap == "ddp":
        model = DistributedDataParallel(net)
    elif wrap == "fsdp":
        for block in (net[1], net[2]):
            fully_shard(block)
        fully_shard(net)
    optimizer = AdamW(model.parameters(), 1e-2)
    events: list[Event] = []
    config: dict[str, Any] = {"distributed": {"mode": "alone" if wrap == "none" else "auto"}}
    growth = esper.grow(
        model, optimizer, loss_fn, probe=[(X[192:], Y[192:])], config=config, on_event=events.append
    )
    order = torch.Generator().manual_seed(1)
    for step in range(12):
        rows = torch.randint(0, 192, (32,), generator=order)
        rows = rows if wrap == "none" else rows[rank::world]
        loss = loss_fn(model, (X[rows], Y[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 5:
            parts = growth.run.parts
            with parts.wrapping.reshaping(parts.optimizers):
                (stack, *_), _ = find_stacks(net, lambda: loss_fn(net, (X[:8], Y[:8])), 8)
                committer = parts.committer
                committer.run = lambda: loss_fn(net, (X[:8], Y[:8]))
                assert committer.deepen(stack, stack.block(4), 5) == ""
    assert [event.kind for event in events].count("deepened") == 1
    with growth.run.parts.wrapping.plain(growth.run.parts.optimizers):
        weights = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
        assert len(list(net.parameters())) == len(optimizer.param_groups[0]["params"])
    growth.run.parts.wrapping.close()
    return weights


def a_block_comes_to_every_rank(rank: int, world: int, folder: Path) -> None:
    alone = deepened(rank, world, "none")
    for wrap in ("ddp", "fsdp"):
        own = deepened(rank, world, wrap)
        found = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(found, own)
        assert all(torch.equal(own, other) for other in found), wrap
        assert len(own) == len(alone)
        assert torch.allclose(own, alone, atol=2e-5), (wrap, float((own - alone).abs().max()))


CHECKS = {check.__name__: check for check in (a_block_comes_to_every_rank,)}

if __name__ == "__main__":
    take_part(CHECKS)

"""Scenarios of test_watchdog.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it: before the forks
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.distributed.launch import leave
from esper.distributed.watchdog import Watchdog
from tests.distributed.forks import Ranks, play

DEADLINE = 3.0
STEPS = 6
STOPPED = 3  # in this step the last process stops itself


def join(rank: int, world: int, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def train(rank: int, world: int, store: Path, *, stop: bool = False, after: Callable[[int], None]) -> None:
    """Train a few steps with growth, which watches; say before and after every backward pass."""
    join(rank, world, store)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4))
    wrapper = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    probe = [(torch.randn(32, 4), torch.randn(32, 4))]
    config = {"distributed": {"deadline": DEADLINE}}
    growth = esper.grow(wrapper, optimizer, loss_fn, probe=probe, steps=1000, config=config)
    for number in range(STEPS):
        batch = torch.randn(8, 4), torch.randn(8, 4)
        loss = loss_fn(wrapper, batch)
        if stop and number == STOPPED and rank == world - 1:
            print("stopping", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        print(f"in {number}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        print(f"out {number}", flush=True)
        optimizer.step()
        growth.step(batch, loss)
    print(f"weights {[p.double().sum().item() for p in net.parameters()]}", flush=True)
    after(rank)


def leave_first(rank: int) -> None:
    """The last process ends without finish() or goodbye; the first one works on, longer than the deadline."""
    if not rank:
        time.sleep(DEADLINE + 2.0)
        print("still here", flush=True)


def silent(folder: Path) -> dict[str, Any]:
    """Stop a process for good while the other waits for its gradients."""
    ranks = Ranks(folder, 2, partial(train, stop=True, after=lambda rank: leave()))
    ranks.until(1, "stopping")
    took = ranks.wait([0])
    ranks.kill(1)
    return {"took": took, "code": ranks.codes[0], "said": ranks.said(0)}


def short(folder: Path) -> dict[str, Any]:
    """Stop a process for less than the deadline."""
    ranks = Ranks(folder, 2, partial(train, stop=True, after=lambda rank: leave()))
    ranks.until(1, "stopping")
    time.sleep(0.5 * DEADLINE)
    ranks.signal(1, signal.SIGCONT)
    return ranks.ended()


def left(folder: Path) -> dict[str, Any]:
    """Let a process leave as scripts do that forget finish()."""
    return Ranks(folder, 2, partial(train, after=leave_first)).ended()


def watch(rank: int, world: int, store: Path, close: bool) -> None:
    """Watch for some pulses, then end the interpreter, without a barrier."""
    join(rank, world, store)
    watchdog = Watchdog(None, DEADLINE)
    time.sleep(0.3 + 0.2 * rank)
    if close:
        watchdog.close()
        assert not watchdog.thread.is_alive()
        dist.barrier()
        dist.destroy_process_group()
    print("done", flush=True)


def ends(folder: Path, count: int, close: bool) -> list[dict[str, Any]]:
    """End pairs of processes."""
    pairs = []
    for number in range(count):
        (folder / str(number)).mkdir()
        pairs.append(Ranks(folder / str(number), 2, partial(watch, close=close)))
    return [pair.ended() for pair in pairs]


if __name__ == "__main__":
    play(
        {
            "silent": silent,
            "short": short,
            "left": left,
            "closed": partial(ends, count=10, close=True),
            "unclosed": partial(ends, count=4, close=False),
        }
    )

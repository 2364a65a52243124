"""Three arms on one task: grown, its twin that never grows, and a fixed network of the grown size.

Every arm takes its learning rate from the same rates, by its own loss on the validation part. The test part
is read once per arm, at that rate.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

import esper
from esper.kasmina.recording.flops import FlopMeter

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Parts:
    """What one seed trains on, decides growth by, chooses rates by, and is judged by."""

    train: list[Batch]  # in the order of training; an epoch is written out
    probe: list[Batch]
    val: Batch
    test: Batch


@dataclass(frozen=True)
class Task:
    build: Callable[[], nn.Module]
    data: Callable[[int], Parts]
    loss_fn: Callable[[nn.Module, Batch], torch.Tensor]
    rates: tuple[float, ...]
    budget: dict[str, Any]
    config: dict[str, Any]
    classes: bool  # whether accuracy is worth a column


@dataclass(frozen=True)
class Row:
    arm: str
    seed: int
    rate: float
    val_loss: float
    test_loss: float
    accuracy: float
    parameters: int
    flops: float  # of training, growth included
    seconds: float  # of the processor


def train(task: Task, arm: str, net: nn.Module, rate: float, seed: int) -> Row:
    """Train one arm in a plain loop, and judge it."""
    parts = task.data(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    steps = len(parts.train)  # the rate falls to zero over the last third
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 3 * (1 - step / steps)))
    begun, growth, flops = time.process_time(), None, 0.0
    if arm == "grown":
        growth = esper.grow(
            net,
            optimizer,
            task.loss_fn,
            probe=parts.probe,
            schedulers=[decay],
            steps=steps,
            budget=task.budget,
            config=task.config,
            seed=seed,
        )
    for batch in parts.train:
        loss = task.loss_fn(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if growth is not None:
            growth.step(batch, loss)
    if growth is not None:
        net = growth.finish()
        flops = float(growth.cost.training_flops + growth.cost.growth_flops)
    else:
        flops = 3.0 * forward_flops(net, parts.train[0][0][:1]) * sum(len(x) for x, _ in parts.train)
    seconds = time.process_time() - begun
    net.eval()
    with torch.no_grad():
        val, test = (task.loss_fn(net, part).item() for part in (parts.val, parts.test))
        inputs, targets = parts.test
        accuracy = (net(inputs).argmax(-1) == targets).float().mean().item()
    size = sum(p.numel() for p in net.parameters())
    row = Row(arm, seed, rate, val, test, accuracy, size, flops, seconds)
    print(
        f"seed {seed}, {arm}, rate {rate}: validation {val:.4f}, {size} parameters, {seconds:.1f} s",
        file=sys.stderr,
    )
    return row


def forward_flops(net: nn.Module, example: torch.Tensor) -> int:
    """Count what one example costs forward, as Esper counts it."""
    with torch.no_grad(), FlopMeter() as meter:
        net(example)
    return meter.total


def fresh(net: nn.Module, seed: int) -> nn.Module:
    """Make a network of the same shape with new weights."""
    torch.manual_seed(seed)
    net = copy.deepcopy(net)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net.train()


def compare(task: Task, seed: int) -> tuple[list[Row], list[str]]:
    """Run every arm at every rate; return the best row of each arm, and what the grown network became."""
    rows: list[Row] = []
    best: tuple[Row, nn.Module] | None = None
    for rate in task.rates:
        torch.manual_seed(seed)
        start = task.build()
        net = copy.deepcopy(start)
        row = train(task, "grown", net, rate, seed)
        if best is None or row.val_loss < best[0].val_loss:
            best = row, net
        rows += [row, train(task, "twin", start, rate, seed)]
    assert best is not None
    rows += [train(task, "fixed", fresh(best[1], seed), rate, seed) for rate in task.rates]
    chosen = [
        min((r for r in rows if r.arm == arm), key=lambda r: r.val_loss) for arm in ("grown", "twin", "fixed")
    ]
    small = {name: shape(module) for name, module in start.named_modules()}
    became = [
        f"{name}: {small[name]} to {shape(module)}"
        for name, module in best[1].named_modules()
        if shape(module) != small[name]
    ]
    return chosen, became


def shape(module: nn.Module) -> str:
    return f"{module.in_features}>{module.out_features}" if isinstance(module, nn.Linear) else ""


def main(task: Task, seeds: int) -> int:
    """Print the comparison; 1 where the grown network is not better than its twin."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=seeds, help="how many, from --first")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--json", action="store_true", help="print every row as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    shapes: dict[int, list[str]] = {}
    for seed in range(asked.first, asked.first + asked.seeds):
        chosen, shapes[seed] = compare(task, seed)
        rows += chosen
    won = test_loss(rows, "grown") < test_loss(rows, "twin")
    if asked.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "grew": shapes, "won": won}))
    else:
        show(rows, task.classes)
        for seed, lines in shapes.items():
            print(f"\nseed {seed} grew " + ("\n  ".join(["", *lines]) if lines else "nothing"))
    return 0 if won else 1


def test_loss(rows: list[Row], arm: str) -> float:
    return fmean(row.test_loss for row in rows if row.arm == arm)


def show(rows: list[Row], classes: bool) -> None:
    head = f"{'arm':<6} {'best rates':>20} {'parameters':>11} {'test loss':>10}"
    print(head + (f" {'accuracy':>9}" if classes else "") + f" {'GFLOP':>8} {'CPU s':>6}")
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = [row for row in rows if row.arm == arm]
        rates = ", ".join(f"{rate:g}" for rate in sorted({row.rate for row in mine}))
        line = f"{arm:<6} {rates:>20} {fmean(r.parameters for r in mine):>11.0f}"
        line += f" {fmean(r.test_loss for r in mine):>10.4f}"
        line += f" {fmean(r.accuracy for r in mine):>9.4f}" if classes else ""
        print(line + f" {fmean(r.flops for r in mine) / 1e9:>8.1f} {fmean(r.seconds for r in mine):>6.1f}")

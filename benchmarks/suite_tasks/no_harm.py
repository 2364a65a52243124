"""Hosts that growth cannot help: noise for labels, an easy table, a full network, one that has converged.

A host is a task of one size, trained with growth and without at one rate, the middle of what suits it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import data
from benchmarks.data import Split, stream
from benchmarks.suite_tasks import digits, transformers
from benchmarks.suite_tasks.networks import cnn, hidden_widths, mlp
from benchmarks.suite_tasks.task import SuiteTask

FEW = 384  # windows the converged GPT knows: 24,576 characters
CHECK, PATIENCE = (
    40,
    3,
)  # steps between two looks at the held-out loss; looks without a new minimum that end it
MOST = 2400  # steps before it is given up as not converging


@dataclass(frozen=True)
class Host:
    """A task of one size; ``converge`` trains it before growth is offered."""

    task: SuiteTask
    rate: float
    converge: bool = False

    def build(self, seed: int) -> nn.Module:
        """Build the network both twins start from."""
        net = self.task.build(self.task.full, seed)
        return converged(self.task, net, seed, self.rate) if self.converge else net


def converged(task: SuiteTask, net: nn.Module, seed: int, rate: float) -> nn.Module:
    """Train until the held-out loss has not had a new minimum for ``PATIENCE`` looks.

    Raises:
        RuntimeError: It still falls after ``MOST`` steps.
    """
    split = task.split(seed)
    optimizer = task.optimizer(net.parameters(), lr=rate)
    best, looks = float("inf"), 0
    for step, (x, y) in enumerate(task.batches(split, seed, MOST), start=1):
        loss = task.loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % CHECK == 0:
            held_out = task.judge(net, split.probe)[1]
            best, looks = (held_out, 0) if held_out < best else (best, looks + 1)
            if looks == PATIENCE:
                return net
    raise RuntimeError(f"{task.name}: the held-out loss still falls after {MOST} steps; it is {best:.3f}")


@cache
def noise(seed: int, images: bool) -> Split:
    return data.digits(seed, images=images, shuffled=True)


@cache
def few_windows(seed: int) -> Split:
    """Keep ``FEW`` training windows of the GPT's text; probe and test stay."""
    split = transformers.windows(seed)
    draw = torch.Generator().manual_seed(stream(seed, "split"))
    rows = torch.randperm(len(split.train[0]), generator=draw)[:FEW]
    return replace(split, train=(split.train[0][rows], split.train[1][rows]))


host = partial(
    SuiteTask,
    selection=False,
    read=hidden_widths,
    loss=F.cross_entropy,
    metric="accuracy",
    optimizer=torch.optim.Adam,
    rates=(3e-3, 1e-2, 3e-2),
    batch=64,
)

HOSTS = {
    each.task.name: each
    for each in (
        Host(
            host(
                name="noise-vectors",
                split=partial(noise, images=False),
                network=partial(mlp, 64, 10),
                sizes=((8,),),
                steps=60 * 17,
            ),
            rate=1e-2,
        ),
        Host(
            host(
                name="noise-images-bn",
                split=partial(noise, images=True),
                network=partial(cnn, normalised=True),
                sizes=((4, 8),),
                steps=40 * 17,
            ),
            rate=1e-2,
        ),
        Host(
            host(
                name="breast-cancer",
                split=cache(data.breast_cancer),
                network=partial(mlp, 30, 2),
                sizes=((8,),),
                steps=60 * 6,
            ),
            rate=1e-2,
        ),
        Host(
            host(name="digits-cnn-full", split=digits.images, network=cnn, sizes=((16, 32),), steps=60 * 17),
            rate=1e-2,
        ),
        Host(
            SuiteTask(
                name="gpt-converged",
                selection=False,
                split=few_windows,
                network=transformers.gpt,
                read=transformers.block_sizes,
                sizes=(((32, 128),),),
                loss=transformers.token_loss,
                metric="loss",
                optimizer=partial(torch.optim.AdamW, weight_decay=0.1),
                rates=(1e-3, 3e-3, 1e-2),
                steps=240,
                batch=12,
            ),
            rate=3e-3,
            converge=True,
        ),
    )
}

"""Student and teacher, 10-10-10, no biases, full batch, plain SGD: GradMax's task and a normal teacher."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import data
from benchmarks.data import Split, stream
from benchmarks.suite_tasks.networks import hidden_widths, mlp
from benchmarks.suite_tasks.task import Size, SuiteTask

SIZES = [1000, 250, 1000]  # training, probe, test


@cache
def uniform(seed: int) -> Split:
    """Draw the teacher's weights from U(−1, 1), as GradMax's notebook."""
    return data.teacher(seed)


@cache
def normal(seed: int) -> Split:
    """Draw the teacher's weights from N(0, 1/3): the variance of U(−1, 1)."""
    generator = torch.Generator().manual_seed(stream(seed, "split"))
    inner, outer = (torch.randn(10, 10, generator=generator) / 3**0.5 for _ in range(2))
    inputs = torch.randn(sum(SIZES), 10, generator=generator)
    targets = (inputs @ inner.T).relu() @ outer.T
    return Split(*zip(inputs.split(SIZES), targets.split(SIZES), strict=True))


def student(widths: Size) -> nn.Sequential:
    """Build the student with Keras' Glorot start."""
    net = mlp(10, 10, widths, bias=False)
    for parameter in net.parameters():
        nn.init.xavier_uniform_(parameter)
    return net


teacher = partial(
    SuiteTask,
    network=student,
    read=hidden_widths,
    sizes=((5,), (10,)),
    loss=F.mse_loss,
    metric="loss",
    optimizer=torch.optim.SGD,
    rates=(0.3, 0.5, 1.0),
    steps=1500,
    batch=None,
    floor=0.1,  # 1 % of it is 3e-4 of the targets' variance, 3.7
)

TASKS = (
    teacher(name="teacher-uniform", selection=True, split=uniform),
    teacher(name="teacher-normal", selection=False, split=normal),
)

"""The gromo package on the suite's tasks that it can train: one hidden layer, a constant rate.

It grows from the small width to the full one by its tutorial's schedule: see ``benchmarks/arms/gromo.py``.
"""

from __future__ import annotations

from torch import nn

from benchmarks import arms
from benchmarks.arms import Setup
from benchmarks.flops import parameters
from benchmarks.suite_runs.training import Clock, Run
from benchmarks.suite_tasks import SuiteTask
from benchmarks.tasks import Task, squared_error

NAME = "gromo"
PLAIN = [nn.Linear, nn.ReLU, nn.Linear]


def fits(task: SuiteTask, schedule: str) -> bool:
    """Say whether gromo is installed and can train the task: a plain net of one hidden layer."""
    if schedule != "constant" or not arms.installed(NAME):
        return False
    return [type(module) for module in task.build(task.small, 0).children()] == PLAIN


def train(task: SuiteTask, seed: int, rate: float, steps: int) -> Run:
    """Train gromo's own container from the small network's weights for as many whole epochs as fit."""
    split = task.split(seed)
    per_epoch = 1 if task.batch is None else -(-len(split.train[0]) // task.batch)
    epochs = max(1, steps // per_epoch)
    clock = Clock()
    with clock:
        arm = arms.start(NAME, Setup(adapted(task, epochs), split, seed, rate))
        for _ in zip(range(epochs), arm.epochs(), strict=False):
            pass
    probe, probe_loss = task.judge(arm.net, split.probe)
    test, test_loss = task.judge(arm.net, split.test)
    return Run(
        task=task.name,
        seed=seed,
        rate=rate,
        schedule="constant",
        steps=epochs * per_epoch,
        size=None,  # gromo's own modules
        parameters=parameters(arm.net),
        probe=probe,
        probe_loss=probe_loss,
        test=test,
        test_loss=test_loss,
        training_flops=arm.training_flops,
        growth_flops=arm.growth_flops,
        seconds=clock.wall,
        cpu_seconds=clock.cpu,
        growths=arm.growths,
    )


def adapted(task: SuiteTask, epochs: int) -> Task:
    """Say a suite task in the words of the older benches, whose arm this is."""
    return Task(
        name=task.name,
        split=task.split,
        layers=task.network,
        small=task.small,
        big=task.full,
        loss=task.loss,
        score=squared_error,  # not read: the suite judges by itself
        higher_is_better=False,
        optimizer=task.optimizer,
        rates=task.rates,
        epochs=epochs,
        batch=task.batch,
    )

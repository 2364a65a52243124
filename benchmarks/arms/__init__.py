"""The ways to train a task: a file here is an arm, ``file:option`` one of its forms.

fixed[:small]      the network at its final (or smallest) widths, never grown
gradmax            GradMax's schedule and start, in torch
gromo              the gromo package, TINY
grown[:rule]       ``esper.grow``; the rule is how optimizer state of new units starts
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from benchmarks.data import Split
from benchmarks.tasks import Task, Widths


@dataclass(frozen=True)
class Setup:
    """One training: everything but the arm itself."""

    task: Task
    split: Split
    seed: int
    rate: float
    widths: Widths | None = None  # of a fixed network; None: the task's big ones


class Arm(Protocol):
    """A training that advances one epoch per item of ``epochs()`` and counts what it spends."""

    net: nn.Module
    growths: int
    training_flops: int  # steps of the network itself
    growth_flops: int  # everything growth added: statistics, candidates, evidence, line searches

    def epochs(self) -> Iterator[None]: ...


def start(name: str, setup: Setup) -> Arm:
    """Find an arm by name and set it up."""
    file, _, option = name.partition(":")
    return importlib.import_module(f"benchmarks.arms.{file}").start(setup, option)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

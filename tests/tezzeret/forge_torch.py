"""What a worker with torch builds: one real kernel, and a tensor too many."""

from __future__ import annotations

import os

import torch
from safetensors.torch import save
from torch import nn

from esper.contracts import Kernel, kernel_id
from tests.tezzeret.forge_builds import Ask

warmed: list[int] = []


def warm() -> None:
    """Pay for the exporter's imports (2 s) before the first request."""
    torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    warmed.append(os.getpid())


def build(ask: Ask) -> Kernel:
    """Export a small network; ``hoard`` asks for more memory than there is."""
    torch.manual_seed(ask.seed)
    host = nn.Sequential(nn.Linear(4, ask.hidden), nn.ReLU(), nn.Linear(ask.hidden, 4))
    hoard = []
    while ask.task == "hoard":
        hoard.append(torch.ones(1 << 22))
    exported = torch.export.export(host, (torch.ones(2, 4),))
    assert torch.equal(exported.module()(torch.ones(2, 4)), host(torch.ones(2, 4)))
    facts = (ask.graph, ask.signature, ask.hidden, ask.seed, "export", f"torch {torch.__version__}")
    report = {"threads": torch.get_num_threads(), "warmed": warmed == [os.getpid()]}
    return Kernel(kernel_id(*facts), *facts, save(dict(host.state_dict())), report=report)

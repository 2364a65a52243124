"""What the governor adds to a step: hosts of several kinds, timed beside their own training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from esper.nissa.detectors.robust import Detectors
from esper.tolaria.governor import Reading, VitalsReader

COST_STEPS, COST_ROUNDS = 12, 5


def encoder() -> tuple[nn.Module, torch.Tensor, int]:
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(16, 32, 128), 32


def convolutions() -> tuple[nn.Module, torch.Tensor, int]:
    layers = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(4):
        layers += [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    return nn.Sequential(*layers), torch.randn(16, 3, 32, 32), 1024


def dense(width: int, batch: int) -> tuple[nn.Module, torch.Tensor, int]:
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return net, torch.randn(batch, width), 1


HOSTS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor, int]]] = {
    "small": partial(dense, 32, 32),
    "mlp 1024, batch 64": partial(dense, 1024, 64),
    "mlp 1024, batch 256": partial(dense, 1024, 256),
    "encoder, 512 tokens": encoder,
    "convolutions, 16 images": convolutions,
}


def cost(name: str) -> dict[str, Any]:
    """Time steps and the governor's part of them, in turns; CPU seconds of this thread, medians of rounds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, x, places = HOSTS[name]()
    optimizer = torch.optim.Adam(net.parameters())
    watcher, detectors = VitalsReader(net, {"": optimizer}), Detectors()
    watcher.close()  # called by hand below, so that it can be timed apart
    parameters = sum(p.numel() for p in net.parameters())
    flops = 6 * parameters * len(x) * places
    watcher.reading = Reading.of(flops, parameters)
    step_ms, own_ms, number = [], [], 0
    for _ in range(COST_ROUNDS):
        spent = own = 0.0
        for _ in range(COST_STEPS):
            begun = time.thread_time()
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            value = float(loss.detach())
            middle = time.thread_time()
            watcher._before(optimizer)
            number += 1
            detectors.look(watcher.read(value), number)
            spent, own = spent + middle - begun, own + time.thread_time() - middle
        step_ms.append(1e3 * spent / COST_STEPS)
        own_ms.append(1e3 * own / COST_STEPS)
    step, mine = statistics.median(step_ms), statistics.median(own_ms)
    facts = {"host": name, "parameters": parameters, "flops": flops, "every": watcher.reading.every}
    return facts | {
        "share_read": watcher.reading.share,
        "step_ms": step,
        "own_ms": mine,
        "share": mine / step,
    }

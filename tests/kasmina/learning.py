"""Hosts that have learned something, and the p-value of what a score found at one of their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esper.kasmina.evidence.score import Scored
from esper.kasmina.evidence.significance import p_value

NetT = TypeVar("NetT", bound=nn.Module)


def learned(net: NetT, loss: Callable[[Any, Any], Tensor], make: Callable[[int], Any], steps: int) -> NetT:
    """Train on batches 1000, 1001, …"""
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, make(1000 + step)).backward()
        optimizer.step()
    return net


def p_of(one: Scored) -> float:
    found = p_value(one.values)
    assert found is not None
    return found

"""Requests that a forge must survive."""

from __future__ import annotations

import ctypes
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from esper.blueprints import CATALOGUE
from esper.contracts import Kernel, Signature
from esper.tezzeret import build as building
from esper.tezzeret.build import KernelRequest
from esper.tezzeret.limits import MIB, Limits

LIMITS = Limits(wall=2.0, memory=1024 * MIB, file=16 * MIB)
REQUEST = KernelRequest(
    CATALOGUE.get("residual_mlp").to_json(), Signature("vector", "parallel", 64, 64), 32, 0, (32, 64)
)


@dataclass(frozen=True)
class Hostile:
    """A request that must come to nothing; ``what`` is a key of HOSTILE."""

    what: str


def build(request: KernelRequest | Hostile) -> Kernel:
    """Build in the worker; a hostile request does what it says first."""
    if isinstance(request, Hostile):
        HOSTILE[request.what]()
        return building.build(REQUEST)
    return building.build(request)


def loop() -> None:
    while True:
        pass


def hoard() -> None:
    kept = []
    while True:
        kept.append(torch.ones(MIB))


def write() -> None:
    Path("large").write_bytes(bytes(2 * LIMITS.file))


def crash() -> None:
    ctypes.string_at(0)


def connect() -> None:
    socket.create_connection(("127.0.0.1", 9), timeout=5)


def many() -> None:
    building.build(replace(REQUEST, graph=json.dumps({"nodes": [{}] * 1_000_000})))


def unknown() -> None:
    building.build(replace(REQUEST, graph=REQUEST.graph.replace("gelu", "system")))


def misfit() -> None:
    building.build(replace(REQUEST, signature=Signature("image", "parallel", 64, 64)))


HOSTILE: dict[str, Callable[[], object]] = {
    "an unknown operator": unknown,
    "another signature": misfit,
    "a million nodes": many,
    "an endless loop": loop,
    "a memory bomb": hoard,
    "a file too large": write,
    "a segmentation fault": crash,
    "an exit": lambda: os._exit(3),
    "a connection": connect,
}

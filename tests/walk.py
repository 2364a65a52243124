"""Train a small model and print, as JSON, which files of Esper two of its steps enter, in order.

It runs in a process of its own: what an earlier run has cached is not entered again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.contracts import Event

SRC = f"{Path(esper.__file__).parent}/"
STEPS = 200
Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def entered(call: Callable[[], object]) -> list[str]:
    """The files of Esper in which a call runs a function, by the first one of each."""
    seen: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(SRC):
            seen.setdefault(name.removeprefix(SRC))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(seen)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    host = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(host.parameters(), lr=1e-2)
    told: list[Event] = []
    growth = esper.grow(
        host,
        optimizer,
        loss_fn,
        probe=[(x[256:], y[256:])],
        steps=STEPS,
        growth="early",
        on_event=told.append,
    )
    found: dict[str, list[str]] = {}
    for _ in range(STEPS):
        rows = torch.randint(0, 256, (64,))
        batch = x[rows], y[rows]
        optimizer.zero_grad()
        loss = loss_fn(host, batch)
        loss.backward()
        optimizer.step()
        told.clear()
        walk = entered(lambda batch=batch, loss=loss: growth.step(batch, loss))
        kinds = {event.kind for event in told}
        if "widened" in kinds:
            found.setdefault("event", walk)
        elif not kinds and not growth.loop.early.listens(growth.steps):  # type: ignore[union-attr]
            found.setdefault("nothing due", walk)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

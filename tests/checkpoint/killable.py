"""A run that may be killed at any instant and started again; it ends with the same weights.

    python killable.py FOLDER WORKERS EVERY

It grows by a race, dropout draws from torch's stream, the data adds noise from it too, a scheduler moves once
per epoch, and everything is found again by itself.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import esper
from esper.checkpoint import Batches, CheckpointManager, Run
from esper.contracts import Event

CLASSES, EPOCHS, EXAMPLES, BATCH = 8, 8, 640, 32
STEPS = EPOCHS * EXAMPLES // BATCH  # 160


class Clusters(Dataset[tuple[Tensor, int]]):
    """Every look at an example adds other noise, from torch's, NumPy's and Python's streams."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % CLASSES
        noise = 0.3 * torch.randn(CLASSES) + 0.01 * random.random() + 0.01 * float(np.random.rand())
        return 2 * torch.eye(CLASSES)[label] + noise, label


def host() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(CLASSES, 1), nn.Tanh(), nn.Dropout(0.1), nn.Linear(1, CLASSES), nn.BatchNorm1d(CLASSES)
    )


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Training:
    """The run, fresh."""

    def __init__(self, folder: Any, workers: int = 0, **options: Any) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.net = host()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, EPOCHS)
        self.average = torch.optim.swa_utils.AveragedModel(self.net)
        generator = torch.Generator().manual_seed(1)
        probe = (2 * torch.eye(CLASSES).repeat(32, 1), torch.arange(CLASSES).repeat(32))
        self.events: list[Event] = []
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            loss_fn,
            probe=[probe],
            steps=STEPS,
            ema=[self.average],
            budget={"growth_factor": 8.0},
            growth="incubate",
            on_event=self.events.append,
        )
        loader = DataLoader(
            Clusters(), BATCH, shuffle=True, generator=generator, num_workers=workers, drop_last=True
        )
        self.batches = Batches(loader)
        run = Run(
            self.net,
            self.optimizer,
            growth=self.growth,
            modules={"average": self.average},
            others={"scheduler": self.scheduler},
            batches=self.batches,
            config={"workers": workers},
        )
        self.manager = CheckpointManager(folder, run, observe=self.events.append, **options)

    def train(self, until: int = STEPS, pause: float = 0.0) -> None:
        """Go on from where it is, up to a step."""
        while self.batches.epoch < EPOCHS:
            for batch in self.batches:
                loss = loss_fn(self.net, batch)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.average.update_parameters(self.net)
                self.growth.step(batch, loss)
                self.manager.step({"loss": loss})
                time.sleep(pause)
                if self.manager.steps >= until and until < STEPS:
                    return
            self.scheduler.step()

    def digest(self) -> str:
        """Of weights, averages, the optimizer's state and the lineage."""
        sha = hashlib.sha256(json.dumps([str(plan) for plan in self.growth.plans]).encode())
        tensors = {**self.net.state_dict(), **{f"ema.{k}": v for k, v in self.average.state_dict().items()}}
        for name, parameter in self.net.named_parameters():
            tensors |= {f"{name}/{k}": v for k, v in self.optimizer.state[parameter].items()}
        for name in sorted(tensors):
            sha.update(name.encode() + tensors[name].detach().numpy().tobytes())
        return sha.hexdigest()


def main(folder: str, workers: str, every: str, pause: str) -> None:
    begun = time.perf_counter()
    training = Training(Path(folder) / "checkpoints", int(workers), every=int(every))
    found = training.manager.resume()
    print(json.dumps({"resumed": None if found is None else found.step}), flush=True)
    training.train(pause=float(pause))
    training.manager.close()
    training.growth.finish()
    told = [event.data["message"] for event in training.events if event.kind == "warning"]
    stages = sorted({event.data["target"] for event in training.events if event.kind == "stage"})
    facts = {"digest": training.digest(), "grown": len(training.growth.plans), "told": told, "stages": stages}
    print(json.dumps({**facts, "seconds": time.perf_counter() - begun}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

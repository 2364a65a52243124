"""Growing runs in which a seed turns bad; every bit can be compared with a twin that never grows."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from benchmarks import data
from benchmarks.tasks import cnn, mlp
from esper.contracts import Event, Stage
from esper.kasmina.race.trial import Exposed, Training
from esper.surgery.isolation.contexts import evaluating, untouched

STEPS, BATCH = 200, 32
FEW, PREY = 96, 200  # training examples that can be learned by heart, and others that are harmed
LONG = {"ramp": 10, "stabilise": 10, "evaluate": 10}  # steps in which a host comes to lean on a seed


@dataclass(frozen=True)
class Host:
    """What is trained, and what may grow in it."""

    split: Callable[[int], data.Split]
    net: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    blueprints: tuple[str, ...] = ("widen",)


def bottleneck() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Dropout(0.05), nn.Linear(3, 10))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 10))


HOSTS = {
    "mlp": Host(data.digits, partial(mlp, 64, 10, (2,)), partial(torch.optim.Adam, lr=0.01)),
    "dropout": Host(data.digits, bottleneck, partial(torch.optim.AdamW, lr=0.01)),
    "cnn": Host(
        partial(data.digits, images=True),
        partial(cnn, (2, 4)),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    ),
    "branch": Host(data.digits, normalised, partial(torch.optim.RMSprop, lr=0.003), ("residual_mlp",)),
}


class Run:
    """One growing run with a bad seed in it; its twin never grows."""

    def __init__(self, host: Host, seed: int, governed: bool, few: bool, grows: bool = True) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        split = host.split(seed)
        x, y = split.train
        self.train = (x[:FEW], y[:FEW]) if few else (x, y)
        self.prey = split.test[0][:PREY], split.test[1][:PREY]
        self.judges = (
            split.test[0][PREY:],
            split.test[1][PREY:],
        )  # neither the seed nor the governor sees them
        self.probe, self.net = split.probe, host.net()
        self.optimizer = host.optimizer(self.net.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 50, 0.9)
        self.order = torch.Generator().manual_seed(seed)
        self.events: list[Event] = []
        self.digests: dict[int, str] = {}  # by step
        self.restored: list[tuple[int, str]] = []  # to which step, and what was there then
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.growth = esper.grow(
                self.net,
                self.optimizer,
                lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
                probe=[self.probe],
                steps=STEPS,
                schedulers=[self.scheduler],
                budget={"growth_factor": 8.0},
                growth="incubate",
                config={
                    "governor": {"enabled": governed, "calm": 4},
                    "blueprints": list(host.blueprints),
                    "schedule": {"warmup": 0.1},
                    "blend": LONG if few else {},
                },
                seed=seed,
                on_event=self.told,
            )
        if not grows:
            self.growth.pause()
        self.digests[0] = self.digest()

    def told(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "rolled_back":
            self.restored.append((event.data["to"], self.digest()))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def step(self) -> None:
        rows = torch.randint(len(self.train[0]), (BATCH,), generator=self.order)
        batch = self.train[0][rows], self.train[1][rows]
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.growth.step(batch, loss.detach())

    def digest(self) -> str:
        """Digest all that goes back: weights, buffers, optimizer, scheduler, random streams."""
        sha = hashlib.sha256()
        for name, tensor in self.net.state_dict().items():
            if "_esper" not in name:
                sha.update(name.encode() + tensor.detach().numpy().tobytes())
        for state in self.optimizer.state_dict()["state"].values():
            sha.update(
                b"".join(
                    v.numpy().tobytes() if isinstance(v, Tensor) else repr(v).encode() for v in state.values()
                )
            )
        groups = self.optimizer.state_dict()["param_groups"]
        sha.update(repr([{k: v for k, v in g.items() if k != "params"} for g in groups]).encode())
        sha.update(repr(self.scheduler.state_dict()).encode() + torch.get_rng_state().numpy().tobytes())
        sha.update(repr(random.getstate()).encode() + repr(np.random.get_state()).encode())
        return sha.hexdigest()

    @property
    def trial(self) -> Any:
        return self.growth.run.orchestrator.oldest

    def stage(self) -> Stage | None:
        return (
            None if self.trial is None else self.growth.run.morphable.layout.stage_of(self.trial.origin.seed)
        )

    def until(self, where: str) -> bool:
        """Train until a seed is where it is to be turned."""
        while self.growth.steps < STEPS:
            self.step()
            trial = self.trial
            if trial is None:
                continue
            if where == "race" and isinstance(trial, Training) and trial.tap.x is not None:
                return True
            if where == "winner" and isinstance(trial, Training):
                return True
            if where in ("exposed", "finish") and isinstance(trial, Exposed):
                return True
        return False

    def held_out(self, kernel: Any) -> Tensor:
        """Return the loss of every example that judges, with a kernel at full strength or without any."""
        with evaluating(self.net), untouched(self.net, 0), self.trial.origin.layer.showing(kernel):
            return F.cross_entropy(self.net(self.judges[0]), self.judges[1], reduction="none")

"""A run of 60 steps whose growth passes every stage a seed can be in, for benches that interrupt it.

It asks only to get everywhere soon: a race has one lesson, the gate is easy, one kernel is made to raise, and
one epoch is noise, so that what is exposed then has to go. Two candidates lose in other ways; a pair is
widened, and a blueprint's graft stays.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import esper
from benchmarks.clusters import Clusters, loss_fn, refuse
from esper.checkpoint import Batches, CheckpointManager, Run, Storage
from esper.checkpoint.contents.run import capture_run
from esper.checkpoint.format.manifest import packed
from esper.contracts import Event, Stage
from esper.kasmina.seeds.state import VITALS

CLASSES, BATCH, BATCHES, EPOCHS = 8, 32, 6, 10
STEPS = BATCHES * EPOCHS
NOISE = 6 * [0.3] + [9.0] + 3 * [0.3]  # of the data, by epoch
ASKED = {14: "0>4", 28: "0>4", 42: "0+residual_mlp", 53: "4+residual_mlp"}  # after a step: where to grow
RAISING = 9, 10, 11  # steps in which the exposed kernel raises; the third time ends its seed
CLOCKS = ("seconds", "growth_seconds", "milliseconds")  # fields of events
LOST = 24  # the step whose batch is not finite, where a governor watches
CONFIG = {
    "blueprints": ["widen", "residual_mlp"],
    "schedule": {"warmup": 0.05, "stop": 0.05, "embargo": 0.05, "plateau": False},  # one decision, at step 3
    "race": {"steps": 1, "candidates": 2},
    "blend": {"ramp": 2, "stabilise": 1, "evaluate": 2},
    "telemetry": {"progress_every": 7, "sampling": 2},
}


def host() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(CLASSES, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Dropout(0.1), nn.Linear(2, CLASSES)
    )


class Journey:
    """The run, fresh: a scheduler, a scaler, clipping, an average of the weights, a shuffled loader.

    Args:
        storage: Of its checkpoints.
        workers: Of the loader.
        every: Steps between checkpoints.
        rounds: How often it goes through its 60 steps.
        keep: Checkpoints that are kept; None keeps all.
        governed: A governor watches, and a batch is lost while a seed is exposed, so it rolls the run back. A
            scaler would pass over such a step itself, so it is off.
    """

    def __init__(
        self,
        storage: Storage | str,
        workers: int,
        every: int = 10**9,
        rounds: int = 1,
        keep: int | None = None,
        governed: bool = False,
    ) -> None:
        self.governed = governed
        self.epochs, self.steps = rounds * EPOCHS, rounds * STEPS
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.net = host()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.average = torch.optim.swa_utils.AveragedModel(self.net)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7, enabled=not governed)
        self.events: list[Event] = []
        self.heard: dict[int, int] = {}  # how many of them, by step
        self.seen: dict[int, str] = {}  # digests of the batches, by step
        self.stages: dict[int, set[str]] = {}  # those that each step left seeds in
        probe = (2 * torch.eye(CLASSES).repeat(32, 1), torch.arange(CLASSES).repeat(32))
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            loss_fn,
            probe=[probe],
            steps=STEPS,
            schedulers=[self.scheduler],
            scaler=self.scaler,
            ema=[self.average],
            budget={"growth_factor": 20.0, "growth_events": 6 * rounds},
            growth="incubate",
            config={
                **CONFIG,
                "governor": {"enabled": governed, "every": 5},
                "gate": {"false_keep": 0.99, "looks": 5 * rounds},
            },
            on_event=self.events.append,
        )
        self.data = Clusters(CLASSES, BATCH * BATCHES, NOISE[0])
        order = torch.Generator().manual_seed(1)
        self.batches = Batches(
            DataLoader(self.data, BATCH, shuffle=True, num_workers=workers, generator=order)
        )
        self.run = Run(
            self.net,
            self.optimizer,
            growth=self.growth,
            modules={"average": self.average},
            others={"scheduler": self.scheduler, "scaler": self.scaler},
            batches=self.batches,
        )
        self.manager = CheckpointManager(
            storage, self.run, every=every, keep=keep, observe=self.events.append
        )

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        self.manager.resume()
        self.heard[self.manager.steps] = len(self.events)

    def train(self, after: Callable[[], Any] | None = None, until: int | None = None) -> None:
        """Go on from where it is, up to a step.

        Args:
            after: Called after every step.
            until: The last one; None goes to the end.
        """
        while self.batches.epoch < self.epochs:
            self.data.noise = NOISE[self.batches.epoch % EPOCHS]
            for batch in self.batches:
                self.step(batch)
                if after is not None:
                    after()
                if self.manager.steps == until:
                    return

    def step(self, batch: Any) -> None:
        """Do one step of training, and of growth."""
        number, exposed = self.manager.steps + 1, self.growth.run.orchestrator.exposed
        place = number % STEPS
        fault = None
        if place in RAISING and exposed:
            fault = exposed[0].kernel.register_forward_pre_hook(refuse)
        if self.governed and place == LOST:
            batch = [batch[0] * math.nan, batch[1]]
        loss = loss_fn(self.net, batch)
        if fault is not None:
            fault.remove()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.average.update_parameters(self.net)
        self.growth.step(batch, loss)
        if ASKED.get(place) in self.growth.run.morphable.places:
            self.growth.grow_now(ASKED[place])
        self.seen[number] = hashlib.sha256(batch[0].numpy().tobytes()).hexdigest()[:16]
        self.heard[number] = len(self.events)
        self.stages[number] = self.left()
        self.manager.step({"loss": loss})

    def left(self) -> set[str]:
        """Name the stages seeds are in; DORMANT where all are."""
        layout = self.growth.run.morphable.layout
        found = {layout.stage_of(seed) for seed in range(len(layout.stage))} - {Stage.DORMANT}
        return {stage.name for stage in found or {Stage.DORMANT}}

    def since(self, step: int) -> dict[str, Any]:
        """Return what was told and seen after a step."""
        events = told(self.events[self.heard[step] :])
        return {"events": events, "data": {k: v for k, v in self.seen.items() if k > step}}

    def end(self) -> dict[str, Any]:
        """End growth; return everything the run came to."""
        facts = self.facts()
        self.growth.finish()
        grown = {f"grown/{k}": v.numpy().tobytes() for k, v in self.net.state_dict().items()}
        return {**facts, **grown}

    def facts(self) -> dict[str, Any]:
        """Return the whole state but its clocks, in parts: plain values, and the bytes of every tensor."""
        skeleton, tensors = packed(capture_run(self.run, self.manager.steps), {})
        parts = skeleton["dict"]
        growth = parts.pop("growth")["dict"]
        del growth["cost"]["dict"]["seconds"]
        vitals = "growth/layout/vitals"
        tensors[vitals] = tensors[vitals][: VITALS.index("latency")]
        content = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        return {**parts, **{f"growth/{name}": value for name, value in growth.items()}, **content}


def told(events: Sequence[Event]) -> list[tuple[str, int, dict[str, Any]]]:
    """Return what events say of the run itself: no clocks, no checkpoints."""
    own = [event for event in events if event.kind not in ("checkpoint", "resumed")]
    return [(e.kind, e.step, {k: v for k, v in e.data.items() if k not in CLOCKS}) for e in own]


def digest(end: Mapping[str, Any]) -> str:
    """Sum up an end for another process."""
    sha = hashlib.sha256()
    for name, part in sorted(end.items()):
        sha.update(name.encode() + (part if isinstance(part, bytes) else json.dumps(part).encode()))
    return sha.hexdigest()

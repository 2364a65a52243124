"""A run of several processes that grows all the time and says what it does; and their killer's view of them.

It asks only for many races: each has one lesson, the gate is easy, one epoch in three is noise, so that what
is exposed then has to go, and now and then a kernel raises in one process alone.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import esper
from benchmarks.clusters import Clusters, loss_fn, refuse
from esper.batches.share import Share
from esper.checkpoint import Batches, CheckpointManager, Run
from esper.contracts import Event, Stage
from esper.distributed.launch import leave

MODULE = "benchmarks.rank_runs"
WORLD = 2
CLASSES, BATCH, BATCHES = 16, 32, 12
PERIOD = 3  # epochs; the last of each is noise
EVERY = 7  # steps between checkpoints
RAISING = 5  # of so many decisions one gets a kernel that raises, in the last process alone
CONFIG: dict[str, Any] = {
    "blueprints": ["widen", "residual_mlp"],
    "schedule": {"warmup": 0.0, "stop": 1.0, "plateau": False, "patience": 10**6, "embargo": 0.0},
    "race": {"steps": 2, "candidates": 2},
    "blend": {"ramp": 2, "stabilise": 1, "evaluate": 2},
    "gate": {"false_keep": 0.99, "looks": 60},
    "telemetry": {"progress_every": 50, "sampling": 2},
}


class Journey:
    """The run, fresh, in one of its processes.

    Args:
        rank: Of this process.
        world: How many there are.
        folder: Of its checkpoints.
        steps: Its length.
        config: Settings besides those that make it grow all the time.
    """

    def __init__(self, rank: int, world: int, folder: Path, steps: int, config: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        self.rank, self.steps = rank, steps
        self.net = nn.Sequential(
            *(nn.Linear(CLASSES, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Dropout(0.1)),
            *(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
        )
        self.wrapper = DistributedDataParallel(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        self.events: list[Event] = []
        probe = (2 * torch.eye(CLASSES).repeat(32, 1), torch.arange(CLASSES).repeat(32))
        self.growth = esper.grow(
            self.wrapper,
            self.optimizer,
            loss_fn,
            probe=[probe],
            steps=steps,
            budget={"growth_factor": 40.0, "growth_events": 1000},
            growth="incubate",
            config={**CONFIG, **config},
            on_event=self.events.append,
        )
        for stream in (torch.manual_seed, random.seed, np.random.seed):
            stream(rank)  # each process has noise of its own
        self.data = Clusters(CLASSES, BATCH * BATCHES, 0.3)
        order = torch.Generator().manual_seed(1)
        loader = DataLoader(self.data, BATCH, shuffle=True, generator=order)
        self.batches = Batches(Share(loader, rank, world))
        run = Run(self.net, self.optimizer, growth=self.growth, batches=self.batches)
        self.manager = CheckpointManager(folder, run, every=EVERY)

    def train(self) -> None:
        """Go on to the end, and say after every step where it is."""
        while self.manager.steps < self.steps:
            self.data.noise = 9.0 if self.batches.epoch % PERIOD == PERIOD - 1 else 0.3
            for batch in self.batches:
                self.step(batch)
                self.manager.step()
                self.say()
                if self.manager.steps >= self.steps:
                    break
            self.growth.rewrap()

    def step(self, batch: Any) -> None:
        """Do one step of training, and of growth; where nothing grows, ask for it."""
        exposed, fault = self.growth.run.orchestrator.exposed, None
        if exposed and self.raises(exposed[0].origin.decision.id):
            fault = exposed[0].kernel.register_forward_pre_hook(refuse)
        loss = loss_fn(self.wrapper, batch)
        if fault is not None:
            fault.remove()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.growth.step(batch, loss)
        if self.growth.run.orchestrator.oldest is None:
            places = list(self.growth.run.morphable.places)
            self.growth.grow_now(places[self.growth.run.tamiyo.decisions % len(places)])

    def awake(self) -> list[nn.Module]:
        """Return the exposed kernel, which DistributedDataParallel does not know of."""
        return [trial.kernel for trial in self.growth.run.orchestrator.exposed]

    def raises(self, decision: int) -> bool:
        return decision % RAISING == RAISING - 1 and self.rank == WORLD - 1

    def say(self) -> None:
        """Append a line: when, which step, what grew and how, the weights, the stage, the outcome."""
        growth, layout = self.growth, self.growth.run.morphable.layout
        awake = {layout.stage_of(seed) for seed in range(len(layout.stage))} - {Stage.DORMANT}
        kept = [str(event.data["kept"]) for event in self.events if event.kind == "outcome"]
        self.events.clear()
        fields = (
            f"{time.monotonic():.6f}",
            self.manager.steps,
            growth.run.orchestrator.lineage,
            growth.run.topology,
            digest(self.net, *self.awake()),
            "+".join(sorted(stage.name for stage in awake)) or "none",
            "+".join(kept) or "none",
        )
        say(" ".join(map(str, fields)))


def digest(*modules: nn.Module) -> str:
    """Sum up parameters."""
    sha = hashlib.sha256()
    for module in modules:
        for name, parameter in module.named_parameters():
            sha.update(name.encode() + parameter.detach().numpy().tobytes())
    return sha.hexdigest()[:16]


def say(line: str) -> None:
    """Tell the killer, at once and whole."""
    os.write(1, f"{line}\n".encode())


def join(rank: int, world: int, store: Path) -> None:
    """Join the other processes by a file: no port is taken."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)


def take_part(rank: int, store: Path, folder: Path, steps: int, deadline: float) -> None:
    """Train from wherever the newest checkpoint is, to the end."""
    join(rank, WORLD, store)
    run = Journey(rank, WORLD, folder, steps, {"distributed": {"deadline": deadline}})
    run.manager.resume()
    run.train()
    run.manager.close()
    run.growth.finish()
    say(f"end {digest(run.net)} {sum(p.numel() for p in run.net.parameters())}")
    leave()


# -- seen from outside ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """What a process said after a step."""

    when: float
    step: int
    hashes: tuple[str, str, str]  # of all moves of seeds, of what grew, of the weights
    stages: str
    outcomes: str

    @classmethod
    def of(cls, text: str) -> Line:
        when, step, lineage, topology, weights, stages, outcomes = text.split()
        return cls(float(when), int(step), (lineage, topology, weights), stages, outcomes)


@dataclass
class Life:
    """Processes that were started together; killed, stopped and delayed from outside.

    Args:
        folder: What they say goes there.
        number: Of this life.
        given: What the program reads besides its rank and where to meet.
        module: The program.
    """

    folder: Path
    number: int
    given: Sequence[str]
    module: str = MODULE
    born: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        root, store = Path(__file__).resolve().parents[1], self.folder / f"store-{self.number}"
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(WORLD):
            command = [sys.executable, "-m", self.module, str(rank), str(store)]
            with self.path(rank).open("wb") as said, self.path(rank, "wrong").open("wb") as wrong:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *self.given], stdout=said, stderr=wrong, cwd=root, env=environment
                    )
                )

    def path(self, rank: int, what: str = "said") -> Path:
        return self.folder / f"{what}-{self.number}-{rank}"

    def texts(self, rank: int) -> list[str]:
        """Return the whole lines a process has said; one it died in is left out."""
        return self.path(rank).read_text().split("\n")[:-1]

    def lines(self, rank: int) -> list[Line]:
        return [Line.of(text) for text in self.texts(rank) if not text.startswith("end")]

    def end(self, rank: int) -> list[str]:
        """Return what a process said last, once it had done everything."""
        return next((text.split()[1:] for text in self.texts(rank) if text.startswith("end")), [])

    def over(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def reach(self, step: int, limit: float) -> bool:
        """Wait until every process has done a step; False if one ended, or it took too long."""
        until = time.monotonic() + limit
        while time.monotonic() < until and not self.over():
            if all(texts and self.done(texts) >= step for texts in map(self.texts, range(WORLD))):
                return True
            time.sleep(0.01)
        return False

    def done(self, texts: Sequence[str]) -> int:
        last = texts[-1]
        return sys.maxsize if last.startswith("end") else int(last.split()[1])

    def signal(self, rank: int, what: signal.Signals) -> None:
        self.processes[rank].send_signal(what)

    def outlive(self, ranks: Sequence[int], limit: float) -> float | None:
        """Return the seconds until these processes ended by themselves; None: they had to be killed."""
        begun = time.monotonic()
        while time.monotonic() < begun + limit:
            if all(self.processes[rank].poll() is not None for rank in ranks):
                return time.monotonic() - begun
            time.sleep(0.01)
        return None

    def clear(self) -> list[int]:
        """Kill whatever is left; return how each ended."""
        for process in self.processes:
            process.kill()
        return [process.wait() for process in self.processes]

    def wrong(self) -> str:
        """Return the last of what each process complained of."""
        return "\n".join(self.path(rank, "wrong").read_text()[-2000:] for rank in range(WORLD))


def counted(lives: Sequence[Life]) -> Counter[str]:
    """Count outcomes, each step once."""
    found = {line.step: line.outcomes for life in lives for line in life.lines(0) if line.outcomes != "none"}
    return Counter(word for text in found.values() for word in text.split("+"))


if __name__ == "__main__":
    take_part(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))

"""Scenarios of test_resuming.py: runs that are killed, and go on in as many processes, or more, or fewer."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it: before the forks
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.batches.share import Share
from esper.checkpoint import Batches, CheckpointManager, FolderStorage, Run
from esper.contracts import Event
from esper.distributed.launch import leave
from esper.errors import StateError, StoreError
from esper.tolaria.trainer import Trainer
from tests.distributed.forks import Ranks, play

CLASSES, ROWS, BATCH, EPOCHS, EVERY = 8, 96, 16, 8, 5
STEPS = EPOCHS * ROWS // BATCH
CONFIG: dict[str, Any] = {
    "growth": "incubate",
    "blueprints": ["widen", "residual_mlp"],
    "budget": {"growth_factor": 20.0, "growth_events": 4},
    "schedule": {"warmup": 0.05, "stop": 0.6, "plateau": False, "embargo": 0.02, "patience": 100},
    "race": {"steps": 1, "candidates": 2},
    "gate": {"false_keep": 0.99, "looks": 6},
    "blend": {"ramp": 2, "stabilise": 1, "evaluate": 2},
    "telemetry": {"progress_every": 50},
    "distributed": {"deadline": 20.0},
}


class Unreadable(FolderStorage):
    """A folder whose disk does not answer."""

    def get(self, *given: Any) -> bytes:
        raise StoreError("the disk does not answer")


@dataclass(frozen=True)
class Plan:
    """What a process does.

    Args:
        kept: Folder of checkpoints.
        trainer: Whether ``Trainer`` runs the loop.
        synced: Whether buffers are the same in all processes.
        kill: The rank and the step at which that process kills itself.
        until: The step after which all of them end.
        others: Storages of processes that have another one, by rank.
    """

    kept: Path
    trainer: bool = False
    synced: bool = True
    kill: tuple[int, int] = (-1, 0)
    until: int = STEPS
    others: tuple[tuple[int, Any], ...] = ()


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def told(event: Event) -> None:
    """Say what matters of an event."""
    if event.kind == "outcome":
        print(f"outcome {event.data['kept']}", flush=True)
    if event.kind == "warning":
        print(f"warning {event.data['message']}", flush=True)
    if event.kind == "resumed":
        print(f"resumed {event.step}", flush=True)


def digest(net: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Sum up parameters, buffers, and the optimizer's state."""
    sha = hashlib.sha256()
    for name, value in net.state_dict().items():
        sha.update(name.encode() + value.numpy().tobytes())
    for state in optimizer.state.values():
        sha.update(b"".join(value.numpy().tobytes() for value in state.values()))
    return sha.hexdigest()[:16]


def live(rank: int, world: int, store: Path, plan: Plan) -> None:
    """Train from the newest checkpoint on; a run of one process is nobody's peer."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(CLASSES, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Dropout(0.1), nn.Linear(2, CLASSES))
    )
    model = net if world == 1 else DistributedDataParallel(net, forward_sync_buffers=plan.synced)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    labels = torch.arange(ROWS) % CLASSES
    data = TensorDataset(2 * torch.eye(CLASSES)[labels] + 0.3 * torch.randn(ROWS, CLASSES), labels)
    probe = [(2 * torch.eye(CLASSES).repeat(16, 1), torch.arange(CLASSES).repeat(16))]
    order = torch.Generator().manual_seed(1)
    share = Share(DataLoader(data, BATCH, shuffle=True, generator=order), rank, world)
    torch.manual_seed(rank)  # dropout differs from process to process
    done = [0]

    def count(*given: Any) -> None:
        done[0] += 1
        if plan.kill == (rank, done[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    optimizer.register_step_post_hook(count)
    kept = dict(plan.others).get(rank, plan.kept)
    given: Mapping[str, Any] = {"probe": probe, "config": CONFIG, "on_event": told}
    try:
        if plan.trainer:
            trainer = Trainer(
                model, optimizer, loss_fn, train=share, epochs=EPOCHS, checkpoints=kept, every=EVERY, **given
            )
            growth = trainer.growth
            trainer.resume()
            trainer.fit()
        else:
            growth = esper.grow(model, optimizer, loss_fn, steps=STEPS, **given)
            loop(model, optimizer, growth, Batches(share), kept, plan.until)
    except StateError as error:
        print(f"refused {error}", flush=True)
        leave_or_end(world)
    print(f"steps {growth.steps} took {done[0]}", flush=True)
    print(f"end {digest(net, optimizer)}", flush=True)
    leave_or_end(world)


def leave_or_end(world: int) -> None:
    """End this process; alone there is nobody to leave."""
    if world > 1:
        leave()
    os._exit(0)


def loop(
    model: nn.Module, optimizer: Any, growth: esper.Growth, batches: Batches, kept: Any, until: int
) -> None:
    """Train as a user does who writes the loop."""
    with CheckpointManager(
        kept, Run(model, optimizer, growth=growth, batches=batches), every=EVERY
    ) as manager:
        manager.resume()
        print(f"position {batches.epoch} {batches.index}", flush=True)
        while batches.epoch < EPOCHS and manager.steps < until:
            for batch in batches:
                loss = loss_fn(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                growth.step(batch, loss)
                manager.step()
                if manager.steps >= until:
                    break
            else:
                growth.rewrap()
    if until >= STEPS:
        growth.finish()


def run(folder: Path, name: str, world: int, plan: Plan) -> dict[str, Any]:
    """Run processes to their end."""
    (folder / name).mkdir()
    return Ranks(folder / name, world, partial(live, plan=plan)).ended()


def killed(folder: Path, trainer: bool, synced: bool) -> dict[str, Any]:
    """Kill one process of two at a random step, go on; and a run that nobody killed."""
    draw = random.Random(f"{trainer} {synced}")
    kill = draw.randrange(2), draw.randrange(2 * EVERY + 2, STEPS - 2)
    plan = Plan(folder / "kept", trainer, synced)
    return {
        "kill": kill,
        "whole": run(folder, "whole", 2, replace(plan, kept=folder / "kept-whole")),
        "cut": run(folder, "cut", 2, replace(plan, kill=kill)),
        "again": run(folder, "again", 2, plan),
    }


def other_number(folder: Path, before: int, after: int) -> dict[str, Any]:
    """Kill a run, and go on with another number of processes."""
    plan = Plan(folder / "kept")
    cut = run(folder, "cut", before, replace(plan, kill=(0, 2 * EVERY + 4)))
    return {"cut": cut, "again": run(folder, "again", after, plan)}


def ended_early(folder: Path) -> Plan:
    """Leave checkpoints after 5 and 10 steps."""
    plan = Plan(folder / "kept")
    run(folder, "first", 2, replace(plan, until=2 * EVERY + 2))
    return plan


def damage(kept: Path) -> None:
    """Flip a bit in the middle of the newest checkpoint's largest part."""
    newest = max(path for path in kept.iterdir() if path.is_dir() and path.name.startswith("step-"))
    part = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


def damaged(folder: Path) -> dict[str, Any]:
    """Damage the newest checkpoint for everybody."""
    plan = ended_early(folder)
    whole = run(folder, "whole", 2, Plan(folder / "kept-whole"))
    damage(plan.kept)
    return {"whole": whole, "again": run(folder, "again", 2, plan)}


def one_cannot(folder: Path) -> dict[str, Any]:
    """Let one process see another storage than the other does: damaged, empty, or without an answer."""
    kept, found = ended_early(folder).kept, {}
    for name in ("damaged 0", "damaged 1", "empty 1", "silent 0", "silent 1"):  # the first one's is the list
        own, what = folder / f"kept {name}", name.split()[0]
        shutil.copytree(kept, own)
        other: Any = Unreadable(own) if what == "silent" else folder / f"other {name}"
        if what == "damaged":
            shutil.copytree(kept, other)
            damage(other)
        plan = Plan(own, others=((int(name[-1]), other),))
        found[name] = run(folder, name, 2, plan)
        found[name]["left"] = sorted(path.name for path in own.iterdir() if path.name.startswith("step-"))
    return found


if __name__ == "__main__":
    play(
        {
            **{
                f"killed {'trainer' if trainer else 'loop'} {'synced' if synced else 'own'}": partial(
                    killed, trainer=trainer, synced=synced
                )
                for trainer in (False, True)
                for synced in (True, False)
            },
            "fewer": partial(other_number, before=2, after=1),
            "more": partial(other_number, before=1, after=2),
            "damaged": damaged,
            "one cannot": one_cannot,
        }
    )
